"""fsq_vqvae: the transform coder, the tokenizer's promises, readers, split, batches, the loop, the report."""

import json
import os
import pickle
import shutil

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, launch, load, log_of, shared

from common import DataError

CONTEXT = dict(none=0, action=1, state=4)  # rows


@pytest.fixture(scope="module")
def this():
    return load("fsq_vqvae", "transform_coding", "fsq", "readers", "baselines", "metrics", "evaluate", "split")


def described(name="arm", action_dim=4, chunk=12):
    ones = [1.0] * action_dim
    more = dict(center=[0.5] * action_dim, scale=[2.0] * action_dim, low=[-9.0] * action_dim, high=ones)
    return dict(name=name, action_dim=action_dim, chunk=chunk, fps=20.0, **more)


def smooth(count, steps=12, dims=4, seed=0):
    """Chunks (count, steps, dims) that live near a few smooth directions, as robot actions do."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, steps)
    waves = np.stack([np.ones_like(t), t, np.sin(4 * t), np.cos(9 * t)], 1) * [1, 0.7, 0.4, 0.2]
    mixing = np.random.default_rng(99).normal(size=(4, 6, dims))
    return np.einsum("tk,kia,nki->nta", waves, mixing, rng.normal(size=(count, 4, 6))).astype(np.float32)


def sample(chunks, condition="action", mask=None, seed=5):
    rows = CONTEXT[condition]
    noise = np.random.default_rng(seed).normal(0, 0.1, (len(chunks), rows, chunks.shape[2]))
    context = (chunks[:, :1] + noise * (condition == "state")).astype(np.float32)[:, :rows]
    mask = np.ones(chunks.shape[:2], bool) if mask is None else mask
    return {key: torch.from_numpy(v) for key, v in dict(actions=chunks, mask=mask, context=context).items()}


def tokenizer(this, condition="action", tokens=3, network=False, sources=((),), **config):
    """A tokenizer fitted to smooth chunks; its network, if on, has random weights."""
    torch.manual_seed(0)
    about = [described(*source) for source in sources]
    samples = [sample(smooth(400, a["chunk"], a["action_dim"]), condition) for a in about]
    sizes = dict(hidden_dim=16, condition=condition) | config
    model = this.model.FSQVQVAE.fit(about, samples, tokens, **sizes).eval()
    for own in model.coders if network else ():
        torch.nn.init.normal_(own.leave.weight, std=0.1)
        own.use_network.fill_(True)
    return model


# --- the published quantizer


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [8, 6, 5], [3, 3, 3], [7, 5, 5, 5, 5], [4, 4]])
def test_fsq_matches_a_loop_over_scalars(this, levels):
    """Codes and indices are those of the published formula, written out number by number in float64."""
    z = torch.randn(40, len(levels), generator=torch.Generator().manual_seed(1)) * 2
    codes, indices = this.fsq.FSQ(levels)(z)
    for row, code, index in zip(z.tolist(), codes, indices.tolist(), strict=True):
        expected, base = 0, 1
        for x, level, got in zip(row, levels, code.tolist(), strict=True):
            half = (level - 1) * 1.001 / 2
            offset = 0.0 if level % 2 else 0.5
            digit = np.round(np.tanh(x + np.arctanh(offset / half)) * half - offset)
            assert got == pytest.approx(digit / (level // 2), abs=1e-6)
            expected += int(digit + level // 2) * base
            base *= level
        assert index == expected


def test_fsq_indices_above_2_to_the_24_come_back(this):
    """A vocabulary of 8^9 is exact; one that an int64 cannot count is refused."""
    fsq, z = this.fsq.FSQ([8] * 9), torch.randn(200, 9) * 2
    codes, indices = fsq(z)
    assert indices.max() > 2**24
    torch.testing.assert_close(fsq.codes(indices), codes)
    with pytest.raises(ValueError, match="64-bit"):
        this.fsq.FSQ([8] * 21)
    with pytest.raises(ValueError, match="at least 3"):
        this.fsq.FSQ([8, 2])


def test_fsq_is_float32_under_autocast_and_passes_the_gradient(this):
    fsq, z = this.fsq.FSQ([8, 5, 5, 5]), torch.randn(64, 4, requires_grad=True)
    plain = fsq(z)[1]
    with torch.autocast("cpu", torch.bfloat16):
        codes, indices = fsq(z)
    assert codes.dtype == torch.float32 and torch.equal(indices, plain)
    codes.sum().backward()
    expected = (1 - torch.tanh(z + fsq.shift) ** 2) * fsq.half_l / fsq.half_width
    torch.testing.assert_close(z.grad, expected.detach())


# --- the transform coder


def test_lloyd_max_of_a_gaussian_has_the_error_of_the_textbook(this):
    """Max 1960, table I: 0.3634, 0.1175, 0.03454 for 2, 4, 8 levels of a unit Gaussian."""
    table = this.transform_coding.LloydMax(np.random.default_rng(0).normal(size=200_000))
    for levels, error in ((2, 0.3634), (4, 0.1175), (8, 0.03454)):
        assert table(levels)[1] == pytest.approx(error, rel=0.03)
        assert (np.diff(table(levels)[0]) > 0).all()


def test_closed_form_is_near_the_bound_and_beats_equal_levels(this):
    """Gaussian coefficients: within 5 dB of the rate-distortion function, and well below PCA with equal levels."""
    rng, scale = np.random.default_rng(0), 0.8 ** np.arange(40)
    x, held = (rng.normal(size=(n, 40)) * scale for n in (8000, 2000))
    fit = this.transform_coding.fit(this.transform_coding.klt(x, np.zeros((8000, 0)), 8), 8, 1024)
    z, decoded = (held - fit.mean) @ fit.basis.T, np.tile(fit.mean, (2000, 1))
    for i, points in enumerate(fit.points):
        decoded += points[np.abs(z[:, i, None] - points).argmin(1)][:, None] * fit.basis[i]
    ours = np.square(decoded - held).sum(1).mean()
    sizes = [np.prod(levels) for levels in fit.levels]
    assert max(sizes) <= 1024  # no token has more codes than it may
    bits, water = np.log2(sizes).sum(), 1.0
    while np.maximum(0, np.log2(scale / np.sqrt(water))).sum() < bits:  # reverse water-filling
        water *= 0.99
    assert ours < 10**0.5 * np.minimum(water, scale**2).sum()
    equal = this.baselines.pca(x[:, None], held[:, None], 8, 1024).decoded[:, 0]
    assert ours < 0.7 * np.square(equal - held).sum(1).mean()


def test_what_the_context_tells_costs_no_bits(this):
    """Chunks that follow from the context decode exactly, however wide they range."""
    rng = np.random.default_rng(0)
    context = rng.normal(size=(2000, 3))
    x = context @ rng.normal(size=(3, 30)) * 50 + rng.normal(size=(2000, 30)) * 0.01
    fit = this.transform_coding.fit(this.transform_coding.klt(x, context, 2), 2, 1024)
    assert np.abs(context @ fit.weight + fit.mean - x).max() < 1


# --- the tokenizer's promises


@pytest.mark.parametrize("condition", CONTEXT)
def test_encode_takes_the_nearest_points_and_decode_gives_them_back(this, condition):
    """Every index tuple is a fixed point of decode and encode in the closed form; held-out chunks come back."""
    model, chunks = tokenizer(this, condition, 4), smooth(200, seed=3)
    context = sample(chunks, condition)["context"].numpy()
    indices = model.encode(chunks, context=context)
    decoded = model.decode(indices, context=context)
    assert np.square(decoded - chunks).mean() < 0.1 * np.square(chunks - chunks.mean(0)).mean()
    if condition != "action":  # there the context is the chunk's own first action
        assert (model.encode(decoded, context=context) == indices).mean() > 0.99


def test_a_shift_of_the_joints_changes_no_token(this):
    """Conditions `action` and `state` code differences: what has drifted since the training keeps its tokens."""
    chunks, offset = smooth(50), np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    for condition in ("action", "state"):
        model, context = tokenizer(this, condition, network=True), sample(chunks, condition)["context"].numpy()
        tokens, moved = (model.encode(chunks + x, context=context + x) for x in (0, offset))
        assert (tokens == moved).mean() > 0.98  # rounding may tip a code
        a, b = (model.decode(tokens, context=context + x) for x in (0, offset))
        np.testing.assert_allclose(b, a + offset, atol=1e-4)


def test_decode_without_a_context_starts_from_the_middle_and_says_so(this):
    for condition in ("action", "state"):
        model = tokenizer(this, condition, network=True)
        with pytest.warns(UserWarning, match="give context=: (action|state) at step 0"):
            decoded = model.decode([[3, 20, 7]])
        middle = np.full((1, CONTEXT[condition], 4), 0.5, np.float32)
        np.testing.assert_array_equal(decoded, model.decode([[3, 20, 7]], context=middle))
    with pytest.raises(ValueError, match="needs context=: state at step 0, action at step -1"):
        model.encode(smooth(1)[0])
    with pytest.raises(ValueError, match=r"context has shape \(4, 3, 4\), expected \(3, 4, 4\)"):
        model.encode(smooth(3), context=np.zeros((4, 3, 4)))  # rows before chunks


def test_held_out_chunks_decide_how_far_the_points_reach(this):
    """Held-out chunks like those of the fit want points for just these, larger ones want points further out."""
    fit, chunks = this.model.FSQVQVAE.fit, sample(smooth(6000), "none")
    for size in (1, 8):
        held_out = [sample(smooth(400, seed=8) * np.float32(size), "none")]
        found = fit([described()], [chunks], 3, held_out, condition="none", hidden_dim=8)
        plain = fit([described()], [chunks], 3, condition="none", hidden_dim=8)
        assert found.sources[0]["spread"] == (8 if size == 8 else 0) and plain.sources[0]["spread"] == 1
        x = held_out[0]["actions"]
        a, b = ((m.decode(m.encode(x)) - x).square().mean() for m in (found, plain))
        assert a < (0.3 if size == 8 else 0.99) * b


def test_any_tuple_of_any_integer_type_decodes(this):
    model, tokens = tokenizer(this, "none", network=True), np.random.default_rng(0).integers(0, 1024, (5000, 3))
    expected = model.decode(tokens)
    assert expected.shape == (5000, 12, 4) and np.isfinite(expected).all()
    for kind in (np.uint16, np.uint32, np.int32, np.uint64, ">i4", object):
        np.testing.assert_array_equal(model.decode(tokens.astype(kind)), expected)
    np.testing.assert_array_equal(model.decode(np.uint8([[3, 200, 7]])), model.decode([[3, 200, 7]]))
    tensor = model.decode(torch.from_numpy(tokens.astype(np.uint16)))
    assert torch.is_tensor(tensor) and np.array_equal(tensor, expected)


@pytest.mark.parametrize("condition", CONTEXT)
def test_means_of_coefficients_decode_to_means_of_chunks(this, condition):
    """What a policy executes that is unsure between two tuples of tokens lies half-way (closed form)."""
    model, tokens = tokenizer(this, condition), torch.tensor([[3, 200, 7], [900, 5, 61]])
    context = sample(smooth(1), condition)["context"]
    chunks = model.decode(tokens, context=context)
    own = model.coders[0]
    mean = own.values(own.unpack(tokens)).mean(0, keepdim=True)
    decoded = model.decode_values(mean, context=context)
    torch.testing.assert_close(decoded, chunks.mean(0, keepdim=True), atol=1e-5, rtol=1e-5)
    assert (chunks[0] - chunks[1]).abs().max() > 0.1


def test_padding_content_never_changes_tokens(this):
    model = tokenizer(this, sources=(("arm", 4, 12), ("hand", 2, 6)))
    rng = np.random.default_rng(0)
    for name, steps, dims in (("arm", 12, 4), ("hand", 6, 2)):
        chunks, mask = rng.normal(size=(20, steps, dims)).astype(np.float32) * 3, np.ones((20, steps), bool)
        mask[:, steps // 2 :] = False
        other, nothing = (np.where(mask[..., None], chunks, x).astype(np.float32) for x in (1e6, np.nan))
        tokens = model.encode(chunks, mask, name)
        assert np.array_equal(tokens, model.encode(other, mask, name))
        assert np.array_equal(tokens, model.encode(nothing, mask, name))
        assert np.array_equal(tokens, model.encode(chunks[:, : steps // 2], source=name))
        assert not np.array_equal(tokens, model.encode(chunks, source=name))  # valid content does


def test_calls_like_fast_with_arrays_tensors_one_or_many(this):
    model, chunks = tokenizer(this), smooth(5)
    tokens = model(chunks)
    assert isinstance(tokens, list) and isinstance(tokens[0][0], int) and np.shape(tokens) == (5, 3)
    assert model.decode(tokens, context=chunks[:, 0]).shape == (5, 12, 4)
    one = model.encode(torch.from_numpy(chunks[2]))
    assert torch.is_tensor(one) and one.tolist() == tokens[2]
    assert model.decode(one, context=torch.from_numpy(chunks[2, 0])).shape == (12, 4)


ZEROS = np.zeros((12, 4), np.float32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(np.zeros((12, 5), np.float32)), "expected"),
        (lambda m: m.encode(np.zeros((13, 4), np.float32)), "expected"),
        (lambda m: m.encode(ZEROS, np.array([False] + [True] * 11)), "mask"),
        (lambda m: m.encode(ZEROS * np.nan), "NaN"),
        (lambda m: m.encode(ZEROS, context=ZEROS[0] * np.nan), "NaN"),
        (lambda m: m.encode(np.linspace(0, 1e30, 48, dtype=np.float32).reshape(12, 4)), "outside the range"),
        (lambda m: m.decode([[0, 0]], context=ZEROS[0]), "indices"),
        (lambda m: m.decode([[0, 0, 1024]], context=ZEROS[0]), r"\[0, 1024\)"),
        (lambda m: m.decode([[0, 0, -1]], context=ZEROS[0]), r"\[0, 1024\)"),
        (lambda m: m.decode([[0.5, 0, 0]], context=ZEROS[0]), "whole numbers"),
        (lambda m: m.decode([[0, 0, 0]], context=ZEROS[0, :3]), "context has shape"),
        (lambda m: m.decode([[0, 0, 0]], context=ZEROS[:2]), "context has shape"),
        (lambda m: m.decode([["a", "b", "c"]], context=ZEROS[0]), "indices are <U1, expected numbers"),
        (lambda m: m.encode(ZEROS + 1j), "actions are complex"),
        (lambda m: m.encode(ZEROS, source="leg"), "unknown"),
    ],
)
def test_wrong_arguments_are_named(this, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer(this))


def test_checkpoint_round_trip_and_what_it_refuses(this, tmp_path):
    two = (("arm", 4, 12), ("hand", 2, 6))
    model, chunks = tokenizer(this, sources=two, network=True), smooth(4)
    model.save_pretrained(tmp_path / "a")
    again = this.model.FSQVQVAE.from_pretrained(tmp_path / "a")
    tokens = model.encode(chunks, source="arm")
    assert np.array_equal(tokens, again.encode(chunks, source="arm"))
    assert np.array_equal(*(m.decode(tokens, "arm", chunks[:, 0]) for m in (model, again)))

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "a" / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError, match="pytorch_model.bin"):
        this.model.FSQVQVAE.from_pretrained(tmp_path / "a")
    assert not (tmp_path / "owned").exists()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for wrong in (dict(sources=3), dict(hidden_dim=10**12), dict(tokens=1), dict(codebook_size=2**63)):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(DataError, match="config.json"):
            this.model.FSQVQVAE.from_pretrained(tmp_path / "a")


def test_a_new_robot_joins_a_trained_tokenizer(this, tmp_path):
    """Its own coder is fitted; the shared layers and the old robot are the checkpoint's; other sizes are refused."""
    old = tokenizer(this, network=True)
    old.save_pretrained(tmp_path)
    both = tokenizer(this, sources=(("arm", 4, 12), ("hand", 2, 6)))
    alone = both.encode(smooth(5, 6, 2), source="hand")
    both.load_pretrained(tmp_path)
    chunks = smooth(5)
    assert np.array_equal(both.encode(chunks, source="arm"), old.encode(chunks))
    assert np.array_equal(both.encode(smooth(5, 6, 2), source="hand"), alone)
    assert all(torch.equal(a, b) for a, b in zip(both.trunk.parameters(), old.trunk.parameters(), strict=True))
    for other, message in (
        (dict(condition="none"), "condition"),
        (dict(tokens=4), "4 tokens|3 tokens"),
        (dict(codebook_size=256), "codebook_size"),
        (dict(sources=(("arm", 4, 10),)), "chunk of arm"),
    ):
        with pytest.raises(DataError, match=message):
            tokenizer(this, **other).load_pretrained(tmp_path)


