"""common.py: command line, processes, run folder, log, checkpoints, signals."""

import argparse
import json
import math
import os
import pickle
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch
from safetensors import SafetensorError

sys.path.insert(1, str(ROOT))
import common
from common import DataError


def run_of(out, **flags):
    """The flags that common reads, of a run in `out`."""
    flags = dict(out=str(out), resume=False, wandb=None, steps=100, lr=0.5, accum=1, val_episodes=[]) | flags
    return argparse.Namespace(**flags, folder="FOLDER", demo=False, fixed=["lr"])


def open_log(out, first=0, **flags):
    out.mkdir(exist_ok=True)
    return common.Logger(run_of(out, **flags), first)


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(f"import os, signal, sys\nsys.path.insert(1, {str(ROOT)!r})\nimport common\n{text}")
    return path


# --- command line


def parser_of():
    parser = common.ArgumentParser("Train things.\n\nRun:\n  python x")
    parser.add_argument("--steps", type=int, default=5, help="steps")
    parser.add_argument("--zero", type=float, default=0.0, help="a number")
    parser.add_argument("--levels", type=int, nargs="+", default=[8, 5], help="levels")
    parser.add_argument("--names", nargs="+", default=[], help="names")
    parser.add_argument("--fast", action="store_true", help="a switch")
    parser.add_argument("--init", help="a path")
    return parser


def test_help_shows_defaults_and_keeps_lines(capsys):
    """--help keeps the lines of the description and shows each default, 0 too, but no None, False or empty list."""
    with pytest.raises(SystemExit):
        parser_of().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "Run:\n  python x" in shown and all(text in shown for text in ("[5]", "[0.0]", "[8 5]"))
    assert not [word for word in ("None", "False", "SUPPRESS", "[]") if word in shown]


@pytest.mark.parametrize("words", [["--step", "3"], ["--steps", "x"], ["--nothing"], ["@nowhere.args"]])
def test_a_wrong_flag_is_one_line(words, capsys):
    """A mistyped or abbreviated flag, a wrong value or a missing preset is one line on stderr and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        parser_of().parse_args(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("preset", [b'--name "open', "--name größer".encode("latin-1"), "--steps 3".encode("utf-16")])
def test_a_broken_preset_is_one_line(preset, tmp_path, capsys):
    (tmp_path / "a.args").write_bytes(preset)
    with pytest.raises(SystemExit) as end:
        parser_of().parse_args([f"@{tmp_path / 'a.args'}"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1


def test_presets_hold_comments_and_quotes(tmp_path):
    """@file holds flags, several a line; comments are skipped, quotes respected, later flags win."""
    (tmp_path / "a.args").write_text("# a comment\n--steps 7 --fast  # another\n\n--init 'a b/#c'\n")
    args = parser_of().parse_args([f"@{tmp_path / 'a.args'}", "--steps", "9"])
    assert (args.steps, args.fast, args.init) == (9, True, "a b/#c")


def test_importing_common_imports_no_framework(tmp_path):
    """`import common` loads neither torch, jax, numpy nor wandb."""
    path = script(tmp_path, "print({'torch', 'jax', 'numpy', 'wandb'} & set(sys.modules))")
    assert launch(path).stdout == "set()\n"


def test_an_error_of_the_user_is_one_line_and_a_bug_a_traceback(tmp_path):
    """DataError, also one that a loader process wraps in its traceback, is one line and exit code 2."""
    text = """
import torch
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        if kind == "worker": raise common.DataError("ü.npz: no array `actions`;\\nwrite one")
        return i["bug"]
kind = sys.argv[1]
try:
    if kind == "plain": raise common.DataError("ü.npz: no array `actions`;\\nwrite one")
    for item in torch.utils.data.DataLoader(Data(), num_workers=1): pass
except common.DataError as error:
    common.fail(error)
