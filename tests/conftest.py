"""Load a folder's modules beside the others', launch scripts, find the real data, leave nothing behind."""

import contextlib
import ctypes.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDERS = ["fsq_vqvae", "vvae_lam", "laq", "vla", "pi05_finetune", "vae_distill"]
torch.set_num_threads(1)
if ctypes.util.find_library("EGL"):  # before any test imports mujoco: without a screen, its default renderer aborts
    os.environ.setdefault("MUJOCO_GL", "egl")


def load(folder, *more):
    """model, data, train (and `more`) of a folder as a namespace; none stays in sys.modules, `common` does.

    Limit: classes loaded so cannot be pickled, so tests in this process use --workers 0.
    """
    home, path = ROOT / folder, list(sys.path)
    own = {file.stem for file in home.glob("*.py")} | {file.parent.name for file in home.glob("*/*.py")}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in own}
    sys.path[:0] = [str(home), str(ROOT)]
    try:
        return SimpleNamespace(**{name: import_module(name) for name in ("model", "data", "train", *more)})
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] in own]:
            del sys.modules[name]
        sys.modules.update(hidden)


def shared(name):
    """A folder of the real data that lies beside the checkout; without it the test is skipped."""
    if not (SHARED / name).exists():
        pytest.skip(f"real data {name} is not beside the checkout (../shared/data)")
    return SHARED / name


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def family(pid):
    """A process and all below it. torchrun puts each rank into a session of its own, where killpg does not reach."""
    with contextlib.suppress(OSError):
        yield pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def launch(*words, ranks=1, cwd=None, env=None, timeout=300):
    """Run a script and its flags in a process of its own, under torchrun if there are several ranks."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    command = [str(word) for word in [*command, *words]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "offline", **(env or {})}
    env["PYTHONFAULTHANDLER"] = "1"  # SIGABRT then prints the stack of each thread
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            pids = list(family(process.pid))
            for number in [signal.SIGABRT] * isinstance(error, subprocess.TimeoutExpired) + [signal.SIGKILL]:
                for pid in reversed(pids):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(1)
            print(*process.communicate(), sep="\n")  # what it said, and where each process stood
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def log_of(out):
    """The lines of OUT/log.jsonl without their speeds, which no two runs share."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.endswith(("_per_s", "data_fraction"))} for line in lines]


def weights_of(out, link="last"):
    """{file: bytes} of the weights in a run's checkpoint; equal dicts are equal models, bit for bit."""
    folder = (Path(out) / "checkpoints" / link).resolve()
    files = [file for file in folder.rglob("*") if file.suffix in (".bin", ".safetensors", ".npz", ".pt")]
    files = [file for file in files if file.name != "resume.pt"]
    assert files, f"{folder} holds no weights"
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def this(request):
    """The folder that the test file is named after: test_laq.py -> laq."""
    return load(Path(request.fspath).stem.removeprefix("test_"))


@pytest.fixture(autouse=True)
def tidy():
    """Put back the signal handlers that common.Interrupt replaced; end a wandb run left open."""
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
