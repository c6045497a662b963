"""vla: the world and its expert, the shards, the batches, the model, stages 2 and 3, the policy, the verbs."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, launch, load

MORE = "demo evaluate finetune policy predict shards tiny".split()
SIM = "sim.experiment sim.film sim.idm sim.pointing sim.rollout sim.world".split()


@pytest.fixture(scope="module")
def this():
    modules = vars(load("vla", *MORE, *SIM))
    return SimpleNamespace(**{name.removeprefix("sim."): module for name, module in modules.items()})


@pytest.fixture(scope="module")
def home(this, tmp_path_factory):
    """A small demo: 24 videos with latents, 16 demonstrations, a tiny backbone of width 32."""
    folder = tmp_path_factory.mktemp("demo") / "vla"
    this.demo.write(folder, videos=24, demonstrations=16, family="qwen3_vl", pointing=0)
    names = [f" {name}" for name in this.pointing.NAMES]
    this.tiny.build(
        folder / "small", [*names, "robot, push the red block to the left"], width=32, depth=2, vision_width=32
    )
    return folder


def stage2(home, out, *more):
    words = ["--data", f"demo={home}", "--labels", home / "labels", "--backbone", home / "small", "--out", out]
    words += "--image-size 32 --batch-size 8 --lr 1e-3 --warmup 2 --log-every 1 --val-samples 24".split()
    return [*words, "--prompt", "robot, {instruction}", *more]


def stage3(home, out, *more):
    words = ["--data", f"robot={home / 'robot'}", "--out", out]
    return [*words, *"--batch-size 8 --lr 1e-3 --warmup 2 --log-every 1 --val-samples 24 --chunk 3".split(), *more]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out, name="last"):
    from safetensors.torch import load_file

    folder = out / "checkpoints" / name
    heads = torch.load(folder / "heads.bin", weights_only=True)
    return {**load_file(folder / "model.safetensors"), **heads}


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


# --- world


def test_expert_succeeds_and_chance_does_not(this):
    """Otherwise demonstrations teach the wrong thing, or success means nothing."""
    seeds = [(5, i) for i in range(200)]
    for sd in (0.0, 0.35):
        assert np.mean([episode["success"] for episode in this.world.record(seeds, sd=sd)]) >= 0.9
    tables, rng = this.world.Tables(200), np.random.default_rng(0)
    tables.reset(seeds)
    won, walk = tables.success(), np.zeros((200, 2))
    assert not won.any()
    for _ in range(tables.limit):
        walk = 0.9 * walk + rng.normal(size=(200, 2)) * 0.02
        won |= tables.step(walk)[1]
    assert won.mean() <= 0.05


def test_tables_side_by_side_are_tables_alone(this):
    """A vectorised step mixes up two tables."""
    seeds, rng = [(1, i) for i in range(5)], np.random.default_rng(0)
    actions = rng.normal(size=(12, 5, 2)) * 0.03
    together = this.world.Tables(5, distractors=2)
    together.reset(seeds)
    frames = [together.step(action)[0] for action in actions]
    for i, seed in enumerate(seeds):
        alone = this.world.Tables(1, distractors=2)
        alone.reset([seed])
        for step, action in enumerate(actions):
            assert np.array_equal(alone.step(action[i : i + 1])[0][0], frames[step][i])


def test_things_do_not_overlap_and_stay_on_the_table(this):
    """On random walks blocks neither overlap much nor leave, and an action is at most MAX_STEP."""
    w = this.world
    tables, rng = w.Tables(64), np.random.default_rng(1)
    tables.reset(range(64))
    for _ in range(60):
        before = tables.effector.copy()
        tables.step(rng.normal(size=(64, 2)))
        assert (np.linalg.norm(tables.effector - before, axis=1) < w.MAX_STEP + 0.05).all()
        assert (tables.blocks > w.BLOCK - 1e-9).all() and (tables.blocks < 1 - w.BLOCK + 1e-9).all()
        gaps = np.linalg.norm(tables.blocks[:, :, None] - tables.blocks[:, None], axis=-1)[:, ~np.eye(4, dtype=bool)]
        assert np.quantile(gaps, 0.001) > 2 * w.BLOCK - 0.03


def test_tabletop_is_a_gymnasium_environment(this):
    env = this.world.Tabletop(limit=3)
    obs, info = env.reset(seed=4)
    again, _ = env.reset(seed=4)
    assert obs["instruction"] == again["instruction"] and np.array_equal(obs["image"], again["image"]) and info == {}
    assert obs["image"].shape == (32, 32, 3) and obs["image"].dtype == np.uint8 and obs["state"].shape == (2,)
    for step in range(3):
        obs, reward, terminated, truncated, info = env.step(np.array([0.04, 0.0]))
        assert (reward, terminated, truncated, info["is_success"]) == (0.0, False, step == 2, False)


def test_bodies_look_different_and_move_alike(this):
    """The other embodiment would be the same one, or another task."""
    seeds = [(2, i) for i in range(4)]
    one, two = this.world.record(seeds, body="disc"), this.world.record(seeds, body="light")
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a["actions"], b["actions"]) and a["instruction"] == b["instruction"]
        assert np.abs(a["frames"].astype(int) - b["frames"]).mean() > 50


# --- shards and sources


def write(this, folder, episodes=3, length=8, **more):
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
        samples.append({"__key__": f"k{i}", **{name: value for name, value in members.items() if value is not None}})
    this.shards.write_shard(folder / "a.tar", samples)
    return folder


def write_labels(this, folder, gap=2, length=8, vocabulary=8, codes=None, **about):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, vocabulary, (length - gap, 2)) if codes is None else codes
    arrays = dict(codes=codes, vectors=rng.normal(size=(*codes.shape, 3)).astype(np.float32), gap=np.int64(gap))
    packed = this.shards.npz(**{**arrays, **{k: v for k, v in about.items() if k in ("vectors", "valid")}})
    this.shards.write_shard(folder / "a.tar", [{"__key__": f"k{i}", "latents.npz": packed} for i in range(3)])
    head = dict(
        vocabulary=vocabulary, codes=2, dim=3, gap=gap, model="laq", codebook=rng.normal(size=(vocabulary, 3)).tolist()
    )
    (folder / "labels.json").write_text(json.dumps(head | {k: v for k, v in about.items() if k in head}))
    return folder


def test_shards_come_back_as_written(this, tmp_path):
    folder = write(this, tmp_path / "d")
    labels = write_labels(this, tmp_path / "l", valid=np.array([1, 1, 0, 1, 1, 1], bool))
    (source,) = this.data.read_sources([f"x={folder}"], "latents", [labels], val_share=0)
    clip = source.train[0]
    assert [clip.key for clip in source.train] == ["k0", "k1", "k2"] and clip.meta["episode"] == "e0"
    assert clip.rows.tolist() == [0, 1, 3, 4, 5], "a pair across a cut has no latent action"
    with tarfile.open(folder / "a.tar") as tar:
        frames = np.load(io.BytesIO(tar.extractfile("k0.frames.npy").read()))
    assert np.array_equal(clip.frames([5, 2], 16), frames[[5, 2]])
    assert source.labels["codebook"][0] == source.labels["codebook"][1], "one codebook for both slots"


def test_mp4_clips_give_the_frames_that_were_asked_for(this, tmp_path):
    import av

    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=5, options={"crf": "1"})
        stream.width = stream.height = 32
        for level in (10, 60, 110, 160, 210):
            frame = np.full((32, 32, 3), level, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
    folder = write(this, tmp_path / "d", length=5, **{"frames.npy": None, "mp4": path.read_bytes()})
    clip = this.shards.read_clips(folder)[0]
    assert np.allclose(clip.frames([3, 0], 16).mean((1, 2, 3)), [160, 10], atol=4)
    with pytest.raises(ValueError, match="frame 7 is beyond the end"):
        clip.frames([7], 16)


@pytest.mark.parametrize("options", [dict(g=6, bf=3), dict(g=250, bf=0), {"x264-params": "open-gop=1:keyint=6"}])
def test_rows_of_an_mp4_are_the_same_as_in_the_whole(this, tmp_path, options):
    """Decoding from the keyframe before a row gives another frame; here also the times are uneven."""
    import av

    texture = np.kron(np.random.default_rng(0).integers(40, 200, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={name: str(value) for name, value in options.items()})
        stream.width = stream.height = 32
        for t, time_ in enumerate(np.cumsum([1] * 11 + [3, 1] * 8 + [1] * 8)):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, (t, 3 * t), (0, 1)), "rgb24")
            frame.pts, frame.time_base = int(time_), Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with av.open(str(tmp_path / "v.mp4")) as file:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    folder = write(this, tmp_path / "d", length=35, **{"frames.npy": None, "mp4": (tmp_path / "v.mp4").read_bytes()})
    clip = this.shards.read_clips(folder)[0]
    for rows in (list(range(35)), [30, 3, 34, 12, 3, 13], *([row] for row in range(35))):
        assert np.array_equal(clip.frames(rows, 32), whole[rows]), rows


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"actions.npy": None}, "no commands to learn"),
        ({"actions.npy": b"not numpy"}, "k0.actions.npy"),
        ({"json": b"{}"}, "needs texts source, episode"),
    ],
)
def test_broken_shards_end_in_one_line(this, tmp_path, broken, message):
    folder = write(this, tmp_path / "d", **broken)
    with pytest.raises(ValueError, match=message):
        sources = this.data.read_sources([f"x={folder}"], "actions", val_share=0)
        this.data.describe_actions(sources, 2)


def test_commands_with_nan_or_pickles_are_refused(this, tmp_path):
    for name, array in dict(nan=np.full((8, 2), np.nan), pickle=np.array([{}] * 8)).items():
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        sources = this.data.read_sources(
            [str(write(this, tmp_path / name, **{"actions.npy": file.getvalue()}))], "actions", val_share=0
        )
        with pytest.raises(ValueError, match="NaN|allow_pickle"):
            this.data.describe_actions(sources, 2)


def test_labels_that_do_not_fit_are_refused(this, tmp_path):
    """Shards without labels, labels of other shards, of another vocabulary or length, cut short."""
    folder = write(this, tmp_path / "d")

    def read(labels, **more):
        return this.data.read_sources([f"x={folder}"], "latents", [labels], val_share=0, **more)

    with pytest.raises(ValueError, match="labels.json.*not there"):
        read(folder)
    with pytest.raises(ValueError, match="code 9.*vocabulary of 8"):
        read(write_labels(this, tmp_path / "a", codes=np.full((6, 2), 9)))
    with pytest.raises(ValueError, match="expected vectors .6, 2, 3"):
        read(write_labels(this, tmp_path / "b", codes=np.zeros((5, 2), int)))
    with pytest.raises(ValueError, match="codebook has shape"):
        read(write_labels(this, tmp_path / "c", codebook=[[0.0]]))
    with pytest.raises(ValueError, match="NaN"):
        read(write_labels(this, tmp_path / "e", vectors=np.full((6, 2, 3), np.nan, np.float32)))
    labels = write_labels(this, tmp_path / "f")
    whole = (labels / "a.tar").read_bytes()
    (labels / "a.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match="a.tar"):
        read(labels)
    (labels / "a.tar").unlink()
    with pytest.raises((ValueError, OSError), match="a.tar"):
        read(labels)


def test_a_missing_instruction_is_an_error_unless_one_is_given(this, tmp_path):
    about = dict(instruction=None, fps=5, source="s", episode="e", camera="top", length=8)
    folder = write(this, tmp_path / "d", episodes=1, json=json.dumps(about).encode())
    with pytest.raises(ValueError, match="k0.json: has no instruction"):
        this.data.read_sources([str(folder)], "actions", val_share=0)
    (source,) = this.data.read_sources([str(folder)], "actions", val_share=0, instruction="hebe den Würfel")
    assert source.train[0].meta["instruction"] == "hebe den Würfel"


def test_the_split_is_by_episode_and_subsets_are_nested(this):
    clips = [SimpleNamespace(identity=("s", f"e{i}"), meta=dict(episode=f"e{i}")) for i in range(200) for _ in range(2)]
    train, held = this.data.split(clips, 0.2, [], "s")
    assert not {clip.identity for clip in train} & {clip.identity for clip in held}
    assert 25 <= len(held) / 2 <= 55 and len(train) + len(held) == 400
    five, ten = ({clip.identity for clip in this.data.few(clips, n, 3)} for n in (5, 10))
    assert len(five) == 5 and len(ten) == 10 and five < ten
    assert five != {clip.identity for clip in this.data.few(clips, 5, 4)}, "another seed, other demonstrations"
    with pytest.raises(ValueError, match="--episodes 201"):
        this.data.few(clips, 201, 0)
    with pytest.raises(ValueError, match="no episode x"):
        this.data.split(clips, 0.2, ["x"], "s")


# --- batches


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_step_is_the_same_on_any_number_of_ranks(this, home, share):
    """Two ranks, two micro-steps, or starting later, change which samples a step sees."""
    videos = this.data.read_sources([f"v={home}"], "latents", [home / "labels"])
    robots = this.data.read_sources([f"r={home / 'robot'}"], "actions")

    def steps(rank=0, world=1, accum=1, first=0, workers=0):
        options = dict(seed=7, steps=3, first=first, accum=accum, rank=rank, world=world, workers=workers)
        options |= dict(latent_share=share, shift=0.1, jitter=0.1)
        keep = dict(images=None)

        def prepare(images, instructions):
            keep["images"] = np.stack(images)
            return dict(pixels=torch.from_numpy(keep["images"]), words=torch.tensor([len(t) for t in instructions]))

        shape = (2, 2, 3, 2, 0)
        return list(this.data.prepare_dataloaders(videos + robots, prepare, 8, 32, shape, **options)[0])

    whole = steps()
    assert [batch["has_latents"].float().mean() for batch in whole] == [share] * 3
    for name in ("pixels", "vectors", "actions", "mask", "words"):
        ranks = [steps(rank, 2, 2) for rank in range(2)]
        for step in range(3):
            parts = [ranks[rank][2 * step + micro][name] for micro in range(2) for rank in range(2)]
            assert torch.equal(torch.cat(parts), whole[step][name]), name
        assert torch.equal(steps(first=2)[0][name], whole[2][name])


def test_samples_hold_what_the_clip_holds(this, home):
    """The wrong row's latent or command next to a frame would train, and never work."""
    (videos,) = this.data.read_sources([f"v={home}"], "latents", [home / "labels"], val_share=0)
    (robots,) = this.data.read_sources([f"r={home / 'robot'}"], "actions", val_share=0)
    clip = videos.train[3]
    codes, vectors, _ = clip.latents()
    (sample,) = this.data.take(clip, [4], "latents", 32, (2, 2, 0, 0, 0))
    assert np.array_equal(sample["codes"], codes[4]) and np.array_equal(sample["vectors"], vectors[4])
    clip = robots.train[0]
    actions, length = clip.array("actions.npy"), clip.meta["length"]
    (sample,) = this.data.take(clip, [length - 2], "actions", 32, (0, 0, 4, 2, 2))
    assert np.array_equal(sample["actions"][:2], actions[-2:]) and sample["mask"].tolist() == [True, True, False, False]
    assert np.array_equal(sample["state"], clip.array("state.npy")[length - 2])