"""
    path = script(tmp_path, text)
    for kind in ("plain", "worker"):
        done = launch(path, kind, env={"PYTHONUTF8": "1"})
        assert (done.returncode, done.stderr) == (2, "error: ü.npz: no array `actions`; write one\n")
    done = launch(path, "bug")
    assert done.returncode == 1 and 'return i["bug"]' in done.stderr


# --- processes


def test_seed_depends_on_every_number():
    """Each key (seed, step, rank) draws its own numbers, and the same ones again."""

    def draw(*key):
        common.seed_all(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 10, 0), (0, 1, 10)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, 1, 0) == draw(0, 1, 0)


def test_one_process_needs_no_group():
    """Without a process group broadcast returns its value and mean divides; a count of 0 gives 0."""
    assert common.broadcast([1]) == [1]
    assert common.mean({"a": 6.0, "b": 0.0}, {"a": 3, "b": 0}) == {"a": 2.0, "b": 0.0}


TWO = """
import json
import torch
from argparse import Namespace
from pathlib import Path
os.chdir(sys.argv[1])
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
args = Namespace(out=None, folder="FOLDER", resume=False, wandb=None, fixed=[])
mean = common.mean(*(({"loss": 2.0}, {"loss": 1}) if rank == 0 else ({"loss": 10.0, "b": 6.0}, {"loss": 3, "b": 2})))
shared = common.broadcast(["rank", rank])
common.open_run(args)
stop = common.Interrupt(args.out)
before = stop()
if rank == 1: os.kill(os.getpid(), signal.SIGTERM)
found = [mean, shared, args.out, before, stop(), stop.code]
Path(f"{rank}.json").write_text(json.dumps(found))
common.broadcast()
import time
began = time.monotonic()
if os.fork() == 0: os._exit(0)  # as for a loader process, straight after a collective
assert time.monotonic() - began >= 0.05
if sys.argv[2] == "fail":
    try:
        if rank == 1: raise common.DataError("rank 1 has a broken file")
        common.broadcast()
    except common.DataError as error:
        common.fail(error)