def test_loss_ignores_padding_and_counts_each_chunk_the_same(this):
    """The mean over chunks of the mean over valid entries: what makes ranks and micro-steps add up."""
    model = tokenizer(this, network=True, sources=(("arm", 4, 12), ("hand", 2, 6)))
    actions, mask = torch.randn(6, 12, 4), torch.ones(6, 12, dtype=torch.bool)
    source = torch.tensor([0, 1, 0, 1, 0, 1])
    mask[source == 1, 6:] = False
    mask[2, 3:] = False
    batch = dict(actions=actions, mask=mask, source=source, context=actions[:, :1])
    loss, metrics = model(batch)
    again = model({**batch, "actions": torch.where(mask[..., None], actions, 7e3)})[0]
    torch.testing.assert_close(loss, again)
    single = [model({key: value[i : i + 1] for key, value in batch.items()})[0] for i in range(6)]
    torch.testing.assert_close(loss, torch.stack(single).mean())
    closed = []
    for i, (steps, dims, name) in enumerate([(12, 4, "arm"), (6, 2, "hand")]):
        x = actions[i : i + 1, :steps, :dims]
        decoded = model.decode(model.encode(x, source=name), name, x[:, 0], closed_form=True)
        closed.append(((decoded - x) / 2).square().mean())
    first = {key: value[:2] for key, value in batch.items()}
    torch.testing.assert_close(model(first)[1]["mse_closed_form"], torch.stack(closed).mean())


