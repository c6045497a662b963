"""laq/evaluate.py: the closed forms of probes.py against brute force, and the report card of models one knows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load


@pytest.fixture(scope="module")
def laq():
    return load("laq", "evaluate", "probes", "shards", "card")


# --- probes.py


@pytest.mark.parametrize("n, D", [(40, 7), (9, 30)])
def test_ridge_is_the_normal_equations(laq, n, D):
    """Both ways of solving it, over features and over pairs, give the augmented least-squares problem's answer."""
    rng = np.random.default_rng(0)
    x, y, x_test = rng.normal(3, 2, (n, D)), rng.normal(size=(n, 3)) + 5, rng.normal(3, 2, (6, D))
    got = laq.probes.ridge(x, y, x_test, lambdas=[10.0, 0.1])
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
    guess = laq.probes.ridge(x, y, np.array([[0.0, 0.5, 2.0]]))
    assert np.abs(guess - y.mean()).max() < 1


def test_probe_chooses_lambda_by_training_episodes(laq):
    """Against loops over folds, lambdas and dims; episodes are never torn apart."""
    rng = np.random.default_rng(1)
    episodes = np.repeat(np.arange(7), 5)
    x, x_test = rng.normal(size=(35, 12)), rng.normal(size=(4, 12))
    y = np.stack([x[:, 0] + 0.1 * rng.normal(size=35), rng.normal(size=35)], 1)
    got, folds = laq.probes.probe(x, y, episodes, x_test), episodes % 3
    for dim in range(2):
        errors = []
        for lam in laq.probes.LAMBDAS:
            parts = [(folds != f, folds == f) for f in range(3)]
            guess = [laq.probes.ridge(x[fit], y[fit], x[out], [lam])[0][:, dim] - y[out, dim] for fit, out in parts]
            errors.append(np.square(np.concatenate(guess)).sum())
        best = laq.probes.LAMBDAS[int(np.argmin(errors))]
        np.testing.assert_allclose(got[:, dim], laq.probes.ridge(x, y, x_test, [best])[0][:, dim])
    assert laq.probes.LAMBDAS[0] == max(laq.probes.LAMBDAS)  # of equals the strongest


@pytest.mark.parametrize("n", [1, 2, 5])
def test_probe_of_one_short_episode(laq, n):
    """The first row of the few-label table; and without features a probe is the mean."""
    y = np.arange(n, dtype=float)[:, None]
    guess = laq.probes.probe(np.zeros((n, 1)), y, np.zeros(n, int), np.zeros((3, 1)))
    np.testing.assert_allclose(guess, y.mean())


def test_nmse(laq):
    """1 for the mean, nothing for a dim that never moves, even if it is not zero."""
    rng = np.random.default_rng(2)
    true = np.stack([rng.normal(size=30), np.full(30, 0.3), 100 + rng.normal(size=30)], 1)
    error = laq.probes.nmse(true, np.stack([true[:, 0] * 0.5, true[:, 1], np.full(30, true[:, 2].mean())], 1))
    assert error[0] == pytest.approx(0.25 * np.mean(true[:, 0] ** 2) / np.var(true[:, 0]))
    assert np.isnan(error[1]) and error[2] == pytest.approx(1)
    assert laq.probes.average(error) == pytest.approx((error[0] + 1) / 2) and laq.probes.average([np.nan]) is None


def test_ssim_against_loops(laq):
    """Every window of 11 x 11 by itself, with Gaussian weights, as in the paper."""
    rng = np.random.default_rng(3)
    a = rng.random((2, 3, 13, 14))
    b = np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    for pair in range(2):
        values = []
        for channel in range(3):
            for i in range(3):
                for j in range(4):
                    p, q = a[pair, channel, i : i + 11, j : j + 11], b[pair, channel, i : i + 11, j : j + 11]
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + 1e-4) * (2 * c + 9e-4)
                    values.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        got = laq.probes.ssim(torch.from_numpy(a).float(), torch.from_numpy(b).float())[pair].item()
        assert got == pytest.approx(np.mean(values), abs=1e-4)
    small = torch.rand(1, 3, 8, 8)
    assert laq.probes.ssim(small, small).item() == pytest.approx(1, abs=1e-4)


