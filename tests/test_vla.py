"""vla: sources and labels, batches, model, stages 2 and 3, policy, evaluate. The worlds: test_vla_sim.py."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, launch, load, log_of, weights_of

from common import DataError

MORE = "demo evaluate finetune policy scaling shards sources sim.tiny".split()


@pytest.fixture(scope="module")
def this():
    modules = vars(load("vla", *MORE))
    return SimpleNamespace(**{name.removeprefix("sim."): module for name, module in modules.items()})


@pytest.fixture(scope="module")
def home(this, tmp_path_factory):
    """A small demo: 24 videos with latents, 16 demonstrations, a tiny transformer of width 32."""
    folder = tmp_path_factory.mktemp("demo") / "vla"
    this.demo.write(folder, videos=24, demonstrations=16)
    texts = [" red", " blue", "robot, push the red block to the left"]
    this.tiny.build(folder / "small", texts, width=32, depth=2, vision_width=32)
    return folder


def stage2(home, out, *more):
    words = ["--data", f"demo={home}", "--labels", home / "labels", "--backbone", home / "small", "--out", out]
    words += "--image-size 32 --batch-size 8 --lr 1e-3 --warmup 2 --log-every 1 --val-samples 24 --steps 2".split()
    return [str(word) for word in [*words, "--prompt", "robot, {instruction}", *more]]


def stage3(home, out, *more):
    words = ["--data", f"robot={home / 'robot'}", "--out", out]
    words += "--batch-size 8 --lr 1e-3 --warmup 2 --log-every 1 --val-samples 24 --chunk 3 --steps 2".split()
    return [str(word) for word in [*words, *more]]


def curve(out, *keys):
    return [[line.get(key) for key in ("step", *keys)] for line in log_of(out)]


def tensors_of(out, name="last"):
    from safetensors.torch import load_file

    folder = out / "checkpoints" / name
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "heads.safetensors")}


@pytest.fixture(scope="module")
def latent(this, home, tmp_path_factory):
    """A stage-2 run of six steps; its best checkpoint."""
    out = tmp_path_factory.mktemp("latent") / "run"
    assert this.train.main(stage2(home, out, "--steps", 6, "--eval-every", 3, "--save-every", 3)) == 0
    return out / "checkpoints" / "best"


@pytest.fixture(scope="module")
def robot(this, home, latent, tmp_path_factory):
    """A stage-3 run of four steps on top of it, with the robot's state; its best checkpoint."""
    out = tmp_path_factory.mktemp("robot") / "run"
    words = stage3(home, out, "--init", latent, "--steps", 4, "--eval-every", 2, "--state")
    assert this.finetune.main(words) == 0
    return out / "checkpoints" / "best"


# --- sources and labels


