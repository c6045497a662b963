"""laq: quantizer, model, pairs, training and labelling, each against plain arithmetic or a brute-force loop."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, launch, load, log_of, weights_of
from torch._subclasses.fake_tensor import FakeTensorMode

from common import DataError

SCRIPT = ROOT / "laq" / "train.py"
TINY = dict(image_size=16, patch=4, dim=16, depth=1, code_seq_len=2, codebook_size=8, code_dim=4)


@pytest.fixture(scope="module")
def this():
    return load("laq", "quantizer", "shards", "sources", "demo", "label", "figures", "metrics")


def tiny(this, **options):
    torch.manual_seed(0)
    model = this.model.LAQ(this.model.LAQConfig(**(TINY | options)))
    torch.nn.init.normal_(model.head.out.weight, std=0.1)  # as after some training
    return model


def pairs(count=6, size=16, seed=0):
    return torch.rand(count, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def start(model, frames):
    """Start quantization from the vectors of some pairs."""
    model.train()
    model(dict(frames=frames, actions=torch.zeros(len(frames), 3), has_actions=torch.zeros(len(frames))))
    model.quantizer.update(0)
    model.quantizer.start(0)
    return model


# --- quantizer


def test_code_positions_say_different_things_from_the_start(this):
    """Two independent factors of 8 values, mixed over all dims: the rotation puts one in each position."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(8, (512, 2), generator=generator)
    circle = torch.stack([torch.cos(torch.arange(8) * torch.pi / 4), torch.sin(torch.arange(8) * torch.pi / 4)], 1)
    flat = torch.zeros(512, 8)
    flat[:, :2], flat[:, 2:4] = 3 * circle[factors[:, 0]], 2 * circle[factors[:, 1]]
    d = (flat @ torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] + 5).view(512, 2, 4)
    q = this.quantizer.Quantizer(2, 8, 4).train()
    q(d)
    q.update(0)
    q.start(0)
    codes, v = q.encode(d)
    assert len(torch.unique(codes, dim=0)) >= 40  # of 64; a position that repeats the other's axes would give about 16
    torch.testing.assert_close(q.restore(v), d, atol=1e-4, rtol=0)
    spread = v.flatten(1).T.cov()
    assert (spread - spread.diag().diag()).abs().max() < 1e-3 * spread.max()


def test_noise_has_the_length_of_the_error_and_evaluation_has_none(this):
    """Before quantization starts the vectors pass unchanged."""
    q = this.quantizer.Quantizer(2, 8, 4)
    d = torch.randn(50, 2, 4, requires_grad=True)
    assert torch.equal(q.train()(d)[0], d) and torch.equal(q.eval()(d)[0], d)
    q.quantizing = True
    q.set_codebook(torch.randn(2, 8, 4))
    z, codes = q.train()(d)
    torch.testing.assert_close((z - d).norm(dim=-1), (q.lookup(codes) - d).norm(dim=-1))
    z.sum().backward()
    assert d.grad.abs().sum() > 0
    assert torch.equal(q.eval()(d)[0], q.lookup(codes))


def test_codebooks_follow_their_vectors(this):
    """The moving average of appendix A.1, by hand; a step that is not finite changes nothing."""
    q = this.quantizer.Quantizer(1, 2, 2).train()
    q.quantizing = True
    q.set_codebook(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    q(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[11.0, 11.0]]]))
    q.update(0)
    count = 0.98 / 2 + 0.02 * torch.tensor([2, 1]) / 3
    sums = 0.98 / 2 * torch.tensor([[0.0, 0], [10, 10]]) + 0.02 / 3 * torch.tensor([[1.0, 2], [11, 11]])
    torch.testing.assert_close(q.codebook[0], sums / count[:, None])
    before = q.codebook.clone()
    q(torch.full((4, 1, 2), torch.nan))
    q.update(0)
    assert torch.equal(q.codebook, before)


def test_dead_codes_go_where_vectors_are_and_are_no_copies(this):
    q = this.quantizer.Quantizer(1, 8, 4).train()
    vectors = torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0))
    q.quantizing = True
    q.set_codebook(torch.full((1, 8, 4), 100.0) + torch.arange(8)[None, :, None])
    for step in range(12):
        q(vectors)
        q.update(step)
    book = q.codebook[0]
    assert q.restarts >= 7 and torch.cdist(book, vectors[:, 0]).amin(1).lt(0.5).sum() >= 7
    assert len(torch.unique(book.round(decimals=3), dim=0)) == 8


