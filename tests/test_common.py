"""common.py: flags, schedule, run folder, log, checkpoints, signals."""

import json
import math
import os
import pickle
import shutil
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

DIST = SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cpu"))


def parse(tmp_path, *words, parser=None):
    """Flags as train.py of a folder FOLDER parses them."""
    (tmp_path / "FOLDER").mkdir(exist_ok=True)
    demo = tmp_path / "FOLDER" / "demo.args"
    demo.write_text("# the demo\n--data demo=here\n--steps 5\n")
    return common.parse(parser or common.flags("doc"), words, demo=demo)


def run_of(tmp_path, *words):
    """Flags of a run in tmp_path/out, its folder made."""
    args = parse(tmp_path, "--data", "x", "--out", tmp_path / "out", *words)
    Path(args.out).mkdir(exist_ok=True)
    return args


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(f"import os, signal, sys\nsys.path.insert(1, {str(ROOT)!r})\nimport common\n{text}")
    return path


# --- flags


def test_every_flag_has_help():
    """A shared flag without help: --help of six folders says nothing about it."""
    for action in common.flags("doc")._actions:
        assert action.help, action.option_strings


def test_help_shows_each_default(capsys):
    """--help hides a default (0 is one), and the reader has to open common.py to learn it."""
    for action in (parser := common.flags("doc"))._actions:
        if action.dest not in ("help", "data", "out", "init", "wandb", "compile", "resume"):
            shown = parser._get_formatter()._expand_help(action)
            default = parser.get_default(action.dest)
            value = " ".join(map(str, default)) if isinstance(default, list) else default
            assert f"[{value}]" in shown, action.dest


def test_no_abbreviation_is_accepted(tmp_path, capsys):
    """--step is taken for --steps: a new flag --step-size would break old command lines."""
    for words in (["--step", 3], ["--batch", 3], ["--warm", 3]):
        with pytest.raises(SystemExit) as ended:
            parse(tmp_path, *words)
        assert ended.value.code == 2 and f"unrecognized arguments: {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, right", [("--hlep", "--help"), ("--batch_size", "--batch-size"), ("--sede", "--seed")])
def test_a_mistyped_flag_gets_a_hint(tmp_path, capsys, wrong, right):
    """A typing error ends in a page of usage instead of one line with the flag that was meant."""
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, wrong, 3)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{wrong}: did you mean {right}?" in error and error.count("\n") == 1


def test_a_mistyped_flag_in_place_of_a_needed_one(tmp_path, capsys):
    """`--checkpiont X` is answered with `--checkpoint is required`, which it seems to be there."""
    parser, preset = common.Parser("doc"), tmp_path / "preset.args"
    parser.add_argument("--checkpoint", required=True)
    preset.write_text("--checkpiont x\n")
    for words in (["--checkpiont=x"], [f"@{preset}", "--checkpoint", "y"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert "--checkpiont: did you mean --checkpoint?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--amp", "fp8"], ["--steps", "many"], ["--seed"]])
def test_a_wrong_value_gets_no_hint(tmp_path, capsys, words):
    """`--amp fp8` is answered with `did you mean --amp?`: the flag was right, the hint leads astray."""
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, *words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words[0] in error and "did you mean" not in error


def test_presets(tmp_path):
    """@file loses a quoted path, trips over a comment, or wins over a flag that follows it."""
    preset = tmp_path / "a preset.args"
    preset.write_text('# it\'s a comment\n--data "x=/some where/ü" y=b   # two\n\n--steps 7 --lr 0.5\n--compile\n')
    args = parse(tmp_path, f"@{preset}", "--lr", 0.25)
    assert args.data == ["x=/some where/ü", "y=b"] and args.compile and not args.demo
    assert (args.steps, args.lr, args.batch_size) == (7, 0.25, 64)


def test_an_omitted_flag_is_refused(tmp_path, capsys):
    """A folder that cannot honour a flag accepts and ignores it."""
    parser = common.flags("doc", omit={"amp", "compile"})
    assert not {"amp", "compile"} & {action.dest for action in parser._actions}
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, "--amp", "bf16", parser=parser)
    assert ended.value.code == 2
    assert not hasattr(parse(tmp_path, "--data", "x", parser=common.flags("doc", omit={"accum", "clip"})), "clip")