def write(this, folder, episodes=3, length=8, key="k{}", **more):
    """Shards of `episodes` clips; `more`: members that replace or join the usual ones, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, samples = np.random.default_rng(0), []
    for i in range(episodes):
        about = dict(instruction="push it", fps=5, source="s", episode=f"e{i}", camera="top", length=length)
        members = {
            "json": json.dumps(about).encode(),
            "frames.npy": this.shards.npy(rng.integers(0, 255, (length, 16, 16, 3)).astype(np.uint8)),
            "actions.npy": this.shards.npy(rng.normal(size=(length, 2)).astype(np.float32)),
            **more,
        }
        kept = {name: value for name, value in members.items() if value is not None}
        samples.append({"__key__": key.format(i), **kept})
    this.shards.write_shard(folder / "a.tar", samples)
    return folder


def write_labels(this, folder, gap=2, length=8, size=8, codes=None, clips=(0, 1, 2), **about):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, size, (length - gap, 2)) if codes is None else codes
    arrays = dict(codes=codes, vectors=rng.normal(size=(*codes.shape, 3)).astype(np.float32), gap=np.int64(gap))
    packed = this.shards.npz(**{**arrays, **{k: v for k, v in about.items() if k in ("vectors", "valid")}})
    this.shards.write_shard(folder / "a.tar", [{"__key__": f"k{i}", "latents.npz": packed} for i in clips])
    codebook = np.arange(3.0 * size).reshape(size, 3).tolist()
    head = dict(codebook_size=size, code_seq_len=2, code_dim=3, gap=gap, codebook=codebook)
    (folder / "labels.json").write_text(json.dumps(head | {k: v for k, v in about.items() if k in head}))
    return folder


def read(this, data, labels=None, **more):
    """The one source of a folder, nothing held out, and what was said."""
    kind, lines = "latents" if labels else "actions", []
    more = dict(val_share=0, say=lines.append) | more
    (source,) = this.sources.read_sources([f"x={data}"], kind, labels and [labels], **more)
    return source, "\n".join(map(str, lines))


def test_clips_are_joined_with_their_labels(this, tmp_path):
    folder = write(this, tmp_path / "d")
    labels = write_labels(this, tmp_path / "l", valid=np.array([1, 1, 0, 1, 1, 1], bool))
    source, said = read(this, folder, labels)
    clip = source.train[0]
    assert [clip.key for clip in source.train] == ["k0", "k1", "k2"] and clip.episode == "e0" and not said
    assert np.array(source.labels["codebook"]).shape == (2, 8, 3), "one codebook in the file is every position's"
    rng = np.random.default_rng(0)
    codes, vectors, valid = this.sources.read_latents(clip, source.labels)
    with tarfile.open(folder / "a.tar") as tar:
        frames = np.load(io.BytesIO(tar.extractfile("k0.frames.npy").read()))
    drawn, batches = [], this.data.Batches([(clip, source)], None, SimpleNamespace(image_size=16))
    for row in rng.permutation(6):
        sample = batches.take(clip, source, int(row))
        drawn += [t for t in range(6) if np.array_equal(sample["image"], frames[t])]
        assert np.array_equal(sample["codes"], codes[drawn[-1]]) and valid[drawn[-1]]
        assert np.array_equal(sample["vectors"], vectors[drawn[-1]])
    assert set(drawn) == {0, 1, 3, 4, 5}, "a pair across a cut has no latent action"


def test_what_cannot_teach_is_left_out_and_named(this, tmp_path):
    """A clip without labels, one shorter than the gap, one without an instruction: one line each, the rest is used."""
    folder = write(this, tmp_path / "d")
    source, said = read(this, folder, write_labels(this, tmp_path / "l", clips=(0, 2)))
    assert [clip.key for clip in source.train] == ["k0", "k2"]
    assert "1 of 3 clips left out" in said and "latents.npz" in said and "k1" in said
    with pytest.raises(DataError, match="longer than the gap"):
        read(this, folder, write_labels(this, tmp_path / "n", gap=8))
    about = dict(instruction=" ", fps=5, source="s", episode="e", camera="top", length=8)
    blank = write(this, tmp_path / "b", episodes=1, json=json.dumps(about).encode())
    with pytest.raises(DataError, match="no instruction"):
        read(this, blank)
    source, _ = read(this, blank, instruction="hebe den Würfel")
    assert source.train[0].meta["instruction"] == "hebe den Würfel"
    with pytest.raises(DataError, match="no commands"):
        read(this, write(this, tmp_path / "e", **{"actions.npy": None}))


@pytest.mark.parametrize(
    "about, message",
    [
        (dict(codes=np.full((6, 2), 9)), "code 9.*codebook of 8"),
        (dict(codes=np.zeros((5, 2), int)), "expected vectors .6, 2, 3"),
        (dict(vectors=np.full((6, 2, 3), np.nan, np.float32)), "NaN"),
        (dict(valid=np.zeros(6, bool)), "within one scene"),
        (dict(codebook=[[0.0]]), "codebook has shape"),
        (dict(codes=np.full((6, 2), 1.5)), "float64 codes.*expected whole numbers"),
        (dict(gap=0), "gap is 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(this, tmp_path, about, message):
    folder, labels = write(this, tmp_path / "d"), write_labels(this, tmp_path / "l", **about)
    with pytest.raises(DataError, match=message):
        this.data.describe_latents([read(this, folder, labels)[0]])


def test_the_demo_replaces_no_other_files(this, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="is no demo's data"):
        this.demo.write(tmp_path, videos=1, demonstrations=1)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_commands_that_are_none_are_refused(this, tmp_path):
    """No dims, and what float32 cannot hold."""
    for name, array in dict(rows=np.zeros((8, 0)), infinity=np.full((8, 3), 1e300)).items():
        folder = write(this, tmp_path / name, **{"actions.npy": this.shards.npy(array)})
        with pytest.raises(DataError, match=name):
            this.data.describe_actions([read(this, folder)[0]], 4)


def test_broken_labels_and_shards_are_named_and_passed_over(this, tmp_path):
    """A label shard that is cut off takes its clips with it; without labels.json nothing can be read."""
    folder, labels = write(this, tmp_path / "d"), write_labels(this, tmp_path / "l")
    shutil.copy(folder / "a.tar", folder / "b.tar")
    (labels / "b.tar").write_bytes((labels / "a.tar").read_bytes()[:700])
    source, said = read(this, folder, labels)
    assert len(source.train) == 3 and "b.tar" in said
    (folder / "c.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    source, said = read(this, folder, labels)
    assert len(source.train) == 3 and "c.tar" in said
    with pytest.raises(DataError, match="labels.json.*not there"):
        read(this, folder, folder)
    (labels / "labels.json").write_text('{"gap": "x"}')
    with pytest.raises(DataError, match="labels.json: needs codebook_size"):
        read(this, folder, labels)


def test_robots_of_different_rates_are_trained_together(this, tmp_path):
    """One tokenizer labels each with a gap of its own; another tokenizer's labels are refused."""
    data, lines = [f"{name}={write(this, tmp_path / name)}" for name in "ab"], []
    labels = [write_labels(this, tmp_path / f"l{gap}", gap=gap) for gap in (2, 4)]
    sources = this.sources.read_sources(data, "latents", labels, 0, say=lines.append)
    assert [this.sources.num_rows(source.train[0], source.labels) for source in sources] == [6, 4]
    assert np.shape(this.data.describe_latents(sources)["mean"]) == (2, 3)
    other = write_labels(this, tmp_path / "o", size=4)
    with pytest.raises(DataError, match="b was labelled by another model"):
        this.data.describe_latents(this.sources.read_sources(data, "latents", [labels[0], other], 0))


def test_a_path_may_hold_an_equals_sign(this, tmp_path):
    folder = write(this, tmp_path / "lr=0.1")
    assert this.sources.named_paths([str(folder)]) == [("lr=0.1", str(folder))]
    assert this.sources.named_paths([f"a={folder}"]) == [("a", str(folder))]
    with pytest.raises(DataError, match="two sources are called x"):
        this.sources.named_paths(["x=a", "x=b"])


def test_every_stage_holds_out_the_same_episodes(this, tmp_path):
    """By a hash of the episode alone: not of the source's name, not of what else is left out; cameras go together."""
    folder, labels = write(this, tmp_path / "d", 40), write_labels(this, tmp_path / "l", clips=range(0, 40, 2))
    (one,) = this.sources.read_sources([f"a={folder}"], "actions", None, 0.3)
    (two,) = this.sources.read_sources([f"b={folder}"], "latents", [labels], 0.3, say=print)
    assert one.held_out == two.held_out and 4 <= len(one.held_out) <= 20
    assert {clip.episode for clip in one.validation} == set(one.held_out)
    assert not {clip.episode for clip in two.train} & set(one.held_out)
    (some,) = this.sources.read_sources([f"a={folder}"], "actions", None, 0.3, ["a=e3,e5"])
    assert some.held_out == ["e3", "e5"]
    with pytest.raises(DataError, match="no source is called c"):
        this.sources.read_sources([f"a={folder}"], "actions", None, 0.3, ["c=e3"])


def test_baselines_are_those_of_brute_force(this, monkeypatch):
    rng = np.random.default_rng(0)

    def clips(n):
        first = rng.integers(0, 3, (n, 40, 1))
        return [np.concatenate([one, (one + rng.integers(0, 2, one.shape)) % 4], 1) for one in first]

    source = SimpleNamespace(train=clips(6), validation=clips(3), labels=dict(codebook_size=4, code_seq_len=2))
    monkeypatch.setattr(this.data, "read_latents", lambda codes, _: (codes, None, np.ones(len(codes), bool)))
    found = this.data.baselines(source)
    known, held = ([tuple(row) for codes in part for row in codes] for part in (source.train, source.validation))

    def most(values):
        return max(sorted(set(values)), key=values.count)

    top = [most([row[n] for row in known]) for n in (0, 1)]
    after = {k: most([b for a, b in known if a == k]) for k in range(4) if any(a == k for a, _ in known)}
    majority = [[row[0] == top[0], row[1] == top[1]] for row in held]
    bigram = [[row[0] == top[0], row[1] == after.get(row[0], 0)] for row in held]
    assert found["majority_accuracy"] == pytest.approx(np.mean(majority))
    assert found["bigram_accuracy"] == pytest.approx(np.mean(bigram))
    assert found["majority_exact_match"] == pytest.approx(np.mean([row == most(known) for row in held]))


