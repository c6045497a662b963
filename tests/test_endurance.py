"""Endurance: 20,000 steps of each demo (Pi05: 2,000) with loader, validation, saves and figures on; nothing grows.

A campaign, watched from outside through /proc: resident memory and open files of the run and of its loader, and the
processor time of a step, in the second quarter of the run (the first is its warm-up) against the last. Hours:
  pytest -m campaign -s tests/test_endurance.py -k laq
ENDURANCE_STEPS=5000 in front of it makes it shorter.
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
from conftest import ROOT
from test_faults import READY, whole

STEPS = {"pi05_finetune": 2_000}
WORKER = ["--workers", "1"]
SMALL = {  # the smallest batch and model whose every part is still there
    "fsq_vqvae": ["--batch-size", 4, "--hidden-dim", 32, "--val-stride", 40, *WORKER],
    "vvae_lam": ["--batch-size", 2, "--embed-dim", 32, "--patch-dim", 32, *WORKER],
    "laq": ["--batch-size", 2, "--dim", 32, "--stem", 16, "--val-pairs", 32, *WORKER],
    "vla": ["--batch-size", 2, "--val-samples", 16, *WORKER],
    "pi05_finetune": ["--batch-size", 2, "--val-stride", 30, *WORKER],
    "vae_distill": ["--num-envs", 16, "--batch-size", 32],  # four updates per iteration; it has no loader
}
FILES, GROWTH, SLOWER = 0, 0.02, 0.10  # what the last quarter may have more than the second, as a share
TICKS = os.sysconf("SC_CLK_TCK")
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux'")


def children(pid):
    """Ids of a process's children, read from each thread that could have forked them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def use(pid):
    """(resident bytes, open files, processor seconds) of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(after_name[11]) + int(after_name[12])) / TICKS  # utime, stime
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")), seconds


def last_step(out):
    """The step of the last whole log line, 0 before there is one."""
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def look(pid, out):
    """One sample: step, resident bytes, open files and processor seconds of the run; bytes of its loader processes."""
    memory, files, seconds = use(pid)
    loaders = [use(child)[0] for child in children(pid)]
    return dict(step=last_step(out), memory=memory, files=files, loaders=sum(loaders), seconds=seconds)


def watch(process, out, every=0.5):
    """Samples of a run until it ends."""
    samples = []
    while process.poll() is None:
        with contextlib.suppress(OSError):  # of a process that ends while it is looked at
            samples.append(look(process.pid, out))
        time.sleep(every)
    return [sample for sample in samples if sample["memory"]]  # a process that has ended holds nothing


def per_step(samples):
    """[(step, processor seconds per step)] between the samples at which a new log line was seen."""
    seen = [samples[0]]
    for sample in samples:
        if sample["step"] > seen[-1]["step"]:
            seen.append(sample)
    pairs = zip(seen[1:], seen[2:], strict=False)  # from the first log line on: imports come before it
    return [(b["step"], (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])) for a, b in pairs]


def judge(samples, steps):
    """(a row of figures, what grew) of a run's samples: its second quarter against its last.

    Medians; of the time of a step the lower quartile, as others on the machine slow some steps and hurry none.
    """
    quarters = [[s for s in samples if low < s["step"] / steps <= low + 0.25] for low in (0.25, 0.75)]
    assert min(map(len, quarters)) >= 5, f"too few samples: {list(map(len, quarters))}"
    row = {}
    for name in ("memory", "loaders", "files"):
        row[name] = [statistics.median_low([s[name] for s in quarter]) for quarter in quarters]
    times = per_step(samples)
    times = [[t for step, t in times if low < step / steps <= low + 0.25] for low in (0.25, 0.75)]
    row["time"] = [statistics.quantiles(part, n=4)[0] for part in times]
    allowed = dict(memory=GROWTH, loaders=GROWTH, files=FILES, time=SLOWER)
    grown = [f"{name}: {a:.6g} -> {b:.6g}" for name, (a, b) in row.items() if b > a * (1 + allowed[name])]
    return row, grown


@LINUX
@pytest.mark.campaign
@pytest.mark.parametrize("folder", READY)
def test_nothing_grows(folder, tmp_path):
    """A log line, a figure, a checkpoint, a validation's loader that keeps memory or a file; a step that slows down."""
    steps = int(os.environ.get("ENDURANCE_STEPS", STEPS.get(folder, 20_000)))
    often = dict(log=steps // 400, eval=steps // 40, save=steps // 40)
    words = [ROOT / folder / "train.py", "--steps", steps, "--device", "cpu", *SMALL[folder], "--out", "long"]
    words += [word for name, every in often.items() for word in (f"--{name}-every", every)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with open(tmp_path / "output.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        samples = watch(process, tmp_path / "long")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert last_step(tmp_path / "long") >= steps and not whole(tmp_path / "long")
    row, grown = judge(samples, steps)
    figures = [
        f"{steps:,}",
        *("{:.1f} / {:.1f}".format(*(x / 2**20 for x in row[name])) for name in ("memory", "loaders")),
        "{} / {}".format(*row["files"]),
        "{:.2f} / {:.2f}".format(*(1e3 * x for x in row["time"])),
        f"{time.monotonic() - start:.0f}",
    ]
    print("\n| folder | steps | MiB | loader MiB | files | CPU ms per step | s |\n| --- |" + " ---: |" * 6)
    print(f"| {folder} |", " | ".join(figures), "|", flush=True)
    assert not grown, f"{folder}: {grown}"


def samples_of(memory=lambda step: 100 << 20, files=lambda step: 20, seconds=lambda step: step * 0.01):
    loaders = 50 << 20
    return [
        dict(step=step, memory=memory(step), files=files(step), loaders=loaders, seconds=seconds(step))
        for step in range(0, 1001, 10)
    ]


def test_the_judge_sees_what_grows():
    """The campaign's own eyes: a leak of memory or files, a slower step pass unseen; a validation counts as a leak."""
    assert judge(samples_of(), 1000)[1] == []
    spikes = samples_of(memory=lambda step: (200 if step % 100 == 0 else 100) << 20, files=lambda step: 20 + step % 3)
    assert judge(spikes, 1000)[1] == []
    leaks = dict(
        memory=samples_of(memory=lambda step: int((100 + step * 0.005) * 2**20)),
        files=samples_of(files=lambda step: 20 + step // 500),
        time=samples_of(seconds=lambda step: step * 0.01 + step**2 * 4e-6),
    )
    for name, samples in leaks.items():
        _, grown = judge(samples, 1000)
        assert len(grown) == 1 and grown[0].startswith(f"{name}: "), (name, grown)


@LINUX
def test_a_process_is_seen(tmp_path):
    """What /proc tells of a process: its memory, its open files, its child."""
    held = 64 << 20
    script = f"import subprocess, sys\nx = b'1' * {held}\nf = open('f', 'w')\n"
    script += "p = subprocess.Popen(['sleep', '60'])\nprint('ready', flush=True)\nsys.stdin.read()\np.kill()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        memory, files, seconds = use(process.pid)
        assert held < memory < 2 * held and files >= 4 and seconds >= 0
        assert len(children(process.pid)) == 1 and 0 < look(process.pid, tmp_path)["loaders"] < held
