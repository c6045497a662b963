"""common.py: flags, schedule, the run's folder, checkpoints that are whole or absent, signals."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch

import common

ALONE = SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cpu"))


def parser():
    return common.flags("Learns.\nRun:\n  this")


def arguments(tmp_path, *words):
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "folder" / "demo.args").write_text("# a comment\n--data 'a b=c d'  # and one here\n--steps 7\n")
    return common.parse(parser(), [*words], tmp_path / "folder" / "demo.args")


class Toy(torch.nn.Linear):
    def __init__(self, value=0.0):
        super().__init__(2, 2)
        torch.nn.init.constant_(self.weight, value)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    def load_pretrained(self, folder):
        self.load_state_dict(common.load(folder / "pytorch_model.bin"))


def run_with(tmp_path, *words):
    args = arguments(tmp_path, "--data", "x", "--out", str(tmp_path / "out"), *words)
    common.open_run(args, ALONE)
    return args


def save(args, step, value=None, best=False):
    model = Toy(step if value is None else value)
    opt = torch.optim.AdamW(model.parameters())
    common.save(args, ALONE, step, model, opt, common.autocast(args, ALONE.device)[1], 0.5, best)


def steps(args):
    return sorted(path.name for path in (common.Path(args.out) / "checkpoints").iterdir())


# --- flags


def test_flags_refuse_abbreviations_and_point_at_the_right_one(capsys):
    for words in (["--step", "3"], ["--hlep"]):
        with pytest.raises(SystemExit) as stop:
            parser().parse_args(words)
        assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "did you mean --steps?" in lines[0] and "did you mean --help?" in lines[1]


def test_omitted_flags_are_errors_and_defaults_are_shown(capsys):
    small = common.flags("x", omit={"amp"})
    with pytest.raises(SystemExit):
        small.parse_args(["--amp", "off"])
    assert not hasattr(small.parse_args([]), "amp")
    text = " ".join(parser().format_help().split())
    assert "optimizer steps in all [1000]" in text and "[None]" not in text and "[False]" not in text


def test_without_data_the_demo_preset_comes_first_and_says_so(tmp_path, capsys):
    args = arguments(tmp_path, "--lr", "0.5")
    assert args.demo and args.data == ["a b=c d"] and args.steps == 7 and args.lr == 0.5
    assert "running the demo" in capsys.readouterr().out
    args = arguments(tmp_path, "--data", "x", "--steps", "9")
    assert not args.demo and args.steps == 9 and args.folder == "folder"
    assert arguments(tmp_path, "--steps", "9").steps == 9  # a flag beats the preset


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--workers", "-1"], ["--resume"], ["--clip", "0"]]
)
def test_impossible_values_are_refused(tmp_path, words):
    with pytest.raises(SystemExit) as stop:
        arguments(tmp_path, "--data", "x", *words)
    assert stop.value.code == 2


def test_run_args_repeats_the_run(tmp_path):
    words = ["--data", "a=/tmp/ü b", "c=d'e", "--betas", "0.8", "0.9", "--compile", "--lr", "3e-4"]
    args = arguments(tmp_path, *words, "--out", str(tmp_path / "out"))
    common.open_run(args, ALONE)
    again = arguments(tmp_path, f"@{tmp_path / 'out' / 'run.args'}")
    same = {name: value for name, value in vars(again).items() if name != "out"}
    assert same == {name: value for name, value in vars(args).items() if name != "out"} and again.out is None


def test_cosine_ends():
    args = SimpleNamespace(steps=100, warmup=10, lr=1.0, lr_end=0.1)
    assert common.cosine(0, args) == pytest.approx(0.1) and common.cosine(9, args) == common.cosine(10, args) == 1.0
    assert common.cosine(55, args) == pytest.approx(0.55) and common.cosine(100, args) == pytest.approx(0.1)
    rates = [common.cosine(step, args) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    flat = SimpleNamespace(steps=100, warmup=0, lr=0.5, lr_end=0.5)
    assert {common.cosine(step, flat) for step in range(101)} == {0.5}


# --- the run's folder


def test_out_is_numbered_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        args = arguments(tmp_path, "--data", "x")
        common.open_run(args, ALONE)
        assert args.out == f"runs/folder/{number}"
    about = json.loads((tmp_path / "runs/folder/001/args.json").read_text())
    assert torch.__version__.startswith(about["versions"]["torch"]) and about["flags"]["data"] == ["x"]
    with pytest.raises(ValueError, match="holds a run already"):
        common.open_run(arguments(tmp_path, "--data", "x", "--out", "runs/folder/001"), ALONE)


def test_resume_names_the_flag_that_changed(tmp_path):
    run_with(tmp_path, "--lr", "1")
    run_with(tmp_path, "--lr", "1", "--resume", "--steps", "5", "--workers", "2")
    with pytest.raises(ValueError, match="--lr was 1.0 and is now 2.0"):
        run_with(tmp_path, "--lr", "2", "--resume")


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    args = run_with(tmp_path)
    log = common.Logger(args, ALONE)
    for step in (1, 2, 3, 4):
        log.write(step, {"x": step, "bad": float("nan")})
    log.close()
    with open(log.out / "log.jsonl", "a") as file:
        file.write('{"step": 5, "x"')  # killed while writing
    common.Logger(args, ALONE, first=2).close()
    lines = [json.loads(line) for line in (log.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["bad"] is None


def test_flush_is_the_mean_over_micro_steps_and_steps(tmp_path):
    log = common.Logger(run_with(tmp_path), ALONE)
    for values in ((1.0, 3.0), (5.0, 7.0)):
        for value in values:
            log.add(dict(loss=torch.tensor(value)), 1 / 2)
        log.tick()
    assert log.flush(lr=0.1)["train/loss"] == pytest.approx(4.0)
    log.add(dict(loss=torch.tensor(float("nan"))))
    log.tick()
    with pytest.raises(ValueError, match="not finite"):
        log.flush()


# --- checkpoints


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_leaves_the_old_or_the_new(tmp_path, folder):
    target = tmp_path / "x"
    for content, fails in (("old", False), ("half", True), ("new", False)):
        with contextlib.suppress(KeyError), common.atomic(target, folder) as path:
            (path / "file" if folder else path).write_text(content)
            if fails:
                raise KeyError
        expected = "old" if fails else content
        assert (target / "file" if folder else target).read_text() == expected
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_kill_between_write_and_rename_keeps_the_old(tmp_path):
    (tmp_path / "x").write_text("old")
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); import common\n"
        f"with common.atomic({str(tmp_path / 'x')!r}) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / "x").read_text() == "old"


def test_keep_last_and_best(tmp_path):
    args = run_with(tmp_path, "--keep", "2")
    for step in (1, 2, 3, 4, 5):
        save(args, step, best=step == 2)
    assert steps(args) == ["best", "last", "step_0000002", "step_0000004", "step_0000005"]
    root = common.Path(args.out) / "checkpoints"
    assert os.readlink(root / "last") == "step_0000005" and os.readlink(root / "best") == "step_0000002"


def truncate(file):
    file.write_bytes(file.read_bytes()[:100])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "pytorch_model.bin"),
        lambda folder: flip(folder / "resume.pt"),
        lambda folder: (folder / "resume.pt").unlink(),
        lambda folder: (folder / "whole.json").unlink(),
        lambda folder: (folder / "whole.json").write_text("{"),
    ],
)
def test_resume_falls_back_over_a_damaged_checkpoint(tmp_path, capsys, damage):
    args = run_with(tmp_path)
    for step in (1, 2):
        save(args, step)
    damage(common.Path(args.out) / "checkpoints" / "step_0000002")
    (common.Path(args.out) / "checkpoints" / ".step_0000003.99.tmp").mkdir()  # killed while saving
    args = run_with(tmp_path, "--resume")
    model = Toy()
    opt = torch.optim.AdamW(model.parameters())
    first, best = common.resume(args, ALONE, model, opt, common.autocast(args, ALONE.device)[1])
    assert first == 1 and best == 0.5 and (model.weight == 1).all()
    assert "step_0000002 is damaged" in capsys.readouterr().out
    assert steps(args) == ["last", "step_0000001", "step_0000002"]


def test_resume_without_a_checkpoint_starts(tmp_path):
    args, model = run_with(tmp_path, "--resume"), Toy(3.0)
    opt = torch.optim.AdamW(model.parameters())
    assert common.resume(args, ALONE, model, opt, None) == (0, None) and (model.weight == 3).all()


def test_load_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    for content in (pickle.dumps(Attack()), b"garbage", b""):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ValueError, match="x.pt"):
            common.load(tmp_path / "x.pt")
    torch.save({"a": Attack()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a checkpoint that is safe to load"):
        common.load(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


# --- signals, precision, ranks


def test_interrupt_by_signal_and_by_file(tmp_path):
    stop = common.Interrupt(args := run_with(tmp_path), ALONE)
    assert not stop()
    (common.Path(args.out) / "stop").touch()
    assert stop() and stop.code == 75
    (common.Path(args.out) / "stop").unlink()
    for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        stop = common.Interrupt(args, ALONE)
        os.kill(os.getpid(), number)
        assert stop() and stop.code == code
    with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C does not wait for the step
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(amp):
    context, scaler = common.autocast(SimpleNamespace(amp=amp), torch.device("cpu"))
    model = Toy(1.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        with context:
            loss = model(torch.full((1, 2), x)).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    step(float("nan"))
    assert (model.weight == 1).all()
    step(0.5)
    torch.testing.assert_close(model.weight, torch.full((2, 2), 0.95))


def test_unknown_device_is_one_line():
    with pytest.raises(ValueError, match="--device nonsense"):
        common.setup(SimpleNamespace(device="nonsense", seed=0))


def test_errors_end_in_one_line(tmp_path):
    for error, code in (("ValueError('a\\nb')", 2), ("OSError(28, 'No space', 'x')", 2), ("KeyboardInterrupt", 130)):
        script = tmp_path / "s.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common\n"
            f"def main():\n    raise {error}\ncommon.run(main)\n"
        )
        done = launch(script)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr
    script.write_text(script.read_text().replace("KeyboardInterrupt", "ValueError('x')"))
    assert "Traceback" in launch(script, env=dict(TRACEBACK="1")).stderr


@pytest.mark.slow
def test_mean_share_and_interrupt_over_two_ranks(tmp_path):
    script = tmp_path / "s.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import common, os
from types import SimpleNamespace
dist = common.setup(SimpleNamespace(device="cpu", seed=0))
r = dist.rank
more = ({{"b": 3.0}}, {{"b": 2}}) if r else ({{}}, {{}})
got = common.mean(dist, {{"a": 1.0 + r, **more[0]}}, {{"a": 1 + r, **more[1]}})
assert got == {{"a": 1.0, "b": 1.5}}, got
assert common.share(dist, "zero" if r == 0 else "one") == "zero"
stop = common.Interrupt(SimpleNamespace(out={str(tmp_path)!r}), dist)
assert not stop()
if r == 1: os.kill(os.getpid(), 15)
assert stop()
"""
    )
    done = launch(script, ranks=2)
    assert done.returncode == 0, done.stderr
