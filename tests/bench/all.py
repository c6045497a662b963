"""The benchmarks of this folder in turn, as one Markdown page of their tables.

Run:
  python tests/bench/all.py --out runs/bench.md
  python tests/bench/all.py --only laq vla --flags "--device cuda"
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_TIMINGS = ("fsq_policy", "pi05_mistakes")  # experiments, one of them an hour long: only if named


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench.md", help="the page")
    parser.add_argument("--only", nargs="+", metavar="FOLDER", help="these folders' benchmarks alone")
    parser.add_argument("--flags", default="", help="flags for each of them but loaders, in quotes")
    args = parser.parse_args()
    found = {path.stem: path for path in sorted(HERE.glob("*.py")) if path.stem not in ("all", "timing")}
    unknown = set(args.only or []) - set(found)
    if unknown:
        parser.error(f"--only {sorted(unknown)[0]}: there are {', '.join(found)}")
    failed, page = 0, ["# Benchmarks", "", f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores", ""]
    for name in args.only or [name for name in found if name not in NO_TIMINGS]:
        words = [sys.executable, str(found[name]), *shlex.split("" if name == "loaders" else args.flags)]
        start, load = time.monotonic(), os.getloadavg()[0]
        print(f"{name} ...", flush=True)
        done = subprocess.run(words, capture_output=True, text=True)
        failed += done.returncode != 0
        text = done.stdout if done.returncode == 0 else f"failed\n{done.stderr[-1000:]}"
        page += [f"## {name}", "", f"`python tests/bench/{name}.py {args.flags}`: {time.monotonic() - start:.0f} s, "]
        page[-1] += f"load {load:.1f} at the start"
        page += ["", "```text", text.strip(), "```", ""]
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("\n".join(page))
    print(args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
