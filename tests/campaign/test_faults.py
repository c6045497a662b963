"""Faults: whatever ends a run, `--resume` reaches the weights and the log of the undisturbed run.

Each folder's demo is trained for 12 steps while something goes wrong (faults.py). The default and slow tests take a
sample; the whole table, about ten minutes a folder:
  pytest -m campaign -s tests/campaign/test_faults.py -k "whole_table and laq"
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import FOLDERS, ROOT, free_port, launch, weights_of
from faults import FAULTS
from tiny_runs import ENV, LOADERS, Server, assert_same, broken, curve, flags, until

COUNTED = ("codebook", "perplexity", "reward", "joint_error", "val/demo/action")  # codes in use; simulated episodes
OTHERS = [name for name in FOLDERS if name != "fsq_vqvae"]


def suffer(server, out, name, count=1):
    """Run into OUT with a fault, check how it ends and what it leaves, resume, compare with the undisturbed run."""
    fault = FAULTS[name]
    more = [] if "--workers" in fault.flags and not LOADERS[server.folder] else fault.flags.split()
    code, _, printed = server.run(out, *more, fault=f"{name}:{count}")
    where = f"{server.folder}, {name}:{count}: exit {code}\n{printed[-1500:]}"
    assert code == fault.code or (fault.code is None and code not in (0, 124)), where
    assert fault.text in printed, where
    if code == 2:
        assert printed.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in printed, where
    wrong = broken(server.cwd / out) if name != "killed_in_removal" else []
    assert not wrong, f"{where}\n{wrong}"
    again, _, printed = server.run(out, "--resume", *more)
    assert again == 0, f"{where}\n--resume: exit {again}\n{printed[-1500:]}"
    server.same(out, stops=int(code == 75))


def corrupt(server, out):
    """The newest checkpoint is cut short, loses a file, or has no manifest: the one before it is taken."""
    for number, how in enumerate(("short", "lost", "no manifest")):
        run = server.copy(f"{out} {number}")
        newest = max(run.glob("checkpoints/step_*"))
        largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        if how == "short":
            os.truncate(largest, largest.stat().st_size - 100)
        else:
            (largest if how == "lost" else newest / "manifest.json").unlink()
        code, _, printed = server.run(run.name, "--resume")
        assert code == 0 and f"{newest.name} is corrupt" in printed, f"{how}: exit {code}\n{printed[-1500:]}"
        server.same(run.name)


def second_process(server, out):
    """While a run lives, a second process in its folder is refused by host and process id."""
    words = [sys.executable, str(ROOT / server.folder / "train.py"), *flags(server.folder, long=True), "--out", out]
    env, quiet = {**os.environ, **ENV}, dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = subprocess.Popen(words, cwd=server.cwd, env=env, start_new_session=True, **quiet)
    try:
        log = server.cwd / out / "log.jsonl"
        until(lambda: log.exists() and log.stat().st_size, 300, "the first line of the first process")
        os.kill(first.pid, signal.SIGSTOP)
        before = {path: path.stat().st_mtime_ns for path in (server.cwd / out).rglob("*")}
        code, _, printed = server.run(out, "--resume")
        assert code == 2 and f"process {first.pid} on " in printed, f"exit {code}\n{printed[-1500:]}"
        assert before == {path: path.stat().st_mtime_ns for path in (server.cwd / out).rglob("*")}
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    code, _, printed = server.run(out, "--steps", 4)
    assert code == 2 and "holds a run already" in printed, f"exit {code}\n{printed[-1500:]}"


# --- a sample


@pytest.mark.slow
def test_killed_stopped_and_corrupt(tmp_path):
    """fsq_vqvae, killed in a save, ended by SIGTERM with loader processes, and with a corrupt checkpoint, resumes."""
    with Server("fsq_vqvae", tmp_path) as server:
        for name, count in (("killed_in_save", 3), ("killed_in_log_line", 5), ("sigterm", 5), ("disk_full", 6)):
            suffer(server, name, name, count)
        corrupt(server, "corrupt")
        second_process(server, "two processes")


@pytest.mark.slow
@pytest.mark.parametrize("folder", OTHERS)
def test_killed_and_stopped(folder, tmp_path):
    """The other folders resume after SIGKILL in a save, and after SIGTERM to the group with loader processes."""
    with Server(folder, tmp_path) as server:
        suffer(server, "sigterm", "sigterm", 2)
        if folder != "vae_distill":  # each run compiles anew
            suffer(server, "killed_in_save", "killed_in_save", 3)


def torchrun_sigterm(folder, scratch):
    """SIGTERM to torchrun's process group: all ranks end after one step, save, and resume to the undisturbed run."""
    words = [ROOT / folder / "train.py", *flags(folder, long=True), *LOADERS[folder].split()]
    done = launch(*words, "--out", "alone", ranks=2, cwd=scratch, env=ENV, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    out = scratch / "stopped"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [*map(str, words), "--out", out.name]
    with open(scratch / "output.txt", "w") as log:
        pipes = dict(cwd=scratch, env={**os.environ, **ENV}, stdout=log, stderr=log, start_new_session=True)
        process = subprocess.Popen(command, **pipes)
        until((out / "log.jsonl").exists, 300, "the first log line")
        until(lambda: (out / "log.jsonl").read_text() or process.poll() is not None, 300, "the first log line")
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(120)
        finally:
            with_group_left = process.poll() is None
            if with_group_left:
                os.killpg(process.pid, signal.SIGKILL)
    printed = (scratch / "output.txt").read_text()
    assert "stopped after step" in printed and not broken(out), printed[-3000:]
    last = json.loads((out / "checkpoints/last/manifest.json").read_text())["step"]
    assert 0 < last < max(curve(scratch / "alone")), last
    done = launch(*words, "--out", out.name, "--resume", ranks=2, cwd=scratch, env=ENV, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(out, scratch / "alone", stops=1)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["fsq_vqvae", "vvae_lam", "pi05_finetune"])
def test_sigterm_under_torchrun(folder, tmp_path):
    torchrun_sigterm(folder, tmp_path)


# --- the number of processes


def close(a, b):
    """Assert that two curves agree: other numbers of processes add in another order.

    The last bit can choose another code, and change what a body does next: COUNTED may differ by 5 %.
    """
    assert list(a) == list(b)
    for step in a:
        assert a[step].keys() == b[step].keys()
        for name, value in a[step].items():
            rel = 5e-2 if any(part in name for part in COUNTED) else 2e-3
            assert value == pytest.approx(b[step][name], rel=rel, abs=2e-4), f"step {step}, {name}"


def ranks_agree(folder, scratch, worlds):
    """1, 2 and 4 processes with the same global batch log the same curve, also resumed on another number of them."""
    still = ["--dropout", "0"] if folder in ("fsq_vqvae", "vla") else []  # each rank drops its own
    words = [ROOT / folder / "train.py", *flags(folder), *still]

    def run(out, ranks, *more):
        done = launch(*words, "--out", out, *more, ranks=ranks, cwd=scratch, env=ENV, timeout=900)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        return curve(scratch / out)

    if folder == "vla":  # each rank drops its own: no dropout here, in the heads or in the demo's backbone
        run("writes the demo", 1)
        config = scratch / "runs/demo/vla/backbone/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(dropout=0.0)))
    alone = run("1", 1)
    for world, later in zip(worlds, (1, *worlds), strict=False):
        close(run(str(world), world), alone)
        out = scratch / f"{world} then {later}"
        shutil.copytree(scratch / str(world), out, symlinks=True)
        newest = max(out.glob("checkpoints/step_*"))
        shutil.rmtree(newest)
        close(run(out.name, later, "--resume"), alone)
        assert max(out.glob("checkpoints/step_*")).name == newest.name and not broken(out)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["fsq_vqvae", "vvae_lam", "laq"])
