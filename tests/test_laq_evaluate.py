"""laq/evaluate.py: the closed forms of metrics.py against brute force, and reports on models one knows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, load


@pytest.fixture(scope="module")
def laq():
    return load("laq", "evaluate", "metrics", "shards", "figures")


# --- metrics.py


@pytest.mark.parametrize("n, D", [(40, 7), (9, 30)])
def test_ridge_is_the_normal_equations(laq, n, D):
    """Both ways of solving it, over features and over pairs, give the augmented least-squares problem's answer."""
    rng = np.random.default_rng(0)
    x, y, x_test = rng.normal(3, 2, (n, D)), rng.normal(size=(n, 3)) + 5, rng.normal(3, 2, (6, D))
    got = laq.metrics.ridge(x, y, x_test, lambdas=[10.0, 0.1])
    for lam, guess in zip([10.0, 0.1], got, strict=True):
        z, z_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
        rows = np.concatenate([z, np.sqrt(lam * n) * np.eye(D)])
        weights = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((D, 3))]), rcond=None)[0]
        np.testing.assert_allclose(guess, y.mean(0) + z_test @ weights, atol=1e-8)


def test_features_that_hardly_vary_are_not_blown_up(laq):
    """A pixel that is still in training and lights up in the test would otherwise decide the prediction."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=50), 1e-6 * rng.normal(size=50), np.ones(50)], 1)
    y = x[:, :1] + rng.normal(size=(50, 1))
    guess = laq.metrics.ridge(x, y, np.array([[0.0, 0.5, 2.0]]))
    assert np.abs(guess - y.mean()).max() < 1


def test_probe_chooses_lambda_by_training_episodes(laq):
    """Against loops over folds, lambdas and dims; episodes are never torn apart."""
    rng = np.random.default_rng(1)
    episodes = np.repeat(np.arange(7), 5)
    x, x_test = rng.normal(size=(35, 12)), rng.normal(size=(4, 12))
    y = np.stack([x[:, 0] + 0.1 * rng.normal(size=35), rng.normal(size=35)], 1)
    got, folds = laq.metrics.probe(x, y, episodes, x_test), episodes % 3
    for dim in range(2):
        errors = []
        for lam in laq.metrics.LAMBDAS:
            parts = [(folds != f, folds == f) for f in range(3)]
            guess = [laq.metrics.ridge(x[fit], y[fit], x[out], [lam])[0][:, dim] - y[out, dim] for fit, out in parts]
            errors.append(np.square(np.concatenate(guess)).sum())
        best = laq.metrics.LAMBDAS[int(np.argmin(errors))]
        np.testing.assert_allclose(got[:, dim], laq.metrics.ridge(x, y, x_test, [best])[0][:, dim])
    guess = laq.metrics.probe(np.zeros((2, 1)), np.arange(2.0)[:, None], np.zeros(2, int), np.zeros((3, 1)))
    np.testing.assert_allclose(guess, 0.5)  # of one short episode, without features: the mean


def test_probe_scores_against_arithmetic(laq):
    """R2 per dim, its mean over the dims that move, weighted by motion; the intervals are over episodes."""
    rng = np.random.default_rng(2)
    true = np.stack([rng.normal(size=40), np.full(40, 0.3), 3 * rng.normal(size=40)], 1)
    guess = np.stack([true[:, 0] * 0.5, true[:, 1], np.full(40, true[:, 2].mean())], 1)
    found = laq.metrics.scores(true, guess, np.repeat(np.arange(8), 5))
    first = 1 - 0.25 * np.square(true[:, 0]).sum() / np.square(true[:, 0] - true[:, 0].mean()).sum()
    assert found["r2_per_dim"] == [pytest.approx(first), None, pytest.approx(0)]
    assert found["r2"] == pytest.approx(first / 2)
    variance = true.var(0)
    assert found["r2_weighted"] == pytest.approx(first * variance[0] / variance.sum())
    low, high = found["r2_interval"]
    assert low < found["r2"] < high
    assert laq.metrics.scores(np.ones((9, 2)), np.ones((9, 2)), np.arange(9))["r2"] is None
    true[:20, 0] = true[:, 0].mean()  # a dim that rests in one of two episodes has no endless interval
    low, high = laq.metrics.scores(true, guess, np.repeat([0, 1], 20))["r2_interval"]
    assert -2 < low < high <= 1


def test_angles_that_wrap_are_differenced_the_short_way_round(laq):
    turning = np.linspace(0, 12, 60)
    radians = (turning + np.pi) % (2 * np.pi) - np.pi
    state = np.stack([radians, np.degrees(radians), turning, np.where(turning > 6, 255.0, 0.0)], 1)
    period = laq.metrics.turns([state[:30], state[30:]])
    assert period[0] == 2 * np.pi and period[1] == 360 and np.isinf(period[2:]).all()
    motion = laq.metrics.wrap(state[3:] - state[:-3], period)
    np.testing.assert_allclose(motion[:, 0], 3 * 12 / 59, atol=1e-9)
    np.testing.assert_allclose(motion[:, 1], np.degrees(3 * 12 / 59), atol=1e-6)


def test_each_evaluated_episode_is_held_out_in_turn(laq):
    episode = np.repeat(np.arange(5), 4)
    folds = laq.metrics.leave_one_out(episode, [1, 3])
    assert [set(episode[test]) for _, test in folds] == [{1}, {3}]
    assert [set(episode[fit]) for fit, _ in folds] == [{0, 2, 3, 4}, {0, 1, 2, 4}]
    assert len(laq.metrics.leave_one_out(np.arange(100), range(100))) == 20
    alone = laq.metrics.leave_one_out(np.zeros(10), [0])
    assert sorted(np.concatenate([test for _, test in alone])) == list(range(10)) and len(alone) == 5


def test_each_camera_has_its_own_probe(laq):
    """The same motion goes left in one picture and right in the other: one probe for both would tell nothing."""
    rng = np.random.default_rng(0)
    y, episode, camera = rng.normal(size=(80, 2)), np.repeat(np.arange(8), 10), np.tile(["left", "right"], 40)
    seen = np.where((camera == "left")[:, None], y, -y)
    table, cameras, pairs = laq.metrics.probe_tables(dict(seen=seen), y, episode, camera, [2, 5])
    assert table["seen"]["r2"] > 0.99 and cameras["left"]["seen"]["r2"] > 0.99 and pairs == (35, 20)
    assert laq.metrics.probe_tables(dict(seen=seen), y, episode, camera, [])[0] == {}


def test_codebook_metrics(laq):
    """A code of 1 % is not in use where 1 / 40 is the bound; perplexity is exp of the entropy."""
    codes = np.zeros((1000, 2), int)
    codes[:10, 0], codes[:, 1] = 1, np.arange(1000) % 4
    found = laq.metrics.codebook_metrics(codes, 4)
    assert found["usage"] == (1 + 4) / 8
    assert found["perplexity_0"] == pytest.approx(0.99**-0.99 * 0.01**-0.01)
    assert found["perplexity_1"] == pytest.approx(4) and found["top1_frequency"] == pytest.approx(0.25, abs=0.01)
    assert found["joint_perplexity"] == pytest.approx(4 * found["perplexity_0"], rel=0.02)


def test_advice_names_what_is_missing(laq):
    good = dict(mse=0.01, psnr_gain_over_copy=2.0, code_sensitivity=0.5, usage=1.0, perplexity=7.0, top1_frequency=0.1)
    assert laq.metrics.advice(good, 8).startswith("good enough to label")
    for name, value, word in (
        ("psnr_gain_over_copy", -1.0, "train longer"),
        ("code_sensitivity", 0.0, "longer --gap"),
        ("perplexity", 3.0, "--codebook-size"),
        ("top1_frequency", 0.9, "90 %"),
    ):
        advice = laq.metrics.advice(good | {name: value}, 8)
        assert advice.startswith("not yet") and word in advice
    assert "quantization has not begun" in laq.metrics.advice(dict(mse=0.01, psnr_gain_over_copy=2.0), 8)


# --- reports


SHIFTS = np.array([[0, 2], [2, 0], [0, -2], [-2, 0]])


def rolling(laq, folder, episodes=6, length=16, change=lambda number, actions: actions, name="world"):
    """Shards of noise images that roll by 2 pixels in one of four directions, which is the action."""
    rng, samples = np.random.default_rng(0), []
    for number in range(episodes):
        image, steps, frames = rng.integers(0, 256, (16, 16, 3)), rng.integers(0, 4, length), []
        for step in steps:
            frames.append(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8))
            image = np.roll(image, SHIFTS[step], (0, 1))
        meta = dict(instruction="", source=name, episode=str(number), camera="top", fps=5, length=length)
        sample = {"__key__": f"{name}-{number}", "frames.npy": laq.shards.npy(np.stack(frames))}
        actions = change(number, SHIFTS[steps].astype(np.float32))
        if actions is not None:
            sample["actions.npy"], meta["actions"] = laq.shards.npy(actions), "delta"
        samples.append(sample | {"json": json.dumps(meta).encode()})
    folder.mkdir(parents=True)
    laq.shards.write_shard(folder / "shard-000000.tar", samples)
    return folder


class Perfect:
    """A model that knows the rolling world: one code, the direction."""

    config = SimpleNamespace(image_size=16, codebook_size=4)
    quantizer = SimpleNamespace(shape=(1, 4, 4), quantizing=True)

    def to(self, device):
        return self

    def decode(self, first, codes):
        return torch.stack([f.roll(tuple(SHIFTS[c]), (1, 2)) for f, c in zip(first, codes[:, 0], strict=True)])

    def encode(self, first, second):
        ways = torch.stack([first.roll(tuple(shift), (2, 3)) for shift in SHIFTS], 1)
        error = (ways - second[:, None]).square().mean((2, 3, 4))
        return error.argmin(1, keepdim=True), -error[:, None]

    def reconstruct(self, first, second):
        codes = self.encode(first, second)[0]
        return self.decode(first, codes), self.decode(first, codes.roll(1, 0)), codes


def report_on(laq, monkeypatch, model, out, *words):
    monkeypatch.setattr(laq.evaluate.LAQ, "from_pretrained", lambda folder: model)
    words = ["--checkpoint", out / "none", "--out", out, "--gap", 1, "--device", "cpu", *words]
    assert laq.evaluate.main([str(word) for word in words]) == 0
    return json.loads((out / "report.json").read_text())["sources"]


def test_report_on_a_perfect_model(laq, monkeypatch, tmp_path):
    """Every number is known: the codes are the actions, and only the camera's noise is left of the image."""
    data = rolling(laq, tmp_path / "data")
    found = report_on(laq, monkeypatch, Perfect(), tmp_path, "--data", f"w={data}")["w"]
    image, book = found["reconstruction"], found["codebook"]
    assert found["pairs"] == 90 and found["episodes"] == 6
    assert image["psnr"] == pytest.approx(10 * np.log10(255**2 / 32), abs=0.7)  # two frames' noise, clipped a little
    assert image["psnr_gain_over_copy"] > 15
    assert image["code_sensitivity"] == pytest.approx(0.75, abs=0.15)  # a quarter of the shuffled codes are right
    assert book["usage"] == 1 and 3.5 < book["perplexity"] <= 4
    rows = found["probe"]
    assert rows["codes"]["r2"] > 0.99 and rows["vectors before quantization"]["r2"] > 0.8
    assert rows["first frame"]["r2"] < 0.1 and rows["shuffled codes"]["r2"] < 0.1
    text = (tmp_path / "report.md").read_text()
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"codes_w"} and all(f"figures/{name}.png" in text for name in drawn)
    assert "good enough to label" in text and "the codes tell more" in text