torch.distributed.barrier()  # the end of every train.py
time.sleep(0.5)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Under torchrun all ranks get rank 0's values, the mean of all, one folder, and stop at the same step.

    A fork waits until gloo's thread is quiet: forked at once, one child in some hundreds stood still for ever.
    """
    assert launch(script(tmp_path, TWO), tmp_path, "end", ranks=2).returncode == 0
    expected = [{"loss": 3.0, "b": 3.0}, ["rank", 0], "runs/FOLDER/001", False, True, 75]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


@pytest.mark.slow
def test_one_failing_process_ends_all(tmp_path):
    """A broken file on one rank ends all of them, with its line."""
    done = launch(script(tmp_path, TWO), tmp_path, "fail", ranks=2, timeout=240)
    assert done.returncode != 0 and "error: rank 1 has a broken file" in done.stderr


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step(tmp_path, number, code, capfd):
    """After a signal stop() is True, with the exit code that sbatch requeues (75) or a person expects (130)."""
    signal.signal(number, lambda *call: None)  # else a handler that is missing would end pytest
    stop = common.Interrupt(tmp_path)
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop() and stop() and stop.code == code and "ending after this step" in capfd.readouterr().err


def test_a_signal_while_the_ranks_agree_counts(tmp_path, monkeypatch):
    """One that comes after this step's code was read ends the next step."""
    stop = common.Interrupt(tmp_path)
    monkeypatch.setattr(common, "group", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not stop() and stop() and stop.code == 75


def test_the_stop_file_ends_the_step(tmp_path):
    """A file OUT/stop ends the run as SIGTERM does."""
    stop = common.Interrupt(tmp_path)
    assert not stop()
    (tmp_path / "stop").touch()
    assert stop() and stop.code == 75


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """The first Ctrl-C waits for the step, the second raises KeyboardInterrupt."""
    stop = common.Interrupt(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        stop()


# --- atomic


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_is_all_or_nothing(tmp_path, folder):
    """An exception while writing leaves the old content and no temporary; the new content replaces all of the old."""
    path = tmp_path / "ü x"

    def write(place, text):
        (place / text if folder else place).write_text(text)

    def content():
        return [part.read_text() for part in path.iterdir()] if folder else [path.read_text()]

    with common.atomic(path, folder) as temporary:
        write(temporary, "old")
    with pytest.raises(KeyError), common.atomic(path, folder) as temporary:
        write(temporary, "half")
        assert content() == ["old"] and temporary.parent == path.parent
        raise KeyError
    assert content() == ["old"] and list(tmp_path.iterdir()) == [path]
    with common.atomic(path, folder) as temporary:
        write(temporary, "new")
    assert content() == ["new"] and list(tmp_path.iterdir()) == [path]


KILL = "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"


def test_killed_between_write_and_rename(tmp_path):
    """SIGKILL before the rename leaves the old file, and what it left behind is in nobody's way."""
    path = tmp_path / "args.json"
    path.write_text("old")
    text = f"{KILL}with common.atomic(sys.argv[1]) as path:\n    path.write_text('new')\n"
    assert launch(script(tmp_path, text), path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with common.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore"),
        SafetensorError("I/O error: File too large (os error 27)"),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_is_a_data_error(tmp_path, error):
    """A disk that fills is one line, whoever writes; the checkpoint before stays. A bug keeps its traceback."""
    write(tmp_path, 1)
    with pytest.raises(DataError, match="step_0000002 cannot be written") as caught:
        with common.checkpoint(tmp_path, 2) as folder:
            (folder / "weights").write_bytes(b"half")
            raise error
    assert "\n" not in str(caught.value) and names(tmp_path) == ["last", "step_0000001"]
    log = common.Logger(run_of(tmp_path))
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match="log.jsonl cannot be written .No space left"):
        log.write(1, dict(loss=1.0))
    with pytest.raises(TypeError), common.checkpoint(tmp_path, 2):
        raise TypeError


# --- checkpoints


def write(out, step, best=False, keep=2):
    with common.checkpoint(out, step, best, keep) as folder:
        (folder / "weights").write_bytes(f"weights of {step}".encode() * 9)
        (folder / "more").mkdir()
        (folder / "more" / "state").write_bytes(b"state")


def names(out):
    return sorted(path.name for path in (Path(out) / "checkpoints").iterdir())


def test_links_and_pruning(tmp_path):
    """`last` and `best` point at their checkpoints, also when the run is moved; the newest two and the best stay."""
    root = tmp_path / "run" / "checkpoints"
    root.parent.mkdir()
    for step in (10, 20, 30, 40, 50):
        write(root.parent, step, best=step == 20)
    assert names(root.parent) == ["best", "last", "step_0000020", "step_0000040", "step_0000050"]
    assert os.readlink(root / "last") == "step_0000050" and os.readlink(root / "best") == "step_0000020"
    write(root.parent, 60, best=True)
    assert names(root.parent) == ["best", "last", "step_0000050", "step_0000060"]
    moved = root.parent.rename(tmp_path / "moved")
    assert (moved / "checkpoints" / "best" / "weights").read_bytes() == b"weights of 60" * 9


def corrupt(folder, how):
    if how == "short":
        (folder / "weights").write_bytes(b"weights")
    elif how == "lost":
        (folder / "more" / "state").unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(how)


@pytest.mark.parametrize("how", ["short", "lost", "no manifest", '{"step": 2', "[]", '{"files": 3}'])
def test_newest_passes_over_a_corrupt_checkpoint(tmp_path, capsys, how):
    """A corrupt checkpoint is named and the one before is taken; None when none is left."""
    assert common.newest(tmp_path) is None
    write(tmp_path, 10)
    write(tmp_path, 20)
    root = tmp_path / "checkpoints"
    assert common.newest(tmp_path) == root / "step_0000020" and not capsys.readouterr().err
    corrupt(root / "step_0000020", how)
    assert common.newest(tmp_path) == root / "step_0000010"
    said = capsys.readouterr().err
    assert f"{root / 'step_0000020'} is corrupt" in said and "step_0000010" not in said
    assert os.readlink(root / "last") == "step_0000010"
    write(tmp_path, 20)  # the run goes on and writes it again
    assert common.newest(tmp_path) == root / "step_0000020"
    for step in (10, 20):
        corrupt(root / f"step_00000{step}", how)
    assert common.newest(tmp_path) is None and "step_0000010 is corrupt" in capsys.readouterr().err


def test_killed_while_a_checkpoint_is_written(tmp_path):
    """SIGKILL before the rename: the half checkpoint does not count and is cleared away."""
    write(tmp_path, 10)
    root = tmp_path / "checkpoints"
    text = f'{KILL}with common.checkpoint(sys.argv[1], 20) as folder:\n    (folder / "weights").write_bytes(b"20")\n'
    assert launch(script(tmp_path, text), tmp_path).returncode == -signal.SIGKILL
    assert len(list(root.glob(".*.tmp"))) == 1
    assert common.newest(tmp_path) == root / "step_0000010" and not list(root.glob(".*.tmp"))


def test_what_cannot_be_deleted_or_linked_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    """A busy old checkpoint (NFS), a file system without links or folder fsync: named, and the run goes on."""
    write(tmp_path, 10, keep=1)

    def refuse(*call, **more):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(common.shutil, "rmtree", refuse)
    write(tmp_path, 20, keep=1)
    assert "step_0000010 cannot be removed (Device or resource busy)" in capsys.readouterr().err
    monkeypatch.setattr(Path, "symlink_to", refuse)
    write(tmp_path, 30, keep=1)
    assert "no link to step_0000030" in capsys.readouterr().err
    assert common.newest(tmp_path) == tmp_path / "checkpoints" / "step_0000030"


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch before 1.6"])
def test_load_runs_no_code(tmp_path, kind):
    """A file that would run code when unpickled is refused, and its code does not run."""
    path, mark = tmp_path / "x.pt", tmp_path / "was here"
    content = dict(step=1, best=Evil(mark))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
        torch.load(path, weights_only=False)
    assert mark.exists()  # an unsafe reader would have run it
    mark.unlink()
    with pytest.raises(DataError, match="x.pt: not a checkpoint that is safe to load"):
        common.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["zip", "old", "random"])
def test_load_of_garbage_is_a_data_error(tmp_path, kind):
    """A file cut short or of another kind is a DataError in one line that names it."""
    path, draw = tmp_path / "x.pt", torch.Generator().manual_seed(0)
    torch.save(dict(step=3, opt=[1, torch.zeros(5), "x"]), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    cuts = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 97))]
    if kind == "random":
        cuts = [bytes(torch.randint(256, (n,), generator=draw).tolist()) for n in range(100)] + [b"not a checkpoint"]
    for cut in cuts:
        path.write_bytes(cut)
        with pytest.raises(DataError, match="x.pt") as caught:
            common.load(path)
        assert "\n" not in str(caught.value)


