"""Endurance: a long run of each demo with loader, validation, checkpoints and figures on; nothing grows.

Watched from outside through /proc: memory and open files of the run and its loader processes, and the processor time
of a step, in the second quarter of the run (the first is its warm-up) against the last. Hours:
  STEPS=20000 pytest -m campaign -s tests/campaign/test_endurance.py -k laq
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT
from tiny_runs import ENV, LOADERS, TINY, broken

MORE = {"memory": 0.01, "loaders": 0.01, "files": 0.0, "seconds": 0.10}  # what the last quarter may have more, a share
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux'")


def use(pid):
    """(resident bytes, open files, processor seconds) of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")), seconds


def sample(pid, out):
    """{step, memory, loaders, files, seconds} of a run; loaders: resident bytes of its loader processes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        memory, files, seconds = use(pid)
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
        step = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
        return dict(step=step, memory=memory, loaders=sum(use(n)[0] for n in children), files=files, seconds=seconds)


def judge(samples, steps):
    """({what: (second quarter, last quarter)}, what grew): medians; lower quartiles of the time of a step."""
    parts = [[s for s in samples if low < s["step"] / steps <= low + 0.25] for low in (0.25, 0.75)]
    assert min(map(len, parts)) >= 5, f"too few samples: {list(map(len, parts))}"
    row = {name: [statistics.median_low([s[name] for s in part]) for part in parts] for name in list(MORE)[:3]}
    row["seconds"] = []
    for part in parts:  # between samples at which a new log line was seen
        seen = [b for a, b in zip(part, part[1:], strict=False) if b["step"] > a["step"]]
        pairs = zip(seen, seen[1:], strict=False)
        times = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs]
        row["seconds"].append(statistics.quantiles(times, n=4)[0])
    return row, [f"{name}: {a:.6g} -> {b:.6g}" for name, (a, b) in row.items() if b > a * (1 + MORE[name])]


@LINUX
@pytest.mark.campaign
@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_grows(folder, tmp_path):
    steps = int(os.environ.get("STEPS", 2_000 if folder == "pi05_finetune" else 20_000))
    often = f"--log-every {steps // 400} --eval-every {steps // 40} --save-every {steps // 40} --device cpu"
    words = f"{TINY[folder]} {LOADERS[folder]} --steps {steps} {often} --out long".split()
    start, out, samples = time.monotonic(), tmp_path / "long", []
    with open(tmp_path / "output.txt", "w") as log:
        pipes = dict(cwd=tmp_path, env={**os.environ, **ENV}, stdout=log, stderr=log, start_new_session=True)
        process = subprocess.Popen([sys.executable, ROOT / folder / "train.py", *words], **pipes)
    try:
        while process.poll() is None:
            samples += filter(None, [sample(process.pid, out)])
            time.sleep(0.5)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()[-3000:]
    row, grown = judge([sample for sample in samples if sample["memory"]], steps)  # an ended process holds nothing
    shown = [f"{a / 2**20:.1f} / {b / 2**20:.1f}" for a, b in (row["memory"], row["loaders"])]
    shown += ["{} / {}".format(*row["files"]), "{:.2f} / {:.2f}".format(*(1e3 * x for x in row["seconds"]))]
    print("\n| folder | steps | MiB | loaders, MiB | files | CPU ms per step | s |\n| --- |" + " ---: |" * 6)
    print(f"| `{folder}` | {steps:,} |", " | ".join(shown), f"| {time.monotonic() - start:.0f} |", flush=True)
    assert not grown and not broken(out), f"{folder}: {grown}"


def test_the_judge_sees_what_grows():
    """A leak of memory or files and a slower step are seen; the peak of a validation is none."""

    def samples(memory=lambda step: 100 << 20, files=lambda step: 20, seconds=lambda step: step * 0.01):
        made = [dict(step=step, memory=memory(step), files=files(step), loaders=1) for step in range(0, 1001, 10)]
        return [sample | dict(seconds=seconds(sample["step"])) for sample in made]

    assert judge(samples(memory=lambda step: (200 if step % 100 == 0 else 100) << 20), 1000)[1] == []
    leaks = dict(
        memory=samples(memory=lambda step: int((100 + step * 0.005) * 2**20)),
        files=samples(files=lambda step: 20 + step // 500),
        seconds=samples(seconds=lambda step: step * 0.01 + step**2 * 4e-6),
    )
    for name, leak in leaks.items():
        (grown,) = judge(leak, 1000)[1]
        assert grown.startswith(f"{name}: ")


@LINUX
def test_a_process_is_seen(tmp_path):
    """/proc tells a process's memory, open files and children."""
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n')
    script = "import subprocess, sys\nx = b'1' * (64 << 20)\np = subprocess.Popen(['sleep', '60'])\nprint()\ninput()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with subprocess.Popen([sys.executable, "-u", "-c", script], **pipes) as process:
        process.stdout.readline()
        seen = sample(process.pid, tmp_path)
        os.killpg(process.pid, signal.SIGKILL)
    assert seen["step"] == 7 and 64 << 20 < seen["memory"] < 128 << 20 and seen["files"] >= 3
    assert 0 < seen["loaders"] < seen["memory"]