def test_normalisation_of_commands(this):
    """1 % and 99 % quantiles go to -1 and 1; a constant, a jittering or a rare dim does not explode."""
    rng, event = np.random.default_rng(0), (np.arange(1000) == 7).astype(float)
    jitter = np.where(np.arange(1000) % 2, 1000.0, np.nextafter(np.float32(1000), 2000))
    columns = [rng.normal(3, 2, 1000), np.full(1000, 0.5), event, jitter]
    actions = np.stack(columns, 1).astype(np.float32)
    clip = SimpleNamespace(array=lambda name: actions, members={"actions.npy": 1})
    about = this.data.describe_actions([SimpleNamespace(train=[clip], name="x")], 4)
    scaled = (actions - about["center"]) / about["scale"]
    assert np.quantile(scaled[:, 0], [0.01, 0.99]) == pytest.approx([-1, 1], abs=1e-5)
    assert np.abs(scaled[:, 1:3]).max() <= 2 + 1e-6 and np.abs(scaled[:, 3]).max() < 1e-3


# --- batches


def loader(this, sources, **more):
    """Batches of 8 with plain pixels in place of a backbone's tensors; the config fits the demo."""
    config = SimpleNamespace(image_size=32, action=SimpleNamespace(action_dim=2, chunk_size=3, state_dim=2))

    def preprocess(images, instructions):
        pixels = torch.from_numpy(np.stack(images))
        return dict(pixels=pixels, letters=torch.tensor([len(text) for text in instructions]))

    train, validation = this.data.prepare_dataloaders(sources, preprocess, config, 8, **dict(seed=7, steps=3) | more)
    return list(train), validation


@pytest.mark.parametrize("kind", ["latents", "actions"])
def test_a_step_is_the_same_on_any_number_of_ranks(this, home, kind):
    """Two ranks, two micro-steps or starting later draw the same samples."""
    words = dict(latents=([f"v={home}"], "latents", [home / "labels"]), actions=([f"r={home / 'robot'}"], "actions"))
    sources = this.sources.read_sources(*words[kind])
    whole = loader(this, sources)[0]
    ranks = [loader(this, sources, rank=rank, world=2, accum=2)[0] for rank in range(2)]
    later = loader(this, sources, first=2)[0]
    for name in ("codes", "vectors") if kind == "latents" else ("pixels", "actions", "mask", "letters", "state"):
        for step in range(3):
            parts = [ranks[rank][2 * step + micro][name] for micro in range(2) for rank in range(2)]
            assert torch.equal(torch.cat(parts), whole[step][name]), name
        assert torch.equal(later[0][name], whole[2][name])


def test_every_frame_is_drawn_alike(this, tmp_path):
    """First and last frames of a clip come as often as any other, and so does each of its paraphrases."""
    source, _ = read(this, write(this, tmp_path / "d", episodes=1, length=20))
    batches = this.data.TrainBatches([(source.train[0], source)], None, None, 8)
    seen, texts = [], []
    blank = np.zeros((4, 4, 3), np.uint8)
    batches.read = lambda frame: seen.append(int(frame)) or dict(image=blank, instruction=["a", "b"])
    for step in range(500):
        for slot in range(8):
            texts.append(batches.sample(step, slot)["instruction"])
    counts = np.bincount(seen, minlength=20)
    assert counts.min() > 140 and counts.max() < 260  # 200 each
    assert 1800 < texts.count("a") < 2200, "and every paraphrase"


def test_a_chunk_ends_with_its_episode(this, home):
    (source,) = this.sources.read_sources([f"r={home / 'robot'}"], "actions", val_share=0)
    clip = source.train[0]
    actions = clip.array("actions.npy")
    config = SimpleNamespace(image_size=32, action=SimpleNamespace(action_dim=2, chunk_size=4, state_dim=2))
    sample = this.data.Batches([(clip, source)], None, config).take(clip, source, len(clip) - 2)
    assert np.array_equal(sample["actions"][:2], actions[-2:]) and sample["mask"].tolist() == [True, True, False, False]
    assert np.array_equal(sample["state"], clip.array("state.npy")[-2])


def test_shift_and_jitter(this):
    """In the middle of all ranges nothing changes; a shift repeats the edge."""
    image = np.random.default_rng(0).integers(0, 255, (50, 50, 3)).astype(np.uint8)
    assert np.array_equal(this.data.shift_and_jitter(image, np.full(5, 0.5)), image)
    moved = this.data.shift_and_jitter(image, np.array([0.99, 0.0, 0.5, 0.5, 0.5]))
    assert np.array_equal(moved[:-3, 3:], image[3:, :-3]) and np.array_equal(moved[-1, 3:], image[-1, :-3])
    assert np.array_equal(this.data.shift_and_jitter(image, np.full(5, 0.9), 0.0), image)


def test_broken_clips_are_passed_over_in_training_and_validation(this, tmp_path, capsys):
    """One clip of NaN commands among four: named once, another takes its place, batches stay full."""
    folder = write(this, tmp_path / "d", 4)
    nan = write(this, tmp_path / "n", 1, key="n{}", **{"actions.npy": this.shards.npy(np.full((8, 2), np.nan))})
    shutil.copy(nan / "a.tar", folder / "b.tar")
    source, _ = read(this, folder)
    assert this.data.describe_actions([source], 2, say=print)["action_dim"] == 2
    config = SimpleNamespace(image_size=16, action=SimpleNamespace(action_dim=2, chunk_size=3, state_dim=0))
    source.validation = source.train
    options = dict(steps=4, val_samples=30)
    train, held = this.data.prepare_dataloaders([source], lambda *words: {}, config, 8, **options)
    assert [len(batch["actions"]) for batch in train] == [8] * 4
    assert [len(batch["actions"]) for batch in held["x"]] == [8, 8, 8, 6]
    assert all(batch["actions"].isfinite().all() for batch in [*train, *held["x"]])
    assert "NaN" in capsys.readouterr().out
    (only,) = this.sources.read_sources([f"x={nan}"], "actions", val_share=0)
    with pytest.raises(DataError, match="cannot be read"):
        list(this.data.prepare_dataloaders([only], lambda *words: {}, config, 8, **options)[0])