def test_without_data_the_demo_runs(tmp_path, capsys, monkeypatch):
    """The first command of each README fails: no --data is demo.args, said once, and flags win over it."""
    args = parse(tmp_path, "--lr", 3)
    assert args.demo and (args.data, args.steps, args.lr, args.folder) == (["demo=here"], 5, 3.0, "FOLDER")
    assert capsys.readouterr().out.startswith("no --data: running the demo")
    monkeypatch.setenv("RANK", "1")
    assert parse(tmp_path, "--steps", 6).steps == 6 and not capsys.readouterr().out
    args = parse(tmp_path, "--data", "a", "b")
    assert not args.demo and args.data == ["a", "b"] and args.steps == 1000


@pytest.mark.parametrize(
    "words",
    [
        *(["--steps", 0], ["--batch-size", -1], ["--accum", 0], ["--lr", "nan"], ["--lr", 0], ["--clip", 0]),
        *(["--keep", 0], ["--log-every", 0], ["--warmup", -1], ["--lr-end", "nan"], ["--seed", -1], ["--resume"]),
    ],
)
def test_values_that_make_no_run(tmp_path, capsys, words):
    """A rate of nan, 0 checkpoints kept or --resume of nothing starts a run that is lost hours later."""
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, "--data", "x", *words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words[0] in error and error.count("\n") == 1


def test_importing_common_imports_no_framework(tmp_path):
    """`import common` drags torch into the JAX folder, and 4 seconds into every --help."""
    path = script(tmp_path, "print({'torch', 'jax', 'numpy', 'wandb'} & set(sys.modules))")
    assert launch(path).stdout == "set()\n"


# --- schedule, seeds, precision, device


def test_cosine():
    """The rate's warm-up, peak or end is off, in all folders at once and without a message."""
    args = SimpleNamespace(lr=2.0, lr_end=0.5, warmup=4, steps=20)
    rates = [common.cosine(step, args) for step in range(21)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[12] == pytest.approx(1.25) and rates[20] == common.cosine(99, args) == 0.5
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    flat = SimpleNamespace(lr=2.0, lr_end=2.0, warmup=0, steps=20)
    assert {common.cosine(step, flat) for step in range(21)} == {2.0}
    short = SimpleNamespace(lr=2.0, lr_end=0.0, warmup=8, steps=4)
    assert [common.cosine(step, short) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_seed_depends_on_every_number():
    """A resumed step draws other noise than it drew before, or two ranks draw the same."""

    def draw(*key):
        common.seed(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 10, 0), (0, 1, 10)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, 1, 0) == draw(0, 1, 0)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gradient_that_is_not_finite_is_skipped(amp):
    """One bad batch writes NaN into the weights; or, after it, steps are no longer the optimizer's own."""
    context, scaler = common.autocast(SimpleNamespace(amp=amp), torch.device("cpu"))
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = torch.optim.SGD([weight], lr=0.5)

    def step(factor):
        with context:
            loss = (weight * factor).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        return weight.tolist()

    assert step(torch.tensor([1.0, 1.0])) == [0.5, 1.5]
    for bad in (math.inf, math.nan, math.inf):
        assert step(torch.tensor([1.0, bad])) == [0.5, 1.5]
    assert step(torch.tensor([1.0, -2.0])) == [0.0, 2.5]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_skipped_steps_leave_no_trace(amp):
    """Each skipped step halves a scale that never grows again: after 130 in all, the weights turn to infinity."""
    scaler = common.autocast(SimpleNamespace(amp=amp), torch.device("cpu"))[1]
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    opt = torch.optim.SGD([weight], lr=0.5)
    for factor in [math.nan] * 160 + [1.0]:
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert weight.tolist() == [0.5]


def test_autocast_computes_in_the_asked_precision():
    """--amp is accepted and ignored."""
    for amp, dtype in dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16).items():
        with common.autocast(SimpleNamespace(amp=amp), torch.device("cpu"))[0]:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("name", ["banana", "cuda:99", "cuda:one", "hpu", "meta"])
