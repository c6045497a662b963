"""Export a student: a folder that runs with numpy alone, or a track-mjx checkpoint.

Run:
  python vae_distill/export.py --checkpoint runs/x/checkpoints/best --out runs/x/policy
  python vae_distill/export.py --checkpoint runs/x/checkpoints/best --out runs/x/policy --track-mjx

The folder holds config.json, weights.npz and policy.py, its loader. --track-mjx writes OUT/PPONetwork_0 in
track-mjx's flat layout instead: its decoder takes [latent, proprioception], as every track-mjx decoder does. The whole
policy acts as the student with the mean of its latent; it is fed [reference, proprioception, proprioception], since
track-mjx shows the encoder the first part and the decoder the rest.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from distill import find_devices
from model import QUIET, Student
from teacher.checkpoint import write_teacher

import common


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--out", required=True, metavar="DIR", help="folder to write into")
    add("--track-mjx", action="store_true", help="write a track-mjx checkpoint instead")
    return parser.parse_args(argv)


def intention_policy(student, params):
    """(params, mean, std, network_config) of a track-mjx intention policy that acts as the student's mean does."""
    config, own = student.config, slice(student.config.reference_size, None)
    decoder, last = dict(params["decoder"]), f"hidden_{len(config.decoder_hidden_sizes)}"
    kernel, bias = (np.asarray(decoder[last][name], np.float32) for name in ("kernel", "bias"))
    decoder[last] = dict(
        kernel=np.concatenate([kernel, 0 * kernel], 1), bias=np.r_[bias, np.full_like(bias, QUIET)]
    )  # the second half is the scale
    sizes = dict(
        arch_name="intention",
        encoder_layer_sizes=list(config.encoder_hidden_sizes),
        decoder_layer_sizes=list(config.decoder_hidden_sizes),
        critic_layer_sizes=list(config.decoder_hidden_sizes),  # not saved, but track-mjx builds one
        intention_size=config.latent_dim,
        observation_size=len(student.mean) + config.proprioception_size,
        reference_obs_size=len(student.mean),
        proprioceptive_obs_size=config.proprioception_size,
        action_size=config.action_size,
        normalize_observations=True,
    )
    mean, std = (np.r_[value, value[own]] for value in (student.mean, student.std))
    return dict(encoder=params["encoder"], decoder=decoder), mean, std, sizes


def main(argv=None):
    args = parse(argv)
    find_devices()
    student, params = Student.from_pretrained(args.checkpoint)
    if not args.track_mjx:
        out = Path(args.out).absolute()
        others = {file.name for file in out.glob("*")} - {"config.json", "weights.npz", "policy.py"}
        if others or out.is_file() or out in (Path.cwd(), *Path.cwd().parents):
            raise common.DataError(f"--out {out}: is or holds other files; give the policy a folder of its own")
        with common.atomic(out, folder=True) as folder:
            student.save_pretrained(folder, params)
            shutil.copy(Path(__file__).with_name("policy.py"), folder)
        print(f"{args.out}: config.json, weights.npz, policy.py")
        return 0
    if student.config.fsq_levels:
        raise common.DataError("--track-mjx: its policies have Gaussian latents, this student has FSQ")
    if (Path(args.out) / "PPONetwork_0").exists():
        raise common.DataError(f"--out {args.out}: holds a PPONetwork_0 already; give another folder")
    common.make_folder(args.out)
    policy, mean, std, sizes = intention_policy(student, params)
    write_teacher(args.out, 0, {**student.config.teacher, "network_config": sizes}, mean, std, policy)
    print(f"{args.out}/PPONetwork_0")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