# --- model

LATENT = dict(codebook_size=4, code_seq_len=2, code_dim=3, mean=[[1.0] * 3] * 2, std=[[2.0] * 3] * 2)
LATENT |= dict(codebook=np.arange(24.0).reshape(2, 4, 3).tolist(), weight=[[0.5, 0.3, 0.2]] * 2)
ACTION = dict(action_dim=2, chunk_size=3, center=[1.0, 2.0], scale=[0.5, 4.0])


def small(this, home, latent=None, action=None, **more):
    torch.manual_seed(0)
    heads = dict(
        latent=latent and this.model.LatentConfig(**latent), action=action and this.model.ActionConfig(**action)
    )
    config = dict(prompt="robot, {instruction}", num_queries=2, image_size=32, dropout=0.0) | heads | more
    return this.model.VLA(this.model.VLAConfig(**config), *this.model.open_backbone(home / "small"))


def frames(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3)).astype(np.uint8))


def test_prompts_of_different_length_do_not_disturb_one_another(this, home):
    """A sample's output does not depend on its neighbours' length."""
    model, images = small(this, home).eval(), frames(2)
    texts = ["push", "push the red block to the left and then, slowly, further on"]
    with torch.no_grad():
        both = model.query_states(model.preprocess(images, texts))
        pairs = zip(images, texts, strict=True)
        alone = [model.query_states(model.preprocess([image], [text]))[0] for image, text in pairs]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.05


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "film"])
def test_the_queries_see_image_and_instruction(this, tmp_path, family):
    texts = [" red", " blue", "put the red block on the blue block"]
    this.tiny.build(tmp_path / "small", texts, family, width=32, depth=2, vision_width=32)
    model = small(this, tmp_path).eval()
    order = ["red to the blue", "blue to the red"]
    with torch.no_grad():
        base, image, text = (
            model.query_states(model.preprocess(*words))
            for words in [(frames(1), order[:1]), (frames(1, 1), order[:1]), (frames(1), order[1:])]
        )
        model.queries.mul_(2)
        queries = model.query_states(model.preprocess(frames(1), order[:1]))
    for other in (image, text, queries):
        assert (base - other).abs().max() > 1e-3


def test_words_of_the_model_are_plain_text_in_an_instruction(this, home):
    """<|image_pad|> in an instruction adds no image."""
    model = small(this, home)
    pad = model.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    plain, odd = (model.preprocess(frames(1), [text]) for text in ("push", "push <|image_pad|>{red}<|im_end|>"))
    assert (plain["input_ids"] == pad).sum() == (odd["input_ids"] == pad).sum() == 16
    with torch.no_grad():
        assert model.query_states(odd).isfinite().all()


def batch_of(model):
    g, batch = torch.Generator().manual_seed(3), model.preprocess(frames(4), ["push red"] * 4)
    if model.config.latent:
        return batch | dict(codes=torch.randint(4, (4, 2), generator=g), vectors=torch.randn(4, 2, 3, generator=g))
    return batch | dict(actions=torch.randn(4, 3, 2, generator=g), mask=torch.tensor([[1, 1, 1], [1, 1, 0]] * 2).bool())


@pytest.mark.parametrize("target", ["codes", "vectors"])
def test_loss_of_latents_written_out(this, home, target):
    """Each target's loss, number by number."""
    model = small(this, home, LATENT | dict(target=target)).eval()
    batch = batch_of(model)
    with torch.no_grad():
        loss, metrics = model(batch)
        hidden = model.query_states(batch)
    logits, total = model.to_codes(hidden).log_softmax(2), 0.0
    for b in range(4):
        for n in range(2):
            total -= logits[b, n, batch["codes"][b, n]].item() / 2
            if target != "codes":
                error = (model.to_vectors(hidden[b, n]) - (batch["vectors"][b, n] - 1) / 2).square()
                total += (error * torch.tensor([0.5, 0.3, 0.2])).sum().item() / 2
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)
    right = (logits.argmax(2) == batch["codes"]).float()
    assert metrics["token_accuracy"].item() == pytest.approx(right.mean().item())
    assert metrics["exact_match"].item() == pytest.approx(right.amin(1).mean().item())


def test_loss_of_commands_written_out(this, home):
    """Smooth L1 of normalised commands, a mean over the steps that are there; and what is predicted in robot units."""
    model = small(this, home, action=ACTION).eval()
    batch, center, scale = batch_of(model), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    with torch.no_grad():
        loss, hidden, commands = model(batch)[0], model.query_states(batch), model.predict_actions(batch)
        out, total = model.to_actions(hidden.flatten(1)).view(4, 3, 2), 0.0
    for b in range(4):
        x = (out[b] - (batch["actions"][b] - center) / scale)[: 3 if b % 2 == 0 else 2].abs()
        total += torch.where(x < 1, 0.5 * x * x, x - 0.5).mean().item()
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)
    torch.testing.assert_close(commands, out * scale + center)


def test_the_classifier_of_a_regression_sends_no_gradient_back(this, home):
    """With target vectors the classifier only reads; and every parameter that trains gets a gradient, as DDP needs."""
    model = small(this, home, LATENT | dict(target="vectors")).eval()
    batch = batch_of(model)
    hidden = model.query_states(batch).detach().requires_grad_()
    entropy = model.latent_loss(hidden, batch)[1]["cross_entropy"].sum()
    assert torch.autograd.grad(entropy, hidden, allow_unused=True) == (None,)
    model(batch)[0].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_lora_layers_start_as_nothing(this, home):
    plain, model = small(this, home, action=ACTION).eval(), small(this, home, action=ACTION, lora_rank=2).eval()
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys, "weights keep their names"
    batch = batch_of(model)
    with torch.no_grad():
        torch.testing.assert_close(model.query_states(batch), plain.query_states(batch))