def test_report_on_a_model_that_ignores_its_codes(laq, monkeypatch, tmp_path):
    model = Perfect()
    model.decode = lambda first, codes: first
    found = report_on(laq, monkeypatch, model, tmp_path, "--data", f"w={rolling(laq, tmp_path / 'data')}")["w"]
    assert found["reconstruction"]["code_sensitivity"] == found["reconstruction"]["psnr_gain_over_copy"] == 0
    assert "not yet" in (tmp_path / "report.md").read_text()


def test_sources_without_actions_and_with_broken_ones(laq, monkeypatch, tmp_path, capsys):
    """No actions: no probes. Actions that are not finite: that clip is named and left out."""
    data = rolling(laq, tmp_path / "a", change=lambda number, actions: None)
    found = report_on(laq, monkeypatch, Perfect(), tmp_path, "--data", f"w={data}")["w"]
    assert "probe" not in found and "No probes" in (tmp_path / "report.md").read_text()
    data = rolling(laq, tmp_path / "b", change=lambda number, actions: actions + (np.nan if number == 2 else 0))
    found = report_on(laq, monkeypatch, Perfect(), tmp_path, "--data", f"w={data}")["w"]
    assert found["episodes"] == 5 and "holds NaN or infinity" in capsys.readouterr().err
    assert found["probe"]["codes"]["r2"] > 0.99


