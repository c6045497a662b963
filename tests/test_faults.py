"""Faults: whatever ends a run, `--resume` reaches the weights and the log of a run that was left alone.

Each folder's demo is trained for a few steps while something goes wrong. A process per folder imports its train.py
once and forks for every run (`serve`), so that a kill costs no import. CI takes a seeded sample; the whole list:
  pytest -m campaign -s tests/test_faults.py
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT, launch

READY = [
    name for name in FOLDERS if all((ROOT / name / file).exists() for file in ("train.py", "demo.py", "demo.args"))
]
SPEED = {"steps_per_s", "data_share", "tokens_per_s", "env_steps_per_s", "train/mfu", "mfu"}  # what differs each time
SHORT = "--steps 12 --log-every 2 --eval-every 4 --save-every 4 --warmup 2 --device cpu".split()
LONG = "--steps 120 --log-every 10 --eval-every 40 --save-every 20 --warmup 10 --device cpu".split()
OWN = {
    "fsq_vqvae": "--val-stride 20",
    "laq": "--val-pairs 64 --dim 32 --stem 16 --batch-size 16 --restart-every 3",  # codes start half-way
    "vla": "--val-samples 64 --batch-size 16",
    "vvae_lam": "--batch-size 8 --embed-dim 32 --patch-dim 32 --val-share 0.05"
    " --check-every 3 --margin -1 --restart-every 3",  # codes start at step 3, whatever they are worth
    "pi05_finetune": "--val-stride 30 --batch-size 8",
    "vae_distill": "--num-envs 64 --batch-size 128",  # four updates per iteration
}
# What a run imports late: once in `serve`, not in every fork.
LATE = {"vae_distill": [], "pi05_finetune": ["torch._dynamo", "lerobot.policies.pi05.modeling_pi05"]}
LATE["pi05_finetune"] += [f"transformers.models.{name}" for name in ("gemma.modeling_gemma", "auto.tokenization_auto")]
LATE["pi05_finetune"] += ["lerobot.policies.pi05.processor_pi05", "transformers.models.paligemma.modeling_paligemma"]


def sizes(folder, long=False):
    """Flags of a run of `folder`'s demo: 12 steps, or 120 (fsq_vqvae, the fastest, 600)."""
    more = ["--steps", "600"] if long and folder == "fsq_vqvae" else []
    return [*(LONG if long else SHORT), *OWN[folder].split(), *more]


# --- what a run leaves