def test_a_device_that_is_not_there(name):
    """--device with a typing error ends in a traceback from inside torch."""
    with pytest.raises(ValueError, match=f"--device {name}"):
        common.setup(SimpleNamespace(device=name, seed=0))


def test_setup_alone():
    """One process without torchrun gets no rank 0, or another seed each time."""
    dist = common.setup(SimpleNamespace(device="cpu", seed=3))
    assert (dist.rank, dist.world, dist.main, dist.device.type) == (0, 1, True, "cpu")
    drawn = torch.rand(3)
    common.setup(SimpleNamespace(device="cpu", seed=3))
    assert torch.equal(torch.rand(3), drawn)


def test_mean_alone():
    """The weighted mean of one process, and a metric that nothing was counted for."""
    assert common.mean(DIST, {"a": 6.0, "b": 0.0}, {"a": 3, "b": 0}) == {"a": 2.0, "b": 0.0}


def test_unwrap():
    """Checkpoints get keys with `module.` or `_orig_mod.` in front, which no other process count loads."""
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model)
    assert common.unwrap(model) is common.unwrap(compiled) is model
    assert common.unwrap(SimpleNamespace(module=compiled)) is model


def test_a_report_goes_to_its_run(tmp_path, capsys):
    """`best` leads the report astray, a checkpoint without its run writes two folders up, or --out is ignored."""
    parser, run = common.Parser("doc"), tmp_path / "run"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (best := run / "checkpoints" / "best").symlink_to("step_1")
    (run / "args.json").touch()

    def where(checkpoint, out=None):
        return common.report_folder(parser, SimpleNamespace(checkpoint=checkpoint, out=out))

    assert Path(where(str(best))) == run / "report" and where(str(best), "elsewhere") == "elsewhere"
    assert where(None, "elsewhere") == "elsewhere"
    for checkpoint in (str(run), None):
        with pytest.raises(SystemExit):
            where(checkpoint)
        assert "give --out DIR" in capsys.readouterr().err


# --- run(): how a script ends

RUN = """
def main():
    what = sys.argv[1]
    if what == "value": raise ValueError("data/ü.npz: no array `actions`\\nwrite one")
    if what == "file": open("/nowhere/at all")
    if what == "empty": raise ValueError
    if what == "bug": raise KeyError("a bug of ours")
    if what == "reset": raise ConnectionResetError(104, "Connection reset by peer")
    if what == "killed": raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    if what == "torch": raise RuntimeError("shapes")
    if what == "ctrl": raise KeyboardInterrupt
    print("done")
    return int(what)
common.run(main)
"""


def test_run_ends_a_users_mistake_in_one_line(tmp_path):
    """A broken file ends in a traceback, a bug of ours in one line, or sbatch sees the wrong exit code."""
    path, utf8 = script(tmp_path, RUN), {"PYTHONUTF8": "1"}
    done = launch(path, "value", env=utf8)
    assert (done.returncode, done.stderr) == (2, "error: data/ü.npz: no array `actions` write one\n")
    done = launch(path, "file")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "/nowhere/at all" in done.stderr
    assert (done := launch(path, "empty")).returncode == 2 and done.stderr == "error: ValueError\n"
    done = launch(path, "value", env={"TRACEBACK": "1", **utf8})
    assert done.returncode == 1 and "Traceback" in done.stderr and "in main" in done.stderr
    for what in ("reset", "killed"):
        done = launch(path, what)
        assert done.returncode == 2 and done.stderr.startswith("error: a loader process died")
    for what, word in (("bug", "a bug of ours"), ("torch", "shapes")):
        done = launch(path, what)
        assert done.returncode == 1 and "Traceback" in done.stderr and word in done.stderr
    assert (done := launch(path, "ctrl")).returncode == 130 and "Traceback" not in done.stderr
    for code in (0, 75):
        done = launch(path, code)
        assert (done.returncode, done.stdout, done.stderr) == (code, "done\n", "")