@pytest.fixture(scope="module")
def run(laq, tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    data = rolling(laq, home / "data", episodes=12)
    words = (
        "--gap 1 --image-size 16 --patch 4 --dim 16 --depth 1 --code-seq-len 2 --code-dim 4 --steps 6 --batch-size 4"
    )
    words += " --val-share 0.3 --device cpu --warmup 1"
    laq.train.main(["--data", f"w={data}", "--out", str(home / "run"), *words.split()])
    return home


def test_which_episodes_are_evaluated(laq, run, tmp_path):
    """Of the run's own data, under any name and grown since, those that its checkpoint held out; of other data all."""
    checkpoint, new = run / "run/checkpoints/best", rolling(laq, tmp_path / "new", episodes=3, name="lab")
    held = len(json.loads((checkpoint / "data.json").read_text())["w"]["held_out"])
    grown = rolling(laq, tmp_path / "grown", episodes=14)
    cases = ([], held), (["--data", f"other={run / 'data'}"], held), (["--data", grown], held), (["--data", new], 3)
    for words, count in cases:
        words = ["--checkpoint", checkpoint, "--device", "cpu", *words]
        assert laq.evaluate.main([str(word) for word in words]) == 0
        (found,) = json.loads((run / "run/report/report.json").read_text())["sources"].values()
        assert found["episodes"] == count and found["gap"] == "1" and 0 < held < 12


@pytest.mark.slow
def test_mistakes_are_one_line(run, tmp_path):
    script, checkpoint = ROOT / "laq" / "evaluate.py", run / "run/checkpoints/best"
    for words, said in (
        (["--checkpoint", tmp_path], "in no run's folder"),
        (["--checkpoint", tmp_path, "--out", tmp_path / "o"], "config.json"),
        (["--checkpoint", checkpoint, "--data", tmp_path / "no"], "no such file or folder"),
    ):
        done = launch(script, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
