"""Samples per second that one core loads, for each folder's own loader inside of its own train.py.

Run:
  python tests/bench/loaders.py
  python tests/bench/loaders.py vla --data web=shards/web --labels labels/web --backbone NAME --image-size 224
  python tests/bench/loaders.py laq @laq/lapa.args --data shards/web --steps 4 --log-every 2

A folder with flags of its train.py, or every folder's demo. 30 steps with --workers 0, of which the last 10 count:
batch size * steps / processor seconds in which the loop waited for its batch. vae_distill has no loader.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["fsq_vqvae", "vvae_lam", "laq", "vla", "pi05_finetune"]
STEPS = "--steps 30 --log-every 10 --eval-every 1000 --workers 0".split()


def rate(folder, flags, out):
    """Samples per processor second of a run of FOLDER/train.py into `out`."""
    sys.path[:0] = [str(ROOT / folder), str(ROOT)]
    import train

    train.time = SimpleNamespace(perf_counter=time.process_time)  # what it measures its waiting with
    code = train.main([*STEPS, *flags, "--out", out])
    assert code == 0, f"{folder}: exit {code}"
    last = json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1])
    batch = json.loads((Path(out) / "args.json").read_text())["flags"]["batch_size"]
    return batch * last["steps_per_s"] / last["data_fraction"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", choices=FOLDERS, help="whose loader; without it all of them")
    args, flags = parser.parse_known_args()
    if folder := args.folder:
        with tempfile.TemporaryDirectory() as scratch:
            found = rate(folder, flags, f"{scratch}/run")
        return print(f"| {folder} | {found:.0f} |", flush=True)
    print("| folder | samples/s per core |\n| --- | ---: |", flush=True)
    for folder in FOLDERS:
        done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