def test_health_of_a_codebook(laq):
    flat, dead = laq.probes.health(np.ones(8), 8), laq.probes.health(np.eye(8)[3], 8)
    assert flat == dict(perplexity=pytest.approx(8), usage=1, commonest=pytest.approx(1 / 8))
    assert dead == dict(perplexity=pytest.approx(1), usage=1 / 8, commonest=1)
    rare = laq.probes.health(np.array([990, 10, 0, 0]), 4)  # 1 % is below 1 / 40
    assert rare["usage"] == 1 / 4
    assert rare["perplexity"] == pytest.approx(0.99**-0.99 * 0.01**-0.01)


def test_eta_squared(laq):
    """Against loops; words dealt at random have what `chance` says."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 2, (60, 2))
    y = np.stack([codes[:, 0] + 0.5 * rng.normal(size=60), rng.normal(size=60), np.ones(60)], 1)
    word = laq.probes.words_of(codes)
    eta, chance = laq.probes.eta_squared(y, word)
    for dim in range(2):
        groups = [y[(codes == pair).all(1), dim] for pair in ([0, 0], [0, 1], [1, 0], [1, 1])]
        within = sum(np.square(group - group.mean()).sum() for group in groups)
        assert eta[dim] == pytest.approx(1 - within / np.square(y[:, dim] - y[:, dim].mean()).sum())
    assert np.isnan(eta[2]) and chance == pytest.approx(3 / 59)
    noise = [laq.probes.eta_squared(rng.normal(size=(60, 1)), word)[0][0] for _ in range(500)]
    assert np.mean(noise) == pytest.approx(chance, rel=0.15)


def test_what_counts_as_discrete(laq):
    gripper = np.array([0, 1, 1, 0, 1 + 1e-7])  # sums of floats differ in the last bit
    assert laq.probes.classes(gripper).tolist() == [0, 1, 1, 0, 1]
    assert laq.probes.classes(np.linspace(0, 1, 11)) is None and laq.probes.classes(np.ones(5)) is None
    assert laq.probes.classes(np.linspace(0, 1, 10)).tolist() == list(range(10))
    angles = np.arange(16) * np.pi / 8
    moves = np.concatenate([np.stack([np.cos(angles), np.sin(angles)], 1), [[0, 0]]])
    noise = 1e-6 * np.random.default_rng(0).normal(size=(5, 17, 2))
    kinds = np.stack([laq.probes.directions(scale * moves + n) for scale, n in zip(range(1, 6), noise, strict=True)])
    assert len(set(kinds[0])) == 17 and (kinds == kinds[0]).all()
    assert laq.probes.directions(np.random.default_rng(0).normal(size=(40, 2))) is None


def test_balanced_accuracy(laq):
    """Always saying the commonest class is no skill."""
    true = np.array([0] * 8 + [1] * 2)
    assert laq.probes.accuracies(true, np.zeros(10, int)) == (0.8, 0.5)


def test_table_and_few_shot(laq):
    """Held-out episodes alone are scored, the last row has all labels, and good latents need few."""
    rng = np.random.default_rng(5)
    episode, y = np.repeat(np.arange(12), 6), rng.normal(size=(72, 2))
    features = dict(good=y + 0.01 * rng.normal(size=(72, 2)), wide=rng.normal(size=(72, 40)))
    features["wide"][:, :2] += y
    side = episode >= 8
    folds = [(np.flatnonzero(~side), np.flatnonzero(side))]
    good, wide = laq.probes.table(features, y, episode, folds)
    guess = laq.probes.probe(features["wide"][~side], y[~side], episode[~side], features["wide"][side])
    per_dim = 1 - np.square(guess - y[side]).mean(0) / y[side].var(0)
    np.testing.assert_allclose(wide["r2_per_dim"], per_dim)
    share = y[side].var(0) / y[side].var(0).sum()
    assert wide["r2_weighted"] == pytest.approx((share * per_dim).sum())
    assert wide["r2"] == pytest.approx(per_dim.mean()) and wide["nmse"] == pytest.approx(1 - per_dim.mean())
    assert list(wide["r2_per_episode"]) == [8, 9, 10, 11] and not wide["accuracy"]
    rows = list(laq.probes.few_shot(features, y, episode, folds, seed=0))
    assert [row["episodes"] for row in rows] == [1, 2, 4, 8]
    assert rows[-1]["good"] == pytest.approx(good["r2"]) and rows[-1]["wide"] == pytest.approx(wide["r2"])
    assert rows[0]["good"] > 0.9 > rows[0]["wide"] + 0.3


# --- the report card


def clip(laq, episode, frames, actions=None, name="world"):
    about = dict(instruction="", source=name, episode=episode, camera="top", fps=5, length=len(frames))
    sample = {"__key__": laq.shards.key_of(name, episode), "frames.npy": laq.shards.npy(frames)}
    if actions is not None:
        sample["actions.npy"] = laq.shards.npy(actions)
        about["actions"] = "delta"
    return sample | {"json": json.dumps(about).encode()}


SHIFTS = np.array([[0, 2], [2, 0], [0, -2], [-2, 0]])


def rolling(laq, folder, episodes=6, length=16, change=lambda number, actions: actions, name="world"):
    """Shards of noise images that roll by 2 pixels in one of four directions, which is the action."""
    rng = np.random.default_rng(0)

    def samples():
        for number in range(episodes):
            image, steps = rng.integers(0, 256, (16, 16, 3)), rng.integers(0, 4, length)
            frames = []
            for step in steps:
                frames.append(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8))
                image = np.roll(image, SHIFTS[step], (0, 1))
            actions = change(number, SHIFTS[steps].astype(np.float32))
            yield clip(laq, str(number), np.stack(frames), actions, name)

    folder.mkdir(parents=True)
    laq.shards.write_shard(folder / "shard-000000.tar", samples())
    return folder


class Perfect:
    """A model that knows the rolling world: one code, the direction."""

    image_size, codes = 16, 1
    quantiser = SimpleNamespace(vocabulary=4, lookup=lambda codes: torch.eye(4)[codes], started=True)
    weight = torch.zeros(1)

    def to(self, device):
        return self

    def parameters(self):
        return iter([self.weight])

    def decode(self, first, codes):
        return torch.stack([f.roll(tuple(SHIFTS[c]), (1, 2)) for f, c in zip(first, codes[:, 0], strict=True)])

    def encode(self, first, second):
        ways = torch.stack([first.roll(tuple(shift), (2, 3)) for shift in SHIFTS], 1)
        error = (ways - second[:, None]).square().mean((2, 3, 4))
        return error.argmin(1, keepdim=True), -error[:, None]


def card_of(laq, monkeypatch, model, out, *words):
    monkeypatch.setattr(laq.evaluate.LAQ, "from_pretrained", lambda folder: model)
    words = ["--checkpoint", out / "none", "--out", out, "--gap", 1, "--device", "cpu", *words]
    assert laq.evaluate.main([str(word) for word in words]) == 0
    return json.loads((out / "report.json").read_text())["sources"]


def test_card_of_a_perfect_model(laq, monkeypatch, tmp_path):
    """Every number is known: the codes are the actions, and only the camera's noise is left of the image."""
    data = rolling(laq, tmp_path / "data")
    card = card_of(laq, monkeypatch, Perfect(), tmp_path, "--data", f"w={data}", "--val-episodes", "0,1")["w"]
    image, book, like = card["reconstruction"], card["codebook"], card["consistency"]
    assert card["pairs"] == 30 and card["episodes"] == 2
    assert image["psnr"] == pytest.approx(10 * np.log10(255**2 / 32), abs=0.7)  # two frames' noise, clipped a little
    assert image["gain"] == pytest.approx(image["psnr"] - image["psnr_nothing_moves"])
    assert image["gain"] > 15 and image["delta_psnr_random"] > 15 and image["nearer_to_the_future"] == 1
    assert image["delta_psnr_random"] > image["delta_psnr_shuffled"] > 5  # a quarter of the shuffled codes are right
    assert image["ssim"] > 0.9 > image["ssim_nothing_moves"] + 0.5
    shares = np.array(book["histogram"][0])
    assert like["cycle"] == like["transfer"] == [1] and like["chance"] == [pytest.approx(np.square(shares).sum())]
    assert book["slots"][0]["usage"] == 1 and book["joint"]["words"] == 4 and card["eta_squared"]["mean"] > 0.999
    rows = {row["method"]: row for row in card["probe"]}
    for method in ("one-hot codes", "code vectors", "vectors before quantisation"):
        assert rows[method]["accuracy"]["move"] == 1 and rows[method]["balanced_accuracy"]["dim 0"] == 1
        assert rows[method]["r2"] > (0.99 if "code" in method else 0.8)
    for method in ("mean", "first frame", "shuffled vectors"):
        assert rows[method]["r2"] < 0.1 and rows[method]["accuracy"]["move"] < 0.6
    assert rows["mean"]["r2"] == pytest.approx(1 - rows["mean"]["nmse"]) and rows["mean"]["nmse"] >= 1
    few = card["few_shot"]
    assert [row["episodes"] for row in few] == [1, 2, 4] and few[1]["codes"] > 0.99 > few[1]["both frames"] + 0.5
    text = (tmp_path / "report.md").read_text()
    assert "| one-hot codes |" in text and "| slot 0 |" in text and "| pixel difference |" in text
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"probe", "few_shot", "usage", "sheet_w"}
    assert all(f"figures/{name}.png" in text for name in drawn)


