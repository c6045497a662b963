"""laq: quantisers, model, pairs, training and labelling, each against plain arithmetic or a brute-force loop."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, launch, load

torch.set_num_threads(1)
SCRIPT = ROOT / "laq" / "train.py"
TINY = dict(image_size=16, patch=4, dim=16, stem=8, spatial_depth=1, temporal_depth=2, decoder_depth=1, code_dim=4)


@pytest.fixture(scope="module")
def this():
    return load("laq", "quantise", "shards", "demo", "label", "figures")


def tiny(this, **kwargs):
    torch.manual_seed(0)
    model = this.model.LAQ(**(TINY | dict(codes=2, vocabulary=8) | kwargs))
    torch.nn.init.normal_(model.head.out.weight, std=0.1)  # as after some training
    return model


def pairs(count=6, size=16, seed=0):
    return torch.rand(count, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def begin(model, batch):
    """Start the codes from the vectors of a batch."""
    model.train()
    model.quantiser.keep(model.compare(*batch["frames"].unbind(1), *map(model.see, batch["frames"].unbind(1))))
    model.quantiser.update(None, 0, 10)
    model.quantiser.start(0)
    return model


# --- quantisers


def test_nearest_pick_and_totals_match_loops(this):
    q, x, books = this.quantise, torch.randn(20, 3, 4), torch.randn(3, 5, 4)
    codes = q.nearest(x, books)
    for b in range(20):
        for n in range(3):
            assert codes[b, n] == min(range(5), key=lambda k: (x[b, n] - books[n, k]).square().sum().item())
            assert torch.equal(q.pick(books, codes)[b, n], books[n, codes[b, n]])
    counts, sums = q.totals(x, codes, 5)
    for n in range(3):
        for k in range(5):
            assert counts[n, k] == (codes[:, n] == k).sum()
            torch.testing.assert_close(sums[n, k], x[codes[:, n] == k, n].sum(0))


def test_kmeans_finds_separate_clusters(this):
    generator = torch.Generator().manual_seed(0)
    true = 10 * torch.eye(8)
    x = true[torch.arange(400) % 8] + 0.1 * torch.randn(400, 8, generator=generator)
    centres = this.quantise.kmeans(x, 8, generator)
    assert (torch.cdist(true, centres).amin(1) < 0.2).all()


def test_slots_say_different_things_from_the_start(this):
    """Two independent factors of 8 values, mixed over all dims: the axes put one in each slot."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(8, (512, 2), generator=generator)
    circle = torch.stack([torch.cos(torch.arange(8) * torch.pi / 4), torch.sin(torch.arange(8) * torch.pi / 4)], 1)
    flat = torch.zeros(512, 8)
    flat[:, :2], flat[:, 2:4] = 3 * circle[factors[:, 0]], 2 * circle[factors[:, 1]]
    flat = flat @ torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] + 5
    vq = this.quantise.VQ(2, 8, 4)
    vq.keep(flat.view(512, 2, 4))
    vq.update(None, 0, 10)
    vq.start(0)
    codes = vq.quantise(vq.align(flat.view(512, 2, 4)))[1]
    assert len(torch.unique(codes, dim=0)) >= 40  # of 64; a slot that repeats the other's axes would give about 16
    torch.testing.assert_close(vq.restore(vq.align(flat.view(512, 2, 4))), flat.view(512, 2, 4), atol=1e-4, rtol=0)
    spread = vq.align(flat.view(512, 2, 4)).flatten(1).T.cov()
    assert (spread - spread.diag().diag()).abs().max() < 1e-3 * spread.max()


def test_continuous_until_started(this):
    for q in (this.quantise.VQ(2, 8, 4), this.quantise.NSVQ(2, 8, 4)):
        d = torch.randn(3, 2, 4)
        assert torch.equal(q.train()(d)[0], d) and q(d)[2] == 0


def test_vq_follows_its_vectors_and_passes_the_gradient(this):
    vq = this.quantise.VQ(1, 2, 2, commitment=0.5, decay=0.9)
    vq.started = True
    vq.begin(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    d = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[11.0, 11.0]]], requires_grad=True)
    z, codes, loss = vq(d)
    assert codes.flatten().tolist() == [0, 0, 1]
    torch.testing.assert_close(loss, 0.5 * torch.tensor([1.0, 0, 0, 4, 1, 1]).mean())
    z.sum().backward()
    torch.testing.assert_close(d.grad, torch.ones_like(d))
    vq.update(None, 0, 100)
    count = 0.9 / 2 + 0.1 * torch.tensor([2, 1]) / 3
    sums = 0.9 / 2 * torch.tensor([[0.0, 0], [10, 10]]) + 0.1 / 3 * torch.tensor([[1.0, 2], [11, 11]])
    torch.testing.assert_close(vq.codebook[0], sums / count[:, None])


