"""The faults: each makes a forked run (tiny_runs.child) do something at the count-th call of a function of the run."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Fault:
    inject: callable  # (count, train module, common module)
    code: int | None  # exit code of the run; None: any but 0
    text: str = ""  # what is printed
    flags: str = ""  # what the run needs for it


def strike(owner, name, count, act, when=lambda *words: True):
    """Make the `count`-th call of owner.name (for which `when` holds) do `act` first."""
    real, seen = getattr(owner, name), 0

    def watched(*words, **more):
        nonlocal seen
        if when(*words):
            seen += 1
            if seen == count:
                act(*words)
        return real(*words, **more)

    setattr(owner, name, watched)


def die(*words):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step(count, train, common):
    strike(common.Logger, "tick", count, die)


def killed_in_save(count, train, common):
    """At the count-th file of checkpoints, of which half is on the disk."""

    def half(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    def in_checkpoint(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        return ".step_" in str(path) and path.is_file()

    strike(os, "fsync", count, half, in_checkpoint)


def killed_before_rename(count, train, common):
    strike(os, "replace", count, die, lambda source, target: Path(target).name.startswith("step_"))


def killed_before_links(count, train, common):
    strike(os, "replace", count, die, lambda source, target: Path(target).name == "last")


def killed_in_removal(count, train, common):
    """One file of an old checkpoint is gone."""

    def half(path, *more):
        next(file for file in Path(path).iterdir() if file.is_file()).unlink()
        die()

    strike(shutil, "rmtree", count, half, lambda path, *more: Path(path).name.startswith("step_"))


def killed_in_log_line(count, train, common):
    def half(log, step, metrics):
        with open(log.out / "log.jsonl", "a") as file:
            file.write(f'{{"step": {step}, "train/lo')
        die()

    strike(common.Logger, "write", count, half)


def sigterm(count, train, common):
    """To the whole process group, loader processes included, as a cluster or a terminal does."""

    def ask(*words):
        # from another process: torch's loaders take their parent's SIGTERM for the normal end
        subprocess.run(["bash", "-c", f"kill -TERM -- -{os.getpgrp()}"], start_new_session=True)
        time.sleep(0.5)  # a loader process that dies of it has died

    strike(common.Logger, "tick", count, ask)


def stop_file(count, train, common):
    strike(common.Logger, "tick", count, lambda log, *words: (log.out / "stop").touch())


def loader_dies(count, train, common):
    def kill_one(*words):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    strike(common.Logger, "tick", count, kill_one)


def disk_full(count, train, common):
    """No file can grow above 60 kB, as under a quota: no checkpoint fits."""
    limit = (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    strike(common.Logger, "tick", count, lambda *words: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


FAULTS = {
    "killed_in_step": Fault(killed_in_step, -9),
    "killed_in_save": Fault(killed_in_save, -9),
    "killed_before_rename": Fault(killed_before_rename, -9),
    "killed_before_links": Fault(killed_before_links, -9),
    "killed_in_removal": Fault(killed_in_removal, -9, flags="--keep 1"),
    "killed_in_log_line": Fault(killed_in_log_line, -9),
    "sigterm": Fault(sigterm, 75, "stopped after step", "--workers 2"),
    "stop_file": Fault(stop_file, 75, "stopped after step"),
    "loader_dies": Fault(loader_dies, None, flags="--workers 1"),
    "disk_full": Fault(disk_full, 2, "cannot be written"),
}