def test_card_of_a_model_that_ignores_its_codes(laq, monkeypatch, tmp_path):
    """Collapse is told: no gain, no delta, one word, nothing in the probe."""

    class Blind(Perfect):
        def decode(self, first, codes):
            return first

        def encode(self, first, second):
            return torch.zeros(len(first), 1, dtype=torch.long), torch.zeros(len(first), 1, 4)

    data = rolling(laq, tmp_path / "data")
    card = card_of(laq, monkeypatch, Blind(), tmp_path, "--data", f"w={data}", "--val-share", 0.3)["w"]
    image = card["reconstruction"]
    assert image["gain"] == image["delta_psnr_random"] == image["nearer_to_the_future"] == 0
    assert card["codebook"]["joint"] == dict(perplexity=1, usage=0.25, commonest=1, words=1, possible=4)
    assert card["probe"][0]["r2"] <= 0 and card["eta_squared"]["mean"] == pytest.approx(0, abs=1e-9)
    verdict = laq.card.verdict("w", card)
    assert "good: nothing." in verdict and "commonest word holds 100 %" in verdict and "pairs: indicative" in verdict


def test_card_of_a_model_that_knows_its_frames_by_heart(laq, monkeypatch, tmp_path):
    """A fine image and a full cycle without any use of the code: delta-PSNR and transfer tell."""

    class Parrot(Perfect):
        known = {}

        def encode(self, first, second):
            codes, vectors = super().encode(first, second)
            for frame, code in zip(first, codes, strict=True):
                self.known.setdefault(frame.numpy().tobytes(), code)
            return codes, vectors

        def decode(self, first, codes):
            return super().decode(first, torch.stack([self.known[frame.numpy().tobytes()] for frame in first]))

    data = rolling(laq, tmp_path / "data", length=40)
    words = ["--data", f"w={data}", "--val-episodes", "0,1", "--pairs", 60, "--train-pairs", 12]
    card = card_of(laq, monkeypatch, Parrot(), tmp_path, *words)["w"]
    assert card["reconstruction"]["gain"] > 15 and card["reconstruction"]["delta_psnr_random"] == 0
    assert card["consistency"]["cycle"] == [1] and card["consistency"]["transfer"][0] < 0.6
    assert card["pairs"] == 60 and card["labelled"]["fitted"] == 12  # spread over the clips: 30 and 3 of each