@pytest.mark.parametrize("kind", ["VQ", "NSVQ"])
def test_dead_codes_go_where_vectors_are_and_are_no_copies_of_others(this, kind):
    q = getattr(this.quantise, kind)(1, 8, 4)
    vectors = torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0))
    q.started = True
    with torch.no_grad():
        q.begin(torch.full((1, 8, 4), 100.0) + torch.arange(8)[None, :, None])
    opt = torch.optim.Adam(list(q.parameters()) or [torch.zeros(1, requires_grad=True)])
    if kind == "NSVQ":
        q.codebook.grad = torch.ones_like(q.codebook)
        opt.step()
        opt.zero_grad()
    for step in range(10):
        q.keep(vectors)
        q.update(opt, step, 5)
    book = q.codebook.detach()[0]
    assert q.restarts >= 7 and torch.cdist(book, vectors[:, 0]).amin(1).lt(0.5).sum() >= 7
    assert len(torch.unique(book.round(decimals=3), dim=0)) == 8
    if kind == "NSVQ":
        assert (opt.state[q.codebook]["exp_avg"][0].abs().sum(1) == 0).sum() >= 7


def test_a_code_in_use_is_counted_every_time(this):
    """The released code counts a code once however often it is chosen."""
    vq = this.quantise.VQ(1, 2, 2)
    vq.begin(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    vq.started = True
    vq.keep(torch.zeros(144, 1, 2))
    vq.update(None, 0, 5)
    assert vq.used.tolist() == [[144, 0]]


def test_nsvq_noise_has_the_length_of_the_error_and_evaluation_has_none(this):
    q = this.quantise.NSVQ(2, 8, 4)
    q.started = True
    d = torch.randn(50, 2, 4)
    z, codes, _ = q(d)
    torch.testing.assert_close((z - d).norm(dim=-1), (q.lookup(codes) - d).norm(dim=-1))
    q.eval()
    torch.testing.assert_close(q(d)[0], q.lookup(codes))
    assert torch.equal(q(d)[0], q(d)[0])


@pytest.mark.parametrize("levels", [[2, 2, 2], [4, 4], [3, 5]])
def test_fsq_codes_and_vectors_are_inverse(this, levels):
    q = this.quantise.FSQ(1, levels).eval()
    q.start(0)
    codes = torch.arange(int(np.prod(levels)))[:, None]
    vectors = q.lookup(codes)
    assert len(torch.unique(vectors, dim=0)) == len(codes) and vectors.abs().max() == 1
    z, back, _ = q(torch.atanh(vectors * 0.999))
    assert torch.equal(back, codes)
    torch.testing.assert_close(z, vectors)


def test_two_clusters_on_one_code_are_told_apart(this):
    """One code holds two clusters, another cluster has two codes. A look mends it; a second one changes nothing."""
    vq = this.quantise.VQ(1, 4, 4)
    true = 10 * torch.eye(4)
    x = true[torch.arange(400) % 4] + 0.1 * torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    vq.keep(x[:, None])
    vq.update(None, 0, 10)
    vq.started = True
    vq.begin(torch.stack([(true[0] + true[1]) / 2, true[2] + 0.05, true[2] - 0.05, true[3]])[None])
    assert vq.look(torch.Generator().manual_seed(0))
    codes = vq.quantise(vq.align(x[:, None]))[1][:, 0]
    assert all(len(codes[kind::4].unique()) == 1 for kind in range(4)) and len(codes.unique()) == 4
    before = vq.codebook.clone(), vq.axes.clone(), vq.recent.clone()
    assert not vq.look(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(before, (vq.codebook, vq.axes, vq.recent), strict=True))


# --- model


def test_pair_attention_is_a_softmax_over_two_keys(this):
    layer = this.model.PairAttention(128)
    first, second = torch.randn(2, 2, 5, 128)
    x = layer.norm(second)
    q = layer.q(x).view(2, 5, 2, 64)
    k, v = zip(*(layer.kv(y).view(2, 5, 2, 2, 64).unbind(2) for y in (first, x)), strict=True)
    weight = torch.stack([(q * key).sum(-1) / 8 for key in k]).softmax(0)
    want = layer.out(sum(w[..., None] * value for w, value in zip(weight, v, strict=True)).flatten(2))
    torch.testing.assert_close(layer(second, first), want)


def test_position_convolution_sees_neighbours(this):
    """The released temporal PEG mixes up places: only 6 % of the tokens sit where its convolution assumes."""
    place = this.model.Place(1)
    x = torch.zeros(1, 16, 1, requires_grad=True)
    place(x)[0, 5, 0].backward()
    seen = {divmod(i, 4) for i in torch.nonzero(x.grad[0, :, 0])[:, 0].tolist()}
    assert seen == {(i, j) for i in (0, 1, 2) for j in (0, 1, 2)}


def test_the_first_frame_is_encoded_without_the_second(this):
    """Causal, unlike the released code: d depends on the second frame, the first frame's tokens do not."""
    model = tiny(this).eval()
    batch = pairs()
    seen = []
    for block in model.temporal:
        block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    model.encode(batch[:, 0], batch[:, 1])
    model.encode(batch[:, 0], batch.flip(0)[:, 1])
    assert len(seen) == 4 and all(torch.equal(seen[0], other) for other in seen[1:])


def test_first_prediction_is_nothing_moves(this):
    model, batch = this.model.LAQ(**TINY), pairs()
    assert torch.equal(model.predict(batch[:, 0], torch.randn(6, 4, 4)), batch[:, 0])
    metrics = model(dict(frames=batch))[1]
    assert metrics["mse"] == metrics["still"]


@pytest.mark.parametrize("options", [{}, dict(quantiser="vq"), dict(quantiser="fsq"), dict(action_dim=3)])
@pytest.mark.parametrize("started", [False, True])
def test_gradients_reach_every_parameter(this, options, started):
    """The released code has dead ones, and needs find_unused_parameters for them."""
    model = tiny(this, motion_weight=2.0, **options)
    batch = dict(frames=pairs(8), actions=torch.randn(8, 3), labelled=torch.ones(8, dtype=torch.bool))
    model = begin(model, dict(batch, frames=pairs(64, seed=1))) if started else model.train()
    model(batch)[0].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    silent = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert silent == ([] if started or "quantiser" in options else ["quantiser.codebook"])


def test_motion_weight_and_action_head_are_what_the_docstring_says(this):
    model = tiny(this, motion_weight=3.0, action_dim=2, action_weight=0.5).eval()
    model.action_mean[:], model.action_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    first, second = pairs().unbind(1)
    batch = dict(frames=torch.stack([first, second], 1), actions=torch.randn(6, 2))
    batch["labelled"] = torch.tensor([True, False, True, True, False, False])
    d = model.compare(first, second, model.see(first), model.see(second))
    error = (model.predict(first, d) - second) ** 2
    moved = ((first - second).abs().amax(1, keepdim=True) > 0.05).float()
    want = ((1 + 3 * moved) * error).mean()
    off = [
        ((model.act(d[b].flatten()) - (batch["actions"][b] - model.action_mean) / model.action_std) ** 2).mean()
        for b in (0, 2, 3)
    ]
    torch.testing.assert_close(model(batch)[0], want + 0.5 * sum(off) / 6)


def test_dense_labels_are_the_pairs_and_see_each_frame_once(this):
    model = begin(tiny(this), dict(frames=pairs(32))).eval()
    clip, count = torch.rand(23, 3, 16, 16), 0

    def seen(frames, see=model.see):
        nonlocal count
        count += len(frames)
        return see(frames)

    model.see = seen
    for gap in (1, 5, 22):
        for batch in (2, 7, 64):
            count = 0
            codes, vectors = model.encode_clip(clip, gap, batch)
            assert count == 23
            want_codes, want = model.encode(clip[:-gap], clip[gap:])
            assert torch.equal(codes, want_codes)
            torch.testing.assert_close(vectors, want, atol=1e-5, rtol=1e-4)
    assert model.encode_clip(clip[:3], 3)[0].shape == (0, 2) and model.encode_clip(clip[:1], 5)[1].shape == (0, 2, 4)
    bytes_ = (clip * 255).round().byte().permute(0, 2, 3, 1)
    torch.testing.assert_close(
        model.encode_clip(bytes_, 2)[1], model.encode_clip(bytes_.permute(0, 3, 1, 2) / 255, 2)[1]
    )


def test_features_of_a_backbone_are_the_target_and_pixels_only_watch(this, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    features = load("laq", "features").features
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=2, image_size=8)
    ).save_pretrained(tmp_path)
    backbone = features.Backbone(str(tmp_path), 4)
    model = tiny(this, feature_dim=backbone.dim)
    batch = dict(frames=pairs())
    batch["features"] = backbone(batch["frames"])
    assert batch["features"].shape == (6, 2, 16, 8)
    torch.testing.assert_close(batch["features"].std(-1, correction=0), torch.ones(6, 2, 16), atol=1e-2, rtol=0)
    loss, metrics = model(batch)
    loss.backward()
    with_pixels = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {"head.out.weight", "read.weight", "feature_head.1.weight"} <= set(with_pixels)
    model.zero_grad()
    torch.manual_seed(0)
    (model(batch)[0] - model(batch)[1]["mse"]).backward()
    for name, p in model.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(p.grad, with_pixels[name])
    with pytest.raises(ValueError, match="not a vision transformer"):
        features.Backbone(str(tmp_path / "no"), 4)