def test_shift_and_jitter(this):
    image = np.arange(10 * 10 * 3, dtype=np.uint8).reshape(10, 10, 3)
    same = this.data.shift_and_jitter(image, np.full(5, 0.5), 0.2, 0.0)
    assert np.array_equal(same, image), "the middle of all ranges changes nothing"
    moved = this.data.shift_and_jitter(image, np.array([0.99, 0.0, 0.5, 0.5, 0.5]), 0.2, 0.0)
    assert np.array_equal(moved[:-2, 2:], image[2:, :-2])


def test_references_are_those_of_brute_force(this):
    rng = np.random.default_rng(0)

    def clips(n):
        first = rng.integers(0, 3, (n, 40, 1))
        codes = np.concatenate([first, (first + rng.integers(0, 2, first.shape)) % 4], 2)
        return [SimpleNamespace(latents=lambda c=c: (c, None, None), rows=np.arange(40)) for c in codes]

    source = SimpleNamespace(train=clips(6), validation=clips(3), labels=dict(vocabulary=4, codes=2))
    found = this.data.references(source)
    known = [tuple(row) for clip in source.train for row in clip.latents()[0]]
    held = [tuple(row) for clip in source.validation for row in clip.latents()[0]]

    def most(values):
        return max(sorted(set(values)), key=values.count)

    best = [most([row[n] for row in known]) for n in (0, 1)]
    after = {k: most([b for a, b in known if a == k]) for k in range(4) if any(a == k for a, _ in known)}
    right = [[row[0] == best[0], row[1] == best[1]] for row in held]
    pairs = [[row[0] == best[0], row[1] == after.get(row[0], 0)] for row in held]
    assert found["majority_accuracy"] == pytest.approx(np.mean(right))
    assert found["bigram_accuracy"] == pytest.approx(np.mean(pairs))
    assert found["majority_word_accuracy"] == pytest.approx(np.mean([row == most(known) for row in held]))