def test_a_checkpoint_is_a_plain_hugging_face_folder(this, home, latent):
    """transformers opens it alone, with the trained weights, and can generate."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = this.model.VLA.from_pretrained(latent).eval()
    other, info = AutoModelForImageTextToText.from_pretrained(latent, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[name]), name
    before = this.model.open_backbone(home / "small")[0].state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in other.state_dict().items()), "it did train"
    processor = AutoProcessor.from_pretrained(latent)
    inputs = processor(text=["<|image_pad|> push"], images=[frames(1)], return_tensors="pt")
    assert other.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_what_is_saved_comes_back_where_it_fits(this, home, tmp_path):
    """Another LoRA rank, a heads file that is cut off and a folder that is no checkpoint are refused."""
    model = small(this, home, LATENT, ACTION, lora_rank=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model.eval().save_pretrained(tmp_path / "c")
    again, batch = this.model.VLA.from_pretrained(tmp_path / "c").eval(), batch_of(model)
    with torch.no_grad():
        assert torch.equal(model(batch)[0], again(batch)[0])
    model.config.lora_rank = 0
    with pytest.raises(DataError, match="--lora-rank 2"):
        this.model.VLA.from_pretrained(tmp_path / "c", model.config)
    (tmp_path / "c" / "heads.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="heads.safetensors: not a readable checkpoint"):
        this.model.VLA.from_pretrained(tmp_path / "c")
    with pytest.raises(DataError, match="vla.json: not there"):
        this.model.VLA.from_pretrained(home / "small")


def test_a_tokenizer_that_is_missing_or_of_transformers_5_is_one_line(this, home, tmp_path):
    for name in ("none", "v5"):
        folder = shutil.copytree(home / "small", tmp_path / name)
        for file in ("tokenizer.json", "vocab.json", "merges.txt") if name == "none" else ():
            (folder / file).unlink()
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        more = dict(extra_special_tokens=["<|im_end|>"]) if name == "v5" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields | more))
        with pytest.raises(DataError, match="not a vision-language model"):
            this.model.open_backbone(folder)


def test_what_is_no_vision_language_model_is_refused(this, home, tmp_path):
    """An unknown name, a language model, a processor without images, a weights file that is cut off."""
    with pytest.raises(DataError, match="not a vision-language model"):
        this.model.open_backbone(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
    with pytest.raises(DataError, match="not a vision-language model"):
        this.model.open_backbone(tmp_path)
    for name, kept in dict(text=lambda file: "preprocessor" not in file.name, cut=lambda file: True).items():
        (tmp_path / name).mkdir()
        for file in filter(kept, (home / "small").iterdir()):
            short = 5000 if name == "cut" and file.suffix == ".safetensors" else None
            (tmp_path / name / file.name).write_bytes(file.read_bytes()[:short])
        with pytest.raises(DataError, match=str(tmp_path / name)):
            this.model.open_backbone(tmp_path / name)


# --- policy


class Stub:
    """Predicts the chunk 100 k, 100 k + 1, ... at its k-th call."""

    def __init__(self):
        self.calls, self.queries = 0, torch.zeros(1)
        self.config = SimpleNamespace(image_size=32, action=SimpleNamespace(chunk_size=4, state_dim=0))

    def eval(self):
        return self

    def preprocess(self, images, instructions):
        return dict(x=torch.zeros(len(images)))

    def predict_actions(self, batch):
        chunk = 100.0 * self.calls + torch.arange(4.0)
        self.calls += 1
        return chunk.view(1, 4, 1).expand(len(batch["x"]), -1, -1)


@pytest.mark.parametrize("every, coefficient", [(1, None), (3, None), (1, 0.0), (1, 0.5), (2, 0.1)])
def test_chunks_are_carried_out_and_averaged(this, every, coefficient):
    policy = this.policy.Policy(Stub(), every, coefficient)
    policy.reset("push")
    image = np.zeros((32, 32, 3), np.uint8)
    for t in range(11):
        chunks = [(100 * k + t - s) for k, s in enumerate(range(0, t + 1, every)) if t - s < 4]  # oldest first
        w = [math.exp(-(coefficient or 0) * i) for i in range(len(chunks))]
        mean = sum(a * b for a, b in zip(w, chunks, strict=True)) / sum(w)
        action = policy.act(image)
        assert action.shape == (1,) and action[0] == pytest.approx(chunks[-1] if coefficient is None else mean)
    policy.reset(["a", "b"])
    assert policy.act([image, image]).shape == (2, 1)
    with pytest.raises(ValueError, match="4 commands at once"):
        this.policy.Policy(Stub(), 5)


def test_policy_of_a_checkpoint(this, robot, latent):
    """In robot units, the same alone as side by side; NaN and what the model cannot read are errors."""
    policy = this.policy.Policy.from_pretrained(robot)
    images, states = frames(3), np.float32([[0.1, 0.2], [0.5, 0.5], [0.9, 0.3]])
    policy.reset(["push red", "push the blue block", "push"])
    together = policy.act(images, states)
    for i, text in enumerate(policy.instructions.copy()):
        policy.reset(text)
        assert policy.act(images[i], states[i]) == pytest.approx(together[i], abs=1e-4)
    assert np.abs(together).max() < 0.5
    wrong = [("reads 2 numbers", images[0], None), ("uint8", images[0] / 255.0, states[0])]
    wrong += [("NaN", images[0], np.float32([np.nan, 0])), ("uint8", images[0][..., 0], states[0])]
    for message, image, state in wrong:
        policy.reset("push")
        with pytest.raises(ValueError, match=message):
            policy.act(image, state)
    with torch.no_grad():
        policy.model.queries.fill_(float("nan"))
    policy.reset("push")
    with pytest.raises(ValueError, match="predicts NaN"):
        policy.act(images[0], states[0])
    with pytest.raises(ValueError, match="finetune.py"):
        this.policy.Policy.from_pretrained(latent)


# --- the runs


def test_what_the_stages_log_and_keep(this, latent, robot):
    """Stage 2 logs accuracies beside their baselines; stage 3 drops the latent head."""
    lines = log_of(latent.parents[1])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = "token_accuracy token_accuracy_0 token_accuracy_1 exact_match perplexity bigram_accuracy".split()
    assert not {f"val/demo/{name}" for name in names} - lines[-1].keys()
    assert (latent.parents[1] / "figures" / "curves.png").exists()
    config = this.model.VLAConfig.from_pretrained
    assert config(latent).latent.target == "vectors" and config(robot).latent is None
    assert "val/robot/action_mae" in log_of(robot.parents[1])[-1]


def test_interrupted_and_resumed_equals_uninterrupted(this, home, tmp_path, monkeypatch):
    """Weights and curves of a run ended by SIGTERM and resumed are those of one that ran through, bit for bit."""
    args = ["--steps", 4, "--eval-every", 2, "--save-every", 2]
    assert this.train.main(stage2(home, tmp_path / "a", *args)) == 0
    save = this.train.scaling.save
    with monkeypatch.context() as patch:
        patch.setattr(this.train.scaling, "save", lambda *w: (save(*w), os.kill(os.getpid(), signal.SIGTERM)))
        assert this.train.main(stage2(home, tmp_path / "b", *args)) == 75
    assert this.train.main(stage2(home, tmp_path / "b", *args, "--resume", "--accum", 1, "--workers", 0)) == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    keys = "train/loss", "val/loss"
    assert curve(tmp_path / "a", *keys) == curve(tmp_path / "b", *keys)


def test_a_resumed_run_keeps_what_its_data_were(this, home, tmp_path, capsys):
    """Demonstrations that joined meanwhile are trained on; normalisation and held-out episodes stay, and it is said."""
    shutil.copytree(home / "robot", tmp_path / "d")
    extra = sorted((tmp_path / "d").glob("*.tar"))[-1]
    for index in (tmp_path / "d").glob("*.json"):
        index.unlink()
    kept = extra.rename(tmp_path / "later.tar")
    words = stage3(
        home, tmp_path / "r", "--backbone", home / "small", "--image-size", 32, "--data", f"x={tmp_path / 'd'}"
    )
    assert this.finetune.main([*words, "--steps", "1"]) == 0
    before = [json.loads((tmp_path / "r/checkpoints/last" / name).read_text()) for name in ("vla.json", "data.json")]
    kept.rename(extra)
    assert this.finetune.main([*words, "--steps", "2", "--resume"]) == 0
    after = [json.loads((tmp_path / "r/checkpoints/last" / name).read_text()) for name in ("vla.json", "data.json")]
    assert before[0] == after[0] and before[1]["x"]["held_out"] == after[1]["x"]["held_out"]
    assert after[1]["x"]["episodes"] == 16 > before[1]["x"]["episodes"]
    assert "when the run began" in capsys.readouterr().out


def test_stage_3_from_stage_3_keeps_the_head_if_asked(this, home, robot, tmp_path):
    words = ["--init", robot, "--steps", 1, "--state", "--lr", "1e-12", "--clip", "1e-9", "--val-share", 0.4]
    assert this.finetune.main(stage3(home, tmp_path / "k", *words, "--keep-head")) == 0
    assert this.finetune.main(stage3(home, tmp_path / "n", *words)) == 0
    old, kept, new = (tensors_of(out) for out in (robot.parents[1], tmp_path / "k", tmp_path / "n"))
    torch.testing.assert_close(kept["to_actions.weight"], old["to_actions.weight"])
    assert not torch.allclose(new["to_actions.weight"], old["to_actions.weight"])
    config = this.model.VLAConfig.from_pretrained
    assert config(tmp_path / "k" / "checkpoints" / "last").action == config(robot).action


def test_finetuning_with_lora(this, home, latent, tmp_path):
    """LoRA layers, queries and head train, nothing else."""
    words = ["--init", latent, "--freeze", "backbone", "--lora-rank", 2]
    assert this.finetune.main(stage3(home, tmp_path / "r", *words)) == 0
    before, after = tensors_of(latent.parents[1], "best"), tensors_of(tmp_path / "r")
    assert {name for name in before if name in after and not torch.equal(before[name], after[name])} == {"queries"}
    assert any("lora_b" in name and value.any() for name, value in after.items())


def test_the_best_checkpoint_is_the_one_that_succeeds(this, home, latent, tmp_path, monkeypatch):
    """With --eval-env the policy acts at each validation, and best is by success, then by loss."""
    seeds, wins = [], iter([1, 0, 0, 0, 0] + [1, 1, 0, 1, 0] + [0, 1, 0, 1, 0])

    def run(policy, envs, seed):
        policy.reset([env.reset(0) for env in envs])
        assert policy.act([env.image() for env in envs]).shape == (1, 2)
        seeds.append(*seed)
        return [dict(success=next(wins))]

    monkeypatch.setattr(this.finetune.rollout, "run", run)
    monkeypatch.setattr(this.finetune, "EVAL_EPISODES", 5)
    words = ["--init", latent, "--steps", 3, "--eval-every", 1, "--eval-env", "tabletop"]
    assert this.finetune.main(stage3(home, tmp_path / "r", *words)) == 0
    assert [line["val/success"] for line in log_of(tmp_path / "r")] == [0.2, 0.6, 0.4]
    assert seeds[:5] == seeds[5:10] and min(seeds) > 10_000  # the same initial states, and not those of evaluate.py
    assert (tmp_path / "r/checkpoints/best").resolve().name == "step_0000002"


def test_bf16_and_recomputed_activations(this, home, tmp_path):
    """The losses stay within 5 % of float32 with all activations kept."""
    for name, more in dict(a=[], b=["--amp", "bf16", "--checkpointing"]).items():
        assert this.train.main(stage2(home, tmp_path / name, "--eval-every", 9, *more)) == 0
    a, b = (np.array(curve(tmp_path / name, "train/loss"))[:, 1] for name in "ab")
    assert a == pytest.approx(b, rel=0.05)


@pytest.mark.slow
def test_a_compiled_run(home, tmp_path):
    """torch.compile changes the losses by rounding alone."""
    words = ["--backbone", home / "backbone", "--eval-every", 9, "--dropout", 0]
    for name, more in dict(a=[], b=["--compile"]).items():
        done = launch(ROOT / "vla" / "train.py", *stage2(home, tmp_path / name, *words, *more))
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (np.array(curve(tmp_path / name, "train/loss"))[:, 1] for name in "ab")
    assert a == pytest.approx(b, rel=0.05)


def test_mistakes_end_in_one_line(this, home, latent, tmp_path, capsys):
    """Flags are checked before --out is made; what only the data or a checkpoint tell is a DataError."""
    cases = [
        (this.train, stage2(home, tmp_path / "a", "--batch-size", 7, "--accum", 2), "multiple"),
        (this.train, stage2(home, tmp_path / "a", "--prompt", "do it"), "--prompt"),
        (this.train, stage2(home, tmp_path / "a", "--prompt", "{instruction} {task}"), "task"),
        (this.finetune, stage3(home, tmp_path / "a"), "--init"),
        (this.finetune, stage3(home, tmp_path / "a", "--backbone", "x", "--keep-head"), "--init"),
    ]
    for script, words, message in cases:
        with pytest.raises(SystemExit) as ended:
            script.main(words)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and message in error and error.count("\n") == 1
    cases = [
        (this.train, ["--data", "x", "--out", str(tmp_path / "a")], "--labels is needed"),
        (this.train, stage2(home, tmp_path / "b", "--backbone", tmp_path / "none"), "not a vision-language model"),
        (this.train, stage2(home, tmp_path / "c", "--init", latent, "--prompt", "{instruction}"), "its prompt"),
        (this.finetune, stage3(home, tmp_path / "d", "--init", tmp_path / "none"), "vla.json"),
        (this.finetune, stage3(home, tmp_path / "f", "--init", latent, "--keep-head"), "no command head"),
    ]
    for script, words, message in cases:
        with pytest.raises(DataError, match=message):
            script.main(words)
    assert not [path for path in tmp_path.iterdir() if path.name in "af"]


# --- what a run needs


@pytest.mark.parametrize(
    "freeze, amp, again", [("vision", "bf16", False), ("backbone", "off", False), ("vision", "off", True)]
)
def test_the_predicted_memory_is_the_memory_measured(this, tmp_path, freeze, amp, again):
    """Weights, gradients, AdamW's moments, and the peak of a training step above them: within 10 % of the dry run's."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.profiler import ProfilerActivity, profile

    this.tiny.build(tmp_path / "t", [" red"], width=64, depth=6, vision_width=32)
    rank = 4 if freeze == "backbone" else 0
    config = this.model.VLAConfig(
        num_queries=2, lora_rank=rank, image_size=32, latent=this.model.LatentConfig(**LATENT)
    )
    with FakeTensorMode():
        fake = this.model.VLA(config, *this.model.open_backbone(tmp_path / "t", "cpu")).freeze(freeze)
    model = this.model.VLA.from_pretrained(tmp_path / "t", config).freeze(freeze).train()
    if again:
        model.backbone.gradient_checkpointing_enable(dict(use_reentrant=False))
    batch = model.preprocess(frames(64), ["push red"] * 64)
    told = this.scaling.memory(fake, 64, batch["input_ids"].shape[1], 64, amp, again)
    batch |= dict(codes=torch.zeros(64, 2, dtype=torch.long), vectors=torch.zeros(64, 2, 3))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            loss = model(batch)[0]
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=False)

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    moments = [value for state in opt.state.values() for name, value in state.items() if name != "step"]
    measured = dict(weights=size(model.parameters()), AdamW=size(moments))
    measured["gradients"] = size([p.grad for p in model.parameters() if p.grad is not None])
    for name, value in measured.items():
        assert told[name] == pytest.approx(value, rel=0.1), name
    kept = sum(value for name, value in told.items() if name.startswith("activations"))
    assert kept == pytest.approx(np.cumsum(changes).max(), rel=0.1)