def test_load_gives_back_what_was_saved(tmp_path):
    """Tensors and plain values survive; a missing file is a DataError."""
    state = dict(step=3, best=None, x=torch.arange(3), opt={"a": [1.5, "b", (2, True)]})
    torch.save(state, tmp_path / "x.pt")
    back = common.load(tmp_path / "x.pt")
    assert torch.equal(back.pop("x"), state.pop("x")) and back == state
    with pytest.raises(DataError, match="y.pt"):
        common.load(tmp_path / "y.pt")


# --- the run's folder


def test_runs_are_numbered(tmp_path, monkeypatch):
    """Without --out each run gets the next free number; other names are left alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/FOLDER/notes").mkdir(parents=True)
    for number in ("001", "002"):
        args = run_of("")
        args.out = None
        common.open_run(args)
        assert args.out == f"runs/FOLDER/{number}" and (tmp_path / args.out / "args.json").exists()
    (tmp_path / "runs").rename(tmp_path / "old")
    (tmp_path / "runs").symlink_to("/not/mounted")
    args.out = None
    with pytest.raises(DataError, match="--out runs/FOLDER: "):
        common.open_run(args)


def test_an_occupied_folder_is_refused(tmp_path):
    """A run that has begun is not overwritten; one that failed before its first log line is. A file is no --out."""
    common.open_run(run_of(tmp_path / "out", lr=1.0))
    common.open_run(run_of(tmp_path / "out"))
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1}\n')
    before = (tmp_path / "out" / "run.args").read_text()
    with pytest.raises(DataError, match="out holds a run already"):
        common.open_run(run_of(tmp_path / "out", steps=3))
    assert (tmp_path / "out" / "run.args").read_text() == before
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--out .*file"):
        common.open_run(run_of(tmp_path / "file"))


def test_resume_keeps_model_and_optimisation_flags(tmp_path, capsys):
    """--resume refuses a changed flag of args.fixed by name and takes any other; it removes a left-over OUT/stop.

    It says that the split stays, once a checkpoint has one.
    """
    common.open_run(run_of(tmp_path, steps=7))
    (tmp_path / "checkpoints" / "step_0000001").mkdir(parents=True)
    (tmp_path / "stop").touch()
    common.open_run(run_of(tmp_path, resume=True, steps=9, accum=2, val_episodes=["3"]))
    assert not (tmp_path / "stop").exists()
    assert "--val-episodes is not looked at" in capsys.readouterr().err
    before = (tmp_path / "args.json").read_text()
    with pytest.raises(DataError, match="--resume keeps --lr 0.5, not 1.0"):
        common.open_run(run_of(tmp_path, resume=True, lr=1.0))
    assert (tmp_path / "args.json").read_text() == before
    assert json.loads(before)["flags"]["steps"] == 9
    assert json.loads(before)["versions"]["torch"] in torch.__version__


def test_a_live_process_holds_its_folder(tmp_path):
    """A second process is refused with the first one's pid; after kill -9 the folder is free at once."""
    text = """
import time
from argparse import Namespace
args = Namespace(out=sys.argv[1], folder="f", resume=True, wandb=None, fixed=[], lr=0.5)
common.open_run(args)
print("ready", flush=True)
time.sleep(60)
"""
    import subprocess

    with subprocess.Popen([sys.executable, script(tmp_path, text), tmp_path / "o"], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"ready\n"
        with pytest.raises(DataError, match=f"is in use by process {first.pid} on "):
            common.open_run(run_of(tmp_path / "o", resume=True))
        first.kill()
    common.open_run(run_of(tmp_path / "o", resume=True))


def test_wandb_is_looked_for_before_the_folder_is_made(tmp_path, monkeypatch):
    """--wandb without the package is one line, and --out stays free."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails
    with pytest.raises(DataError, match="pip install wandb"):
        common.open_run(run_of(tmp_path / "out", wandb="p"))
    assert not (tmp_path / "out").exists()


def test_run_args_repeats_the_run(tmp_path):
    """`@run.args` gives the same flags again: zeros, switches, lists, spaces, quotes, empty lists."""
    words = ["--steps", "0", "--zero", "0", "--levels", "3", "--fast", "--init", '/ü b/# c/it\'s "d"']
    for number, given in enumerate((words, [], ["--names", "a b", "#1"])):
        args = parser_of().parse_args(given)
        more = dict(out=str(tmp_path / str(number)), resume=False, wandb=None, folder="f", fixed=[])
        common.open_run(argparse.Namespace(**vars(args), **more))
        again = parser_of()
        again.add_argument("--wandb", help="project")
        again = vars(again.parse_args([f"@{tmp_path / str(number) / 'run.args'}"]))
        assert again == vars(args) | dict(wandb=None)


# --- log


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_log_is_cut_to_the_checkpoint(tmp_path, capsys):
    """After a resume the log goes on from the checkpoint's step; a line cut by a kill is named and left out."""
    file = tmp_path / "log.jsonl"
    text = "".join(f'{{"step": {step}, "train/loss": 1.0}}\n' for step in (2, 4, 6)) + '{"step": 8, "tra'
    file.write_text(text)
    open_log(tmp_path, first=8).close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6] and str(file) in capsys.readouterr().err
    file.write_text(text)
    log = open_log(tmp_path, first=4)
    log.write(6, {"train/loss": 2.0})
    log.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(2, 1.0), (4, 1.0), (6, 2.0)]