def test_normalisation_and_bins_of_commands(this, tmp_path):
    """1 % and 99 % quantiles go to -1 and 1; a constant or rare dim does not explode; bins are equally full."""
    rng = np.random.default_rng(0)
    actions = np.stack([rng.normal(3, 2, 1000), np.full(1000, 0.5), (np.arange(1000) == 7).astype(float)], 1).astype(
        np.float32
    )
    clip = SimpleNamespace(array=lambda name: actions, members={"actions.npy": 1})
    about = this.data.describe_actions([SimpleNamespace(train=[clip], name="x")], 4, bins=8)
    scaled = (actions - about["center"]) / about["scale"]
    assert np.quantile(scaled[:, 0], [0.01, 0.99]) == pytest.approx([-1, 1], abs=1e-5)
    assert np.abs(scaled[:, 1:]).max() <= 2 + 1e-6
    edges, values = np.array(about["edges"]), np.array(about["values"])
    which = np.searchsorted(edges[0], actions[:, 0], side="right")
    assert np.bincount(which, minlength=8).tolist() == [125] * 8
    assert values[0] == pytest.approx([actions[which == b, 0].mean() for b in range(8)], rel=1e-5)


# --- model


def small(this, home, **changes):
    torch.manual_seed(0)
    about = dict(prompt="robot, {instruction}", queries=2, image_size=32, dropout=0.0)
    return this.model.VLA(*this.model.open_backbone(home / "small"), about | changes)