def test_training_starts_from_the_closed_form_and_reaches_every_parameter(this):
    model = tokenizer(this, sources=(("arm", 4, 12), ("hand", 2, 6))).train()
    actions = torch.from_numpy(smooth(16))
    mask, source = torch.ones(16, 12, dtype=torch.bool), torch.tensor([0, 1] * 8)
    batch = dict(actions=actions, mask=mask, source=source, context=actions[:, :1])
    loss, metrics = model(batch)
    torch.testing.assert_close(loss, metrics["mse_closed_form"])
    for own in model.coders:
        torch.nn.init.normal_(own.leave.weight)
    model(batch)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


# --- readers


def write_npz(folder, lengths, dims=3, seed=0, rate=10):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(lengths):
        actions = rng.normal(size=(length, dims)).cumsum(0).astype(np.float32)
        state = actions - rng.normal(0, 0.1, actions.shape).astype(np.float32)
        np.savez(folder / f"ep{i:02d}.npz", actions=actions, state=state, timestamps=np.arange(length) / rate)
    return folder


def write_lerobot(folder, files, key="action", fps=10, names=None, state_names=None, flat=False):
    """files: {name: [(episode, first frame, actions)]}: v2.1 has one episode a file, v3.0 many."""
    (folder / "meta").mkdir(parents=True)
    width = next(iter(files.values()))[0][2].shape[1]
    about = {key: dict(shape=[width], names=names), "observation.state": dict(shape=[width], names=state_names)}
    (folder / "meta" / "info.json").write_text(json.dumps(dict(fps=fps, features=about)))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for name, parts in files.items():
        rows = [row.tolist() for _, _, actions in parts for row in actions]
        columns = {
            key: [row[0] for row in rows] if flat else rows,
            "observation.state": [[x + 100 * i for i, x in enumerate(row)] for row in rows],
            "episode_index": [episode for episode, _, actions in parts for _ in actions],
            "frame_index": [first + t for _, first, actions in parts for t in range(len(actions))],
        }
        columns["timestamp"] = [frame / 10 for frame in columns["frame_index"]]
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data" / "chunk-000" / name)
    return folder