def test_flush_averages_micro_steps(tmp_path):
    """A logged value is the mean over steps of the weighted sum over micro-steps; then it starts anew."""
    log = open_log(tmp_path)
    for micro in ((1.0, 3.0), (5.0, 7.0)):
        for loss in micro:
            log.add(dict(loss=torch.tensor(loss, requires_grad=True), other=2 * loss), 1 / 2)
        log.add(dict(norm=micro[0]))
        log.tick(0.5, waited=0.125)
    metrics = log.flush(lr=0.25)
    known = {"train/loss": 4.0, "train/other": 8.0, "train/norm": 3.0, "train/lr": 0.25}
    known |= dict(steps_per_s=pytest.approx(2.0), data_fraction=pytest.approx(0.25))
    assert metrics == known
    log.add(dict(loss=9.0))
    log.tick(1.0)
    assert log.flush()["train/loss"] == 9.0
    log.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, bad):
    """A diverged run ends with one line that says where the good checkpoints are."""
    log = open_log(tmp_path)
    for loss in (1.0, bad):
        log.add(dict(loss=torch.tensor(loss)))
        log.tick(1.0)
    with pytest.raises(DataError, match="the loss is not finite"):
        log.flush()
    log.close()


def test_log_lines_are_json_and_tell_the_time_left(tmp_path, capsys):
    """NaN is written as null; the line for people ends with the time left."""
    log = open_log(tmp_path)
    log.write(2, {"train/loss": 1.5, "val/mse": math.nan, "steps_per_s": 0.5})
    log.close()
    found = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert found == {"step": 2, "train/loss": 1.5, "val/mse": None, "steps_per_s": 0.5}
    assert "step 2/100  loss 1.5" in (said := capsys.readouterr().out) and "left 03:16" in said