def test_checkpoint_round_trip_and_what_it_refuses(this, tmp_path):
    model = begin(tiny(this), dict(frames=pairs(32))).eval()
    model.save_pretrained(tmp_path)
    again, batch = this.model.LAQ.from_pretrained(tmp_path), pairs()
    assert again.quantiser.started and not again.training
    for a, b in zip(model.encode(*batch.unbind(1)), again.encode(*batch.unbind(1)), strict=True):
        assert torch.equal(a, b)
    torch.save(dict(a=print), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        this.model.LAQ.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}x")
    with pytest.raises(ValueError, match="not a configuration of LAQ"):
        this.model.LAQ.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong", [dict(image_size=30), dict(patch=2, image_size=16), dict(quantiser="fsq", levels=[3, 3])]
)
def test_impossible_sizes_are_named(this, wrong):
    with pytest.raises(ValueError, match="--"):
        tiny(this, **wrong)


def test_published_size(this):
    """344 M parameters, as arXiv 2410.11758 says."""
    with torch.device("meta"):
        args = this.train.parse([f"@{ROOT / 'laq' / 'lapa.args'}", "--data", "x"])
        names = "image_size patch dim stem spatial_depth temporal_depth decoder_depth codes vocabulary code_dim".split()
        model = this.model.LAQ(**{name: getattr(args, name) for name in names})
    assert 0.97 < sum(p.numel() for p in model.parameters()) / 343_796_080 < 1.05