def test_leave_one_out(laq, monkeypatch, tmp_path):
    """Each of three episodes is predicted from the other two."""
    data = rolling(laq, tmp_path / "data", episodes=3)
    words = ["--data", f"w={data}", "--val-episodes", "2", "--leave-one-out"]
    card = card_of(laq, monkeypatch, Perfect(), tmp_path, *words)["w"]
    assert card["pairs"] == 15 and card["labelled"] == dict(fitted=30, tested=45)
    row = card["probe"][0]
    assert len(row["r2_per_episode"]) == 3 and min(row["r2_per_episode"].values()) > 0.99
    assert [row["episodes"] for row in card["few_shot"]] == [1, 2]
    assert card["consistency"]["transfer"] == [1]  # one held-out episode: other scenes are training ones


def test_sources_without_actions_and_with_broken_ones(laq, monkeypatch, tmp_path, capsys):
    """Everything but the probes; a nan or another width is no label; each is told."""

    plain = rolling(laq, tmp_path / "plain", change=lambda number, actions: None)
    some = rolling(laq, tmp_path / "some", change=lambda n, actions: actions * np.nan if n > 3 else actions)
    none = rolling(laq, tmp_path / "none", change=lambda number, actions: actions * np.nan)
    wide = rolling(laq, tmp_path / "wide", change=lambda n, actions: np.repeat(actions, 2, 1) if n > 4 else actions)
    one = rolling(laq, tmp_path / "one", episodes=1)
    data = [f"{folder.name}={folder}" for folder in (plain, some, none, wide, one)]
    held = [f"{name}=0,1" for name in ("plain", "some", "none", "wide")]
    cards = card_of(laq, monkeypatch, Perfect(), tmp_path / "out", "--data", *data, "--val-episodes", *held)
    printed = capsys.readouterr().out
    assert "plain: no actions: everything but the probes" in printed
    assert "none: no finite actions on one side" in printed and "one is left out" in printed
    assert "some: 30 of 90 pairs have no finite action: left out of the probes" in printed
    assert "wide: 15 of 90 pairs" in printed and cards["wide"]["labelled"]["fitted"] == 45
    assert "probe" not in cards["plain"] and cards["plain"]["reconstruction"]["gain"] > 15
    assert cards["some"]["probe"][0]["r2"] > 0.99 and cards["some"]["labelled"] == dict(fitted=30, tested=30)
    assert "No probes: no actions." in (tmp_path / "out" / "report.md").read_text()


