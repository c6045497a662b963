"""Write a student as a track-mjx checkpoint, for what reads those: its decoder as a motor module, or all of it.

Run:
  python vae_distill/export.py --checkpoint runs/x/checkpoints/best --out runs/x/policy

OUT/PPONetwork_<step> is in track-mjx's flat layout. The decoder takes [latent, proprioception], as every track-mjx
decoder does. The whole policy acts as the student with the mean of its latent; it is fed [reference, proprioception,
proprioception], since track-mjx shows the encoder the first part and the decoder the rest.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from model import Student
from teacher import write_teacher

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder with config.json, such as RUN/checkpoints/best")
    add("--out", required=True, metavar="DIR", help="folder to write PPONetwork_<step> into")
    add("--step", type=int, default=0, metavar="N", help="the number in its name")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    student, params = Student.from_pretrained(args.checkpoint)
    policy, mean, std, sizes = student.as_intention(params)
    write_teacher(args.out, args.step, {**student.config["teacher"], "network_config": sizes}, mean, std, policy)
    print(f"{args.out}/PPONetwork_{args.step}")
    return 0


if __name__ == "__main__":
    common.run(main)