LATENT = dict(vocabulary=4, codes=2, dim=3, gap=2, target="vectors")
LATENT |= dict(codebook=np.arange(24.0).reshape(2, 4, 3).tolist(), center=[[1.0] * 3] * 2, scale=[[2.0] * 3] * 2)
LATENT |= dict(weight=[[0.5, 0.3, 0.2]] * 2)
ACTION = dict(dims=2, chunk=3, center=[1.0, 2.0], scale=[0.5, 4.0], bins=0, state=0)


def frames(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3)).astype(np.uint8))


def test_prompts_of_different_length_do_not_disturb_one_another(this, home):
    """Padding, positions or the queries' place are wrong: a sample's output depends on its neighbours."""
    model, images = small(this, home).eval(), frames(2)
    texts = ["push", "push the red block to the left and then, slowly, further on"]
    with torch.no_grad():
        both = model.read(model.inputs(images, texts))
        alone = [model.read(model.inputs([image], [text]))[0] for image, text in zip(images, texts, strict=True)]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.05


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_queries_see_image_and_instruction(this, home, tmp_path, family):
    this.tiny.build(tmp_path / "small", [" red", " blue"], family, width=32, depth=2, vision_width=32)
    model = small(this, tmp_path).eval()
    with torch.no_grad():
        base, image, text = (
            model.read(model.inputs(*words))
            for words in [(frames(1), ["push red"]), (frames(1, 1), ["push red"]), (frames(1), ["push blue"])]
        )
        model.queries.mul_(2)
        queries = model.read(model.inputs(frames(1), ["push red"]))
    for other in (image, text, queries):
        assert (base - other).abs().max() > 1e-3


def test_film_reads_the_order_of_words_whatever_the_padding(this, tmp_path):
    """The laptop's backbone mixes up "red to blue" and "blue to red", or a neighbour's longer prompt disturbs it."""
    texts = ["push the red block to the blue block", "push the blue block to the red block", "push the red block"]
    this.tiny.build(tmp_path / "small", texts, "film")
    model = small(this, tmp_path).eval()
    same = frames(1) * 3
    with torch.no_grad():
        all_three = model.read(model.inputs(same, texts))
        alone = model.read(model.inputs(same[:1], texts[2:]))
    assert (all_three[0] - all_three[1]).abs().max() > 1e-3
    torch.testing.assert_close(all_three[2:], alone, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    loaded = this.model.VLA.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(loaded.read(loaded.inputs(same, texts)), all_three)


def batch_of(model, count=4, latents=(1, 1, 0, 0)):
    g = torch.Generator().manual_seed(3)
    has = torch.tensor(latents, dtype=torch.bool)
    batch = model.inputs(frames(count), ["push red"] * count)
    batch |= dict(codes=torch.randint(4, (count, 2), generator=g), vectors=torch.randn(count, 2, 3, generator=g))
    batch |= dict(actions=torch.randn(count, 3, 2, generator=g), mask=torch.tensor([[1, 1, 1], [1, 1, 0]] * 2).bool())
    return batch | dict(has_latents=has, has_actions=~has)


@pytest.mark.parametrize("target", ["codes", "codebook", "vectors"])
def test_latent_loss_written_out(this, home, target):
    """Each target's loss, number by number, and a mixed batch: every sample weighs the same."""
    model = small(this, home, latent=LATENT | dict(target=target), action=ACTION).eval()
    batch = batch_of(model)
    with torch.no_grad():
        loss, metrics = model(batch)
        hidden = model.read(batch)
    logits = model.to_codes(hidden).log_softmax(2)
    total = 0.0
    for b in range(2):
        for n in range(2):
            code = batch["codes"][b, n]
            total -= logits[b, n, code].item() / 2
            if target != "codes":
                vector = torch.tensor(LATENT["codebook"])[n, code] if target == "codebook" else batch["vectors"][b, n]
                error = (model.to_vectors(hidden[b, n]) - (vector - 1) / 2).square()
                total += (error * torch.tensor([0.5, 0.3, 0.2])).sum().item() / 2
    out = model.to_actions(hidden.flatten(1)).view(4, 3, 2)
    for b in (2, 3):
        steps = 3 if b % 2 == 0 else 2
        x = (out[b] - (batch["actions"][b] - torch.tensor([1.0, 2.0])) / torch.tensor([0.5, 4.0]))[:steps].abs()
        total += torch.where(x < 1, 0.5 * x * x, x - 0.5).mean().item()
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)
    right = (model.to_codes(hidden).argmax(2) == batch["codes"])[:2].float()
    assert metrics["token_accuracy"].item() == pytest.approx(right.mean().item())
    assert metrics["word_accuracy"].item() == pytest.approx(right.amin(1).mean().item())


