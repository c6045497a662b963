"""Load a folder's modules beside the other folders', launch its scripts, find the shared real data."""

import os
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)


def load(folder):
    """The modules of a folder as a namespace. All six have a model.py, so none stays in sys.modules."""
    home, before = ROOT / folder, list(sys.path)
    sys.path[:0] = [str(home), str(ROOT)]
    try:
        return SimpleNamespace(**{file.stem: import_module(file.stem) for file in sorted(home.glob("*.py"))})
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == home:
                del sys.modules[name]


def shared(name):
    """A folder of the real data that lies beside the checkout; without it the test is skipped."""
    if not (SHARED / name).exists():
        pytest.skip(f"real data {name} is not beside the checkout (../shared/data)")
    return SHARED / name


def launch(script, *words, ranks=1, cwd=None, env=None, timeout=300):
    """Run a script in a process of its own, under torchrun if there are several ranks."""
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command += [str(script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def this(request):
    """The folder that the test file is named after."""
    return load(Path(request.fspath).stem.removeprefix("test_"))


@pytest.fixture(autouse=True)
def signals():
    """common.Interrupt installs handlers; put pytest's back."""
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)