def curve(out):
    """{step: its log line without speeds}. A line twice or out of order is an assertion."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"{out}: log lines of steps {steps}"
    return {line["step"]: {name: x for name, x in line.items() if name not in SPEED} for line in lines}


def same_curve(a, b, stops=0):
    """Assert that two runs' logs agree. A run that stopped `stops` times between two log lines has, each time, one line
    whose train/* are means over the steps since then only."""
    a, b = curve(a), curve(b)
    assert list(a) == list(b), f"log lines of steps {list(a)}, expected {list(b)}"
    differ = [step for step in a if a[step] != b[step]]
    names = {name for step in differ for name in a[step] if a[step][name] != b[step].get(name)}
    assert len(differ) <= stops and all(name.startswith("train/") for name in names), (
        f"steps {differ} differ in {names}"
    )


def whole(out):
    """What is wrong in OUT/checkpoints, as texts: a half-written checkpoint, a link to nothing. Nothing should be."""
    root, wrong = Path(out) / "checkpoints", []
    for folder in root.glob("step_*"):
        try:
            sums = json.loads((folder / "whole.json").read_text())
            wrong += [
                f"{folder.name}/{name}" for name, crc in sums.items() if zlib.crc32((folder / name).read_bytes()) != crc
            ]
            wrong += [f"{folder.name} holds nothing"] * (len(sums) < 2)
        except (OSError, ValueError) as error:
            wrong.append(f"{folder.name}: {error}")
    for link in ("last", "best"):
        if (root / link).is_symlink() and not (root / link).exists():
            wrong.append(f"{link} leads to nothing")
    return wrong


def weights(out):
    """Checksums of the last checkpoint's weights; the training state's bytes tell in which order things were made."""
    sums = json.loads((Path(out) / "checkpoints" / "last" / "whole.json").read_text())
    return {
        name: crc for name, crc in sums.items() if not name.startswith("resume") and not name.endswith((".json", ".md"))
    }


# --- the process that imports once and forks


def serve(folder):
    """For each line of stdin, a task: fork, run train.py with its fault, answer with [exit code, seconds]."""
    sys.path[:0] = [str(ROOT / folder), str(ROOT)]
    import train

    import common

    for name in LATE.get(folder, ["torch._dynamo"]):
        importlib.import_module(name)

    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(task, train, common)
        ended, limit = 0, task["limit"]
        while not ended:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if time.monotonic() - start > (task["kill"] or limit) and not ended:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                status = status if task["kill"] else 124 << 8
                break
            time.sleep(0.005)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - start]), flush=True)


def child(task, train, common):
    """The forked process: its own output, the fault, then train.py as a user starts it."""
    code = 1
    try:
        os.chdir(task["cwd"])
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        name, _, count = task["fault"].partition(":")
        if name:
            FAULTS[name][0](int(count), train, common)
        if not task["figures"]:
            train.figures, common.Logger.figure = Blank(), lambda log, step, name, figure: log.out / name
        sys.argv = [train.__file__, *task["words"]]
        common.run(train.main)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Blank:
    """Stands for figures.py: pictures take most of a short run's time, and nothing is read from them."""

    def __getattr__(self, name):
        return lambda *words: ()


class Server:
    """A running `serve` and the scratch folder that its runs live in; spaces and unicode in its path on purpose."""

    def __init__(self, folder, scratch):
        self.folder, self.cwd = folder, scratch / "ein Ordner ü 数据"
        self.cwd.mkdir()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "offline", "PYTHONUTF8": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        words = [sys.executable, __file__, folder]
        self.process = subprocess.Popen(words, env={**env, "HF_HUB_OFFLINE": "1"}, start_new_session=True, **pipes)
        if self.process.stdout.readline() != "ready\n":
            self.process.kill()
            pytest.skip(f"{folder}/train.py cannot be imported: {self.process.stderr.read()[-500:]}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def run(self, out, *more, fault="", kill=None, limit=900, figures=False):
        """(exit code, seconds, what it printed) of a run into OUT, ended by `fault` or killed after `kill` seconds."""
        words = [*sizes(self.folder), "--out", out, *map(str, more)]
        log = str(self.cwd / "output.txt")
        task = dict(words=words, fault=fault, kill=kill, limit=limit, cwd=str(self.cwd), log=log, figures=figures)
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds, Path(log).read_text()

    def same(self, out, stops=0):
        """Assert that OUT ended as the run that was left alone."""
        out, alone = self.cwd / out, self.cwd / "left alone"
        assert not whole(out), whole(out)
        assert weights(out) == weights(alone), "other weights"
        same_curve(out, alone, stops)
        assert not list(out.rglob(".*.tmp")), "temporaries are left"


# --- the faults; each takes the count of the call at which it strikes

FAULTS = {}  # name -> (function, exit code or None for any but 0, a word of what is printed, flags that it needs)


def ends(code, text="", *flags):
    """Register a fault and how a run that meets it has to end."""

    def register(function):
        FAULTS[function.__name__] = function, code, text, flags
        return function

    return register


def strike(owner, name, count, act, when=lambda *words: True, after=False):
    """Make the `count`-th call of owner.name (for which `when` holds) do `act` first (or after)."""
    real, seen = getattr(owner, name), [0]

    def watched(*words, **more):
        seen[0] += bool(when(*words))
        now = seen[0] == count and when(*words)
        if now and not after:
            act(*words)
        result = real(*words, **more)
        if now and after:
            act(*words)
        return result

    setattr(owner, name, watched)


def die(*words):
    os.kill(os.getpid(), signal.SIGKILL)


@ends(-9)
def kill_in_step(count, train, common):
    strike(common.Logger, "tick", count, die)


@ends(-9)
def kill_before_rename(count, train, common):
    strike(os, "replace", count, die, when=lambda source, target: Path(target).name.startswith("step_"))


@ends(-9)
def kill_half_written(count, train, common):
    def half(path):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        die()

    strike(common, "sync", count, half, when=lambda path: ".step_" in str(path))


@ends(-9)
def kill_before_link(count, train, common):
    strike(os, "replace", count, die, when=lambda source, target: Path(target).name == "last")


@ends(-9)
def kill_in_pruning(count, train, common):
    def half(path, *more, **rest):
        next(file for file in Path(path).iterdir() if file.is_file()).unlink()
        die()

    strike(shutil, "rmtree", count, half, when=lambda path, *more: "step_" in Path(path).name)


@ends(-9)
def kill_in_validation(count, train, common):
    strike(train, "validate", count, die)


@ends(-9)
def kill_after_log_line(count, train, common):
    strike(common.Logger, "write", count, die, after=True)


@ends(-9)
def kill_in_log_line(count, train, common):
    def half(log, step, metrics):
        with open(log.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics})[:25])
        die()

    strike(common.Logger, "write", count, half)


@ends(75, "stopped after step")
def sigterm(count, train, common):
    strike(common.Logger, "tick", count, lambda *words: os.kill(os.getpid(), signal.SIGTERM))


@ends(75, "stopped after step")
def stop_file(count, train, common):
    strike(common.Logger, "tick", count, lambda log, *words: (log.out / "stop").touch())


@ends(None, "worker", "--workers", 1)
def worker_dies(count, train, common):
    strike(
        common.Logger, "tick", count, lambda *words: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    )


@ends(2, "error: ")
def disk_full(count, train, common):
    """Files cannot grow above 60 kB, which no checkpoint fits in: what a quota does."""
    limit = (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    strike(common.Logger, "tick", count, lambda *words: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


@ends(2, "the loss is not finite")
def loss_not_finite(count, train, common):
    def spoil(log, metrics, *more):
        for name in metrics:
            metrics[name] = metrics[name] * math.nan

    strike(common.Logger, "add", count, spoil, when=lambda log, metrics, *more: "loss" in metrics)


@ends(0)
def clock_jumps(count, train, common):
    real, day = time.time, 86400
    jumps = random.Random(count)
    time.time = lambda: real() + jumps.randint(-3650, 3650) * day


@ends(0)
def stdin_closed(count, train, common):
    os.close(0)


def suffer(server, out, fault, count=1):
    """Run into OUT with a fault, check what it leaves, resume, compare; returns seconds of both."""
    _, code, text, flags = FAULTS[fault]
    ended, seconds, printed = server.run(out, *flags, fault=f"{fault}:{count}")
    where = f"{server.folder}, {fault}:{count}: exit {ended}\n{printed[-1500:]}"
    assert ended == code or (code is None and ended not in (0, 124)), where
    assert text in printed, where
    assert ended != 2 or printed.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in printed, where
    if ended:
        broken = whole(server.cwd / out) if fault != "kill_in_pruning" else []
        assert not broken, f"{where}\n{broken}"
        again, more, printed = server.run(out, "--resume", *flags)
        assert again == 0, f"{where}\n--resume: exit {again}\n{printed[-1500:]}"
        seconds += more
    server.same(out, stops=int(ended == 75))
    return seconds


def damage(server, out):
    """Break the newest checkpoint of a copy of the run left alone: a flipped byte, a lost and a short file."""
    for number, how in enumerate(("a flipped byte", "a lost file", "a short file")):
        to = server.cwd / f"{out} {number}"
        shutil.copytree(server.cwd / "left alone", to, symlinks=True)
        newest = max(to.glob("checkpoints/step_*"))
        file = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        if how == "a lost file":
            file.unlink()
        else:
            data[len(data) // 2] ^= 64
            file.write_bytes(data if how == "a flipped byte" else data[:-100])
        code, _, printed = server.run(to.name, "--resume")
        assert code == 0 and "is damaged" in printed, f"{server.folder}, {how}: exit {code}\n{printed[-1500:]}"
        server.same(to.name)


# --- the sample that CI takes


def sample(folder, tmp_path, faults):
    with Server(folder, tmp_path) as server:
        code, seconds, printed = server.run("left alone", figures=True)
        assert code == 0, printed[-3000:]
        for fault, count in faults:
            suffer(server, fault, fault, count)
        return server


def test_sample_of_fsq_vqvae(tmp_path):
    """Killed in a save, in a validation and with half a log line; ended by SIGTERM."""
    faults = [("kill_half_written", 3), ("kill_in_validation", 2), ("kill_in_log_line", 5), ("sigterm", 7)]
    sample("fsq_vqvae", tmp_path, faults)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [name for name in READY if name != "fsq_vqvae"])
def test_sample(folder, tmp_path):
    """The same for the other folders: at moments drawn by the folder's name."""
    draw = random.Random(folder)
    names = ["kill_before_rename", "kill_half_written", "kill_in_validation", "kill_in_log_line", "kill_after_log_line"]
    faults = [(name, draw.choice([1, 2])) for name in draw.sample(names, 2)] + [("sigterm", 5), ("disk_full", 5)]
    sample(folder, tmp_path, faults[: 1 if folder == "vae_distill" else 4])


def test_checks_see_what_is_wrong(tmp_path):
    """The campaign's own eyes: a half checkpoint, a dead link, a double log line pass unseen."""
    step = tmp_path / "checkpoints" / "step_0000004"
    step.mkdir(parents=True)
    for name in ("a", "b"):
        (step / name).write_text(name)
    sums = {name: zlib.crc32(name.encode()) for name in ("a", "b")}
    (step / "whole.json").write_text(json.dumps(sums))
    (tmp_path / "checkpoints" / "last").symlink_to("step_0000004")
    assert not whole(tmp_path) and weights(tmp_path) == sums
    (step / "a").write_text("A")
    assert whole(tmp_path) == ["step_0000004/a"]
    (step / "whole.json").unlink()
    (tmp_path / "checkpoints" / "best").symlink_to("step_0000008")
    assert len(whole(tmp_path)) == 2
    (tmp_path / "log.jsonl").write_text('{"step": 2, "a": 1, "steps_per_s": 3}\n')
    assert curve(tmp_path) == {2: {"step": 2, "a": 1}}
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 2}\n')
    with pytest.raises(AssertionError, match="log lines"):
        curve(tmp_path)


# --- the number of processes


def close(a, b):
    """Assert that two curves agree: other numbers of processes add in another order.

    Except dsnr: so early it is the ratio of two differences that are nearly 0.
    """
    assert list(a) == list(b)
    for step in a:
        assert a[step].keys() == b[step].keys()
        for name in a[step].keys() - {"val/dsnr", "val/demo/dsnr"}:
            value = a[step][name]
            assert value == pytest.approx(b[step][name], rel=2e-3, abs=2e-4), f"step {step}, {name}"


def ranks_agree(folder, tmp_path, worlds=(2, 4)):
    """1, 2 and 4 processes at equal global batch, and resumed on other numbers than they began with."""
    words, env = [ROOT / folder / "train.py", *sizes(folder)], {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}

    def run(out, ranks, *more):
        done = launch(*words, "--out", out, *more, ranks=ranks, cwd=tmp_path, env=env, timeout=900)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]

    if folder == "vla":  # each rank drops its own: no dropout here, in the heads or in the demo's backbone
        words += ["--dropout", "0"]
        run("writes the demo", 1)
        config = tmp_path / "runs/demo/vla/backbone/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(dropout=0.0)))
    run("1", 1)
    alone = curve(tmp_path / "1")
    for world, later in zip(worlds, (1, *worlds), strict=False):
        run(str(world), world)
        close(curve(tmp_path / str(world)), alone)
        out = tmp_path / f"{world} then {later}"
        shutil.copytree(tmp_path / str(world), out, symlinks=True)
        newest = max(out.glob("checkpoints/step_*"))
        shutil.rmtree(newest)
        run(out.name, later, "--resume")
        close(curve(out), alone)
        assert max(out.glob("checkpoints/step_*")).name == newest.name and not whole(out)


@pytest.mark.slow
def test_ranks_agree_in_fsq_vqvae(tmp_path):
    """Two processes train on other samples, or validation counts a padded duplicate; a resume needs the same number."""
    ranks_agree("fsq_vqvae", tmp_path)


# --- campaign


@pytest.mark.campaign
@pytest.mark.parametrize("folder", [name for name in READY if name not in ("fsq_vqvae", "vae_distill")])
def test_ranks_agree(folder, tmp_path):
    ranks_agree(folder, tmp_path)


TABLE = []


def case(server, name, count, act):
    """One row of the table: how often `act` (number) went well, in how many seconds."""
    start, failures = time.monotonic(), []
    for number in range(count):
        try:
            act(number)
        except AssertionError as error:
            failures.append(f"{name} {number}: {error}")
    seconds = time.monotonic() - start
    TABLE.append((server.folder, name, count, count - len(failures), seconds))
    print(f"| {server.folder} | {name} | {count} | {count - len(failures)} | {seconds:.0f} |", *failures, sep="\n")
    return failures


@pytest.mark.campaign
@pytest.mark.parametrize("folder", READY)
def test_campaign(folder, tmp_path):
    """The whole list: 20 kills at random moments, kills at the worst ones, signals, full disk, damage and more."""
    draw, failures = random.Random(f"{folder} 8"), []
    with Server(folder, tmp_path) as server:
        code, seconds, printed = server.run("left alone", figures=True)
        assert code == 0, printed[-3000:]
        seconds = min(seconds, server.run("again")[1])  # the first one wrote the demo's data and filled caches
        server.same("again")
        print(f"\n| folder | fault | cases | as left alone | seconds |\n| --- | --- | ---: | ---: | ---: |\n"
              f"| {folder} | none: twice the same | 1 | 1 | {seconds:.0f} |", flush=True)  # fmt: skip
        faults = {name: draw.sample(range(1, 4), 2) for name in FAULTS if name.startswith("kill_")}
        faults |= {"kill_in_step": [1, 7], "kill_in_pruning": [1], "kill_half_written": [1, 2, 5]}
        faults |= {"sigterm": [1, 6], "stop_file": [5], "disk_full": [1, 6], "loss_not_finite": [1, 6]}
        faults |= {"clock_jumps": [1], "stdin_closed": [1]}
        if folder == "vae_distill":  # each run traces its programs anew, 20 s of CPU time; and it has no loader
            faults = {name: counts[-1:] for name, counts in faults.items()}
            faults["loss_not_finite"] = [2]  # of its three iterations of four steps
        else:
            faults |= {"worker_dies": [3]}
        for name, counts in faults.items():
            failures += case(
                server,
                name,
                len(counts),
                lambda i, name=name, counts=counts: suffer(server, f"{name} {i}", name, counts[i]),
            )
        failures += case(server, "damaged newest checkpoint (3 ways)", 1, lambda i: damage(server, "damaged"))

        def killed_again_and_again(number):
            """Chains of 5 kills, each of the resumed run, at any moment of its life."""
            for _ in range(5):
                code, _, printed = server.run(f"chain {number}", "--resume", kill=draw.uniform(0.05, seconds))
                assert code in (-9, 0), printed[-2000:]
                assert not whole(server.cwd / f"chain {number}"), "a half checkpoint"
            code, _, printed = server.run(f"chain {number}", "--resume", figures=True)
            assert code == 0, printed[-2000:]
            server.same(f"chain {number}")

        failures += case(server, "kill -9 at random, 5 in a row", 4, killed_again_and_again)
        if os.geteuid() == 0:
            failures += case(server, "read-only data", 1, lambda i: read_only(server))
            failures += case(server, "disk full for real (tmpfs)", 1, lambda i: full_disk(server))
    assert not failures, "\n\n".join(failures)


def read_only(server):
    """The data on a file system that cannot be written: nothing is put beside it."""
    data = server.cwd / "runs" / "demo"
    words = [sys.executable, str(ROOT / server.folder / "train.py"), *sizes(server.folder), "--out", "read only"]
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    words = ["unshare", "--mount", "bash", "-c", script, str(data), *words]
    done = subprocess.run(words, cwd=server.cwd, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    server.same("read only")


def full_disk(server):
    """OUT on a tmpfs for a checkpoint and a half: the second fails, the first stays; with more room it goes on."""
    out = server.cwd / "full"
    out.mkdir()
    sizes_of = [file.stat().st_size for file in (server.cwd / "left alone/checkpoints/last").resolve().rglob("*")]
    size = int(1.5 * sum(sizes_of)) + 400_000
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)], check=True)
    try:
        code, _, printed = server.run(out.name)
        assert code == 2 and printed.strip().splitlines()[-1].startswith("error: "), printed[-2000:]
        assert "Traceback" not in printed and not whole(out), printed[-2000:]
        subprocess.run(["mount", "-o", "remount,size=500M", str(out)], check=True)
        code, _, printed = server.run(out.name, "--resume")
        assert code == 0, printed[-2000:]
        server.same(out.name)
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


if __name__ == "__main__":
    serve(sys.argv[1])