def test_the_code_reader_of_a_regression_sends_no_gradient_back(this, home):
    """With target vectors the classifier only reads: it must not pull the backbone towards the codes."""
    model = small(this, home, latent=LATENT | dict(target="vectors")).eval()
    batch = batch_of(model, latents=(1, 1, 1, 1))
    hidden = model.read(batch).detach().requires_grad_()
    entropy = model.latent_loss(hidden, batch)[1]["cross_entropy"].sum()
    (grad,) = torch.autograd.grad(entropy, hidden, allow_unused=True)
    assert grad is None
    model(batch)[0].backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "a parameter that nothing trains hangs DDP"


def test_bins_are_classified_and_decoded(this, home):
    about = ACTION | dict(bins=3, edges=[[-1.0, 1.0], [0.0, 5.0]], values=[[-2.0, 0.0, 2.0], [-1.0, 2.0, 9.0]])
    model = small(this, home, action=about).eval()
    batch = batch_of(model, latents=(0, 0, 0, 0))
    with torch.no_grad():
        loss = model(batch)[0].item()
        logits = model.chunk(model.read(batch))
        commands = model.predict_actions(batch)
    total = 0.0
    for b in range(4):
        steps, part = (3 if b % 2 == 0 else 2), 0.0
        for h in range(steps):
            for a, edges in enumerate(about["edges"]):
                which = sum(batch["actions"][b, h, a].item() >= edge for edge in edges)
                part -= logits[b, h, a].log_softmax(0)[which].item() / (2 * steps)
        total += part / 4
    assert loss == pytest.approx(total, rel=1e-4)
    for a in range(2):
        expected = torch.tensor(about["values"])[a][logits[:, :, a].argmax(2)]
        torch.testing.assert_close(commands[..., a], expected)


def test_low_rank_layers_start_as_nothing_and_train_alone(this, home):
    plain, model = small(this, home, action=ACTION).eval(), small(this, home, action=ACTION, rank=2).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    batch = batch_of(model, latents=(0, 0, 0, 0))
    with torch.no_grad():
        torch.testing.assert_close(model.read(batch), plain.read(batch))
    model.freeze("backbone")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("low_rank_" in name for name in trains if name.startswith("backbone.")) and len(trains) > 20
    assert "queries" in trains and "to_actions.weight" in trains


def test_a_checkpoint_is_a_plain_hugging_face_folder(this, home, latent):
    """Another program cannot use the backbone, or gets other weights."""
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