def test_every_format_reads_to_the_same_episodes(this, tmp_path):
    """Also through links to folders, beside the hidden files of a Mac, and from sub-folders."""
    rng = np.random.default_rng(0)
    a, b, c = episodes = [rng.normal(size=(length, 3)).astype(np.float32) for length in (12, 7, 15)]
    for name in ("npz", "aloha", "outer", "two"):
        (tmp_path / name).mkdir()
    for i, actions in enumerate(episodes):
        np.savez(tmp_path / "npz" / f"{i}.npz", actions=actions, timestamps=np.arange(len(actions)) / 10)
        with h5py.File(tmp_path / "aloha" / f"episode_{i}.HDF5", "w") as h5:
            h5["action"], h5["observations/qpos"] = actions, actions
    write_lerobot(tmp_path / "v21", {f"episode_{i:06d}.parquet": [(i, 0, x)] for i, x in enumerate(episodes)})
    # an episode may go over into the next file
    files = {"file-000.parquet": [(0, 0, a), (1, 0, b[:4])], "file-001.parquet": [(1, 4, b[4:]), (2, 0, c)]}
    write_lerobot(tmp_path / "v30", files)
    write_lerobot(tmp_path / "openpi", {"file-000.parquet": [(0, 0, a), (1, 0, b), (2, 0, c)]}, key="actions")
    with h5py.File(tmp_path / "demo.hdf5", "w") as h5:
        h5.create_group("data").attrs["env_args"] = json.dumps(dict(env_kwargs=dict(control_freq=10)))
        for i, actions in enumerate(episodes):
            h5[f"data/demo_{i}/actions"] = actions.astype(np.float64)
    (tmp_path / "days").mkdir()
    for day in (1, 2):  # another day's file changes no name, so none of the split
        shutil.copy(tmp_path / "demo.hdf5", tmp_path / "days" / f"{day}.hdf5")
        ids = this.data.read_source("x", tmp_path / "days", "5").ids
        assert ids == [f"{name}/demo_{i}" for name in range(1, day + 1) for i in range(3)]
    os.symlink(tmp_path / "npz", tmp_path / "linked")
    os.symlink(tmp_path / "npz", tmp_path / "outer" / "link")
    os.symlink(tmp_path / "npz", tmp_path / "npz" / "again")  # a link back: each folder is read once
    for folder in (tmp_path / "npz", tmp_path / "v30" / "data" / "chunk-000", tmp_path / "aloha"):
        for file in list(folder.iterdir()):
            (folder / f"._{file.name}").write_bytes(b"\0\5\26\7Mac OS X")
    rates = dict.fromkeys(["npz", "v21", "v30", "openpi", "demo.hdf5", "linked", "outer"], 10.0) | dict(aloha=None)
    for path, fps in rates.items():
        source = this.data.read_source("x", tmp_path / path, "5")
        np.testing.assert_array_equal(source.actions, np.concatenate(episodes))
        assert source.length.tolist() == [12, 7, 15]
        assert source.fps == (pytest.approx(fps) if fps else None)
    for name in "ab":  # files of one name in two folders are two episodes
        shutil.copytree(tmp_path / "npz", tmp_path / "two" / name, ignore=shutil.ignore_patterns("again"))
    assert this.data.read_source("x", tmp_path / "two", "5").ids == [f"{name}/{i}" for name in "ab" for i in range(3)]
    flat = write_lerobot(tmp_path / "flat", {"file-000.parquet": [(0, 0, a[:, :1])]}, flat=True)  # of one dim
    np.testing.assert_array_equal(this.readers.read(flat).actions[0], a[:, :1])
    np.testing.assert_array_equal(this.readers.read(tmp_path / "npz" / "1.npz").actions, [b])


def test_state_is_paired_with_the_action_by_names(this, tmp_path):
    """Another order is put right; a dim that the state lacks is named; without names, position counts and is said."""
    actions = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    files = {"file-000.parquet": [(0, 0, actions)]}
    more = dict(names=["x", "y", "grip"], state_names=dict(motors=["grip", "x", "y"]))
    source = this.data.read_source("a", write_lerobot(tmp_path / "order", files, **more), "5")
    recorded = actions + [0, 100, 200]
    np.testing.assert_allclose(source.state, recorded[:, [1, 2, 0]], rtol=1e-5)
    lost = write_lerobot(tmp_path / "lost", files, names=["x", "y", "grip"], state_names=["x", "y", "z"])
    with pytest.raises(DataError, match="no dims called grip"):
        this.data.read_sources([f"a={lost}"], ["5"], condition="state")
    unnamed = this.data.read_source("a", write_lerobot(tmp_path / "unnamed", files), "5")
    assert "by position" in unnamed.remark and unnamed.state.shape == (9, 3)


def test_context_is_what_was_known_at_the_first_step(this, tmp_path):
    folder = write_npz(tmp_path / "d", [12, 9])
    source = this.data.read_sources([f"a={folder}"], ["4"], 0.0, condition="state")[0]
    rows, episodes = np.array([0, 5, 12, 15]), np.array([0, 0, 1, 1])
    known = source.context(rows, episodes, this.model.CONTEXT["state"])
    a, s = source.actions, source.state
    for got, row, before, earlier in zip(known, (0, 5, 12, 15), (0, 4, 12, 14), (0, 3, 12, 13), strict=True):
        np.testing.assert_array_equal(got, np.stack([s[row], a[before], s[before], a[earlier]]))


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def nan_at(step, dim):
    actions = np.zeros((9, 3), np.float32)
    actions[step, dim] = np.nan
    return actions


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: np.savez(f / "ep01.npz", actions=nan_at(4, 2)),
            "ep01: actions hold NaN or infinity at step 4, dim 2",
        ),
        (lambda f: np.savez(f / "ep01.npz", actions=np.zeros((9, 2))), "2 action dims, but 3"),
        (lambda f: np.savez(f / "ep01.npz", acts=np.zeros((9, 2))), "ep01.npz: has no array `actions`, only acts"),
        (lambda f: np.savez(f / "ep01.npz", actions=np.zeros((0, 3))), "expected"),
        (lambda f: np.savez(f / "ep01.npz", actions=np.array([{}], dtype=object)), "ep01.npz: .*Python objects"),
        (lambda f: truncate(f / "ep01.npz"), "ep01.npz"),
        (lambda f: (f / "ep01.npz").write_text(""), "ep01.npz: the file is empty"),
        (lambda f: (f / "ep01.npz").write_text("version https://git-lfs.github.com/spec/v1"), "ep01.npz: a Git LFS"),
        (
            lambda f: np.savez(f / "ep01.npz", actions=np.zeros((9, 3)), timestamps=np.zeros(9)),
            "ep01.npz: `timestamps`",
        ),
        (lambda f: np.savez(f / "ep01.npz", actions=np.zeros((9, 3)) + 1j), "ep01.npz: .*Cannot cast .*complex128"),
        (
            lambda f: np.savez(f / "ep01.npz", actions=np.zeros((9, 3)), timestamps=np.arange(4)),
            "ep01.npz: 4 `timestamps`, but 9 actions",
        ),
        (lambda f: os.symlink("gone.npz", f / "ep02.npz"), "ep02.npz: No such file"),
        (lambda f: (f / "a.hdf5").write_text("x"), "holds ep00.npz and a.hdf5"),
        (lambda f: write_npz(f, [9] * 3, rate=0.01), "seconds"),
        (lambda f: write_npz(f, [9] * 3, rate=1e-8), "seconds"),
        (lambda f: write_npz(f, [9], rate=30), "10 Hz and of 30 Hz"),
        (lambda f: [file.unlink() for file in f.glob("*.npz")], "no episodes"),
        (shutil.rmtree, "no such file"),
    ],
)
def test_broken_npz_is_named(this, tmp_path, damage, message):
    folder = write_npz(tmp_path / "data ü", [9, 9])
    damage(folder)
    with pytest.raises(DataError, match=message):
        this.readers.read(folder)


