"""What one busy process beside it costs each demo, with the default number of threads; at most half of its speed.

Run, on a quiet machine:
  python tests/campaign/threads.py
  python tests/campaign/threads.py --only laq vla --steps 60 --repeats 3

Quiet and disturbed runs take turns. Steps per second: the median of the log's second half; seconds: the whole command,
imports and validation included. The load is what else the machine did when the run began: above 0.3 trust nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["fsq_vqvae", "vvae_lam", "laq", "vla", "pi05_finetune", "vae_distill"]


def run(folder, steps, scratch, out):
    """(steps per second, seconds) of a run of the demo."""
    words = [sys.executable, str(ROOT / folder / "train.py"), "--out", out, "--device", "cpu"]
    every = max(1, steps // 20)
    words += f"--steps {steps} --log-every {every} --eval-every {steps} --save-every {steps}".split()
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    start = time.monotonic()
    subprocess.run(words, cwd=scratch, env=env | dict(MPLBACKEND="Agg"), check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (scratch / out / "log.jsonl").read_text().splitlines()]
    speeds = [line["steps_per_s"] for line in lines]
    return statistics.median(speeds[len(speeds) // 2 :]), time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FOLDERS, default=FOLDERS, metavar="FOLDER", help="these demos")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; the median counts")
    args = parser.parse_args()
    print("| demo | steps/s quiet | with a neighbour | share of its speed | seconds quiet | with a neighbour | load |")
    print("| --- |" + " ---: |" * 6, flush=True)
    slow = []
    for folder in args.only:
        kinds, loads = dict(quiet=[], busy=[]), []
        with tempfile.TemporaryDirectory() as scratch:
            run(folder, 2, Path(scratch), "writes the demo")
            for repeat in range(args.repeats):
                for kind, runs in kinds.items():
                    loads.append(os.getloadavg()[0])
                    neighbour = None
                    if kind == "busy":
                        neighbour = subprocess.Popen(["yes"], stdout=subprocess.DEVNULL)
                    try:
                        runs.append(run(folder, args.steps, Path(scratch), f"{kind}{repeat}"))
                    finally:
                        if neighbour:
                            neighbour.kill()
                            neighbour.wait()
        (quiet, seconds), (busy, longer) = (map(statistics.median, zip(*runs, strict=True)) for runs in kinds.values())
        row = f"{quiet:.2f} | {busy:.2f} | {busy / quiet:.2f} | {seconds:.0f} | {longer:.0f} | {loads[0]:.1f}"
        print(f"| `{folder}` | {row} |", flush=True)
        slow += [folder] * (busy < quiet / 2)
    if slow:
        sys.exit(f"more than half of its speed is lost: {', '.join(slow)}")


if __name__ == "__main__":
    main()