def test_what_is_saved_comes_back(this, home, tmp_path):
    model = small(this, home, latent=LATENT, action=ACTION | dict(state=0), rank=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model.eval().save_pretrained(tmp_path / "c")
    again = this.model.VLA.from_pretrained(tmp_path / "c").eval()
    batch = batch_of(model)
    with torch.no_grad():
        assert torch.equal(model(batch)[0], again(batch)[0])
    with pytest.raises(ValueError, match="heads.bin: not a checkpoint"):
        (tmp_path / "c" / "heads.bin").write_bytes(b"x" * 100)
        this.model.VLA.from_pretrained(tmp_path / "c")


def test_what_is_no_vision_language_model_is_refused(this, home, latent, tmp_path):
    """An unknown name, a folder that is not a model, a language model, a processor without images, a damaged file."""
    with pytest.raises(ValueError, match="not a vision-language model"):
        this.model.open_backbone(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
    with pytest.raises(ValueError, match="not a vision-language model"):
        this.model.open_backbone(tmp_path)
    text_only = tmp_path / "text"
    text_only.mkdir()
    for file in (home / "small").iterdir():
        if "preprocessor" not in file.name:
            (text_only / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=str(text_only)):
        this.model.open_backbone(text_only)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in (home / "small").iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ValueError, match=str(cut)):
        this.model.open_backbone(cut)


# --- policy and rollouts


class Stub:
    """Predicts the chunk 100 k, 100 k + 1, ... at its k-th call."""

    action = dict(chunk=4, state=0)

    def __init__(self, this):
        self.calls, self.config, self.queries = 0, dict(image_size=32), torch.zeros(1)

    def eval(self):
        return self

    def inputs(self, images, instructions):
        return dict(x=torch.zeros(len(images)))

    def predict_actions(self, batch):
        chunk = 100.0 * self.calls + torch.arange(4.0)
        self.calls += 1
        return chunk.view(1, 4, 1).expand(len(batch["x"]), -1, -1)


@pytest.mark.parametrize("replan, ensemble", [(1, None), (3, None), (1, 0.0), (1, 0.5), (2, 0.1)])
def test_chunks_are_carried_out_and_averaged(this, replan, ensemble):
    policy = this.policy.Policy(Stub(this), replan, ensemble)
    policy.reset("push")
    image = np.zeros((32, 32, 3), np.uint8)
    for t in range(11):
        said = [(100 * k + t - s) for k, s in enumerate(range(0, t + 1, replan)) if t - s < 4]  # oldest first
        w = [math.exp(-(ensemble or 0) * i) for i in range(len(said))]
        expected = said[-1] if ensemble is None else sum(a * b for a, b in zip(w, said, strict=True)) / sum(w)
        action = policy.act(image)
        assert action.shape == (1,) and action[0] == pytest.approx(expected)
    policy.reset(["a", "b"])
    assert policy.act([image, image]).shape == (2, 1)


def test_policy_of_a_checkpoint(this, robot, latent):
    """In robot units, the same alone as side by side; what it cannot use is refused."""
    policy = this.policy.Policy.from_pretrained(robot)
    images, states = frames(3), np.float32([[0.1, 0.2], [0.5, 0.5], [0.9, 0.3]])
    policy.reset(["push red", "push the blue block", "push"])
    together = policy.act(images, states)
    for i, text in enumerate(policy.instructions.copy()):
        policy.reset(text)
        assert policy.act(images[i], states[i]) == pytest.approx(together[i], abs=1e-4)
    assert np.abs(together).max() < 0.5
    with pytest.raises(ValueError, match="reads 2 numbers"):
        policy.act(images[0])
    with pytest.raises(ValueError, match="uint8"):
        policy.act(images[0] / 255.0, states[0])
    with pytest.raises(ValueError, match="finetune.py"):
        this.policy.Policy.from_pretrained(latent)


def test_wilson_interval(this):
    """Published values (Brown, Cai and DasGupta 2001; checked with statsmodels)."""
    for (k, n), expected in {(0, 10): (0.0, 0.2775), (5, 10): (0.2366, 0.7634), (98, 100): (0.9300, 0.9945)}.items():
        assert this.rollout.wilson(k, n) == pytest.approx(expected, abs=1e-4)


def test_rollouts_measure_the_expert_right(this):
    """A policy that acts as the expert does is scored as the expert is, side by side and through gymnasium."""
    seeds = [(9, i) for i in range(12)]
    record = this.world.record(seeds, sd=0.0)

    class Expert:
        model = SimpleNamespace(action=dict(state=0))

        def reset(self, words):
            self.tables = None

        def act(self, image, state=None):
            return (
                self.source.expert() if isinstance(image, np.ndarray) and image.ndim == 4 else self.source.expert()[0]
            )

    made, original = [], this.world.Tables.reset
    expert = Expert()

    def reset(tables, seeds):
        expert.source = tables
        made.append(tables)
        return original(tables, seeds)

    this.world.Tables.reset = reset
    try:
        won, steps, films = this.rollout.on_tables(expert, seeds, films=2)
        env = this.world.Tabletop()
        one = this.rollout.in_gymnasium(expert, env, [3, 4], image_key="image", limit=70)
    finally:
        this.world.Tables.reset = original
    assert won.tolist() == [episode["success"] for episode in record]
    assert steps.tolist() == [len(e["frames"]) - 1 if e["success"] else 70 for e in record]
    caption, frames = films[0]
    assert len(frames) == steps[0] + 1 and caption == f"{record[0]['instruction']}: {'done' if won[0] else 'not done'}"
    assert len(one[0]) == 2 and one[0].any()


# --- the runs


def test_stage_2_learns_what_validation_can_see(this, latent):
    """The log holds accuracy per slot beside its references, and speed; weights did move."""
    lines = log_of(latent.parents[1])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    last = lines[-1]
    for name in (
        "token_accuracy",
        "token_accuracy_0",
        "token_accuracy_1",
        "word_accuracy",
        "perplexity",
        "bigram_accuracy",
    ):
        assert f"val/demo/{name}" in last
    assert last["tokens_per_s"] > 0 and (latent.parents[1] / "figures" / "curves.png").exists()


def test_stage_2_overfits_one_clip(this, home, tmp_path):
    """The latents of eight frames can be learned by heart: image, queries, heads and optimizer are connected."""
    model = small(this, home, latent=LATENT | dict(target="codes"))
    batch = batch_of(model, latents=(1, 1, 1, 1))
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss, metrics = model(batch)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert metrics["token_accuracy"] == 1 and loss < 0.2


def test_interrupted_and_resumed_equals_uninterrupted(this, home, tmp_path):
    """A killed run goes on with other samples, dropout or optimizer state."""
    args = ["--steps", 4, "--eval-every", 2, "--save-every", 2]
    assert this.train.main(stage2(home, tmp_path / "a", *args)) == 0
    common, monkey = this.train.common, pytest.MonkeyPatch()
    original = common.save
    monkey.setattr(common, "save", lambda *words: (original(*words), os.kill(os.getpid(), signal.SIGTERM)))
    try:
        assert this.train.main(stage2(home, tmp_path / "b", *args)) == 75
    finally:
        monkey.undo()
    assert this.train.main(stage2(home, tmp_path / "b", *args, "--resume")) == 0
    one, two = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    keys = ("step", "train/loss", "val/loss")
    assert [[line.get(k) for k in keys] for line in log_of(tmp_path / "a")] == [
        [line.get(k) for k in keys] for line in log_of(tmp_path / "b")
    ]


def test_stage_3_drops_the_latent_head_or_keeps_it(this, home, latent, robot, tmp_path):
    stage_2 = this.model.read_config(latent)
    assert stage_2["latent"]["target"] == "vectors" and this.model.read_config(robot)["latent"] is None
    both = stage3(home, tmp_path / "m", "--init", latent, "--steps", 2, "--videos", home, "--labels", home / "labels")
    assert this.finetune.main([*both, "--latent-share", 0.25]) == 0
    about = this.model.read_config(tmp_path / "m" / "checkpoints" / "last")
    assert about["latent"] == stage_2["latent"] and about["action"]["chunk"] == 3
    last = log_of(tmp_path / "m")[-1]
    assert (
        "val/robot/action_mae" in last and "val/vla/token_accuracy" in last and "val/robot/token_accuracy" not in last
    )


def test_stage_3_from_stage_3_keeps_the_head_if_told(this, home, robot, tmp_path):
    words = ["--init", robot, "--steps", 1, "--state", "--lr", "1e-12", "--clip", "1e-9"]
    assert this.finetune.main([*stage3(home, tmp_path / "k", *words), "--keep-head", "--episodes", 4]) == 0
    assert this.finetune.main([*stage3(home, tmp_path / "n", *words), "--episodes", 4]) == 0
    old, kept, new = (weights_of(out) for out in (robot.parents[1], tmp_path / "k", tmp_path / "n"))
    torch.testing.assert_close(kept["to_actions.weight"], old["to_actions.weight"])
    assert not torch.allclose(new["to_actions.weight"], old["to_actions.weight"])
    assert (
        this.model.read_config(tmp_path / "k" / "checkpoints" / "last")["action"]
        == this.model.read_config(robot)["action"]
    )


@pytest.mark.parametrize("more", [["--bins", 5], ["--freeze", "backbone", "--rank", 2], ["--freeze", "backbone"]])
def test_ways_to_finetune(this, home, latent, tmp_path, more):
    out = tmp_path / "r"
    assert this.finetune.main(stage3(home, out, "--init", latent, "--steps", 2, *more)) == 0
    before, after = weights_of(latent.parents[1], "best"), weights_of(out)
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    backbone = {name for name in moved if name != "queries"}
    assert bool(backbone) == ("--freeze" not in more)
    assert any("low_rank_out" in name for name in after) == ("--rank" in more)


def test_bf16_trains(this, home, tmp_path):
    assert this.train.main(stage2(home, tmp_path / "b", "--steps", 2, "--amp", "bf16", "--checkpointing")) == 0
    assert all(math.isfinite(line["train/loss"]) for line in log_of(tmp_path / "b"))


def test_checkpointing_changes_nothing_but_memory(this, home, tmp_path):
    for name, more in dict(a=[], b=["--checkpointing"]).items():
        assert this.train.main(stage2(home, tmp_path / name, "--steps", 2, "--eval-every", 9, *more)) == 0
    a, b = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert [line["train/loss"] for line in a] == pytest.approx([line["train/loss"] for line in b], rel=1e-6)


def test_mistakes_end_in_one_line(this, home, latent, tmp_path):
    """A traceback, or a run that starts and fails later."""
    cases = [
        (stage2(home, tmp_path / "a", "--backbone", tmp_path / "none"), this.train, "not a vision-language model"),
        (stage2(home, tmp_path / "b", "--batch-size", 7, "--accum", 2), this.train, "not divisible"),
        (stage3(home, tmp_path / "c", "--init", tmp_path / "none"), this.finetune, "vla.json"),
        (stage3(home, tmp_path / "d", "--init", latent, "--episodes", 99), this.finetune, "only"),
        (stage3(home, tmp_path / "e", "--init", latent, "--keep-head"), this.finetune, "no command head"),
    ]
    for words, script, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            script.main(words)
    with pytest.raises(SystemExit):
        this.finetune.parse(["--data", "x"])
    with pytest.raises(ValueError, match="--labels is needed"):
        this.train.main(["--data", "x", "--out", str(tmp_path / "f")])


# --- verbs


def test_predict_tells_codes_with_probabilities(this, home, latent, tmp_path, monkeypatch):
    """As JSON and picture; with an exported decoder also what comes after the gap."""

    class Decoder(torch.nn.Module):
        def forward(self, frame, codes):
            return 1 - frame * (codes.sum(1).view(-1, 1, 1, 1) >= 0)

    program = torch.export.export(
        Decoder(),
        (torch.zeros(2, 3, 32, 32), torch.zeros(2, 2, dtype=torch.int64)),
        dynamic_shapes=({0: torch.export.Dim("b")}, {0: torch.export.Dim("b")}),
    )
    torch.export.save(program, tmp_path / "d.pt2")
    words = [
        "--checkpoint",
        latent,
        "--data",
        home,
        "--frames",
        3,
        "--out",
        tmp_path / "o",
        "--decoder",
        tmp_path / "d.pt2",
    ]
    seen, original = {}, this.predict.figures.latents

    def latents(frames, texts, probabilities, after):
        seen.update(frames=frames, after=after)
        return original(frames, texts, probabilities, after)

    monkeypatch.setattr(this.predict.figures, "latents", latents)
    assert this.predict.main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "o" / "latents.json").read_text())["frames"]
    assert len(found) == 3
    for row, frame, after in zip(found, seen["frames"], seen["after"], strict=True):
        probabilities = np.array(row["probabilities"])
        assert probabilities.shape == (2, 8) and probabilities.sum(1) == pytest.approx([1, 1], abs=1e-3)
        assert probabilities.argmax(1).tolist() == row["codes"] and np.shape(row["vectors"]) == (2, 2)
        assert np.array_equal(after, 255 - frame)