@pytest.mark.parametrize("spell", [{"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {}])
def test_run_in_a_locale_without_unicode(tmp_path, spell):
    """Where the locale is not UTF-8, a report with ü in it, or a folder called 数据, ends in a codec's error."""
    text = """
def main():
    out = pathlib.Path(sys.argv[1])
    (out / "R².md").write_text("ü 数据 −")
    print(out.name, len(sys.argv))
common.run(main)
"""
    (folder := tmp_path / "数据").mkdir()
    done = launch(script(tmp_path, "import pathlib" + text), folder, env={**spell, "PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "数据 2\n")
    assert (folder / "R².md").read_text("utf-8") == "ü 数据 −"


# --- atomic


def test_atomic_file(tmp_path):
    """An exception while writing leaves half a file under the real name, or a temporary beside it."""
    path = tmp_path / "ü x.json"
    path.write_text("old")
    with pytest.raises(KeyError), common.atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == path.parent
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), common.atomic(path):
        raise KeyError  # before anything was written
    with common.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_atomic_folder(tmp_path):
    """The same for a folder: no half-written checkpoint, and nothing of the old one in the new."""
    path = tmp_path / "step"
    with common.atomic(path, folder=True) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("old")
    with pytest.raises(KeyError), common.atomic(path, folder=True) as temporary:
        (temporary / "b").write_text("half")
        raise KeyError
    assert (path / "deep" / "a").read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with common.atomic(path, folder=True) as temporary:
        (temporary / "b").write_text("new")
    assert [part.name for part in path.rglob("*")] == ["b"] and list(tmp_path.iterdir()) == [path]


KILL = "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"


def test_killed_between_write_and_rename(tmp_path):
    """SIGKILL at the worst moment: the old file is gone or half of it is new."""
    path = tmp_path / "args.json"
    path.write_text("old")
    text = f"{KILL}with common.atomic(sys.argv[1]) as path:\n    path.write_text('new')\n"
    assert launch(script(tmp_path, text), path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with common.atomic(path) as temporary:  # what the killed process left is in nobody's way
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_killed_while_a_checkpoint_is_written(tmp_path):
    """SIGKILL before the rename: the half checkpoint counts as one, or stays on the disk for ever."""
    args = run_of(tmp_path)
    write(args, 10)
    root = Path(args.out) / "checkpoints"
    text = f"""{KILL}from types import SimpleNamespace
with common.checkpoint(SimpleNamespace(out=sys.argv[1], keep=2, steps=20, data=["x"], folder="f"), 20) as folder:
    (folder / "weights").write_bytes(b"20")
"""
    assert launch(script(tmp_path, text), args.out).returncode == -signal.SIGKILL
    assert len(list(root.glob(".*.tmp"))) == 1
    assert common.newest(args, DIST) == root / "step_0000010"
    assert not list(root.glob(".*.tmp"))


# --- checkpoints


def test_model_card_beside_a_checkpoint(tmp_path):
    """A checkpoint that is passed on says neither what it is, nor from which data, nor how good."""
    args = run_of(tmp_path)
    lines = [{"step": 5, "val/a/mse": 0.5, "train/loss": 3}, {"step": 10, "val/a/mse": 0.25, "val/b/mse": None}]
    (Path(args.out) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(args, 10)
    card = (Path(args.out) / "checkpoints" / "last" / "README.md").read_text()
    assert "step 10 of" in card and "| `val/a/mse` | 0.25 |" in card and "train/loss" not in card
    assert all(word in card for word in (args.folder, *args.data, "licence")) and "val/b" not in card


def write(args, step, best=False):
    with common.checkpoint(args, step, best) as folder:
        (folder / "weights").write_bytes(f"weights of {step}".encode() * 9)
        (folder / "more").mkdir()
        (folder / "more" / "state").write_bytes(b"state")


def names(args):
    return sorted(path.name for path in (Path(args.out) / "checkpoints").iterdir())


def test_links_and_pruning(tmp_path):
    """--keep deletes the best checkpoint or keeps all; `last` or `best` points at another, or at nothing."""
    args = run_of(tmp_path, "--keep", 2)
    root = Path(args.out) / "checkpoints"
    for step in (10, 20, 30, 40, 50):
        write(args, step, best=step == 20)
    assert names(args) == ["best", "last", "step_0000020", "step_0000040", "step_0000050"]
    assert os.readlink(root / "last") == "step_0000050" and os.readlink(root / "best") == "step_0000020"
    write(args, 60, best=True)
    assert names(args) == ["best", "last", "step_0000050", "step_0000060"]
    assert (root / "best" / "weights").read_bytes() == b"weights of 60" * 9
    moved = root.parent.rename(tmp_path / "moved")
    assert (moved / "checkpoints" / "best" / "whole.json").exists()


def test_a_left_over_link_is_in_nobodys_way(tmp_path):
    """Killed between making a link and renaming it: a next process of the same id (containers) cannot save."""
    args = run_of(tmp_path)
    write(args, 10)
    (Path(args.out) / "checkpoints" / f".last.{os.getpid()}.tmp").symlink_to("step_0000010")
    common.newest(args, DIST)
    write(args, 20)
    assert os.readlink(Path(args.out) / "checkpoints" / "last") == "step_0000020"


def damage(folder, how):
    weights = folder / "weights"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif how == "lost":
        (folder / "more" / "state").unlink()
    elif how == "no whole.json":
        (folder / "whole.json").unlink()
    else:
        (folder / "whole.json").write_text((folder / "whole.json").read_text()[:-5])


@pytest.mark.parametrize("how", ["truncated", "flipped", "lost", "no whole.json", "half whole.json"])
def test_newest_passes_over_a_damaged_checkpoint(tmp_path, capsys, how):
    """A requeued run goes on from damaged weights, or dies although the checkpoint before is whole."""
    args = run_of(tmp_path)
    root = Path(args.out) / "checkpoints"
    assert common.newest(args, DIST) is None
    write(args, 10)
    write(args, 20)
    assert common.newest(args, DIST) == root / "step_0000020" and not capsys.readouterr().out
    damage(root / "step_0000020", how)
    assert common.newest(args, DIST) == root / "step_0000010"
    said = capsys.readouterr().out
    assert f"{root / 'step_0000020'} is damaged" in said and "step_0000010" not in said
    write(args, 20)  # the run goes on and writes it again
    assert common.newest(args, DIST) == root / "step_0000020"
    for step in (10, 20):
        damage(root / f"step_00000{step}", how)
    assert common.newest(args, DIST) is None and "step_0000010 is damaged" in capsys.readouterr().out


class Model(torch.nn.Linear):
    def save_pretrained(self, folder):
        torch.save(self.state_dict(), Path(folder) / "weights.pt")

    def load_pretrained(self, folder):
        self.load_state_dict(common.load(Path(folder) / "weights.pt"))


def training(amp="off"):
    model = Model(2, 1)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = common.autocast(SimpleNamespace(amp=amp), torch.device("cpu"))[1]
    return model, opt, scaler


def train(model, opt, scaler, steps):
    for step in range(steps):
        scaler.scale(model(torch.ones(1, 2) * (step + 1)).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


def test_save_and_resume(tmp_path):
    """Optimizer, scaler, step or best metric is lost on resume; --init takes more than the weights."""
    args = run_of(tmp_path, "--resume", "--amp", "fp16")
    one, two = training("fp16"), training("fp16")
    assert common.resume(args, DIST, *two) == (0, None)  # nothing there yet: a first start
    train(*one, 3)
    common.save(args, DIST, 3, *one, best=0.25, is_best=True)
    assert common.resume(args, DIST, *two) == (3, 0.25)
    for each in (one, two):
        train(*each, 2)
    assert torch.equal(one[0].weight, two[0].weight) and one[2].state_dict() == two[2].state_dict()
    args = parse(tmp_path, "--data", "x", "--out", tmp_path / "b", "--init", tmp_path / "out/checkpoints/best")
    model, opt, scaler = training()
    assert common.resume(args, DIST, model, opt, scaler) == (0, None) and not opt.state
    assert torch.equal(model.weight, torch.load(Path(args.init) / "weights.pt", weights_only=True)["weight"])


@pytest.mark.parametrize("kind", [RuntimeError, SafetensorError])
def test_a_full_disk_is_one_line(tmp_path, kind):
    """What torch or safetensors say of a full disk ends in a traceback, or leaves half a checkpoint behind."""
    args = run_of(tmp_path)
    model, opt, scaler = training()
    common.save(args, DIST, 1, model, opt, scaler, None)

    def full(folder):
        (folder / "weights.pt").write_bytes(b"half")
        raise kind("PytorchStreamWriter failed writing file data/0: file write failed\nmore")

    model.save_pretrained = full
    with pytest.raises(OSError, match="cannot write .*checkpoints .PytorchStreamWriter"):
        common.save(args, DIST, 2, model, opt, scaler, None)
    assert names(args) == ["last", "step_0000001"]
    model.save_pretrained = None
    with pytest.raises(TypeError):  # a bug of ours stays one
        common.save(args, DIST, 2, model, opt, scaler, None)


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch before 1.6"])
def test_load_runs_no_code(tmp_path, kind):
    """A checkpoint from the internet runs what its author likes on the machine that loads it."""
    path, mark = tmp_path / "x.pt", tmp_path / "was here"
    content = dict(step=1, best=Evil(mark))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
        torch.load(path, weights_only=False)
    assert mark.exists()  # the weapon is loaded: an unsafe reader would fire it
    mark.unlink()
    with pytest.raises(ValueError, match="x.pt: not a checkpoint that is safe to load"):
        common.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["zip", "old", "random"])
def test_load_of_garbage_is_a_value_error(tmp_path, kind):
    """A file cut short or of another kind ends in a traceback (IndexError ...) from inside torch."""
    path, wrong, draw = tmp_path / "x.pt", [], torch.Generator().manual_seed(0)
    torch.save(dict(step=3, opt=[1, torch.zeros(5), "x"]), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    cuts = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 97))]
    if kind == "random":
        cuts = [bytes(torch.randint(256, (n,), generator=draw).tolist()) for n in range(100)] + [b"not a checkpoint"]
    for cut in cuts:
        path.write_bytes(cut)
        try:
            common.load(path)
            wrong.append("loaded")
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        except Exception as error:
            wrong.append(repr(error))
    assert not wrong, sorted(set(wrong))


def test_load_gives_back_what_was_saved(tmp_path):
    """The safe reader refuses our own checkpoints."""
    state = dict(step=3, best=None, x=torch.arange(3), opt={"a": [1.5, "b", (2, True)]})
    torch.save(state, tmp_path / "x.pt")
    back = common.load(tmp_path / "x.pt")
    assert torch.equal(back.pop("x"), state.pop("x")) and back == state
    with pytest.raises(FileNotFoundError):
        common.load(tmp_path / "y.pt")


# --- the run's folder


def test_runs_are_numbered(tmp_path, monkeypatch):
    """Two runs without --out share a folder."""
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002", "010"):
        args = parse(tmp_path, "--data", "x")
        common.open_run(args, DIST)
        assert args.out == f"runs/FOLDER/{number}" and (tmp_path / args.out / "args.json").exists()
        if number == "002":
            (tmp_path / "runs/FOLDER/009").mkdir()
            (tmp_path / "runs/FOLDER/notes").mkdir()


def test_an_occupied_folder_is_refused(tmp_path):
    """A second run writes over the first one's checkpoints."""
    args = parse(tmp_path, "--data", "x", "--out", tmp_path / "out")
    common.open_run(args, DIST)
    before = (tmp_path / "out" / "run.args").read_text()
    with pytest.raises(ValueError, match="out holds a run already"):
        common.open_run(parse(tmp_path, "--data", "x", "--out", tmp_path / "out", "--steps", 3), DIST)
    assert (tmp_path / "out" / "run.args").read_text() == before


def test_resume_names_the_changed_flag(tmp_path):
    """--resume goes on with another model, data or rate; or refuses more steps, what one resumes for."""
    words = ["--data", "x", "--out", tmp_path / "out"]
    common.open_run(parse(tmp_path, *words), DIST)
    (tmp_path / "out" / "stop").touch()
    common.open_run(parse(tmp_path, *words, "--resume", "--steps", 9, "--keep", 5, "--workers", 3), DIST)
    assert not (tmp_path / "out" / "stop").exists()  # else the requeued run would stop at once
    about = (tmp_path / "out" / "args.json").read_text()
    for more in (["--lr", 1], ["--batch-size", 8], ["--betas", 0.5, 0.5], ["--data", "y"], ["--amp", "bf16"]):
        with pytest.raises(ValueError, match=f"{more[0]} was .* and is now .*"):
            common.open_run(parse(tmp_path, *words, "--resume", *more), DIST)
    assert (tmp_path / "out" / "args.json").read_text() == about
    about = json.loads(about)
    assert about["flags"]["steps"] == 9 and about["versions"]["torch"] in torch.__version__


@pytest.mark.parametrize(
    "more",
    [
        ["--lr", 0.25, "--betas", 0.5, 0.75, "--compile", "--wandb", "a project", "--init", '/ü b/# c/it\'s "d"'],
        ["--warmup", 0],
        ["--weight-decay", 0, "--lr-end", 0, "--workers", 0],
        ["--names"],
    ],
    ids=["plain", "zero", "zeros", "empty"],
)
def test_run_args_repeats_the_run(tmp_path, more):
    """`train.py @run.args` trains something else: a 0 comes back as the default, a path with spaces in two."""
    parser = common.flags("doc")
    parser.add_argument("--names", nargs="*", default=[], help="names")
    out, data = tmp_path / "out ü", ["x=/some where/ü", "it's", "#1"]
    first = parse(tmp_path, "--data", *data, "--out", out, *more, parser=parser)
    common.open_run(first, DIST)
    again = parse(tmp_path, f"@{out / 'run.args'}", "--out", out, parser=parser)
    assert vars(again) == vars(first)


def test_run_args_of_an_empty_list(tmp_path):
    """A flag of one or more words that defaults to none (--val-episodes): run.args does not parse."""
    parser = common.flags("doc")
    parser.add_argument("--names", nargs="+", default=[], help="names")
    common.open_run(first := parse(tmp_path, "--data", "x", "--out", tmp_path / "out", parser=parser), DIST)
    again = parse(tmp_path, f"@{tmp_path / 'out' / 'run.args'}", "--out", tmp_path / "out", parser=parser)
    assert vars(again) == vars(first)


# --- log


def lines(args):
    return [json.loads(line) for line in (Path(args.out) / "log.jsonl").read_text().splitlines()]


def test_log_is_cut_to_the_checkpoint(tmp_path):
    """After a resume log.jsonl holds steps twice, or a line that a kill cut in half breaks every reader."""
    args = run_of(tmp_path)
    file = Path(args.out) / "log.jsonl"
    file.write_text("".join(f'{{"step": {step}, "train/loss": 1.0}}\n' for step in (2, 4, 6)) + '{"step": 8, "tra')
    shutil.copy(file, tmp_path / "copy")
    common.Logger(args, DIST, first=8).close()
    assert [line["step"] for line in lines(args)] == [2, 4, 6]
    shutil.copy(tmp_path / "copy", file)
    log = common.Logger(args, DIST, first=4)
    log.write(6, {"train/loss": 2.0})
    log.close()
    assert [(line["step"], line["train/loss"]) for line in lines(args)] == [(2, 1.0), (4, 1.0), (6, 2.0)]
    common.Logger(args, DIST).close()
    assert lines(args) == []


def test_flush_averages_micro_steps(tmp_path):
    """The logged loss depends on --accum or --log-every."""
    log = common.Logger(run_of(tmp_path), DIST)
    for micro in ((1.0, 3.0), (5.0, 7.0)):
        for loss in micro:
            log.add(dict(loss=torch.tensor(loss, requires_grad=True), other=2 * loss), 1 / 2)
        log.add(dict(norm=micro[0]))
        log.tick()
    metrics = log.flush(lr=0.5)
    known = {"train/loss": 4.0, "train/other": 8.0, "train/norm": 3.0, "train/lr": 0.5}
    assert {name: metrics[name] for name in known} == known
    assert metrics["steps_per_s"] > 0
    log.add(dict(loss=9.0))
    log.tick()
    assert log.flush()["train/loss"] == 9.0  # nothing of the interval before
    log.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, bad):
    """A diverged run burns its GPU hours and overwrites the good checkpoints with NaN."""
    log = common.Logger(run_of(tmp_path), DIST)
    for loss in (1.0, bad):
        log.add(dict(loss=torch.tensor(loss)))
        log.tick()
    with pytest.raises(ValueError, match="the loss is not finite"):
        log.flush()
    log.close()


def test_log_lines_are_json(tmp_path, capsys):
    """A NaN metric writes a line that no JSON reader but Python's takes."""
    log = common.Logger(args := run_of(tmp_path), DIST)
    log.write(2, {"train/loss": 1.5, "val/mse": math.nan})
    log.close()
    text = (Path(args.out) / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 2, "train/loss": 1.5, "val/mse": None}
    assert "step 2/1000" in capsys.readouterr().out


def test_only_rank_0_writes(tmp_path, capsys):
    """Ranks write over one another's log."""
    other = SimpleNamespace(rank=1, world=1, main=False, device=torch.device("cpu"))
    args = run_of(tmp_path)
    common.open_run(args, other)
    log = common.Logger(args, other)
    log.say("hello")
    log.write(1, {"train/loss": 1.0})
    common.save(args, other, 1, *training(), best=None)
    log.close()
    assert not list(Path(args.out).iterdir()) and not capsys.readouterr().out


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step(tmp_path, number, code):
    """The scheduler's signal kills the run in mid-step, or sbatch does not requeue it."""
    signal.signal(number, lambda *call: None)  # else a handler that is missing would end pytest
    stop = common.Interrupt(run_of(tmp_path), DIST)
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop() and stop() and stop.code == code


def test_the_stop_file_ends_the_step(tmp_path):
    """What slurm/train.sbatch writes before the time limit goes unnoticed."""
    stop = common.Interrupt(args := run_of(tmp_path), DIST)
    assert not stop()
    (Path(args.out) / "stop").touch()
    assert stop() and stop.code == 75


def test_a_second_ctrl_c_ends_at_once(tmp_path, capfd):
    """A run that hangs in a step cannot be ended from the keyboard, or is silent on the first Ctrl-C."""
    stop = common.Interrupt(run_of(tmp_path), DIST)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop() and "Ctrl-C again ends at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        stop()


# --- two processes

TWO = """
import json
from types import SimpleNamespace
from pathlib import Path
os.chdir(sys.argv[1])
args = SimpleNamespace(device="cpu", seed=0, out=None, folder="FOLDER", resume=False)
dist = common.setup(args)
totals, counts = ({"loss": 2.0}, {"loss": 1}) if dist.main else ({"loss": 10.0, "b": 6.0}, {"loss": 3, "b": 2})
mean = common.mean(dist, totals, counts)
shared = common.share(dist, ["rank", dist.rank])
common.open_run(args, dist)
stop = common.Interrupt(args, dist)
before = stop()
if dist.rank == 1: os.kill(os.getpid(), signal.SIGTERM)
after = stop()
Path(f"{dist.rank}.json").write_text(json.dumps([mean, shared, args.out, before, after, stop.code, dist.world]))
common.cleanup(dist, SimpleNamespace(close=lambda: None))
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Under torchrun: a mean of rank 0 alone, two folders for one run, or one rank stops, the other waits."""
    done = launch(script(tmp_path, TWO), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [{"loss": 3.0, "b": 3.0}, ["rank", 0], "runs/FOLDER/001", False, True, 75, 2]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


FAILS = """
from types import SimpleNamespace
def main():
    dist = common.setup(SimpleNamespace(device="cpu", seed=0))
    if dist.rank == 1: raise ValueError("rank 1 has a broken file")
    common.share(dist, 1)
    common.share(dist, 2)
    import torch
    torch.distributed.barrier()
common.run(main)
"""


@pytest.mark.slow
def test_one_failing_process_ends_all(tmp_path):
    """A broken file on one rank: the others wait for it until the time limit, at the price of all GPUs."""
    done = launch(script(tmp_path, FAILS), ranks=2, timeout=240)
    assert done.returncode != 0 and "error: rank 1 has a broken file" in done.stderr