def test_a_wandb_run_is_resumed_as_one(tmp_path, monkeypatch):
    """--wandb works offline, and a resumed run keeps its id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for first in (0, 3):
        log = open_log(tmp_path, first, wandb="project")
        log.write(first + 1, {"train/loss": 1.0})
        ids.append(log.wandb.id)
        log.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()


def test_only_rank_0_writes(tmp_path, capsys, monkeypatch):
    """Another rank creates no file and prints nothing."""
    monkeypatch.setenv("RANK", "1")
    common.open_run(args := run_of(tmp_path / "out"))
    log = common.Logger(args)
    log.say("hello")
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert not (tmp_path / "out").exists() and not capsys.readouterr().out


def test_read_json_names_the_file(tmp_path):
    """Broken, binary and missing files are a DataError with the path."""
    for content in (b"{", b"\xff\xfe", None):
        path = tmp_path / "x.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match="x.json"):
            common.read_json(path)
    path.write_text('{"a": "ü"}', encoding="utf-8")
    assert common.read_json(path) == SimpleNamespace(a="ü").__dict__


def test_the_best_stays_without_links_and_after_a_copy(tmp_path, monkeypatch):
    write(tmp_path, 10, best=True)
    common.shutil.copytree(tmp_path, tmp_path / "copy")  # follows links
    write(tmp_path / "copy", 20, best=True, keep=1)
    assert (tmp_path / "copy/checkpoints/best").resolve().name == "step_0000020"
    monkeypatch.setattr(Path, "symlink_to", lambda *call, **more: os.chmod("/nowhere", 0))
    for step in (30, 40, 50):
        write(tmp_path, step, keep=1)
    assert (tmp_path / "checkpoints/step_0000010").exists()