def test_broken_parquet_is_named(this, tmp_path, capsys):
    actions = np.zeros((9, 3), np.float32)
    files = {"file-000.parquet": [(0, 0, actions)], "file-001.parquet": [(1, 0, actions)]}
    folder = write_lerobot(tmp_path / "a", files)
    file = folder / "data" / "chunk-000" / "file-001.parquet"
    for damage, message in (
        (lambda: truncate(file), "file-001.parquet: not the parquet"),
        (lambda: pyarrow.parquet.write_table(pyarrow.table(dict(other=[1.0])), file), "no column `action`, only other"),
        (lambda: file.write_text("version https://git-lfs.github.com/spec/v1"), "file-001.parquet: a Git LFS pointer"),
        (lambda: (folder / "meta" / "info.json").write_text("{"), "info.json: not readable as JSON"),
        *(
            (lambda x=x: (folder / "meta" / "info.json").write_text(json.dumps(x)), "info.json: no readable `fps`")
            for x in (dict(fps=float("nan")), dict(fps=0), dict(fps=10, features=dict(action=None)))
        ),
    ):
        damage()
        with pytest.raises(DataError, match=message):
            this.readers.read(folder)
    with pytest.raises(DataError, match="frames are missing"):
        this.readers.read(write_lerobot(tmp_path / "b", {"f.parquet": [(0, 0, actions), (0, 11, actions)]}))
    with pytest.raises(DataError, match="10 Hz, but .*info.json says fps 50"):
        this.readers.read(write_lerobot(tmp_path / "c", files, fps=50))
    info = write_lerobot(tmp_path / "partial", files) / "meta" / "info.json"
    info.write_text(json.dumps(dict(fps=10, total_episodes=5, features=dict(action=dict(shape=None, names=["x"])))))
    assert len(this.readers.read(tmp_path / "partial").ids) == 2
    assert "2 of 5 episodes are there" in capsys.readouterr().err
    table = pyarrow.parquet.read_table(file := tmp_path / "partial" / "data" / "chunk-000" / "file-000.parquet")
    empty = pyarrow.array([None] * len(table), pyarrow.int64())
    pyarrow.parquet.write_table(table.set_column(2, "episode_index", empty), file)
    with pytest.raises(DataError, match="file-000.parquet: .*`episode_index` is empty"):
        this.readers.read(tmp_path / "partial")
    other = write_lerobot(tmp_path / "d", files, key="action.joint_position")
    with pytest.raises(DataError, match="--action-key names one of action.joint_position"):
        this.readers.read(other)
    assert len(this.readers.read(other, "action.joint_position").ids) == 2


def test_broken_hdf5_is_named(this, tmp_path):
    (tmp_path / "x.hdf5").write_bytes(b"not hdf5")
    with h5py.File(tmp_path / "y.hdf5", "w") as h5:
        h5["steps"] = np.zeros(3)
    with h5py.File(tmp_path / "texts.hdf5", "w") as h5:
        h5["data/demo_0/actions"] = [["a"]]
    with h5py.File(tmp_path / "lost.hdf5", "w") as h5:
        h5.create_group("data/demo_7")["obs"] = 1
    with h5py.File(tmp_path / "none.hdf5", "w") as h5:
        h5.create_group("data")
    with pytest.raises(DataError, match="none.hdf5: no episodes"):
        this.readers.read(tmp_path / "none.hdf5")
    with h5py.File(tmp_path / "z.hdf5", "w") as h5:
        h5.create_dataset("data/demo_0/actions", (100, 3), "f4", chunks=(10, 3))[:50] = 1.0  # its writer died
    layout = h5py.VirtualLayout((20, 3), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "gone.h5", "a", (20, 3))
    with h5py.File(tmp_path / "v.hdf5", "w") as h5:
        h5.create_virtual_dataset("data/demo_0/actions", layout)
    for name, message in dict(
        x="not readable",
        y=".*it holds steps",
        texts=".*Cannot cast",
        lost=".*demo_7 holds obs",
        z="actions was not written to its end",
        v="actions .*sources are missing",
    ).items():
        with pytest.raises(DataError, match=f"{name}.hdf5: {message}"):
            this.readers.read(tmp_path / f"{name}.hdf5")


def test_hub_names_are_fetched_or_explained(this, tmp_path, monkeypatch):
    """hub:OWNER/NAME@revision goes to huggingface_hub, without videos; what fails there is one line."""
    hub = pytest.importorskip("huggingface_hub")
    folder, asked = write_npz(tmp_path / "cache", [9] * 3), []
    monkeypatch.setattr(hub, "snapshot_download", lambda *words, **more: asked.append((words, more)) or str(folder))
    source = this.data.read_sources(["hub:lab/pick@v2.0"], ["5"])[0]
    assert source.name == "pick" and len(source.ids) == 3
    ((words, more),) = asked
    assert words == ("lab/pick",) and more["revision"] == "v2.0" and more["repo_type"] == "dataset"
    assert not any("video" in pattern for pattern in more["allow_patterns"])

    def fail(*words, **more):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="hub:lab/pick cannot be fetched .*no network"):
        this.readers.read("hub:lab/pick")


# --- split and normalisation


def test_split_depends_on_the_recording_alone(this, tmp_path):
    """The hash of the episode's name decides, in every mix and under every source name; --val-episodes overrides it."""
    folder = write_npz(tmp_path / "lr=0.1", [12] * 40)  # a path may hold an equals sign
    first = this.data.read_sources([str(folder)], ["5"], 0.25)[0]
    assert first.name == "lr=0" and 2 < first.validation.sum() < 20
    assert not set(first.starts(False)[1]) & set(first.starts(True)[1])
    named = this.data.read_sources([f"x={folder}", f"b={folder}"], ["5"], 0.25, ["b=3,ep07,10-12"])
    assert named[0].validation.tolist() == first.validation.tolist()
    assert np.flatnonzero(named[1].validation).tolist() == [3, 7, 10, 11, 12]
    several = this.data.read_sources([f"a={folder}", f"b={folder}"], ["b=6", "5"], 0.1, ["3", "7-8", "b=1"])
    assert [np.flatnonzero(source.validation).tolist() for source in several] == [[3, 7, 8], [1]]
    assert [source.chunk for source in several] == [5, 6]
    for words, message in (
        (([f"a={folder}"], ["5"], 0.1, ["99"]), "no episode is called 99"),
        (([f"a={folder}"], ["c=5"]), "no source is called"),
        (([f"a={folder}"], ["a=5", "a=6"]), "--chunk 5,6: expected steps"),
        (([f"a={folder}", f"b={folder}"], ["5"], 0.1, ["99"]), "no episode is called 99"),
        (([str(folder), str(folder)], ["5"]), "two sources"),
        (([f"a={folder}"], ["5"], 0.1, ["0-39"]), "none is left"),
        (([f"a={folder}"], ["five"]), "expected steps"),
        (([f"a={folder}"], ["100000"]), "300000 values of a"),
        (([f"a={folder}"], ["5"], 0.1, ["²"]), "no episode is called ²"),
    ):
        with pytest.raises(DataError, match=message):
            this.data.read_sources(*words)