def test_two_clusters_on_one_code_are_told_apart(this):
    """No code is dead, but one holds two clusters while two share a third: reclustering mends it."""
    generator = torch.Generator().manual_seed(0)
    true = 10 * torch.eye(4)[:4]
    x = (true[torch.arange(400) % 4] + 0.1 * torch.randn(400, 4, generator=generator))[:, None]
    q = this.quantizer.Quantizer(1, 4, 4).train()
    q(x)
    q.update(0)
    q.start(0)
    bad = torch.stack([true[0] + 0.1, true[0] - 0.1, (true[1] + true[2]) / 2, true[3]])[None]
    q.set_codebook(q.rotate(bad.transpose(0, 1)).transpose(0, 1))
    for step in range(60):
        q(x)
        q.update(step)
    codes = q.encode(x)[0][:, 0]
    assert len({tuple(codes[i::4].unique().tolist()) for i in range(4)}) == 4


def test_a_lifted_out_quantizer_does_not_grow(this):
    q = this.quantizer.Quantizer(2, 8, 4).train()
    for _ in range(12):
        q(torch.randn(1000, 2, 4))
    assert len(q.fresh) <= 8192


def test_autocast_does_not_change_codes(this):
    model = start(tiny(this), pairs(64)).eval()
    d = torch.randn(40, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        codes, v = model.quantizer.encode(d)
        z, again = model.quantizer(d)
    assert v.dtype == z.dtype == torch.float32
    assert torch.equal(codes, model.quantizer.encode(d)[0]) and torch.equal(codes, again)


# --- model


def test_pair_attention_is_a_softmax_over_two_keys(this):
    layer = this.model.PairAttention(128)
    first, second = torch.randn(2, 2, 5, 128)
    x = layer.norm(second)
    q = layer.q_proj(x).view(2, 5, 2, 64)
    k, v = zip(*(layer.kv_proj(y).view(2, 5, 2, 2, 64).unbind(2) for y in (first, x)), strict=True)
    weight = torch.stack([(q * key).sum(-1) / 8 for key in k]).softmax(0)
    want = layer.out_proj(sum(w[..., None] * value for w, value in zip(weight, v, strict=True)).flatten(2))
    torch.testing.assert_close(layer(second, first), want)


@pytest.mark.parametrize("size, grid", [(16, 16), (64, 16), (56, 56), (256, 32)])
def test_block_flow_finds_a_shift(this, size, grid):
    """A texture of which one half moves and the other rests; nothing moves in a flat picture."""
    unit = max(1, size // 64)
    first = F.interpolate(torch.rand(2, 3, size // unit, size // unit), (size, size))
    second = first.roll((-2 * unit, 3 * unit), (2, 3))
    second[..., : size // 2, :] = first[..., : size // 2, :]
    flow = this.model.block_flow(first, second, grid)
    assert flow.shape == (2, 2, grid, grid)
    moving, resting = flow[:, :, -grid // 4 - 1 : -1, grid // 2 : -1], flow[:, :, : grid // 4]
    torch.testing.assert_close(moving.flatten(2).median(2).values, torch.tensor([[-0.4, 0.6]] * 2))
    assert not resting.any() and not this.model.block_flow(first * 0, second * 0, grid).any()


def test_the_first_frame_is_encoded_without_the_second(this):
    """Of any width: 200 dims are 2 heads of 100."""
    model, batch, seen = tiny(this, depth=2, dim=200).eval(), pairs(), []
    for block in model.temporal:
        block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    model.encode(batch[:, 0], batch[:, 1])
    model.encode(batch[:, 0], batch.flip(0)[:, 1])
    assert len(seen) == 4 and all(torch.equal(seen[0], other) for other in seen[1:])


def test_first_prediction_is_the_first_frame(this):
    model, batch = this.model.LAQ(this.model.LAQConfig(**TINY)), pairs()
    assert torch.equal(model.decode_frame(batch[:, 0], torch.randn(6, 2, 4)), batch[:, 0])
    metrics = model(dict(frames=batch))[1]
    assert metrics["mse"] == metrics["mse_copy"]


@pytest.mark.parametrize("quantizing, action_dim", [(False, 0), (True, 0), (True, 3)])
def test_gradients_reach_every_parameter(this, quantizing, action_dim):
    """Unlike in the released code, which needs find_unused_parameters for its dead ones."""
    model = tiny(this, motion_weight=2.0, flow_weight=1.0, action_dim=action_dim)
    model = start(model, pairs(64, seed=1)) if quantizing else model.train()
    model(dict(frames=pairs(8), actions=torch.randn(8, 3), has_actions=torch.ones(8)))[0].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_loss_with_all_its_terms_is_what_the_docstring_says(this):
    model = tiny(this, motion_weight=3.0, flow_weight=2.0, action_dim=2).eval()
    model.action_mean[:], model.action_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    first, second = pairs().unbind(1)
    batch = dict(frames=torch.stack([first, second], 1), actions=torch.randn(6, 2))
    batch["has_actions"] = torch.tensor([True, False, True, True, False, False])
    z = model.encode_pair(first, second, model.encode_frame(first), model.encode_frame(second))
    error = (model.decode_frame(first, z) - second) ** 2
    moved = ((first - second).abs().amax(1, keepdim=True) > 0.05).float()
    off = [
        ((model.action_head(z[b].flatten()) - (batch["actions"][b] - model.action_mean) / model.action_std) ** 2).mean()
        for b in (0, 2, 3)
    ]
    flow = F.adaptive_avg_pool2d(this.model.block_flow(first, second, 16), 8)
    told = (model.to_flow(z.flatten(1)) - flow.flatten(1)).square().mean()
    want = ((1 + 3 * moved) * error).mean() + 2 * told + this.model.ACTION_WEIGHT * sum(off) / 6
    torch.testing.assert_close(model(batch)[0], want)


def test_dense_labels_are_the_pairs_and_see_each_frame_once(this):
    model, count = start(tiny(this), pairs(32)).eval(), 0
    clip = torch.randint(0, 256, (23, 16, 16, 3), dtype=torch.uint8)
    images = clip.movedim(-1, 1).float() / 255

    def seen(frames, encode_frame=model.encode_frame):
        nonlocal count
        count += len(frames)
        return encode_frame(frames)

    model.encode_frame = seen
    for gap, size in itertools.product((1, 5, 22), (2, 7, 64)):
        count = 0
        codes, vectors = model.encode_clip(clip.split(size), gap)
        assert count == 23
        want_codes, want = model.encode(images[:-gap], images[gap:])
        assert torch.equal(codes, want_codes)
        torch.testing.assert_close(vectors, want, atol=1e-5, rtol=1e-4)
    codes, vectors = model.encode_clip([clip[:3]], 3)
    assert codes.shape == (0, 2) and vectors.shape == (0, 2, 4)


def test_checkpoint_round_trip_and_what_it_refuses(this, tmp_path):
    model = start(tiny(this), pairs(32)).eval()
    model.save_pretrained(tmp_path)
    again, batch = this.model.LAQ.from_pretrained(tmp_path), pairs()
    assert again.quantizer.quantizing and not again.training
    for a, b in zip(model.encode(*batch.unbind(1)), again.encode(*batch.unbind(1)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DataError, match="code_dim is 4, this model's 8"):
        tiny(this, code_dim=8).load_pretrained(tmp_path)
    torch.save(dict(a=print), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="not a checkpoint that is safe"):
        this.model.LAQ.from_pretrained(tmp_path)
    for text in ("{}x", '{"dim": 1e30}', '{"dim": -1}', '{"no": 1}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match="not a configuration of LAQ"):
            this.model.LAQ.from_pretrained(tmp_path)


def test_published_size(this):
    """344 M parameters, as arXiv 2410.11758 says."""
    args = this.train.parse([f"@{ROOT / 'laq' / 'lapa.args'}", "--data", "x"])
    config = this.model.LAQConfig(**{name: getattr(args, name) for name in TINY})
    with torch.device("meta"):
        model = this.model.LAQ(config)
    assert 0.97 < sum(p.numel() for p in model.parameters()) / 343_796_080 < 1.05


@pytest.mark.parametrize(
    "words, said",
    [
        (["--image-size", "30"], "multiple of --patch"),
        (["--batch-size", "7", "--accum", "2"], "no multiple of 2"),
        (["--val-share", "1.5"], "--label-share must be at most 1"),
    ],
)
def test_impossible_flags_are_one_line_before_any_file_is_made(this, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        this.train.parse(["--data", "x", *words])
    told = capsys.readouterr().err
    assert end.value.code == 2 and said in told and told.count("\n") == 1


# --- data


def write_clips(this, folder, lengths, source="lab", size=16, per_shard=3, actions=True, fps=5.0, masks=False, **meta):
    """Shards of noise clips; actions are numbered: sums tell which were summed. masks: the robot is a white half."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number, length in enumerate(lengths):
        rng = np.random.default_rng(number)
        frames = np.repeat(rng.integers(0, 256, (1, size, size, 3)), length, 0)
        frames[:, 0] = (np.arange(length) % 256)[:, None, None]  # the first row of pixels tells the time
        frames[:, 1] = number
        frames[:, :, size // 2 :] = 255 if masks else frames[:, :, size // 2 :]
        told = dict(instruction="", fps=fps, source=source, episode=f"{number:03d}", camera="top", length=length)
        sample = {"__key__": f"{source}-{number:03d}", "frames.npy": this.shards.npy(np.uint8(frames))}
        if masks:
            sample["mask.npy"] = this.shards.npy(np.broadcast_to(np.arange(size) >= size // 2, frames.shape[:3]))
        if actions:
            sample["actions.npy"] = this.shards.npy(np.float32(np.arange(length)[:, None] + [0, 1000 * number]))
            told["actions"] = "delta"
        samples.append(sample | {"json": json.dumps(told | meta).encode()})
    for shard in range(0, len(samples), per_shard):
        this.shards.write_shard(folder / f"shard-{shard // per_shard:06d}.tar", samples[shard : shard + per_shard])
    return folder


def test_gap_words(this):
    for text, want in {"3": (3, 3, False), "2-5": (2, 5, False), "0.4s-1.2s": (0.4, 1.2, True)}.items():
        assert this.sources.parse_gap(text) == want
    assert this.sources.named(["5", "a=3", "7"], "ab", "--x") == dict(a="3", b="5,7")
    for text in ("", "0", "-1", "1.5", "3s-5", "5-3", "s", "0.6 s", "nan", "3,5"):
        with pytest.raises(DataError, match="--gap"):
            this.sources.parse_gap(text)


def test_a_path_may_hold_an_equals_sign(this, tmp_path, monkeypatch):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert this.sources.named_paths([str(folder)]) == [("lr=0.1", str(folder))]
    assert this.sources.named_paths(["lr=0.1"]) == [("lr=0.1", "lr=0.1")]
    assert this.sources.named_paths(["a=x"]) == [("a", "x")]


def test_pairs_have_the_gap_and_stay_in_their_clip(this, tmp_path):
    """0.4 to 1 s at 5 fps are 2 to 5 frames, and each is used."""
    write_clips(this, tmp_path, [30, 9, 12, 2, 40])
    source = this.sources.read_sources([f"lab={tmp_path}"], ["0.4s-1s"], 0.0)[0]
    assert source.short == 1
    dataset = this.data.TrainPairs([source], 16, 0)
    frames = torch.cat([dataset[step, 0, 16]["frames"] for step in range(0, 80, 4)])
    when, clip = frames[:, :, 0, 0, 0].int(), frames[:, :, 1, 0, 0]
    assert set((when[:, 1] - when[:, 0]).tolist()) == {2, 3, 4, 5} and torch.equal(clip[:, 0], clip[:, 1])


def test_validation_sees_clips_from_end_to_end_and_all_cameras(this, tmp_path):
    """One pair of a clip is its middle one, two lie at a quarter and three quarters; a thinned list keeps cameras."""
    write_clips(this, tmp_path, [43] * 12)
    source = this.sources.read_sources([f"lab={tmp_path}"], ["3"], 0.0, ["2-11"])[0]
    for limit, starts in ((10, {20}), (20, {10, 30}), (40, {5, 15, 25, 35})):
        held = this.data.Validation(source, 16, limit)
        frames = torch.cat([batch["frames"] for batch in held])
        assert len(frames) == limit and set(frames[:, 0, 0, 0, 0].tolist()) == starts
    clips = [SimpleNamespace(key=f"{i}-{camera}", camera=camera) for i in range(200) for camera in ("top", "wrist")]
    kept = [clip.camera for clip in this.data.some(clips, 100)]
    assert len(kept) == 100 and 30 < kept.count("top") < 70


def test_every_pair_of_a_clip_is_drawn_alike(this, tmp_path):
    """The outer 48 of 197 starts, where grasp and release are, get 24 % of the draws."""
    write_clips(this, tmp_path, [200])
    source = this.sources.read_sources([str(tmp_path)], ["3"], 0.0)[0]
    dataset = this.data.TrainPairs([source], 16, 0)
    starts = torch.cat([dataset[8 * turn, 0, 100]["frames"][:, 0, 0, 0, 0].int() for turn in range(30)])
    outer = ((starts < 24) | (starts >= 197 - 24)).float().mean()
    assert abs(outer - 48 / 197) < 0.03 and len(starts.unique()) == 197


def test_no_pair_crosses_a_scene_cut(this):
    thumbs = np.zeros((20, 16, 16, 3), np.uint8)
    thumbs[12:] = 200
    thumbs[:, 0] = np.arange(20)[:, None, None]  # something moves all the time
    starts = np.flatnonzero(this.data.same_scene(thumbs, np.arange(17), 3))
    assert starts.tolist() == [*range(9), *range(12, 17)]


def test_actions_between_two_frames(this, tmp_path):
    first = this.shards.read_clips(write_clips(this, tmp_path / "delta", [12]))[0]
    second = this.shards.read_clips(write_clips(this, tmp_path / "absolute", [12], actions="absolute"))[0]
    second.meta["actions"] = "absolute"
    starts = np.array([0, 3, 8])
    np.testing.assert_allclose(this.data.between(first, starts, 3)[:, 0], [0 + 1 + 2, 3 + 4 + 5, 8 + 9 + 10])
    np.testing.assert_allclose(this.data.between(second, starts, 3)[:, 0], [3, 3, 3])
    second.meta["actions"] = "relative"
    with pytest.raises(DataError, match="lab-000.json: actions relative, expected delta or absolute"):
        this.data.between(second, starts, 3)


def test_split_is_by_the_recordings_own_name(this, tmp_path):
    """All cameras of an episode go to one side, whatever the source is called and whichever clips are short."""
    for name, length in (("left", 10), ("right", 3)):
        write_clips(this, tmp_path / name, [length] * 40, source=name, camera=name, actions=False)
    read = this.sources.read_sources
    held = [set(read([f"x={tmp_path / 'left'}"], ["1"], 0.25)[0].held_out)]
    held.append(set(read([f"y={tmp_path / 'right'}"], ["2"], 0.25)[0].held_out))
    assert held[0] == held[1] == {f"{n:03d}" for n in range(40) if this.shards.episode_hash(f"{n:03d}") < 0.25}
    source = read([str(tmp_path / "left")], ["1"], 0.1, ["2-4,17"])[0]
    assert source.held_out == ["002", "003", "004", "017"]
    rates = write_clips(this, tmp_path / "rates", [10] * 2, per_shard=1)
    write_clips(this, rates, [10], fps=30.0, episode="fast", per_shard=1)
    said = []
    for gap in ("2", "0.4s"):
        read([str(rates)], [gap], say=said.append)
    assert said == ["warning: rates: 5 to 30 frames a second: give --gap in seconds"]
    with pytest.raises(DataError, match="no episode is called 99"):
        read([str(tmp_path / "left")], ["1"], 0.1, ["99"])


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, tmp_path):
    write_clips(this, tmp_path, [20] * 6)
    sources = this.sources.read_sources([str(tmp_path)], ["3"], 0.0)

    def batches(world=1, accum=1, first=0):
        more = dict(steps=12, first=first, accum=accum, world=world)
        made = [this.data.prepare_dataloaders(sources, 8, 16, rank=r, **more)[0] for r in range(world)]
        return [
            {key: torch.cat([part[key] for micro in parts for part in micro]) for key in parts[0][0]}
            for parts in ([[next(m) for m in made] for _ in range(accum)] for _ in range(first, 12))
        ]

    want = batches()
    assert not torch.equal(want[0]["frames"], want[1]["frames"])
    for other in (batches(world=2), batches(accum=2), batches(world=2, accum=2)):
        for a, b in zip(want, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(want[5:], batches(first=5), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_both_frames_of_a_pair_are_augmented_alike(this):
    frames = torch.randint(0, 256, (4, 1, 16, 16, 3), dtype=torch.uint8).expand(-1, 2, -1, -1, -1)
    batch = dict(frames=frames, actions=torch.zeros(4, 0), has_actions=torch.zeros(4, dtype=torch.bool))
    plain = this.data.augment(batch)["frames"]
    torch.testing.assert_close(plain, frames.permute(0, 1, 4, 2, 3).float() / 255)
    crop = torch.tensor([[0.5, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 0, 0], [0.7, 0.1, 0.2]])
    same = this.data.augment(batch | dict(crop=crop, jitter=torch.ones(4, 3)))["frames"]
    assert torch.equal(same[:, 0], same[:, 1])
    torch.testing.assert_close(same[2], plain[2])
    up = F.interpolate(plain[0, :, :, :8, :8], (16, 16), mode="bilinear")
    torch.testing.assert_close(same[0, :, :, 2:-2, 2:-2], up[:, :, 2:-2, 2:-2], atol=1e-4, rtol=0)


def test_a_mask_takes_the_place_of_the_motion(this, tmp_path):
    """It is cropped with its frames, and weighs in the loss where it is known; other clips keep what moved."""
    write_clips(this, tmp_path / "a", [20] * 2, masks=True)
    write_clips(this, tmp_path / "b", [20] * 2)
    sources = this.sources.read_sources([f"{name}={tmp_path / name}" for name in "ab"], ["3"], 0.0)
    batch = this.data.augment(this.data.TrainPairs(sources, 16, 0, jitter=0.0)[0, 0, 32])
    known, mask = batch["has_mask"], batch["mask"]
    assert mask.shape == (32, 2, 1, 16, 16) and 0 < known.sum() < 32 and not mask[~known].any()
    marked = (batch["frames"][:, :, :1] > 0.99).float()  # the clips' robot is white
    assert ((mask - marked).abs() < 0.5).float()[known].mean() > 0.9
    model = tiny(this, motion_weight=3.0).eval()
    first, second = batch["frames"].unbind(1)
    z = model.encode_pair(first, second, model.encode_frame(first), model.encode_frame(second))
    error = (model.decode_frame(first, z) - second) ** 2
    moved = ((first - second).abs().amax(1, keepdim=True) > 0.05).float()
    weight = torch.where(known[:, None, None, None], mask.amax(1), moved)
    torch.testing.assert_close(model(batch)[0], ((1 + 3 * weight) * error).mean())


def test_every_fourth_slot_is_labelled_with_label_share(this, tmp_path):
    write_clips(this, tmp_path, [20] * 30)
    source = this.sources.read_sources([str(tmp_path)], ["3"], 0.0)[0]
    batch = this.data.TrainPairs([source], 16, 0, label_share=0.2)[0, 0, 64]
    assert batch["has_actions"].tolist() == [slot % 4 == 0 for slot in range(64)]
    seen = {int(c) for c in batch["frames"][::4, 0, 1, 0, 0]}
    assert seen <= {n for n in range(30) if this.shards.episode_hash(f"{n:03d}", "labels") < 0.2}
    mean, std = this.data.action_moments([source], 0.2)
    assert mean.shape == std.shape == (2,)
    with pytest.raises(DataError, match="--label-share"):
        this.data.action_moments([source], 1e-9)


def test_demo_motions_are_what_is_seen(this):
    """The effector, the darkest thing on the table, moves by its action."""
    frames, actions, _ = this.demo.episode(np.random.default_rng(0), False)
    grid = np.indices(frames.shape[1:3]) + 0.5
    dark = frames.sum(3) < 150
    centre = np.stack([(grid[::-1] * frame).sum((1, 2)) / frame.sum() for frame in dark]) / frames.shape[1]
    np.testing.assert_allclose(np.diff(centre, axis=0), actions[:-1], atol=0.03)


def test_the_demo_replaces_nothing_of_others(this, tmp_path, monkeypatch):
    monkeypatch.setitem(this.demo.ABOUT, "episodes", 4)
    this.demo.write(tmp_path / "new")
    (tmp_path / "thesis.txt").touch()
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(DataError, match="is no demo's data"):
            this.demo.write(folder)
    assert (tmp_path / "thesis.txt").exists() and len(this.shards.read_clips(tmp_path / "new")) == 4


# --- training


def flags(data, out, *more):
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | dict(steps=6, batch_size=4, log_every=2)).items()]
    words += ["--eval-every", 3, "--save-every", 3, "--gap", 1, "--warmup", 1, "--device", "cpu"]
    return [str(word) for word in ["--data", f"lab={data}", "--out", out, *words, *more]]


@pytest.fixture(scope="module")
def lab(this, tmp_path_factory):
    return write_clips(this, tmp_path_factory.mktemp("lab"), [12] * 10)


def test_run_resume_and_what_it_leaves(this, lab, tmp_path, capsys):
    assert this.train.main(flags(lab, tmp_path / "one")) == 0
    assert "lab: not yet" in capsys.readouterr().out
    lines = log_of(tmp_path / "one")
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    names = "psnr_gain_over_copy code_sensitivity usage perplexity_1 joint_perplexity top1_frequency"
    assert {f"val/lab/{name}" for name in names.split()} <= set(lines[-1])
    assert {path.name for path in (tmp_path / "one" / "figures").iterdir()} == {"curves.png", "codes.png"}
    before = weights_of(tmp_path / "one")
    (tmp_path / "one" / "checkpoints" / "step_0000006" / "resume.pt").write_bytes(b"corrupt")
    assert this.train.main(flags(lab, tmp_path / "one", "--resume", "--accum", 2)) == 0
    again = this.model.LAQ.from_pretrained(tmp_path / "one" / "checkpoints" / "last").state_dict()
    (tmp_path / "pytorch_model.bin").write_bytes(before["pytorch_model.bin"])
    want = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for name, tensor in want.items():
        if torch.is_tensor(tensor):
            torch.testing.assert_close(again[name], tensor, atol=1e-4, rtol=1e-3)
    with pytest.raises(DataError, match="--resume keeps --lr"):
        this.train.main(flags(lab, tmp_path / "one", "--resume", "--lr", 1))


@pytest.mark.slow
def test_a_resumed_run_holds_out_what_it_held_out(this, lab, tmp_path, capsys):
    """The folder has grown between stop and --resume: that is said, and the split is the checkpoint's. A source is
    known by its clips, too."""
    data = write_clips(this, tmp_path / "data", [12] * 6)
    words = flags(data, tmp_path / "run", "--steps", 3)
    this.train.main(words)
    held = json.loads((tmp_path / "run/checkpoints/last/data.json").read_text())["lab"]["held_out"]
    this.train.main(["--data", f"renamed={data}", *words[2:], "--resume", "--steps", "4"])
    assert json.loads((tmp_path / "run/checkpoints/last/data.json").read_text())["renamed"]["held_out"] == held
    shutil.rmtree(tmp_path / "run")
    this.train.main(words)
    write_clips(this, data, [12] * 40)
    capsys.readouterr()
    this.train.main(flags(data, tmp_path / "run", "--resume"))
    assert "40 episodes, 6 when the run began" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/checkpoints/last/data.json").read_text())["lab"]["held_out"] == held


def test_best_is_a_model_with_codes(this, lab, tmp_path):
    """A continuous model has a smaller error than any with codes: it must not stay `best`. All options on."""
    more = "--steps 3 --eval-every 1 --quantize-after 9 --amp bf16 --label-share 0.5 --motion-weight 5".split()
    this.train.main(flags(lab, tmp_path / "run", *more))
    best = (tmp_path / "run" / "checkpoints" / "best").resolve()
    assert best.name >= "step_0000002" and this.model.LAQ.from_pretrained(best).quantizer.quantizing
    assert np.isfinite(log_of(tmp_path / "run")[-1]["train/loss"])


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(lab, tmp_path):
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        done = launch(SCRIPT, *flags(lab, tmp_path / name, "--steps", 4, *more))
        assert done.returncode == 0, done.stderr
    one, two = ([line["train/loss"] for line in log_of(tmp_path / name)[:1]] for name in ("plain", "compiled"))
    np.testing.assert_allclose(one, two, rtol=1e-3)


def test_unreadable_held_out_clips_do_not_end_a_run(this, tmp_path, capsys):
    data = write_clips(this, tmp_path / "data", [12] * 6, per_shard=1)
    source = this.sources.read_sources([str(data)], ["1"], 0.1)[0]
    for clip in source.validation:
        spoil(clip)
    assert this.train.main(flags(data, tmp_path / "run")) == 0
    assert "skipping a held-out clip" in capsys.readouterr().err
    assert not any(name.startswith("val/") for name in log_of(tmp_path / "run")[-1])


def spoil(clip):
    """Break the frames of a clip in its tar."""
    shard, offset, _ = clip.members["frames.npy"]
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"broken")


@pytest.mark.slow
def test_demo_learns_directions(tmp_path):
    """Half of the demo: every code is in use and the picture is far better than a copy."""
    done = launch(SCRIPT, "--steps", 400, "--val-pairs", 256, "--out", tmp_path / "run", cwd=tmp_path, timeout=1200)
    assert done.returncode == 0 and "good enough to label" in done.stdout, done.stdout + done.stderr
    last = log_of(tmp_path / "run")[-1]
    assert last["val/demo/usage"] >= 0.9 and last["val/demo/psnr_gain_over_copy"] > 3


# --- labelling


@pytest.fixture(scope="module")
def trained(this, lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    this.train.main(flags(lab, out))
    return out / "checkpoints" / "best"


def read_labels(this, folder):
    shards = sorted(folder.glob("*.tar"))
    return {clip.key: clip.archive("latents.npz") for shard in shards for clip in this.shards.open_shard(shard)}


def test_labels_are_the_models_codes_for_every_pair(this, trained, tmp_path):
    data = write_clips(this, tmp_path / "data", [12, 7, 1, 9])
    this.label.main(["--checkpoint", trained, "--data", data, "--gap", "2", "--out", tmp_path / "labels"])
    model, clips = this.model.LAQ.from_pretrained(trained), this.shards.read_clips(data)
    names = [sorted(path.name for path in folder.glob("*.tar")) for folder in (data, tmp_path / "labels")]
    assert names[0] == names[1]
    labels = read_labels(this, tmp_path / "labels")
    assert labels.keys() == {clip.key for clip in clips}
    for clip in clips:
        frames = torch.from_numpy(clip.frames(16)).permute(0, 3, 1, 2) / 255
        found, count = labels[clip.key], max(0, len(frames) - 2)
        assert found["gap"] == 2 and found["codes"].shape == (count, 2) and found["valid"].all()
        if count:
            codes, vectors = model.encode(frames[:-2], frames[2:])
            np.testing.assert_array_equal(found["codes"], codes)
            np.testing.assert_allclose(found["vectors"], vectors, atol=1e-4)
    told = json.loads((tmp_path / "labels" / "labels.json").read_text())
    want = dict(model="laq", code_seq_len=2, codebook_size=8, code_dim=4, gap=2)
    assert want.items() <= told.items()
    torch.testing.assert_close(torch.tensor(told["codebook"]), model.quantizer.codebook)
    joined = this.shards.read_clips(data, tmp_path / "labels")
    assert all({"json", "frames.npy", "latents.npz"} <= set(clip.members) for clip in joined)


def test_labelling_resumes_and_does_not_depend_on_the_batch(this, trained, tmp_path, capsys):
    data = write_clips(this, tmp_path / "data", [12] * 6)
    words = ["--checkpoint", trained, "--data", data]
    this.label.main([*words, "--out", tmp_path / "a"])
    this.label.main([*words, "--out", tmp_path / "b", "--batch-size", "3"])
    a, b = (read_labels(this, tmp_path / x) for x in "ab")
    assert a.keys() == b.keys() and all(np.array_equal(a[key]["codes"], b[key]["codes"]) for key in a)
    want = (tmp_path / "a" / "shard-000001.tar").read_bytes()
    (tmp_path / "a" / "shard-000001.tar").unlink()
    capsys.readouterr()
    this.label.main([*words, "--out", tmp_path / "a"])
    assert (tmp_path / "a" / "shard-000001.tar").read_bytes() == want
    assert "3 clips labelled, 33 pairs; 1 shards were there" in capsys.readouterr().out
    other = write_clips(this, tmp_path / "other", [12] * 3, source="other")
    for source, out, message in (
        (data, data, "shard-000000.tar is there and holds no labels of"),
        (other, tmp_path / "a", "shard-000000.tar is there and holds no labels of"),
        (data, data / "shard-000000.tar", "--out .*tar: File exists"),
    ):
        with pytest.raises(DataError, match=message):
            this.label.main(["--checkpoint", trained, "--data", source, "--out", out])
    with pytest.raises(DataError, match="another model or gap"):
        this.label.main([*words, "--out", tmp_path / "a", "--gap", "3"])


def test_a_model_without_codes_is_refused(this, lab, tmp_path):
    tiny(this).save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="quantization has not started"):
        this.label.main(["--checkpoint", tmp_path / "model", "--data", lab, "--gap", "1", "--out", tmp_path / "out"])


def test_broken_clips_are_named_while_labelling(this, trained, tmp_path, capsys):
    data = write_clips(this, tmp_path / "data", [12] * 3)
    spoil(this.shards.read_clips(data)[1])
    words = ["--checkpoint", trained, "--data", data, "--batch-size", "5", "--amp", "bf16"]
    this.label.main([*words, "--out", tmp_path / "labels"])
    said = capsys.readouterr().out
    assert "lab-001.frames.npy" in said and "2 clips labelled" in said and "1 broken" in said
    labels = read_labels(this, tmp_path / "labels")
    assert len(labels) == 2 and all(np.isfinite(found["vectors"]).all() for found in labels.values())


@pytest.mark.slow
def test_labelling_on_two_ranks_writes_the_same_files(this, trained, tmp_path):
    data = write_clips(this, tmp_path / "data", [12] * 9, per_shard=2)
    words = ["--checkpoint", trained, "--data", data, "--device", "cpu", "--workers", 1]
    for ranks in (1, 2):
        done = launch(ROOT / "laq" / "label.py", *words, "--out", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0 and "9 clips labelled" in done.stdout + done.stderr, done.stderr
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_mixed_precision_as_a_gpu_has_it(this, monkeypatch):
    """CUDA's autocast keeps sums in float32, a CPU's does not; tensors without data show it without a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with FakeTensorMode(), torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        model = this.model.LAQ(this.model.LAQConfig(image_size=32, patch=8, dim=64, depth=1))
        assert model(dict(frames=torch.zeros(2, 2, 3, 32, 32)))[0].dtype == torch.float32