# --- data


def write_clips(this, folder, lengths, source="lab", size=16, per_shard=3, actions=True, fps=5.0, **about):
    """Shards of noise clips; actions are numbered, so that sums tell which were summed. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number, length in enumerate(lengths):
        rng = np.random.default_rng(number)
        frames = np.repeat(rng.integers(0, 256, (1, size, size, 3)), length, 0)
        frames[:, 0] = (np.arange(length) % 256)[:, None, None]  # the first row of pixels tells the time
        frames[:, 1] = number
        meta = dict(instruction="", fps=fps, source=source, episode=f"{number:03d}", camera="top", length=length)
        sample = {"__key__": f"{source}-{number:03d}", "frames.npy": this.shards.npy(np.uint8(frames))}
        if actions:
            sample["actions.npy"] = this.shards.npy(np.float32(np.arange(length)[:, None] + [0, 1000 * number]))
            meta["actions"] = "delta"
        samples.append(sample | {"json": json.dumps(meta | about).encode()})
    for shard in range(0, len(samples), per_shard):
        this.shards.write_shard(folder / f"shard-{shard // per_shard:06d}.tar", samples[shard : shard + per_shard])
    return folder


@pytest.mark.parametrize(
    "text, want",
    [("3", (3, 3, False)), ("0.6s", (0.6, 0.6, True)), ("2-5", (2, 5, False)), ("0.4s-1.2s", (0.4, 1.2, True))],
)
def test_gap_words(this, text, want):
    assert this.data.parse_gap(text) == want


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "3s-5", "5-3", "s", "0.6 s", "nan"])
def test_wrong_gap_words_are_named(this, text):
    with pytest.raises(ValueError, match="--gap"):
        this.data.parse_gap(text)


def test_pairs_have_the_gap_and_stay_in_their_clip(this, tmp_path):
    write_clips(this, tmp_path, [30, 9, 12, 2, 40])
    source = this.data.read_sources([f"lab={tmp_path}"], ["0.8s"], 0.0)[0]
    assert source.short == 1
    dataset = this.data.TrainPairs([source], 16, 0)
    for step in range(30):
        frames = dataset[step, 0, 16]["frames"]
        time_, clip = frames[:, :, 0, 0, 0].int(), frames[:, :, 1, 0, 0]
        assert torch.equal(time_[:, 1] - time_[:, 0], torch.full((16,), 4)) and torch.equal(clip[:, 0], clip[:, 1])


def test_a_gap_range_is_used_whole(this, tmp_path):
    write_clips(this, tmp_path, [30] * 4)
    source = this.data.read_sources([f"lab={tmp_path}"], ["2-5"], 0.0)[0]
    dataset = this.data.TrainPairs([source], 16, 0)
    frames = torch.cat([dataset[step, 0, 16]["frames"] for step in range(0, 64, 8)])
    assert set((frames[:, 1, 0, 0, 0].int() - frames[:, 0, 0, 0, 0].int()).tolist()) == {2, 3, 4, 5}


def test_no_pair_crosses_a_scene_cut(this):
    frames = np.zeros((20, 16, 16, 3), np.uint8)
    frames[12:] = 200
    frames[:, 0] = np.arange(20)[:, None, None]  # something moves all the time
    starts = np.flatnonzero(this.data.pair_starts(frames, 3))
    assert starts.tolist() == [*range(9), *range(12, 17)]


def test_frames_in_which_nothing_moves_are_left_out(this):
    frames = np.full((20, 16, 16, 3), 100, np.uint8)
    frames[10:] += np.arange(10)[:, None, None, None].astype(np.uint8)
    assert np.flatnonzero(this.data.pair_starts(frames, 1, min_motion=0.002)).tolist() == list(range(10, 19))


def test_actions_between_two_frames(this, tmp_path):
    delta = write_clips(this, tmp_path / "delta", [12])
    absolute = write_clips(this, tmp_path / "absolute", [12], actions="absolute")
    first, second = (this.shards.read_clips(folder)[0] for folder in (delta, absolute))
    starts = np.array([0, 3, 8])
    np.testing.assert_allclose(this.data.between(first, starts, 3)[:, 0], [0 + 1 + 2, 3 + 4 + 5, 8 + 9 + 10])
    second.meta["actions"] = "absolute"
    np.testing.assert_allclose(this.data.between(second, starts, 3)[:, 0], [3, 3, 3])


def test_split_keeps_an_episodes_cameras_together_and_is_the_same_for_every_folder(this, tmp_path):
    for camera in ("left", "right"):
        write_clips(this, tmp_path / camera, [10] * 40, camera=camera, actions=False)
    splits = [this.data.read_sources([str(tmp_path / c)], ["1"], 0.25)[0] for c in ("left", "right")]
    held = [{clip.meta["episode"] for clip in split.validation} for split in splits]
    assert held[0] == held[1] and 3 < len(held[0]) < 18
    assert held[0] == {f"{n:03d}" for n in range(40) if this.data.episode_hash("lab", f"{n:03d}") < 0.25}


def test_global_batch_is_the_same_on_any_number_of_ranks_micro_steps_and_workers(this, tmp_path):
    write_clips(this, tmp_path, [20] * 6)
    sources = this.data.read_sources([str(tmp_path)], ["3"], 0.0)

    def batches(world=1, accum=1, first=0):
        made = [
            this.data.prepare_dataloaders(sources, 8, 16, steps=12, first=first, accum=accum, rank=r, world=world)[0]
            for r in range(world)
        ]
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
    batch = dict(frames=frames, actions=torch.zeros(4, 0), labelled=torch.zeros(4, dtype=torch.bool))
    plain = this.data.augment(batch)["frames"]
    torch.testing.assert_close(plain, frames.permute(0, 1, 4, 2, 3).float() / 255)
    batch |= dict(
        crop=torch.tensor([[0.5, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 0, 0], [0.7, 0.1, 0.2]]), jitter=torch.ones(4, 3)
    )
    same = this.data.augment(batch)["frames"]
    assert torch.equal(same[:, 0], same[:, 1])
    torch.testing.assert_close(same[2], plain[2])
    up = F.interpolate(plain[0, :, :, :8, :8], (16, 16), mode="bilinear")
    torch.testing.assert_close(same[0, :, :, 2:-2, 2:-2], up[:, :, 2:-2, 2:-2], atol=1e-4, rtol=0)


def test_weights_mix_sources(this, tmp_path):
    for name, count in (("a", 2), ("b", 6)):
        write_clips(this, tmp_path / name, [20] * count, source=name)
    data = [f"{name}={tmp_path / name}" for name in "ab"]
    for words, share in (([], 0.25), (["a=1", "b=1"], 0.5), (["a=0", "b=1"], 0.0)):
        sources = this.data.read_sources(data, ["1"], 0.0, weights=words)
        dataset = this.data.TrainPairs(sources, 16, 0, reuse=1)
        assert abs(dataset.share[0] - share) < 1e-9
    with pytest.raises(ValueError, match="--weights"):
        this.data.read_sources(data, ["1"], 0.0, weights=["a=x"])


def test_gauges_against_plain_arithmetic(this):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (400, 2), generator=generator)
    codes[:, 1] = (codes[:, 1] > 0).long()
    moves = torch.stack([codes[:, 0].float(), torch.randn(400, generator=generator)], 1)
    table = torch.cat([torch.tensor([[0.01, 0.04, 0.1]]).expand(400, -1), codes, moves], 1)
    found, (true, shown) = this.data.gauges(table, 2, 8, True)
    assert abs(found["gain"] - 10) < 1e-4 and abs(found["delta_psnr"] - 10 * np.log10(4)) < 1e-4
    assert found["usage"] == (4 + 2) / 16
    for slot in range(2):
        p = np.bincount(codes[:, slot], minlength=8) / 400
        assert abs(found[f"perplexity_{slot}"] - np.exp(-sum(x * np.log(x) for x in p if x))) < 1e-4
    words = np.unique(codes.numpy(), axis=0, return_counts=True)[1] / 400
    assert abs(found["commonest"] - words.max()) < 1e-6
    assert 0.45 < found["action_r2"] < 0.52  # one dim wholly told, one not at all
    assert true.shape == (400, 2) and shown.shape == (400, 2)
    assert "usage" not in this.data.gauges(table, 2, 8, False)[0]


def test_broken_clips_and_shards_are_named_and_passed_over(this, tmp_path, capsys):
    write_clips(this, tmp_path, [20] * 6)
    data = bytearray((tmp_path / "shard-000001.tar").read_bytes())
    (tmp_path / "shard-000001.tar").write_bytes(data[: len(data) // 2])
    said = []
    clips = this.shards.read_clips(tmp_path, said.append)
    assert len(clips) == 3 and "shard-000001.tar" in said[0]
    offset, size = clips[0].members["frames.npy"]
    clips[0].members["frames.npy"] = offset, size - 100
    source = this.data.Source("lab", clips, [], 1, 1, False)
    frames = this.data.TrainPairs([source], 16, 0)[0, 0, 8]["frames"]
    assert frames.shape == (8, 2, 16, 16, 3) and "lab-000" in capsys.readouterr().err


def test_missing_fields_are_named(this, tmp_path):
    write_clips(this, tmp_path, [20], fps=0.0)
    with pytest.raises(ValueError, match="none of its 1 shards"):
        this.shards.read_clips(tmp_path, lambda text: None)
    with pytest.raises(ValueError, match="no shards"):
        this.shards.shards_of(tmp_path / ".." / tmp_path.name) if not (tmp_path / "x").mkdir() else None
        this.shards.shards_of(tmp_path / "x")


def test_action_moments_see_labelled_clips_only(this, tmp_path):
    write_clips(this, tmp_path, [20] * 12)
    sources = this.data.read_sources([str(tmp_path)], ["2"], 0.0)
    mean, std = this.data.action_moments(sources, 0.5)
    known = [clip for clip in sources[0].train if this.data.seen(clip, 0.5)]
    assert 0 < len(known) < 12
    moves = np.concatenate([this.data.between(clip, np.arange(18), 2) for clip in known])
    np.testing.assert_allclose(mean, moves.mean(0), rtol=1e-5)
    batch = this.data.TrainPairs(sources, 16, 0, label_share=0.5)[0, 0, 64]
    names = {clip.meta["episode"] for clip in known}
    for frames, labelled in zip(batch["frames"], batch["labelled"], strict=True):
        assert (f"{int(frames[0, 1, 0, 0]):03d}" in names) == bool(labelled)


# --- demo


def test_demo_moves_are_what_is_seen(this):
    rng = np.random.default_rng(0)
    frames, actions, state = this.demo.episode(rng, False)
    assert frames.shape == (24, 32, 32, 3) and len(np.unique(actions.round(3), axis=0)) <= 8
    np.testing.assert_allclose(state[1:], state[:-1] + actions[:-1], atol=1e-6)
    for t in (0, 7, 20):
        dark = np.argwhere(frames[t].max(2) < 60)
        np.testing.assert_allclose((dark.mean(0)[::-1] + 0.5) / 32, state[t], atol=0.03)


# --- training


def flags(data, out, *more):
    words = [
        f"--{k.replace('_', '-')}={v}" for k, v in (TINY | dict(codes=2, steps=6, batch_size=4, log_every=2)).items()
    ]
    words += ["--eval-every", 3, "--save-every", 3, "--start-every", 2, "--start-by", 0.3, "--gap", 1, "--warmup", 1]
    return ["--data", f"lab={data}", "--out", out, "--device", "cpu", *words, *more]


def weights(out, step):
    return torch.load(out / "checkpoints" / f"step_{step:07d}" / "pytorch_model.bin", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lab(this, tmp_path_factory):
    return write_clips(this, tmp_path_factory.mktemp("lab"), [12] * 10)


def test_run_resume_and_what_it_leaves(this, lab, tmp_path):
    assert this.train.main(flags(lab, tmp_path / "one")) == 0
    lines = logged(tmp_path / "one")
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert {"val/lab/gain", "val/lab/usage", "val/lab/perplexity_1", "val/lab/action_r2"} <= set(lines[-1])
    assert {path.name for path in (tmp_path / "one" / "figures").iterdir()} == {"curves.png", "codes.png", "moves.png"}
    assert this.train.main(flags(lab, tmp_path / "two", "--steps", 3)) == 0
    assert this.train.main(flags(lab, tmp_path / "three", "--steps", 6, "--accum", 2)) == 0
    (tmp_path / "one" / "checkpoints" / "step_0000006" / "resume.pt").write_bytes(b"damaged")
    before = weights(tmp_path / "one", 6)
    assert this.train.main([*flags(lab, tmp_path / "one"), "--resume"]) == 0
    assert equal(before, weights(tmp_path / "one", 6))


def test_best_is_a_model_with_codes(this, lab, tmp_path):
    """A continuous model has a smaller error than any with codes: it must not stay `best`."""
    this.train.main(flags(lab, tmp_path / "run", "--steps", 8, "--eval-every", 2, "--start-by", 0.7, "--keep", 9))
    best = (tmp_path / "run" / "checkpoints" / "best").resolve().name
    assert (
        best >= "step_0000006"
        and this.model.LAQ.from_pretrained(tmp_path / "run" / "checkpoints" / "best").quantiser.started
    )


@pytest.mark.parametrize(
    "more", [["--amp", "bf16"], ["--quantiser", "vq"], ["--quantiser", "fsq"], ["--label-share", "0.5"]]
)
def test_options_train(this, lab, tmp_path, more):
    assert this.train.main(flags(lab, tmp_path / "run", *more)) == 0
    assert np.isfinite(logged(tmp_path / "run")[-1]["train/loss"])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(lab, tmp_path):
    more = ["--steps", 60, "--save-every", 10, "--eval-every", 20, "--restart-every", 3]
    assert launch(SCRIPT, *flags(lab, tmp_path / "one", *more)).returncode == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        out = tmp_path / f"run{int(number)}"
        words = [str(word) for word in [sys.executable, SCRIPT, *flags(lab, out, *more)]]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step_0000010").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == code
        done = launch(SCRIPT, *flags(lab, out, *more, "--resume"))
        assert done.returncode == 0, done.stderr
        assert equal(weights(out, 60), weights(tmp_path / "one", 60))
        assert [line["step"] for line in logged(out)] == [line["step"] for line in logged(tmp_path / "one")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq", "nsvq"])
def test_two_ranks_train_one_codebook(lab, tmp_path, kind):
    """200 steps with restarts: every rank's codebook is the same, bit for bit, and the curve is one process's."""
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import os, runpy, sys, torch\n"
        "path = sys.argv[1]\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(path))\n"
        "import quantise\n"
        "kept = []\n"
        "make = quantise.Quantiser.__init__\n"
        "def init(self, *a, **k):\n    make(self, *a, **k)\n    kept.append(self)\n"
        "quantise.Quantiser.__init__ = init\n"
        "try:\n    runpy.run_path(path, run_name='__main__')\n"
        "finally:\n"
        "    q = kept[0]\n"
        "    state = dict(codebook=q.codebook.detach(), axes=q.axes, recent=q.recent, restarts=q.restarts)\n"
        f"    torch.save(state, '{tmp_path}/rank' + os.environ['RANK'] + '.pt')\n"
    )
    more = [
        "--steps",
        200,
        "--restart-every",
        2,
        "--eval-every",
        100,
        "--save-every",
        200,
        "--quantiser",
        kind,
        "--lr",
        "1e-3",
    ]
    done = launch(spy, SCRIPT, *flags(lab, tmp_path / "two", *more), ranks=2)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert a["restarts"] > 0 and equal(a, b)
    assert launch(SCRIPT, *flags(lab, tmp_path / "one", *more)).returncode == 0
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose([x["train/loss"] for x in one[:5]], [x["train/loss"] for x in two[:5]], rtol=2e-3)


@pytest.mark.slow
def test_demo_learns_directions(tmp_path):
    """Half of the demo: every code is in use and tells the direction of the move."""
    done = launch(SCRIPT, "--steps", 400, "--val-pairs", 256, "--out", tmp_path / "run", cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr
    last = logged(tmp_path / "run")[-1]
    assert last["val/demo/usage"] >= 0.9 and last["val/demo/action_r2"] > 0.8 and last["val/demo/gain"] > 3
    assert last["data_share"] < 0.05


# --- labelling


@pytest.fixture(scope="module")
def trained(this, lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    this.train.main(flags(lab, out))
    return out / "checkpoints" / "best"


def read_labels(this, shard):
    return {
        clip.key: np.load(io.BytesIO(clip.read("latents.npz")), allow_pickle=False)
        for clip in this.shards.open_shard(shard)
    }


def test_labels_are_the_models_codes_for_every_pair(this, trained, tmp_path):
    data = write_clips(this, tmp_path / "data", [12, 7, 1, 9])
    this.label.main(["--checkpoint", trained, "--data", data, "--gap", "2", "--out", tmp_path / "labels"])
    model = this.model.LAQ.from_pretrained(trained)
    clips = this.shards.read_clips(data)
    names = sorted(path.name for path in data.glob("*.tar"))
    assert sorted(path.name for path in (tmp_path / "labels").glob("*.tar")) == names
    labels = {}
    for name in names:
        labels |= read_labels(this, tmp_path / "labels" / name)
    assert labels.keys() == {clip.key for clip in clips}
    for clip in clips:
        frames = torch.from_numpy(clip.frames(16)).permute(0, 3, 1, 2) / 255
        found, pairs_ = labels[clip.key], max(0, len(frames) - 2)
        assert found["gap"] == 2 and found["codes"].shape == (pairs_, 2) and found["valid"].all()
        if pairs_:
            codes, vectors = model.encode(frames[:-2], frames[2:])
            np.testing.assert_array_equal(found["codes"], codes)
            np.testing.assert_allclose(found["vectors"], vectors, atol=1e-4)
    about = json.loads((tmp_path / "labels" / "labels.json").read_text())
    assert (about["model"], about["codes"], about["vocabulary"], about["dim"], about["gap"]) == ("laq", 2, 8, 4, 2)
    book = torch.tensor(about["codebook"])
    torch.testing.assert_close(book, model.quantiser.codebook.detach())


def test_labelling_resumes_and_does_not_depend_on_the_batch(this, trained, tmp_path, capsys):
    data = write_clips(this, tmp_path / "data", [12] * 6)
    words = ["--checkpoint", trained, "--data", data]
    this.label.main([*words, "--out", tmp_path / "a"])
    this.label.main([*words, "--out", tmp_path / "b", "--batch-size", "3"])
    for name in ("shard-000000.tar", "shard-000001.tar"):
        a, b = (read_labels(this, tmp_path / x / name) for x in "ab")
        assert all(np.array_equal(a[key]["codes"], b[key]["codes"]) for key in a)
    want = (tmp_path / "a" / "shard-000001.tar").read_bytes()
    (tmp_path / "a" / "shard-000001.tar").unlink()
    capsys.readouterr()
    this.label.main([*words, "--out", tmp_path / "a"])
    assert (tmp_path / "a" / "shard-000001.tar").read_bytes() == want
    assert "3 clips labelled, 33 pairs, 1 shards were there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another model or gap"):
        this.label.main([*words, "--out", tmp_path / "a", "--gap", "3"])


def test_a_model_without_codes_is_refused(this, lab, tmp_path):
    tiny(this).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="never started"):
        this.label.main(["--checkpoint", tmp_path / "model", "--data", lab, "--gap", "1", "--out", tmp_path / "out"])


def test_broken_clips_are_named_while_labelling(this, trained, tmp_path, capsys):
    data = write_clips(this, tmp_path / "data", [12] * 3, per_shard=1)
    shard = tmp_path / "data" / "shard-000001.tar"
    clip = this.shards.open_shard(shard)[0]
    raw = bytearray(shard.read_bytes())
    offset = clip.members["frames.npy"][0]
    raw[offset : offset + 6] = b"broken"
    shard.write_bytes(raw)
    this.label.main(["--checkpoint", trained, "--data", data, "--out", tmp_path / "labels"])
    said = capsys.readouterr().out
    assert "lab-001.frames.npy" in said and "2 clips labelled" in said and "1 broken" in said


@pytest.mark.slow
def test_labelling_on_two_ranks_writes_the_same_files(this, trained, tmp_path):
    data = write_clips(this, tmp_path / "data", [12] * 9, per_shard=2)
    words = ["--checkpoint", trained, "--data", data, "--device", "cpu"]
    for ranks in (1, 2):
        done = launch(ROOT / "laq" / "label.py", *words, "--out", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0 and "9 clips labelled" in done.stdout + done.stderr, done.stderr
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
