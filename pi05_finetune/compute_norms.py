"""Measure the normalisation statistics of a data set's training episodes, once, and freeze them.

Run:
  python pi05_finetune/compute_norms.py --data runs/demo/pi05_finetune --out runs/norms
  python pi05_finetune/compute_norms.py --data so100=PATH --spec spec.yaml --val-episodes 56-69 --out runs/norms_so100

train.py --norms takes the folder, and refuses it where its own training episodes are others: give both the same --data
names, --spec and split. Without --norms train.py measures the same numbers itself.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from episodes import open_data
from norms import absolute_dims, compute

import common


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole, real = parser.add_argument, dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("--data", required=True, nargs="+", metavar="PATH", help="as in train.py")
    add("--spec", metavar="FILE", help="as in train.py")
    add("--out", required=True, metavar="DIR", help="folder for norms.npz and metadata.json")
    add("--val-share", help="as in train.py: statistics are of training episodes only", default=0.1, **real)
    add("--val-episodes", nargs="+", default=[], metavar="IDS", help="as in train.py")
    add("--max-episodes", help="measure the first N training episodes only", **whole)
    add("--proprio-keys", nargs="+", metavar="K", help="only of these of the spec's; without it all")
    add("--relative", action="store_true", help="as in train.py: statistics of relative actions")
    add("--absolute", nargs="+", metavar="NAME", help="as in train.py")
    add("--chunk", help="as in train.py; relative actions depend on it", default=50, **whole)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    spec, train, held = open_data(args.data, args.spec, args.val_share, args.val_episodes)
    absolute = absolute_dims(args, spec)
    norms = compute(spec, train, args.proprio_keys, args.chunk, absolute, args.max_episodes)
    out = Path(args.out)
    if out.exists() and {path.name for path in out.iterdir()} - {"norms.npz", "metadata.json"}:
        raise ValueError(f"--out {out}: holds other files; give the norms a folder of their own")
    with common.atomic(out, folder=True) as folder:
        norms.save(folder)
    for warning in norms.about["warnings"]:
        print(f"warning: {warning}")
    size = f"{len(norms.about['episodes'])} of {len(train)} training episodes, {norms.about['steps']:,} steps"
    print(f"{size} ({len(held)} held out), data hash {norms.about['data_hash']} -> {out}")
    return 0


if __name__ == "__main__":
    common.run(main)