@pytest.fixture(scope="module")
def run(laq, tmp_path_factory):
    """A run's folder: its flags, and a real model with random weights and four slots."""
    folder = tmp_path_factory.mktemp("run")
    data = rolling(laq, folder / "data")
    torch.manual_seed(0)
    model = laq.model.LAQ(16, 8, dim=16, spatial_depth=1, temporal_depth=1, decoder_depth=1)
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "checkpoints" / "step_0000001")
    (folder / "checkpoints" / "best").symlink_to("step_0000001")
    flags = dict(data=[f"w={data}"], gap=["w=2"], val_episodes=["w=4-5"], val_share=0.1)
    (folder / "args.json").write_text(json.dumps(dict(flags=flags)))
    return folder


def test_a_run_alone_is_enough(laq, run, capsys):
    """Data, gap and split are the run's; twice gives the same; a real model fits the calls."""
    cards = []
    for more in ([], ["--batch-size", "7"]):
        assert laq.evaluate.main(["--checkpoint", str(run / "checkpoints" / "best"), "--device", "cpu", *more]) == 0
        cards.append(json.loads((run / "report" / "report.json").read_text())["sources"]["w"])
    assert cards[0]["pairs"] == 2 * 14 and cards[0]["gap"] == "2 frames" and len(cards[0]["codebook"]["slots"]) == 4
    assert cards[0]["names"][-1] == "world/5" and len(cards[0]["consistency"]["cycle"]) == 4
    assert cards[0]["codebook"] == cards[1]["codebook"] and cards[0]["probe"][0] == cards[1]["probe"][0]
    assert cards[0]["reconstruction"] == pytest.approx(cards[1]["reconstruction"], rel=1e-5)
    assert "the codes have not started" in capsys.readouterr().out  # nothing trained them


def test_mistakes_are_told_in_one_line(laq, run, tmp_path, capsys):
    checkpoint = ["--checkpoint", str(run / "checkpoints" / "best"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    lone = tmp_path / "a" / "b" / "lone"
    lone.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (lone / name).write_bytes((run / "checkpoints" / "best" / name).read_bytes())
    for words, match in (
        (["--checkpoint", str(lone), "--out", str(tmp_path / "out")], "give --data NAME=PATH"),
        ([*checkpoint, "--gap", "soon"], "--gap soon"),
        ([*checkpoint, "--gap", "99"], "shorter than the gap"),
        ([*checkpoint, "--data", str(tmp_path / "gone")], "no such file"),
        ([*checkpoint, "--val-episodes", "77"], "no episode is called 77"),
        ([*checkpoint, "--val-share", "0"], "nothing to report on"),
    ):
        with pytest.raises(ValueError, match=match):
            laq.evaluate.main(words)
    with pytest.raises(SystemExit):
        laq.evaluate.main(["--checkpoint", str(lone), "--data", f"w={run / 'data'}"])
    assert "give --out DIR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (run / "args.json").rename(run / "kept.json")
    (run / "args.json").write_text("[]")
    with pytest.raises(ValueError, match="not the flags of a run"):
        laq.evaluate.main(checkpoint)
    (run / "kept.json").rename(run / "args.json")


def test_a_broken_clip_is_passed_over(laq, monkeypatch, tmp_path, capsys):
    data = rolling(laq, tmp_path / "data")
    found = laq.shards.open_shard(data / "shard-000000.tar")[5]
    offset, size = found.members["frames.npy"]
    with open(data / "shard-000000.tar", "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * min(size, 64))
    card = card_of(laq, monkeypatch, Perfect(), tmp_path, "--data", f"w={data}", "--val-episodes", "0,1")["w"]
    assert card["labelled"]["fitted"] == 45 and "passing over a clip" in capsys.readouterr().err
