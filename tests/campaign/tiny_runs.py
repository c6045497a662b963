"""What the campaigns share: a tiny run of each folder's demo, what a run leaves, and a server that forks runs."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from conftest import FOLDERS, ROOT, log_of, weights_of  # noqa: E402

TINY = {  # a batch and a model as small as they go, with every part still there; codes from the first step on
    "fsq_vqvae": "--val-stride 20 --hidden-dim 64",
    "vvae_lam": "--batch-size 8 --embed-dim 32 --patch-dim 32 --val-share 0.05 --quantize-after -1 --steps 24",
    "laq": "--batch-size 16 --val-pairs 64 --dim 32 --depth 1 --quantize-after -1",
    "vla": "--batch-size 16 --val-samples 64",
    "pi05_finetune": "--batch-size 8",
    "vae_distill": "--num-envs 64 --batch-size 128",  # four updates per iteration
}
SHORT = "--steps 12 --log-every 2 --eval-every 4 --save-every 4 --warmup 2 --device cpu"
LONG = "--steps 120 --log-every 10 --eval-every 40 --save-every 20 --warmup 10 --device cpu"
LOADERS = {name: "" if name == "vae_distill" else "--workers 2" for name in FOLDERS}  # vae_distill has no loader
ENV = dict(OMP_NUM_THREADS="1", MPLBACKEND="Agg", WANDB_MODE="offline", HF_HUB_OFFLINE="1", PYTHONUTF8="1")


def flags(folder, long=False):
    """Flags of a run of the demo: 12 steps (vvae_lam 24, codes begin at 20), or 120 (fsq_vqvae, fast, 1500)."""
    more = ("--steps 1500" if folder == "fsq_vqvae" else "--steps 120") if long else ""
    return f"{LONG if long else SHORT} {TINY[folder]} {more}".split()


# --- what a run leaves


def curve(out):
    """{step: its log line without speeds}; a line that is there twice or out of order is an assertion."""
    lines = {line["step"]: line for line in log_of(out)}
    assert list(lines) == [line["step"] for line in log_of(out)] == sorted(lines), f"{out}: log lines of {list(lines)}"
    return lines


def broken(out):
    """What is wrong in OUT/checkpoints, as texts: an incomplete checkpoint, a link to nothing."""
    root, wrong = Path(out) / "checkpoints", []
    for folder in root.glob("step_*"):
        try:
            sizes = json.loads((folder / "manifest.json").read_text())["files"]
            wrong += [f"{folder.name}/{name}" for name, x in sizes.items() if (folder / name).stat().st_size != x]
            wrong += [f"{folder.name} is empty"] * (len(sizes) < 2)
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{folder.name}: {error}")
    links = [root / name for name in ("last", "best") if (root / name).is_symlink()]
    return wrong + [f"{link.name} leads to nothing" for link in links if not link.exists()]


def assert_same(out, alone, stops=0):
    """Assert that a run ended as the undisturbed one: weights, log, complete checkpoints.

    A run that stopped `stops` times between two log lines has, each time, one line whose train/* are means over the
    steps since then only.
    """
    assert not broken(out), broken(out)
    assert weights_of(out) == weights_of(alone), "other weights"
    assert not list(Path(out).rglob(".*.tmp")), "temporaries are left"
    a, b = curve(out), curve(alone)
    assert list(a) == list(b), f"log lines of steps {list(a)}, expected {list(b)}"
    differ = [step for step in a if a[step] != b[step]]
    names = {name for step in differ for name in a[step] if a[step][name] != b[step].get(name)}
    assert len(differ) <= stops and all(name.startswith("train/") for name in names), f"{names} differ at {differ}"


# --- runs in forks of one process that has imported everything


def serve(folder):
    """For each line of stdin, a task: fork, run train.py with its fault, answer with [exit code, seconds]."""
    sys.path[:0] = [str(ROOT / folder), str(ROOT)]
    import faults
    import train

    late = ["torch._dynamo"] if folder != "vae_distill" else []  # what torch's optimizers import at their first step
    late += ["lerobot.policies.pi05.modeling_pi05", "lerobot.policies.pi05.processor_pi05"] * (folder[:2] == "pi")
    for name in late:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        task, start, ended = json.loads(line), time.monotonic(), 0
        pid = os.fork()
        if pid == 0:
            child(task, train, faults.FAULTS)
        with contextlib.suppress(OSError):  # the child does the same: whoever is first
            os.setpgid(pid, pid)
        while not ended:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() - start > (task["kill"] or task["limit"]):
                os.killpg(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1] if task["kill"] else 124 << 8
                break
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):  # loader processes of a run that was killed
            os.killpg(pid, signal.SIGKILL)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - start]), flush=True)


def child(task, train, faults):
    """The forked process: a group of its own, its own output, the fault, then train.py as a user starts it."""
    code = 1
    try:
        import common

        os.setpgid(0, 0)
        os.chdir(task["cwd"])
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        if task["fault"]:
            name, _, count = task["fault"].partition(":")
            faults[name].inject(int(count or 1), train, common)
        common.Logger.figure = lambda *words, **more: None  # drawing takes most of a short run's time
        sys.argv = [train.__file__, *task["words"]]
        try:
            code = train.main() or 0
        except common.DataError as error:
            common.fail(error)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Server:
    """A running `serve`, and the scratch folder of its runs with a space and other letters in its name on purpose."""

    def __init__(self, folder, scratch):
        self.folder, self.cwd = folder, Path(scratch) / "a folder ü 数据"
        self.cwd.mkdir()
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        words, env = [sys.executable, __file__, folder], {**os.environ, **ENV}
        self.process = subprocess.Popen(words, env=env, start_new_session=True, **pipes)
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()[-3000:]

    def __enter__(self):
        code, self.seconds, printed = self.run("alone")  # it writes the demo, too
        assert code == 0, printed[-3000:]
        return self

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def run(self, out, *more, fault="", kill=None, limit=900):
        """(exit code, seconds, what it printed) of a run into OUT, ended by `fault` or killed after `kill` seconds."""
        words = [*flags(self.folder), "--out", out, *map(str, more)]
        log = str(self.cwd / "output.txt")
        task = dict(words=words, fault=fault, kill=kill, limit=limit, cwd=str(self.cwd), log=log)
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds, Path(log).read_text()

    def same(self, out, stops=0):
        assert_same(self.cwd / out, self.cwd / "alone", stops)

    def copy(self, out):
        """A copy of the undisturbed run."""
        shutil.copytree(self.cwd / "alone", self.cwd / out, symlinks=True)
        return self.cwd / out


def until(check, timeout, what):
    """Wait until check() is true."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.1)


if __name__ == "__main__":
    serve(sys.argv[1])
