#!/usr/bin/env bash
# LAPA as a chain of jobs; each starts when the one before has ended well, and all resume by themselves:
#   laq/train.py (latent actions from videos) -> laq/label.py -> vla/train.py (stage 2) -> vla/finetune.py (stage 3)
#
#   VIDEOS=shards/web ROBOT=shards/robot OUT=runs/lapa BACKBONE=Qwen/Qwen2.5-VL-7B-Instruct slurm/lapa.sh --nodes 2
#
# VIDEOS, ROBOT: folders of shards (laq/videos_to_shards.py), the second with actions. LAQ, LABEL, VLA, FINETUNE: flags of
# the stages. What follows lapa.sh goes to sbatch, for all but the labels: those take one node.
set -euo pipefail
# shellcheck source=slurm/cluster.env
source "${CLUSTER_ENV:-slurm/cluster.env}"
for name in VIDEOS ROBOT OUT BACKBONE; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; the head of slurm/lapa.sh shows how" >&2; exit 2; }
done
LAQ=${LAQ-@laq/lapa.args}
VLA=${VLA-@vla/7b.args}
FINETUNE=${FINETUNE---fsdp --checkpointing --amp bf16}
LABEL=${LABEL-}
id=

submit() { # NAME [flags of sbatch] slurm/train.sbatch ...: after the job before, if there is one
  local name=$1
  shift
  id=$(sbatch --parsable --job-name "$name" --kill-on-invalid-dep=yes ${id:+--dependency=afterok:$id} "$@")
  echo "$name: job $id"
}

# shellcheck disable=SC2086  # the stages' flags are several words each
{
  submit laq "$@" slurm/train.sbatch laq $LAQ --data "web=$VIDEOS" --out "$OUT/laq"
  submit label slurm/train.sbatch laq/label.py $LABEL \
    --checkpoint "$OUT/laq/checkpoints/best" --data "$VIDEOS" --out "$OUT/labels"
  submit vla "$@" slurm/train.sbatch vla $VLA \
    --backbone "$BACKBONE" --data "web=$VIDEOS" --labels "$OUT/labels" --out "$OUT/vla"
  submit finetune "$@" slurm/train.sbatch vla/finetune.py $FINETUNE \
    --init "$OUT/vla/checkpoints/best" --data "robot=$ROBOT" --out "$OUT/robot"
}