def test_evaluate_measures_what_it_says(this, home, robot, latent, tmp_path):
    """Errors against a loop over the held-out clips; closed loop with its interval; files are there."""
    words = ["--checkpoint", robot, "--data", f"robot={home / 'robot'}", "--out", tmp_path / "r"]
    assert this.evaluate.main([str(w) for w in [*words, "--episodes", 4, "--films", 2, "--limit", 6]]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    numbers, model = report["offline"]["robot"], this.model.VLA.from_pretrained(robot).eval()
    (source,) = this.data.read_sources([f"robot={home / 'robot'}"], "actions")
    errors, hold = [], []
    for clip in source.validation:
        actions, state = clip.array("actions.npy"), torch.from_numpy(clip.array("state.npy"))
        batch = model.inputs(list(clip.frames(clip.rows, 32)), [clip.meta["instruction"]] * len(clip.rows))
        guess = model.predict_actions(batch | dict(state=state)).numpy()
        for t in range(len(actions)):
            for h in range(min(3, len(actions) - t)):
                errors.append(np.abs(guess[t, h] - actions[t + h]))
                hold.append(np.abs(actions[max(t - 1, 0)] - actions[t + h]))
    assert numbers["mae_per_dim_model"] == pytest.approx(np.mean(errors, 0), rel=1e-4)
    assert numbers["mae_per_dim_hold"] == pytest.approx(np.mean(hold, 0), rel=1e-4)
    loop = report["closed_loop"]
    assert loop["episodes"] == 4 and loop["low"] <= loop["success"] <= loop["high"]
    for name in ("report.md", "figures/rollouts.mp4", "figures/rollouts.png", "figures/commands.png"):
        assert (tmp_path / "r" / name).stat().st_size > 500
    words = ["--checkpoint", latent, "--data", f"demo={home}", "--labels", home / "labels", "--out", tmp_path / "l"]
    assert this.evaluate.main([str(w) for w in words]) == 0
    numbers = json.loads((tmp_path / "l" / "report.json").read_text())["offline"]["demo"]
    assert 0 <= numbers["word_accuracy"] <= numbers["token_accuracy"] <= 1 and numbers["perplexity"] > 1
    with pytest.raises(ValueError, match="no head for actions"):
        this.evaluate.main(
            [str(w) for w in ["--checkpoint", latent, "--data", home / "robot", "--out", tmp_path / "x"]]
        )


def test_inverse_dynamics_learns_and_labels(this, home, tmp_path):
    """VPT's labels are the commands, under the videos' names and keys, and finetune.py reads them."""
    words = [
        "--data",
        f"robot={home / 'robot'}",
        "--videos",
        f"v={home}",
        "--out",
        tmp_path,
        "--steps",
        150,
        "--lr",
        3e-3,
    ]
    assert this.idm.main([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert min(report["r2"]) > 0.5
    plain = this.shards.read_clips(home)
    labelled = this.shards.read_clips(home, tmp_path / "v")
    assert [clip.key for clip in plain] == [clip.key for clip in labelled]
    assert not any("actions.npy" in clip.members for clip in plain)
    assert all(len(clip.array("actions.npy")) == clip.meta["length"] for clip in labelled)


def test_scenes_of_pointing_are_where_they_are_said_to_be(this):
    images, places = this.pointing.scenes(np.random.default_rng(0), 3, 64, "disc")
    colour = 255 * np.array(this.world.BODIES["disc"][1])
    for image, at in zip(images, places, strict=True):
        x, y = (at[-1] * 64).astype(int)
        assert np.abs(image[y, x] - colour).max() < 3, "the robot lies on top"


@pytest.mark.slow
def test_pointing_learns_where_things_are(this, tmp_path):
    """It leaves its plateau (11.5 pixels: the middle of the table for everything)."""
    folder = tmp_path / "tiny"
    this.tiny.build(folder, [f" {name}" for name in this.pointing.NAMES])
    assert this.pointing.teach(folder, 600) < 9
    assert this.model.open_backbone(folder)[0] is not None


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on(this, tmp_path):
    """All arms at a size that proves nothing: rows, table and figure are written, and a second call adds nothing."""
    small = "--videos 24 --pointing 2 --steps 4 --tune-steps 2 --batch-size 8 --demos 5 --episodes 3".split()
    small += ["--backbone-lr", "1"]
    assert this.experiment.main(["--out", str(tmp_path), *small]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in rows] == list(this.experiment.ARMS) and all(row["of"] == 3 for row in rows)
    assert (tmp_path / "success.png").exists() and "latents" in (tmp_path / "table.md").read_text()
    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert this.experiment.main(["--out", str(tmp_path), *small]) == 0
    assert (tmp_path / "results.json").stat().st_mtime_ns == before


def test_shuffled_labels_keep_the_marginal_and_lose_the_frame(this, home, tmp_path):
    (tmp_path / "data").symlink_to(home)
    this.experiment.shuffle_labels(home / "labels", tmp_path / "shuffled")
    one, two = (
        this.data.read_sources([f"v={home}"], "latents", [labels], val_share=0)[0]
        for labels in (home / "labels", tmp_path / "shuffled")
    )
    a, b = (np.concatenate([clip.latents()[0] for clip in source.train]) for source in (one, two))
    assert np.array_equal(np.sort(a @ [100, 1]), np.sort(b @ [100, 1])) and (a == b).all(1).mean() < 0.2


# --- several processes, kills


@pytest.mark.slow
def test_two_ranks_give_one_process(home, tmp_path):
    """DDP and FSDP: losses to 5 digits and the same weights; sharded checkpoints go on with another number of ranks."""
    steps = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--dropout", 0]
    script = ROOT / "vla" / "train.py"
    runs = dict(one=(1, []), ddp=(2, []), fsdp=(2, ["--fsdp"]))
    for name, (ranks, more) in runs.items():
        done = launch(script, *stage2(home, tmp_path / name, *steps, *more), ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    one = log_of(tmp_path / "one")
    for name in ("ddp", "fsdp"):
        lines = log_of(tmp_path / name)
        for key in ("train/loss", "train/norm"):
            assert [line[key] for line in lines] == pytest.approx([line[key] for line in one], rel=1e-5)
        a, b = weights_of(tmp_path / "one"), weights_of(tmp_path / name)
        assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-4

    (tmp_path / "fsdp" / "checkpoints" / "step_0000004").rename(tmp_path / "gone")
    again = stage2(home, tmp_path / "fsdp", *steps, "--fsdp", "--resume")
    done = launch(script, *again)  # written by two ranks, read by one
    assert done.returncode == 0, done.stderr[-2000:]
    lines = log_of(tmp_path / "fsdp")
    assert [line["train/loss"] for line in lines] == pytest.approx([line["train/loss"] for line in one], rel=1e-5)
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(tmp_path / "fsdp" / "checkpoints" / "last")


@pytest.mark.slow
@pytest.mark.parametrize("how, fsdp", [("kill", []), ("kill", ["--fsdp"]), ("term", ["--fsdp"])])
def test_killed_runs_go_on(home, tmp_path, how, fsdp):
    """kill -9 or SIGTERM in the middle of a run, under FSDP too: resumed, it ends as if nothing had happened."""
    steps = ["--steps", 8, "--eval-every", 4, "--save-every", 2]
    script, ranks = ROOT / "vla" / "train.py", 2 if fsdp else 1
    assert launch(script, *stage2(home, tmp_path / "a", *steps, *fsdp), ranks=ranks).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    words = [*command, script, *stage2(home, tmp_path / "b", *steps, *fsdp)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [str(w) for w in words], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 240
    while not list((tmp_path / "b").glob("checkpoints/step_*")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
    run.wait(120)
    done = launch(script, *stage2(home, tmp_path / "b", *steps, *fsdp, "--resume"), ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(one[name], two[name]) for name in one)