def test_chunk_in_seconds_follows_each_rate(this, tmp_path):
    folder = write_npz(tmp_path / "d", [30] * 3)  # 10 Hz
    assert this.data.read_sources([f"a={folder}"], ["1.2s"])[0].chunk == 12
    with h5py.File(tmp_path / "demo.hdf5", "w") as h5:
        h5["data/demo_0/actions"] = np.zeros((20, 3))
    with pytest.raises(DataError, match="do not tell the rate"):
        this.data.read_sources([str(tmp_path / "demo.hdf5")], ["1s"])


def test_chunks_stop_at_their_episode(this, tmp_path):
    folder = write_npz(tmp_path / "d", [9, 6, 20])
    source = this.data.read_sources([f"a={folder}"], ["8"], 0.0)[0]
    rows, episodes = source.starts(False)
    assert len(rows) == 35
    chunks, mask = source.gather(rows, episodes)
    for row, episode, chunk, valid in zip(rows, episodes, chunks, mask, strict=True):
        own = source.actions[row : min(row + 8, source.length[: episode + 1].sum())]
        np.testing.assert_array_equal(chunk[: len(own)], own)
        assert valid.sum() == len(own) and (chunk[len(own) :] == own[-1]).all()
    whole = source.starts(False, stride=3, whole=True)
    assert source.gather(*whole)[1].all() and len(whole[0]) == 1 + 0 + 5


def test_constant_and_rare_dims_are_guarded(this, tmp_path):
    """q01 = q99 neither divides by zero nor blows up a rare gripper event, or the last digit of a constant. Held-out
    episodes play no part."""
    actions = np.zeros((1000, 3), np.float32)
    actions[:, 0] = np.sin(np.arange(1000))
    actions[:, 1] = np.float32(300.0)
    actions[::2, 1] = np.nextafter(np.float32(300.0), np.float32(400.0))
    actions[-3:, 2] = 1.0
    folder = write_npz(tmp_path / "d", [50] * 2)
    np.savez(folder / "ep00.npz", actions=actions, timestamps=np.arange(1000) / 10)
    kept = this.data.describe(this.data.read_sources([f"a={folder}"], ["5"], 0, ["ep01"])[0])
    x = (actions - kept["center"]) / kept["scale"]
    assert np.isfinite(x).all() and np.abs(x).max() < 20 and np.abs(x[:, 1]).max() < 1e-3
    low, high = np.quantile(actions[:, 0], [0.01, 0.99])
    assert kept["scale"][0] == pytest.approx((high - low) / 2, rel=1e-4)