def test_a_dry_run_of_7b_fits_eight_gpus(this, home, tmp_path, capsys, monkeypatch):
    """7b.args on 8 processes: parameters and memory of the published sizes, in seconds, and no run folder."""
    from transformers import AutoConfig

    shutil.copytree(home / "small", tmp_path / "big")
    this.tiny.build(tmp_path / "big", [" red"], "qwen2_5_vl", width=32, depth=2, vision_width=32)
    config = AutoConfig.from_pretrained(tmp_path / "big").to_dict()
    text = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    text |= dict(num_attention_heads=28, num_key_value_heads=4, head_dim=128, layer_types=["full_attention"] * 28)
    text |= dict(rope_scaling=dict(type="default", rope_type="default", mrope_section=[16, 24, 24]))
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14)
    config["text_config"] |= text
    config["vision_config"] |= vision
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    for file in (tmp_path / "big").glob("*.safetensors"):
        file.unlink()
    words = ["--data", f"v={home}", "--labels", str(home / "labels"), "--backbone", str(tmp_path / "big"), "--dry-run"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert this.train.main([f"@{ROOT / 'vla' / '7b.args'}", *words, "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert "8.29" in shown.split("billion")[0] and "steps for" in shown and not (tmp_path / "o").exists()
    total = [float(line.split()[1]) for line in shown.splitlines() if "in all" in line]
    assert 12 < total[0] < 40


# --- verbs


def test_evaluate_measures_what_it_says(this, home, robot, latent, tmp_path, monkeypatch):
    """Errors equal those of a loop over the held-out clips, whose names come from the checkpoint."""
    logged = {}
    run = SimpleNamespace(log=logged.update, finish=lambda: None)
    wandb = SimpleNamespace(Table=lambda columns, rows: rows, init=lambda **more: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    words = ["--checkpoint", robot, "--data", f"other={home / 'robot'}", "--out", tmp_path / "r"]
    words += ["--env", "tabletop", "--episodes", 2, "--limit", 5, "--videos", 2, "--wandb", "test"]
    assert this.evaluate.main([str(w) for w in words]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    numbers, model = report["offline"]["other"], this.model.VLA.from_pretrained(robot).eval()
    (source,) = this.sources.read_sources([f"robot={home / 'robot'}"], "actions")
    errors, last = [], []
    for clip in source.validation:
        actions, state = clip.array("actions.npy"), torch.from_numpy(clip.array("state.npy"))
        batch = model.preprocess(list(clip.frames(32)), [clip.meta["instruction"]] * len(clip))
        predicted = model.predict_actions(batch | dict(state=state)).numpy()
        for t in range(len(actions)):
            for h in range(min(3, len(actions) - t)):
                errors.append(np.abs(predicted[t, h] - actions[t + h]))
                last.append(np.abs(actions[max(t - 1, 0)] - actions[t + h]))
    assert numbers["mae_per_dim_model"] == pytest.approx(np.mean(errors, 0), rel=1e-4)
    assert numbers["mae_per_dim_last_action"] == pytest.approx(np.mean(last, 0), rel=1e-4)
    assert report["closed_loop"]["episodes"] == len(report["closed_loop"]["rows"]) == 2
    assert [row[2:] for row in logged["episodes"]] == [[1_000_000, False, 5], [1_000_001, False, 5]]
    for name in ("report.md", "figures/rollouts.mp4", "figures/rollouts.png", "figures/commands.png"):
        assert (tmp_path / "r" / name).stat().st_size > 500
    words = ["--checkpoint", latent, "--data", f"demo={home}", "--labels", home / "labels", "--out", tmp_path / "l"]
    assert this.evaluate.main([str(w) for w in words]) == 0
    numbers = json.loads((tmp_path / "l" / "report.json").read_text())["offline"]["demo"]
    assert 0 <= numbers["exact_match"] <= numbers["token_accuracy"] <= 1 and numbers["perplexity"] > 1
    with pytest.raises(DataError, match="no head for actions"):
        this.evaluate.main(
            [str(w) for w in ["--checkpoint", latent, "--data", home / "robot", "--out", tmp_path / "x"]]
        )


def test_new_data_are_measured_whole(this, robot, tmp_path):
    """A data set that training never saw needs no flags: every episode of it is evaluated."""
    state = this.shards.npy(np.zeros((8, 2), np.float32))
    folder = write(this, tmp_path / "d", 5, **{"state.npy": state})
    words = ["--checkpoint", robot, "--data", f"new={folder}", "--out", tmp_path / "r"]
    assert this.evaluate.main([str(w) for w in words]) == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["offline"]["new"]["clips"] == 5


# --- several processes, kills


@pytest.mark.slow
def test_two_ranks_give_one_process(home, tmp_path):
    """DDP and FSDP: the same losses and weights; a checkpoint of either goes on in the other, on one or two ranks."""
    steps = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--dropout", 0]
    script, keys = ROOT / "vla" / "train.py", ("train/loss", "train/norm", "val/loss")
    runs = dict(one=(1, []), ddp=(2, []), fsdp=(2, ["--fsdp"]))

    def run(name, ranks, *more):
        done = launch(script, *stage2(home, tmp_path / name, *steps, *more), ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        found = np.array([row for row in curve(tmp_path / name, *keys) if row[3] is not None], float)
        return found, tensors_of(tmp_path / name)

    one, weights = run("one", 1)
    for name, (ranks, more) in runs.items():
        found, other = run(name, ranks, *more, "--resume")
        assert found == pytest.approx(one, rel=1e-5)
        assert max((weights[key] - other[key]).abs().max().item() for key in weights) < 1e-4
    for name, ranks, more in (("fsdp", 1, []), ("ddp", 2, ["--fsdp"])):
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_0000004")
        assert run(name, ranks, *more, "--resume")[0] == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how, more", [("kill", ["--fsdp"]), ("term", ["--fsdp"]), ("term", ["--workers", 2])])
def test_killed_runs_go_on(home, tmp_path, how, more):
    """kill -9 or SIGTERM to the whole process group, loader processes included: resumed, the run ends as unharmed."""
    steps = ["--steps", 12, "--eval-every", 4, "--save-every", 2]
    script, ranks = ROOT / "vla" / "train.py", 2 if "--fsdp" in more else 1
    plain = more if ranks > 1 else []  # loader processes change nothing
    assert launch(script, *stage2(home, tmp_path / "a", *steps, *plain), ranks=ranks).returncode == 0
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    words = [str(w) for w in [*command, script, *stage2(home, tmp_path / "b", *steps, *more)]]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    run = subprocess.Popen(words, start_new_session=True, **quiet)
    until = time.monotonic() + 240
    while not list((tmp_path / "b").glob("checkpoints/step_*")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
    code = run.wait(120)
    assert ranks > 1 or code in (75, 0)
    done = launch(script, *stage2(home, tmp_path / "b", *steps, *more, "--resume"), ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_clips_of_a_smaller_gap_than_the_largest(this, tmp_path):
    """A gap in seconds is of fewer frames where the rate is lower: such clips of a source are trained on."""
    labels = write_labels(this, tmp_path / "l", gap=2)
    (labels / "labels.json").write_text((labels / "labels.json").read_text().replace('"gap": 2', '"gap": 4'))
    source, _ = read(this, write(this, tmp_path / "d"), labels)
    assert len(this.sources.read_latents(source.train[0], source.labels)[0]) == 6


def test_text_that_a_tokenizer_would_not_take(this, home):
    """What UTF-8 cannot hold, and the model's own words in the prompt, are plain text."""
    model = small(this, home, prompt="<|image_pad|> do {instruction}")
    (image,) = frames(1)
    batch = model.preprocess([image], ["cut \ud83d off"])
    model.query_states(batch)


def test_a_run_knows_its_clips_under_any_name(this, tmp_path):
    """A part of the run's data under another name is the run's; other data of its name is not."""
    (one,) = this.sources.read_sources([f"a={write(this, tmp_path / 'd', 20)}"], "actions", None, 0.3)
    split, (part,) = (
        this.sources.split_of([one]),
        this.sources.read_sources([f"b={tmp_path / 'd'}"], "actions", None, 0),
    )
    part.train = part.train[:15]
    assert "held out" in this.sources.split_for_report(part, split) and set(part.held_out) == set(one.held_out)
    (new,) = this.sources.read_sources([f"a={write(this, tmp_path / 'n', 4, key='n{}')}"], "actions", None, 0)
    assert "new data" in this.sources.split_for_report(new, split)
    this.sources.restore_split([part], split)
    assert set(part.held_out) == set(one.held_out)


def test_a_template_with_bos_gives_one(this, home):
    """Gemma's chat template writes <bos>, and its tokenizer would add another."""
    from tokenizers.processors import TemplateProcessing

    model, mark = small(this, home), "<|endoftext|>"
    tokenizer, number = model.processor.tokenizer, model.processor.tokenizer.convert_tokens_to_ids(mark)
    tokenizer._tokenizer.post_processor = TemplateProcessing(f"{mark} $A", special_tokens=[(mark, number)])
    tokenizer.bos_token, model.processor.chat_template = mark, mark + model.processor.chat_template
    assert (model.preprocess(frames(1), ["push"])["input_ids"] == number).sum() == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_fsdp_in_bf16_computes_a_layer_again_as_before(this, tmp_path, family):
    this.tiny.build(tmp_path / "small", [" red"], family, width=32, depth=2, vision_width=32)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    norms, config = [], small(this, tmp_path, LATENT | dict(target="vectors")).config
    for again in (False, True):
        torch.manual_seed(0)
        model = this.scaling.build(tmp_path / "small", config, torch.device("cpu"), "bf16", "none").train()
        model.checkpoint_activations() if again else None
        with torch.autocast("cpu", torch.bfloat16):
            model(batch_of(model))[0].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()))
    torch.distributed.destroy_process_group()
    assert norms[0] == norms[1]