def test_two_processes_agree_with_one(folder, tmp_path):
    ranks_agree(folder, tmp_path, worlds=(2,))


@pytest.mark.campaign
@pytest.mark.parametrize("folder", FOLDERS)
def test_ranks_agree(folder, tmp_path):
    """vae_distill's processes are JAX's: two of them."""
    ranks_agree(folder, tmp_path, worlds=(2,) if folder == "vae_distill" else (2, 4))


@pytest.mark.campaign
@pytest.mark.parametrize("folder", OTHERS)
def test_sigterm_to_torchrun(folder, tmp_path):
    torchrun_sigterm(folder, tmp_path)


# --- the whole table


@pytest.mark.campaign
@pytest.mark.parametrize("folder", FOLDERS)
def test_whole_table(folder, tmp_path):
    """Every fault of the table at two moments, and 20 kills at random ones. CASES=4 makes it shorter."""
    draw, failures, chains = random.Random(folder), [], int(os.environ.get("CASES", 20)) // 4

    def row(name, count, act):
        start, bad = time.monotonic(), []
        for number in range(count):
            try:
                act(number)
            except AssertionError as error:
                bad.append(f"{folder}, {name} {number}: {error}")
        print(f"| {folder} | {name} | {count - len(bad)}/{count} | {time.monotonic() - start:.0f} |", flush=True)
        failures.extend(bad)

    with Server(folder, tmp_path) as server:
        seconds = server.run("again")[1]
        server.same("again")
        print(f"\n| folder | fault | as undisturbed | seconds |\n| --- | --- | ---: | ---: |\n| {folder} | none | 1/1 |"
              f" {seconds:.0f} |", flush=True)  # fmt: skip
        for name in FAULTS:
            if name == "loader_dies" and not LOADERS[folder]:
                continue
            counts = [1] if name in ("killed_in_removal", "killed_before_links") else [1, draw.randint(2, 3)]
            counts = counts[-1:] if folder == "vae_distill" else counts  # each run compiles anew, 20 s of CPU time
            row(name, len(counts), lambda i, name=name, counts=counts: suffer(server, f"{name} {i}", name, counts[i]))
        row("newest checkpoint short, incomplete, without manifest", 1, lambda i: corrupt(server, "corrupt"))
        row("a second process in the folder", 1, lambda i: second_process(server, "two processes"))

        def chain(number):
            """Five kills at any moment of a run's life, each of the resumed one."""
            for _ in range(4):
                code, _, printed = server.run(f"chain {number}", "--resume", kill=draw.uniform(0.05, seconds))
                assert code in (-9, 0), printed[-2000:]
                assert not broken(server.cwd / f"chain {number}"), "an incomplete checkpoint"
            code, _, printed = server.run(f"chain {number}", "--resume")
            assert code == 0, printed[-2000:]
            server.same(f"chain {number}")

        row("killed at random, 4 in a row", chains, chain)
    assert not failures, "\n\n".join(failures)


def test_the_checks_see_what_is_wrong(tmp_path):
    """A file cut short, a checkpoint without manifest, a link to nothing and a log line twice are found."""
    step = tmp_path / "checkpoints" / "step_0000004"
    step.mkdir(parents=True)
    (step / "model.bin").write_text("1234")
    (step / "manifest.json").write_text(json.dumps(dict(files={"model.bin": 4, "manifest.json": 50})))
    assert broken(tmp_path) == ["step_0000004/manifest.json"]
    (step / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "last").symlink_to("step_0000004")
    (tmp_path / "checkpoints" / "best").symlink_to("step_0000008")
    assert len(broken(tmp_path)) == 2 and list(weights_of(tmp_path)) == ["model.bin"]
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 2}\n')
    with pytest.raises(AssertionError, match="log lines"):
        curve(tmp_path)