# --- batches


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, tmp_path):
    write_npz(tmp_path / "a", [30] * 4)
    write_npz(tmp_path / "b", [9] * 6, dims=5, seed=1)
    sources = this.data.read_sources([f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"], ["a=8", "b=4"])

    def batch(step, accum, world):
        more = dict(context=this.model.CONTEXT["state"])
        ranks = [this.data.TrainBatches(sources, 16, 3, accum, rank, world, **more) for rank in range(world)]
        parts = [rank[step * accum + micro] for micro in range(accum) for rank in ranks]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    whole = batch(5, 1, 1)
    assert whole["actions"].shape == (16, 8, 5) and whole["context"].shape == (16, 4, 5)
    assert set(whole["source"].tolist()) == {0, 1}
    for accum, world in ((2, 1), (1, 2), (2, 4)):
        for key, value in batch(5, accum, world).items():
            assert torch.equal(value, whole[key])
    assert not torch.equal(batch(6, 1, 1)["actions"], whole["actions"])


def test_validation_is_shared_without_repeats(this, tmp_path):
    write_npz(tmp_path / "a", [30] * 6)
    sources = this.data.read_sources([f"a={tmp_path / 'a'}"], ["8"], 0.5)
    whole = this.data.ValidationBatches(sources, 0, 3)
    parts = [this.data.ValidationBatches(sources, 0, 3, rank, 4) for rank in range(4)]
    assert sorted(int(row) for part in parts for row in part.rows) == sorted(whole.rows.tolist())


def test_mixed_chunks_keep_their_context(this, tmp_path):
    """Without mixing, batches hold recorded chunks; with it, half of them; the context is mixed alike."""
    write_npz(tmp_path / "a", [30] * 4)
    sources = this.data.read_sources([f"a={tmp_path / 'a'}"], ["8"], 0.0)
    recorded = {chunk.tobytes() for chunk in sources[0].gather(*sources[0].starts(False))[0]}
    for mix, low, high in ((0, 1, 1), (0.5, 0.2, 0.8)):
        batch = this.data.TrainBatches(sources, 32, 0, mix=mix, context=this.model.CONTEXT["action"])[0]
        found = np.mean([chunk.numpy().tobytes() in recorded for chunk in batch["actions"]])
        assert low <= found <= high
        torch.testing.assert_close(batch["context"][:, 0], batch["actions"][:, 0])


# --- the loop


def flags(folder, out, *more):
    sizes = "--hidden-dim 16 --tokens 2"
    times = "--chunk 8 --steps 6 --batch-size 8 --log-every 2 --eval-every 6 --save-every 3 --warmup 1 --device cpu"
    return ["--data", f"a={folder}", "--out", str(out), *sizes.split(), *times.split(), *map(str, more)]


def weights(out, checkpoint="last"):
    return torch.load(out / "checkpoints" / checkpoint / "pytorch_model.bin", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_run_resume_and_what_it_leaves(this, tmp_path, capsys):
    """Lost after step 3 and resumed equals uninterrupted, bit for bit, with dropout and mixing on. A folder that grows
    meanwhile changes neither split nor normalisation, and is told."""
    folder, one, two = write_npz(tmp_path / "data", [30] * 8), tmp_path / "one", tmp_path / "two ü"
    assert this.train.main(flags(folder, one)) == 0
    shutil.copytree(one, two, symlinks=True)
    shutil.rmtree(two / "checkpoints" / "step_0000006")
    with pytest.raises(DataError, match="--lr"):
        this.train.main(flags(folder, two, "--resume", "--lr", 1))
    assert this.train.main(flags(folder, two, "--resume")) == 0
    assert equal(weights(two), weights(one)) and not equal(weights(two), weights(two, "step_0000003"))
    assert [line["step"] for line in log_of(two)] == [line["step"] for line in log_of(one)] == [2, 4, 6]
    with pytest.raises(DataError, match="holds a run already"):
        this.train.main(flags(folder, two))
    before = (two / "checkpoints" / "best" / "config.json").read_bytes()
    for i in range(20, 25):
        np.savez(folder / f"ep{i}.npz", actions=np.full((30, 3), 900, np.float32), timestamps=np.arange(30) / 10)
    this.train.main(flags(folder, two, "--resume", "--steps", 9))
    assert "a: 13 episodes, 8 when the run began" in capsys.readouterr().out
    assert (two / "checkpoints" / "step_0000009" / "config.json").read_bytes() == before


def test_resume_knows_the_sources_by_their_names(this, tmp_path):
    """In another order they train the same model; another name, number of dims or chunk is refused."""
    a, b, wide = (write_npz(tmp_path / f"$ {i}$", [30] * 8, dims=3 + i // 2, seed=i) for i in range(3))
    run, other = tmp_path / "run", tmp_path / "other"
    words = flags(a, run)
    assert this.train.main([*words[:2], f"b={b}", *words[2:]]) == 0
    shutil.copytree(run, other, symlinks=True)
    for out, data in ((run, (f"a={a}", f"b={b}")), (other, (f"b={b}", f"a={a}"))):
        assert this.train.main(["--data", *data, *flags(a, out, "--resume", "--steps", 9)[2:]]) == 0
    assert equal(weights(run), weights(other))
    for data, more, message in (
        ((f"b={b}",), (), "called a, b, not b"),
        ((f"a={wide}", f"b={b}"), (), r"chunks of a .*are \(8, 4\), those of the run \(8, 3\)"),
        ((f"a={a}", f"b={b}"), ("--chunk", 5), r"chunks of a .*are \(5, 3\)"),
    ):
        with pytest.raises(DataError, match=message):
            this.train.main(["--data", *data, *flags(a, run, "--resume", *more)[2:]])
    words = flags(a, tmp_path / "named after its folder")
    assert this.train.main(["--data", str(a), *words[2:]]) == 0  # $ begins no formula in the figures


def test_the_demo_replaces_nothing_but_a_demo(this, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    for path in ("thesis", "thesis/chapter", "thesis/chapter/x"):
        with pytest.raises(DataError, match="no demo's data|cannot be written"):
            this.train.demo.write(tmp_path / path)
    assert (tmp_path / "thesis" / "chapter").read_text() == "x"
    with pytest.raises(SystemExit):
        this.train.parse(["--data", "x", "--val-share", "5"])
    assert "--val-share must be below 1" in capsys.readouterr().err


def test_accumulation_and_amp_train_the_same_model(this, tmp_path):
    """4 micro-steps are one step of the whole batch; bf16 stays close."""
    folder = write_npz(tmp_path / "data", [30] * 8)
    amps = dict(one=[], four=["--accum", 4], bf16=["--amp", "bf16"])
    for name, more in amps.items():
        assert this.train.main(flags(folder, tmp_path / name, "--dropout", 0, *more)) == 0
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "four").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    last = {name: log_of(tmp_path / name)[-1]["train/mse"] for name in amps}  # validation has the closed form, too
    assert max(last.values()) < 1.1 * min(last.values())


def test_network_is_used_where_validation_says_so(this, tmp_path):
    """After a good training it is; with a learning rate that destroys it, the closed form stays."""
    this.train.demo.write(tmp_path / "data")
    sizes = ["--hidden-dim", 128, "--tokens", 8, "--chunk", "1s", "--batch-size", 64, "--val-stride", 20]
    times = ["--steps", 100, "--eval-every", 100, "--save-every", 100, "--log-every", 10]
    for name, lr, used in (("good", 3e-3, True), ("bad", 3.0, False)):
        out = tmp_path / name
        this.train.main(flags(tmp_path / "data", out, "--lr", lr, *sizes, *times))
        last = log_of(out)[-1]
        model = this.model.FSQVQVAE.from_pretrained(out / "checkpoints" / "best")
        assert bool(model.coders[0].use_network) == used
        assert (last["val/mse"] < last["val/a/mse_closed_form"]) == used
        assert last["val/mse"] <= last["val/a/mse_closed_form"]


def test_init_takes_weights_only(this, tmp_path):
    folder = write_npz(tmp_path / "data", [30] * 8)
    this.train.main(flags(folder, tmp_path / "one"))
    init = tmp_path / "one" / "checkpoints" / "last"
    this.train.main(flags(folder, tmp_path / "two", "--init", init, "--lr", 1e-12, "--weight-decay", 0))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in [key for key in a if not key.endswith("use_network")]:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)


MODULE = """
import torch
def prepare_dataloaders(batch_size):
    chunks = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    train = torch.utils.data.DataLoader(chunks[:48], batch_size, shuffle=True)
    lab = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(chunks[48:]), 8)
    return chunks[0], train, {"lab": lab, "field": [dict(actions=chunks[48:52])]}
"""


def test_users_own_loaders(this, tmp_path):
    """All flags hold for them, and every process reads the same."""
    (tmp_path / "mine.py").write_text(MODULE)
    words = flags("x", tmp_path / "out")
    words[1] = f"lab=module:{tmp_path / 'mine.py'}"
    assert this.train.main(words) == 0
    split = json.loads((tmp_path / "out" / "checkpoints" / "last" / "data.json").read_text())["lab"]
    assert split["episodes"] == 68 and len(split["held_out"]) == 20
    a, b = (this.data.read_source("lab", f"module:{tmp_path / 'mine.py'}") for _ in range(2))
    assert a.ids == b.ids and np.array_equal(a.actions, b.actions)
    for text, message in (("", "no function prepare_dataloaders"), (None, "no such Python file")):
        file = tmp_path / f"other_{len(message)}.py"
        file.write_text(text) if text is not None else None
        with pytest.raises(DataError, match=message):
            this.data.read_source("x", f"module:{file}")


@pytest.mark.slow
def test_folder_copied_into_another_project_runs_its_demo(tmp_path):
    """A host project with its own model.py, data.py and common.py on the path does not get in the way."""
    host = tmp_path / "host"
    shutil.copytree(ROOT / "fsq_vqvae", host / "third_party" / "tokens", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "common.py", host / "third_party")
    for name in ("model.py", "data.py", "common.py", "figures.py", "demo.py", "fsq.py"):
        (host / name).write_text("raise SystemExit('the host project was imported')\n")
    more = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--log-every", 2]
    script = host / "third_party" / "tokens" / "train.py"
    done = launch(script, *more, cwd=host, env=dict(PYTHONPATH=str(host)))
    assert done.returncode == 0, done.stderr
    assert list(host.glob("runs/*/001/checkpoints/best/config.json"))


# --- the report


def test_baselines_against_plain_arithmetic(this):
    """A baseline that is worse than its definition would flatter the tokenizer."""
    train, held = smooth(300, seed=1) / 10, smooth(40, seed=2) / 10
    coded = this.baselines.bins256(held)
    inside = np.abs(held) <= 1
    assert np.abs(coded.decoded - held)[inside].max() <= 1 / 255 + 1e-6 and (coded.tokens == 48).all()
    for scale in (2, 10):
        coded = this.baselines.fast(train, held, scale)
        # rounding DCT coefficients to 1/scale errs by 1/(12 scale^2) on average; the DCT keeps that
        assert coded.undecodable == 0 and np.square(coded.decoded - held).mean() < 1.3 / (12 * scale**2)
    exact = this.baselines.pca(train, train, 24, 10**12)
    assert np.median(np.abs(exact.decoded - train)) < 1e-3  # it clips beyond the 0.5 and 99.5 % quantiles
    line = np.linspace(0, 1, 12)[None, :, None] * np.array([1.0, -2.0])  # a spline holds a line
    fitted = np.concatenate([line, -line, 2 * line])
    np.testing.assert_allclose(this.baselines.beast(fitted, line, 5, 10**6).decoded, line, atol=1e-3)


def test_reconstruction_numbers_of_the_report(this):
    """On a case one can do by hand: the decoded chunk is the true one, shifted by 0.1."""
    true = smooth(20)
    found = this.metrics.reconstruction(true, true + np.float32(0.1))
    wanted = dict(mse=0.01, worst_1_percent=0.01, mae=0.1, p99=0.1)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    units = this.metrics.in_robot_units(true, true + np.float32([0.1, 0.2, 0, 0]))
    assert units["mae_per_dim"] == pytest.approx([0.1, 0.2, 0, 0], abs=1e-5)


@pytest.mark.parametrize("chunk", [5, 16, 30])
def test_seams_of_a_perfect_decoder_are_the_true_ones(this, tmp_path, chunk):
    """Whatever the chunk length, and however long the episode."""
    source = this.data.read_source("a", write_npz(tmp_path, [9000]), str(chunk))
    source.validation[:] = True
    found = this.metrics.seams(source, lambda x, context: x, lambda x, context: x, np.float32(1), ())
    assert found["seam_true"] > 0
    assert found["seam_decoded"] == found["seam_true"] == pytest.approx(found["seam_with_ensembling"])


@pytest.mark.slow
def test_report_of_a_run_and_of_new_data(this, tmp_path, capsys):
    """On the run's own split its MSE is what training logged; on data that is new, under whatever name, all episodes
    count but those that the run was trained on."""
    folder, out = write_npz(tmp_path / "a", [30] * 12), tmp_path / "run"
    assert this.train.main(flags(folder, out, "--val-stride", 3)) == 0

    def report(name, *data):
        words = ["--checkpoint", out / "checkpoints" / "last", "--out", tmp_path / name, *data, "--device", "cpu"]
        more = ["--random-tuples", 300, "--val-stride", 3, "--register-steps", 2]
        assert this.evaluate.main([str(word) for word in [*words, *more]]) == 0
        return json.loads((tmp_path / name / "report.json").read_text())["sources"][name]

    own = report("a")
    assert own["reconstruction"]["mse"] == pytest.approx(log_of(out)[-1]["val/a/mse"], rel=1e-3)
    assert own["robustness"]["random_tuples_failed"] == 0
    assert {row["method"].split(",")[0] for row in own["table"]} >= {"this", "closed form", "FAST", "256 bins"}
    assert (tmp_path / "a" / "figures" / "rate_distortion.png").exists()
    write_npz(tmp_path / "new", [30] * 5, seed=9)
    assert report("b", "--data", f"b={tmp_path / 'new'}")["episodes"] == 5
    assert report("c", "--data", f"c={folder}")["episodes"] == own["episodes"]
    assert "episodes are left out: the run was trained on them" in capsys.readouterr().out


# --- real data


def test_real_lerobot_readers_agree_with_the_converted_arrays(this):
    """G1 in v2.1 and v3.0 against npz files made from the same parquet files."""
    g1 = shared("g1_lerobot_v21")
    source = this.data.read_source("g1", g1 / "original")
    assert len(source.ids) == 70 and source.fps == 30 and source.state.shape[1] == 26 and source.remark is None
    v30 = this.data.read_source("g1", g1 / "converted" / "lerobot_v30")
    for position, episode in enumerate((29, 30)):
        with np.load(g1 / "converted" / f"g1_ep{episode:03d}.npz") as arrays:
            start = source.start[source.ids.index(str(episode))]
            np.testing.assert_array_equal(source.actions[start : start + len(arrays["actions"])], arrays["actions"])
            start = v30.start[position]
            np.testing.assert_array_equal(v30.actions[start : start + v30.length[position]], arrays["actions"])


@pytest.mark.parametrize("name", ["reachy2_lerobot_v30", "robosuite_hdf5_sim", "droid_ctrlworld/converted"])
def test_other_real_sources_read(this, name):
    folder = shared(name)
    found = [file.parent.parent for file in folder.rglob("meta/info.json")] or [next(folder.rglob("*.hdf5"), folder)]
    source = this.data.read_source("x", found[0], "10")
    assert np.isfinite(source.actions).all() and source.length.sum() == len(source.actions) > 300


@pytest.mark.slow
def test_real_g1_reaches_the_front(this, tmp_path):
    """80 bits on later recordings, from the first action: the published transform coder has 1.57e-3."""
    folder = shared("g1_lerobot_v21/original")
    words = ["--data", f"g1={folder}", "--val-episodes", "56-69", "--out", tmp_path, "--steps", 100, "--device", "cpu"]
    assert this.train.main([*map(str, words)]) == 0
    last = log_of(tmp_path)[-1]
    assert last["val/g1/mse_closed_form"] < 1.55e-3 and last["val/mse"] < 1.5e-3


def test_init_of_another_robot_is_refused(this, tmp_path):
    """Two sources of one name whose motions differ twentyfold: the closed form of one means nothing for the other."""
    a, b = (write_npz(tmp_path / name / "episodes", [30] * 4, rate=10) for name in "ab")
    for file in b.glob("*.npz"):
        np.savez(file, actions=1000 + 50 * np.load(file)["actions"], timestamps=np.arange(30) / 10)
    assert this.train.main(["--data", str(a), "--steps", "1", "--hidden-dim", "8", "--out", str(tmp_path / "r")]) == 0
    more = ["--init", str(tmp_path / "r" / "checkpoints" / "last"), "--out", str(tmp_path / "s")]
    with pytest.raises(DataError, match="another robot"):
        this.train.main(["--data", str(b), "--steps", "1", "--hidden-dim", "8", *more])


@pytest.mark.parametrize("times", [np.r_[:9, :9] / 10, np.arange(18) * 2.0, np.arange(18) * 8.0])
def test_times_set_back_or_in_milliseconds(this, tmp_path, times):
    np.savez(tmp_path / "e.npz", actions=np.zeros((18, 2)), timestamps=times)
    with pytest.raises(DataError, match="e.npz: .*(increase|seconds)"):
        this.readers.read(tmp_path)


def test_a_pause_is_told(this, tmp_path, capsys):
    np.savez(tmp_path / "e.npz", actions=np.zeros((18, 2)), timestamps=np.r_[:9, 59:68] / 10)
    assert this.readers.read(tmp_path).rates == [pytest.approx(10)]
    assert "e.npz: 5.1 s pass between two steps of 0.1 s" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_read(this, tmp_path):
    write_npz(tmp_path, [30] * 4, rate=10)
    os.rename(tmp_path / "ep00.npz", os.fsencode(tmp_path) + b"/caf\xe9.npz")
    source = this.data.read_source("x", tmp_path, "5")
    assert len(source.ids) == 4 and all(0 <= this.split.episode_hash(name) < 1 for name in source.ids)


def test_actions_of_one_dim_without_its_axis(this, tmp_path):
    np.savez(tmp_path / "e.npz", actions=np.arange(9.0))
    assert this.readers.read(tmp_path).actions[0].shape == (9, 1)
