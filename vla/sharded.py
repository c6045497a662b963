"""FSDP2: weights, gradients and optimizer state split over the ranks, and checkpoints for any number of ranks.

A checkpoint holds the whole weights as a plain Hugging Face folder (gathered on rank 0) and the optimizer state in
shards (torch.distributed.checkpoint, folder resume/), which every rank writes and any number of ranks can read.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common


def shard(model, args, dist):
    """Split each layer by itself, and what is left as one group. With one process nothing is split.

    --amp bf16: layers are gathered and computed in bfloat16, their gradients summed over ranks in float32. Queries,
    heads and tied embeddings are gathered as they are.
    """
    if dist.world == 1:
        return
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = low if args.amp == "bf16" else MixedPrecisionPolicy()
    layers = set(model.backbone._no_split_modules)
    for module in [module for module in model.backbone.modules() if type(module).__name__ in layers]:
        fully_shard(module, mp_policy=policy)
    embeddings, output = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
    if output is not None and output.weight is not embeddings.weight:  # else both are in the root's group
        fully_shard(embeddings, mp_policy=policy)
        fully_shard(output, mp_policy=policy)  # never called, so never gathered
    fully_shard(model)


def save(args, dist, step, model, opt, scaler, best, is_best=False):
    """common.save for a model in shards; every rank calls it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)  # empty but on rank 0
    state = get_optimizer_state_dict(model, opt)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(common.checkpoint(args, step, is_best)) if dist.main else None
        folder = Path(common.share(dist, str(folder)))
        dcp.save({"opt": state}, checkpoint_id=folder / "resume")
        if dist.main:
            model.save_pretrained(folder, weights)
            torch.save(dict(step=step, best=best, scaler=scaler.state_dict()), folder / "resume.pt")
        common.share(dist, None)


def resume(args, dist, model, opt, scaler):
    """common.resume for a model in shards, whatever the number of ranks that wrote the checkpoint."""
    folder = common.newest(args, dist) if args.resume else None
    start = folder or args.init
    if start:
        weights = model.read_weights(start) if dist.main else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.world > 1, strict=False)
        set_model_state_dict(model, weights, options=options)
    if folder is None:
        return 0, None
    state = {"opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder / "resume")
    set_optimizer_state_dict(model, opt, state["opt"])
    state = common.load(folder / "resume.pt")
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["best"]
