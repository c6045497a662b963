"""fsq_vqvae: the quantiser, the residual skeleton, the tokenizer's promises, the readers, the batches and the loop."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, launch, load, shared


def about(name="arm", action_dim=4, chunk=12):
    center, scale = [0.5] * action_dim, [2.0] * action_dim
    return dict(name=name, action_dim=action_dim, chunk=chunk, fps=20.0, center=center, scale=scale)


def tiny(this, sources=None, **kwargs):
    torch.manual_seed(0)
    sizes = dict(hidden_dim=16, latent_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, num_tokens=3)
    model = this.model.FSQVQVAE(sources or [about()], **{**sizes, **kwargs})
    for parameter in model.parameters():  # the heads start at zero: give them something to say
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def smooth(count, seed=0):
    """Chunks (count, 12, 4) that live near a few smooth directions, as robot actions do."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, 12)
    waves = np.stack([np.ones_like(t), t, np.sin(4 * t), np.cos(9 * t)], 1) * [1, 0.7, 0.4, 0.2]
    mixing = np.random.default_rng(99).normal(size=(4, 6, 4))
    return np.einsum("tk,kia,nki->nta", waves, mixing, rng.normal(size=(count, 4, 6))).astype(np.float32)


# --- quantiser


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [8, 6, 5], [3, 3, 3], [7, 5, 5, 5, 5], [4, 4]])
@pytest.mark.parametrize("bound", ["atanh", "paper"])
def test_fsq_matches_a_loop_over_scalars(this, levels, bound):
    """Codes and indices are those of the published formula, written out number by number in float64."""
    z = torch.randn(40, len(levels), generator=torch.Generator().manual_seed(1)) * 2
    codes, indices = this.model.FSQ(levels, bound)(z)
    for row, code, index in zip(z.tolist(), codes, indices.tolist(), strict=True):
        expected, base = 0, 1
        for x, level, got in zip(row, levels, code.tolist(), strict=True):
            half = (level - 1) * (1.001 if bound == "atanh" else 0.999) / 2
            offset = 0.0 if level % 2 else 0.5
            shift = np.arctanh(offset / half) if bound == "atanh" else np.tan(offset / half)
            digit = np.round(np.tanh(x + shift) * half - offset)
            assert got == pytest.approx(digit / (level // 2), abs=1e-6)
            expected += int(digit + level // 2) * base
            base *= level
        assert index == expected


def test_fsq_index_and_code_are_inverse_over_the_whole_vocabulary(this):
    fsq = this.model.FSQ([8, 5, 5, 5])
    indices = torch.arange(1000)
    codes = fsq.codes(indices)
    assert len(torch.unique(codes, dim=0)) == 1000
    z = torch.atanh(((codes * fsq.width + fsq.offset) / fsq.reach).clamp(-0.9999, 0.9999)) - fsq.shift
    again, found = fsq(z)  # z is what the bound maps onto the code
    assert torch.equal(found, indices) and torch.equal(again, codes)


def test_fsq_is_float32_under_autocast_and_passes_the_gradient(this):
    """In bfloat16 the rounding would flip codes; without straight-through nothing would train."""
    fsq, z = this.model.FSQ([8, 5, 5, 5]), torch.randn(64, 4, requires_grad=True)
    plain = fsq(z)[1]
    with torch.autocast("cpu", torch.bfloat16):
        codes, indices = fsq(z)
    assert codes.dtype == torch.float32 and torch.equal(indices, plain)
    codes.sum().backward()
    expected = (1 - torch.tanh(z + fsq.shift) ** 2) * fsq.reach / fsq.width
    torch.testing.assert_close(z.grad, expected.detach())


def test_fsq_refuses_what_it_cannot_do(this):
    with pytest.raises(ValueError, match="fsq_bound"):
        this.model.FSQ([8, 5], "round")
    with pytest.raises(ValueError, match="at least 3"):
        this.model.FSQ([8, 2])


# --- skeleton


def test_skeleton_is_the_residual_coder_written_out(this):
    """The feedback form gives the tokens and the decoding of: code, subtract the decoded part, code the rest."""
    chunks, mask = torch.from_numpy(smooth(500)), torch.ones(500, 12, dtype=torch.bool)
    model = this.model.FSQVQVAE([about()], num_tokens=3, hidden_dim=16, latent_dim=8, patch=4)
    model.fit_skeleton("arm", chunks, mask)
    indices = model.encode(chunks)
    x = model.normalise(chunks, mask, torch.zeros(500, dtype=torch.int64)).flatten(1)
    residual, decoded, E = x - model.mean[0], model.mean[0], model.analysis[0].unflatten(1, (3, 4))
    same = torch.ones(500, dtype=torch.bool)
    for i in range(3):
        codes, index = model.fsq(residual @ E[:, i])
        same &= index == indices[:, i]  # float32 ties may fall either way
        part = torch.nn.functional.pad(codes, (0, 1), value=1.0) @ model.synthesis[0, i]
        residual, decoded = residual - part, decoded + part
    assert same.float().mean() > 0.98
    expected = decoded.detach().view(500, 12, 4) * 2 + 0.5
    torch.testing.assert_close(model.decode(indices)[same], expected[same], rtol=1e-3, atol=1e-3)
    assert residual.square().mean() < 0.2 * (x - x.mean(0)).square().mean()


def test_skeleton_of_a_source_is_the_same_beside_larger_ones(this):
    """Padding to the largest chunk and width of a mix must not leak into a smaller source's coder."""
    chunks, mask = torch.from_numpy(smooth(300)), torch.ones(300, 12, dtype=torch.bool)
    sizes = dict(num_tokens=3, hidden_dim=16, latent_dim=8, patch=4)
    alone = this.model.FSQVQVAE([about()], **sizes)
    mixed = this.model.FSQVQVAE([about("big", 7, 30), about()], **sizes)
    for model in (alone, mixed):
        model.fit_skeleton("arm", chunks, mask)
    torch.testing.assert_close(alone.mean[0].view(12, 4), mixed.mean[1].view(32, 7)[:12, :4])
    a, b = (model.decode(model.encode(chunks, source="arm"), source="arm") for model in (alone, mixed))
    assert ((a - b).abs().amax((1, 2)) < 1e-3).float().mean() > 0.95  # float32 ties may fall either way


def test_skeleton_beats_pca_at_equal_bits(this):
    """The reason it is there: before any training it is better than the linear baseline with uniform levels."""
    fit, held = torch.from_numpy(smooth(800, seed=1)), torch.from_numpy(smooth(200, seed=2))
    model = this.model.FSQVQVAE([about()], num_tokens=4, hidden_dim=16, latent_dim=8, patch=4)
    model.fit_skeleton("arm", fit, torch.ones(800, 12, dtype=torch.bool))
    ours = (model.decode(model.encode(held)) - held).square().mean()
    x, y = fit.flatten(1), held.flatten(1) - fit.flatten(1).mean(0)
    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    low, high = torch.quantile((x - x.mean(0)) @ directions.T, torch.tensor([0.005, 0.995]), dim=0)
    step = (high - low) / 999
    coefficients = ((y @ directions.T).clamp(low, high) - low).div(step).round() * step + low
    assert ours < 0.8 * (coefficients @ directions - y).square().mean()


# --- the tokenizer's promises


def test_padding_content_never_changes_tokens(this):
    model = tiny(this, [about(), about("hand", 2, 6)])
    rng = np.random.default_rng(0)
    for name, steps, dims in (("arm", 12, 4), ("hand", 6, 2)):
        chunks, mask = rng.normal(size=(20, steps, dims)).astype(np.float32) * 3, np.ones((20, steps), bool)
        mask[:, steps // 2 :] = False
        other = np.where(mask[..., None], chunks, 1e6).astype(np.float32)
        nothing = np.where(mask[..., None], chunks, np.nan).astype(np.float32)
        tokens = model.encode(chunks, mask, name)
        assert np.array_equal(tokens, model.encode(other, mask, name))
        assert np.array_equal(tokens, model.encode(nothing, mask, name))
        assert np.array_equal(tokens, model.encode(chunks[:, : steps // 2], source=name))
        assert not np.array_equal(tokens, model.encode(chunks, source=name))  # valid content does


def test_loss_ignores_padding_and_counts_each_chunk_the_same(this):
    """The mean over chunks of the mean over valid entries: what makes ranks and micro-steps add up."""
    model = tiny(this, [about(), about("hand", 2, 6)]).eval()
    actions, mask = torch.randn(6, 12, 4), torch.ones(6, 12, dtype=torch.bool)
    source = torch.tensor([0, 1, 0, 1, 0, 1])
    mask[source == 1, 6:] = False
    mask[2, 3:] = False
    batch = dict(actions=actions, mask=mask, source=source)
    loss, metrics = model(batch)
    again = model({**batch, "actions": torch.where(mask[..., None], actions, 7e3)})[0]
    torch.testing.assert_close(loss, again)
    single = [model({key: value[i : i + 1] for key, value in batch.items()})[0] for i in range(6)]
    torch.testing.assert_close(loss, torch.stack(single).mean())
    x = model.normalise(actions, mask, source)
    codes = model.quantise(x, source)[0]
    error = (model.reconstruct(codes, source, torch.ones(6, 3, dtype=torch.bool)) - x).square()
    valid = zip(range(6), [12, 6, 3, 6, 12, 6], [4, 2] * 3, strict=True)
    expected = torch.stack([error[i][:steps, :dims].mean() for i, steps, dims in valid])
    torch.testing.assert_close(metrics["mse"], expected.mean())


def test_spectral_term_is_the_mean_magnitude_of_the_errors_dct(this):
    from scipy.fft import dct

    model = tiny(this, spectral_weight=1.0, patch=4).eval()
    actions, mask, source = (
        torch.randn(3, 12, 4),
        torch.ones(3, 12, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64),
    )
    metrics = model(dict(actions=actions, mask=mask, source=source))[1]
    x = model.normalise(actions, mask, source)
    error = model.reconstruct(model.quantise(x, source)[0], source, torch.ones(3, 3, dtype=torch.bool)) - x
    expected = np.abs(dct(error.detach().numpy(), axis=1, norm="ortho")).mean()
    assert metrics["spectral"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [{}, dict(ordered=0.5, spectral_weight=0.1, commitment_weight=0.25, dropout=0.1)])
def test_gradients_reach_every_parameter(this, options):
    model = tiny(this, [about(), about("hand", 2, 6)], **options).train()
    mask, source = torch.ones(16, 12, dtype=torch.bool), torch.tensor([0, 1] * 8)
    loss, metrics = model(dict(actions=torch.randn(16, 12, 4), mask=mask, source=source))
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ([] if options else ["absent"])  # only prefixes use it
    assert set(metrics) == {"loss", "mse", "mae"} | ({"spectral", "commitment"} if options else set())


def test_any_index_tuple_decodes_to_finite_actions(this):
    indices = torch.randint(1000, (5000, 3), generator=torch.Generator().manual_seed(0))
    actions = tiny(this).decode(indices)
    assert actions.shape == (5000, 12, 4) and actions.isfinite().all()


def test_huge_values_encode_and_nan_is_refused(this):
    model = tiny(this)
    assert 0 <= model.encode(np.full((12, 4), 1e5, np.float32)).min() <= 999
    with pytest.raises(ValueError, match="outside the range"):
        model.encode(np.full((12, 4), 1e30, np.float32))
    bad = np.zeros((12, 4), np.float32)
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        model.encode(bad)


def test_calls_like_fast_with_arrays_tensors_one_or_many(this):
    model, chunks = tiny(this, ordered=0.5), smooth(5)
    tokens = model(chunks)
    assert isinstance(tokens, list) and isinstance(tokens[0][0], int) and np.shape(tokens) == (5, 3)
    actions = model.decode(tokens, time_horizon=7, action_dim=4)
    assert isinstance(actions, np.ndarray) and actions.shape == (5, 7, 4)
    one = model.encode(torch.from_numpy(chunks[2]))
    assert torch.is_tensor(one) and one.tolist() == tokens[2]
    assert torch.is_tensor(model.decode(one)) and model.decode(one).shape == (12, 4)
    assert model.decode(np.array(tokens[2])).shape == (12, 4)
    for prefix in (1, 2):
        short = model.decode(tokens, prefix=prefix)
        changed = [[*row[:prefix], *((t + 1) % 1000 for t in row[prefix:])] for row in tokens]
        assert np.array_equal(short, model.decode(changed, prefix=prefix))  # later tokens are not looked at
        assert not np.allclose(short, model.decode(tokens))


def test_relative_tokens_do_not_see_where_the_chunk_starts(this):
    model, chunks = tiny(this, relative=True), smooth(5)
    offset = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    tokens = model.encode(chunks)
    assert (model.encode(chunks + offset) == tokens).mean() > 0.9  # rounding may tip a code
    a, b = model.decode(tokens, start=chunks[:, 0]), model.decode(tokens, start=chunks[:, 0] + offset)
    np.testing.assert_allclose(b, a + offset, atol=1e-5)
    with pytest.raises(ValueError, match="needs start="):
        model.decode(tokens)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(np.zeros((12, 5), np.float32)), "expected"),
        (lambda m: m.encode(np.zeros((13, 4), np.float32)), "expected"),
        (lambda m: m.encode(np.zeros((12, 4), np.float32), np.array([False] + [True] * 11)), "mask"),
        (lambda m: m.decode([[0, 0]]), "indices"),
        (lambda m: m.decode([[0, 0, 1000]]), r"\[0, 1000\)"),
        (lambda m: m.decode([[0.5, 0, 0]]), "whole numbers"),
        (lambda m: m.decode([[0, 0, 0]], prefix=2), "ordered"),
        (lambda m: m.decode([[0, 0, 0]], action_dim=7), "action_dim"),
        (lambda m: m.decode([[0, 0, 0]], time_horizon=99), "time_horizon"),
        (lambda m: m.encode(np.zeros((12, 4), np.float32), source="leg"), "unknown"),
    ],
)
def test_wrong_arguments_are_named(this, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny(this))


def test_checkpoint_round_trip_and_what_it_refuses(this, tmp_path):
    model, chunks = tiny(this, [about(), about("hand", 2, 6)], levels=[8, 6, 5], fsq_bound="paper"), smooth(4)
    model.save_pretrained(tmp_path / "a")
    again = this.model.FSQVQVAE.from_pretrained(tmp_path / "a")
    assert np.array_equal(model.encode(chunks, source="arm"), again.encode(chunks, source="arm"))
    assert again.config == model.config and again.config["fsq_bound"] == "paper"
    with pytest.raises(ValueError, match="cannot be loaded into this model"):
        tiny(this).load_pretrained(tmp_path / "a")

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "a" / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        this.model.FSQVQVAE.from_pretrained(tmp_path / "a")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "a" / "config.json").write_text('{"sources": 3, "tokens": 1}')
    with pytest.raises(ValueError, match="not a configuration"):
        this.model.FSQVQVAE.from_pretrained(tmp_path / "a")


# --- readers


def write_npz(folder, lengths, dims=3, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(lengths):
        actions = rng.normal(size=(length, dims)).cumsum(0).astype(np.float32)
        np.savez(folder / f"ep{i:02d}.npz", actions=actions, timestamps=np.arange(length) / 10)
    return folder


def write_lerobot(folder, files):
    """files: {name: [(episode, first frame, actions)]}: v2.1 has one episode a file, v3.0 many."""
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(dict(fps=10)))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for name, parts in files.items():
        columns = dict(
            action=[row.tolist() for _, _, actions in parts for row in actions],
            episode_index=[episode for episode, _, actions in parts for _ in actions],
            frame_index=[first + t for _, first, actions in parts for t in range(len(actions))],
        )
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data" / "chunk-000" / name)
    return folder


def test_every_format_reads_to_the_same_episodes(this, tmp_path):
    rng = np.random.default_rng(0)
    a, b, c = episodes = [rng.normal(size=(length, 3)).astype(np.float32) for length in (12, 7, 15)]
    (tmp_path / "npz").mkdir()
    for i, actions in enumerate(episodes):
        np.savez(tmp_path / "npz" / f"{i}.npz", actions=actions, timestamps=np.arange(len(actions)) / 10)
    write_lerobot(tmp_path / "v21", {f"episode_{i:06d}.parquet": [(i, 0, x)] for i, x in enumerate(episodes)})
    # an episode may go over into the next file
    write_lerobot(
        tmp_path / "v30",
        {"file-000.parquet": [(0, 0, a), (1, 0, b[:4])], "file-001.parquet": [(1, 4, b[4:]), (2, 0, c)]},
    )
    with h5py.File(tmp_path / "demo.hdf5", "w") as h5:
        for i, actions in enumerate(episodes):
            h5[f"data/demo_{i}/actions"] = actions.astype(np.float64)
    for path, fps in (("npz", 10), ("v21", 10), ("v30", 10), ("demo.hdf5", None)):
        source = this.data.read_source("x", tmp_path / path)
        np.testing.assert_array_equal(source.actions, np.concatenate(episodes))
        assert source.length.tolist() == [12, 7, 15]
        assert source.fps == (pytest.approx(fps) if fps else None)


def break_nan(folder):
    actions = np.zeros((9, 3), np.float32)
    actions[4, 2] = np.nan
    np.savez(folder / "ep01.npz", actions=actions)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_nan, "ep01: actions hold NaN or infinity at step 4, dim 2"),
        (lambda f: np.savez(f / "ep01.npz", actions=np.zeros((9, 2))), "2 action dims, but 3"),
        (lambda f: np.savez(f / "ep01.npz", acts=np.zeros((9, 2))), "ep01.npz: has no array `actions`, only acts"),
        (lambda f: np.savez(f / "ep01.npz", actions=np.zeros((0, 3))), "expected"),
        (lambda f: np.savez(f / "ep01.npz", actions=np.array([{}], dtype=object)), "ep01.npz: .*pickle"),
        (lambda f: truncate(f / "ep01.npz"), "ep01.npz"),
        (lambda f: np.savez(f / "ep01.npz", actions=np.zeros((9, 3)), timestamps=np.zeros(9)), "ep01.npz: .*increase"),
        (lambda f: [file.unlink() for file in f.glob("*.npz")], "no episodes"),
        (shutil.rmtree, "no such file"),
    ],
)
def test_broken_npz_is_named(this, tmp_path, damage, message):
    folder = write_npz(tmp_path / "data ü", [9, 9])
    damage(folder)
    with pytest.raises(ValueError, match=message):
        this.data.read_source("x", folder)


def test_broken_parquet_and_hdf5_are_named(this, tmp_path):
    actions = np.zeros((9, 3), np.float32)
    files = {"file-000.parquet": [(0, 0, actions)], "file-001.parquet": [(1, 0, actions)]}
    folder = write_lerobot(tmp_path / "a", files)
    file = folder / "data" / "chunk-000" / "file-001.parquet"
    truncate(file)
    with pytest.raises(ValueError, match="file-001.parquet: not a parquet"):
        this.data.read_source("x", folder)
    pyarrow.parquet.write_table(pyarrow.table(dict(state=[1.0])), file)
    with pytest.raises(ValueError, match="file-001.parquet"):
        this.data.read_source("x", folder)
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json"):
        this.data.read_source("x", folder)
    (tmp_path / "x.hdf5").write_bytes(b"not hdf5")
    with pytest.raises(ValueError, match="x.hdf5"):
        this.data.read_source("x", tmp_path / "x.hdf5")


def test_split_by_episode(this, tmp_path):
    """The hash decides, the same in every mix of sources; explicit episodes override it."""
    folder = write_npz(tmp_path / "d", [12] * 40)
    source = this.data.read_sources([f"a={folder}"], ["5"], 0.25)[0]
    expected = [this.data.is_validation("a", f"ep{i:02d}", 0.25) for i in range(40)]
    assert source.validation.tolist() == expected and 2 < sum(expected) < 20
    assert not set(source.starts(False)[1]) & set(source.starts(True)[1])
    named = this.data.read_sources([f"a={folder}", f"b={folder}"], ["5"], 0.25, ["b=ep03,ep07"])
    assert named[0].validation.tolist() == expected
    assert np.flatnonzero(named[1].validation).tolist() == [3, 7]
    for words, message in (
        (([f"a={folder}"], ["5"], 0.1, ["99"]), "no episode is called"),
        (([f"a={folder}"], ["c=5"]), "no source is called"),
        (([str(folder), str(folder)], ["5"]), "two sources"),
        (([f"a={folder}"], ["5"], 0.1, [",".join(f"ep{i:02d}" for i in range(40))]), "none is left"),
    ):
        with pytest.raises(ValueError, match=message):
            this.data.read_sources(*words)


def test_chunk_in_seconds_follows_each_rate(this, tmp_path):
    folder = write_npz(tmp_path / "d", [30] * 3)  # 10 Hz
    assert this.data.read_sources([f"a={folder}"], ["1.2s"])[0].chunk == 12
    with h5py.File(tmp_path / "demo.hdf5", "w") as h5:
        h5["data/demo_0/actions"] = np.zeros((20, 3))
    with pytest.raises(ValueError, match="do not tell the rate"):
        this.data.read_sources([str(tmp_path / "demo.hdf5")], ["1s"])
    with pytest.raises(ValueError, match="expected steps"):
        this.data.read_sources([f"a={folder}"], ["one"])


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


def test_constant_and_binary_dims_are_guarded(this, tmp_path):
    """q01 = q99 must neither divide by zero nor blow a rare gripper event up to thousands of units."""
    actions = np.zeros((1000, 3), np.float32)
    actions[:, 0] = np.sin(np.arange(1000))
    actions[:, 1] = 3.0
    actions[-3:, 2] = 1.0
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d" / "a.npz", actions=actions)
    source = this.data.read_sources([f"a={tmp_path / 'd'}"], ["5"], 0.0)[0]
    for kind in ("quantile", "std"):
        kept = this.data.describe(source, kind)
        x = (actions - kept["center"]) / kept["scale"]
        assert np.isfinite(x).all() and np.abs(x).max() < 20 and np.abs(x[:, 1]).max() < 1e-6
    low, high = np.quantile(actions[:, 0], [0.01, 0.99])
    kept = this.data.describe(source)
    assert kept["center"][0] == pytest.approx((low + high) / 2, abs=1e-6)
    assert kept["scale"][0] == pytest.approx((high - low) / 2, abs=1e-6)


def test_normalisation_sees_training_episodes_only(this, tmp_path):
    folder = write_npz(tmp_path / "d", [50] * 4)
    before = this.data.describe(this.data.read_sources([f"a={folder}"], ["5"], 0, ["ep03"])[0])
    np.savez(folder / "ep03.npz", actions=np.full((50, 3), 1e4, np.float32), timestamps=np.arange(50) / 10)
    assert this.data.describe(this.data.read_sources([f"a={folder}"], ["5"], 0, ["ep03"])[0]) == before


# --- batches


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, tmp_path):
    write_npz(tmp_path / "a", [30] * 4)
    write_npz(tmp_path / "b", [9] * 6, dims=5, seed=1)
    sources = this.data.read_sources([f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"], ["a=8", "b=4"])

    def batch(step, accum, world):
        ranks = [this.data.TrainBatches(sources, 16, 3, accum, rank, world) for rank in range(world)]
        parts = [rank[step * accum + micro] for micro in range(accum) for rank in ranks]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    whole = batch(5, 1, 1)
    assert whole["actions"].shape == (16, 8, 5) and set(whole["source"].tolist()) == {0, 1}
    for accum, world in ((2, 1), (1, 2), (2, 4)):
        for key, value in batch(5, accum, world).items():
            assert torch.equal(value, whole[key])
    assert not torch.equal(batch(6, 1, 1)["actions"], whole["actions"])
    with pytest.raises(ValueError, match="not divisible"):
        this.data.TrainBatches(sources, 16, 3, 3)


def test_validation_is_shared_without_repeats(this, tmp_path):
    write_npz(tmp_path / "a", [30] * 6)
    sources = this.data.read_sources([f"a={tmp_path / 'a'}"], ["8"], 0.5)
    whole = this.data.ValidationChunks(sources, 0, 3)
    parts = [this.data.ValidationChunks(sources, 0, 3, rank, 4) for rank in range(4)]
    assert sorted(int(row) for part in parts for row in part.rows) == sorted(whole.rows.tolist())


def test_without_mixing_batches_hold_recorded_chunks(this, tmp_path):
    write_npz(tmp_path / "a", [30] * 4)
    sources = this.data.read_sources([f"a={tmp_path / 'a'}"], ["8"], 0.0)
    recorded = {chunk.tobytes() for chunk in sources[0].gather(*sources[0].starts(False))[0]}
    plain = this.data.TrainBatches(sources, 32, 0, mix=0, offset=0)[0]
    assert all(chunk.numpy().tobytes() in recorded for chunk in plain["actions"])
    for more in (dict(mix=0.5, offset=0), dict(mix=0, offset=0.2)):
        changed = this.data.TrainBatches(sources, 32, 0, **more)[0]
        share = np.mean([chunk.numpy().tobytes() in recorded for chunk in changed["actions"]])
        assert 0.2 < share < 0.8


# --- the loop


def flags(folder, out, *more):
    sizes = "--hidden-dim 16 --latent-dim 8 --num-heads 2 --num-encoder-layers 1 --num-decoder-layers 1 --tokens 2"
    times = "--chunk 8 --steps 6 --batch-size 8 --log-every 2 --eval-every 3 --save-every 3 --warmup 1 --device cpu"
    return ["--data", f"a={folder}", "--out", str(out), *sizes.split(), *times.split(), *map(str, more)]


def weights(out, step=6):
    return torch.load(out / "checkpoints" / f"step_{step:07d}" / "pytorch_model.bin", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_run_resume_and_what_it_leaves(this, tmp_path):
    """Lost after step 3 and resumed equals uninterrupted, bit for bit, with dropout, mixing and ordered tokens on."""
    folder = write_npz(tmp_path / "data", [30] * 8)
    noise, one, two = ["--dropout", 0.1, "--ordered", 0.5], tmp_path / "one", tmp_path / "two ü"
    assert this.train.main(flags(folder, one, *noise)) == 0
    assert os.environ["LAST_VAL_FIG"] == str(one / "figures" / "curves.png")
    shutil.copytree(one, two, symlinks=True)
    shutil.rmtree(two / "checkpoints" / "step_0000006")
    with pytest.raises(ValueError, match="--lr was"):
        this.train.main(flags(folder, two, *noise, "--resume", "--lr", 1))
    assert this.train.main(flags(folder, two, *noise, "--resume")) == 0
    assert equal(weights(two), weights(one)) and not equal(weights(two), weights(two, 3))
    steps = [line["step"] for line in logged(two)]
    assert steps == sorted(set(steps)) == [line["step"] for line in logged(one)]
    for link in ("last", "best"):
        this.model.FSQVQVAE.from_pretrained(two / "checkpoints" / link)
    with pytest.raises(ValueError, match="holds a run already"):
        this.train.main(flags(folder, two))


def test_accumulation_and_amp_train_the_same_model(this, tmp_path):
    """4 micro-steps are one step of the whole batch; bf16 stays close."""
    folder = write_npz(tmp_path / "data", [30] * 8)
    for name, more in (("one", []), ("four", ["--accum", 4]), ("bf16", ["--amp", "bf16"]), ("fp16", ["--amp", "fp16"])):
        assert this.train.main(flags(folder, tmp_path / name, *more)) == 0
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "four").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    last = {name: logged(tmp_path / name)[-1]["val/mse"] for name in ("one", "four", "bf16", "fp16")}
    assert max(last.values()) < 1.1 * min(last.values())


def test_loss_falls(this, tmp_path):
    folder = write_npz(tmp_path / "data", [30] * 8)
    times = ["--eval-every", 100, "--save-every", 100, "--log-every", 10]
    this.train.main(flags(folder, tmp_path / "out", "--steps", 100, "--lr", 1e-2, "--mix", 0, "--offset", 0, *times))
    losses = [line["train/mse"] for line in logged(tmp_path / "out")]
    assert np.mean(losses[-3:]) < 0.85 * np.mean(losses[:3])


def test_a_diverging_run_stops_with_clean_checkpoints(this, tmp_path):
    """The loss is not finite: one line, no further checkpoint, and no NaN in those that are there."""
    folder = write_npz(tmp_path / "data", [30] * 8)
    with pytest.raises(ValueError, match="not finite"):
        this.train.main(flags(folder, tmp_path / "out", "--lr", 1e30, "--clip", 1e30, "--steps", 20))
    for path in (tmp_path / "out" / "checkpoints").glob("step_*"):
        assert all(value.isfinite().all() for value in weights(tmp_path / "out", int(path.name[5:])).values())


def test_init_takes_weights_only(this, tmp_path):
    folder = write_npz(tmp_path / "data", [30] * 8)
    this.train.main(flags(folder, tmp_path / "one"))
    init = tmp_path / "one" / "checkpoints" / "last"
    this.train.main(flags(folder, tmp_path / "two", "--init", init, "--lr", 1e-12, "--weight-decay", 0))
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_users_own_loaders(this, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def prepare_dataloaders(batch_size):\n"
        "    chunks = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(0))\n"
        "    train = torch.utils.data.DataLoader(chunks[:48], batch_size, drop_last=True)\n"
        "    held = torch.utils.data.TensorDataset(chunks[48:])\n"
        "    lab = torch.utils.data.DataLoader(held, 8)\n"
        "    return chunks[0], train, {'lab': lab, 'field': [dict(actions=chunks[48:])]}\n"
    )
    words = flags("x", tmp_path / "out")
    words[1] = f"module:{tmp_path / 'mine.py'}"
    assert this.train.main(words) == 0
    last = logged(tmp_path / "out")[-1]
    assert last["val/lab/mse"] == pytest.approx(last["val/field/mse"], rel=1e-4)
    assert last["val/mse"] == pytest.approx((last["val/lab/mse"] + last["val/field/mse"]) / 2)
    # a generator can be read once: that must end in an error, not in an endless wait
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "once.py").write_text(text.replace("return chunks[0], train", "return chunks[0], (x for x in train)"))
    words[1], words[3] = f"module:{tmp_path / 'once.py'}", str(tmp_path / "once")
    with pytest.raises(ValueError, match="used up"):
        this.train.main(words)
    words[1], words[3] = f"module:{tmp_path / 'absent.py'}", str(tmp_path / "out2")
    with pytest.raises(ValueError, match="no such file"):
        this.train.main(words)


@pytest.mark.slow
def test_two_ranks_and_micro_steps_give_the_gradient_of_one_process(tmp_path):
    """And the gradients are reduced once per optimizer step, not once per micro-step."""
    folder = write_npz(tmp_path / "data", [30] * 8)
    script = tmp_path / "ranks.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT / "fsq_vqvae")!r}, {str(ROOT)!r}]
import torch, train
calls, wrap, clip = [], train.DistributedDataParallel, torch.nn.utils.clip_grad_norm_
def watched(*words, **more):
    ddp = wrap(*words, **more, bucket_cap_mb=1000)
    def hook(state, bucket):
        calls.append(bucket.is_last())
        done = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return done.then(lambda f: f.value()[0])
    ddp.register_comm_hook(None, hook)
    return ddp
def keep(parameters, limit):
    parameters = list(parameters)
    torch.save([p.grad.clone() for p in parameters], {str(tmp_path)!r} + "/grads_" + sys.argv[1] + ".pt")
    return clip(parameters, limit)
train.DistributedDataParallel, torch.nn.utils.clip_grad_norm_ = watched, keep
assert train.main(sys.argv[2:]) == 0
print("reductions", sum(calls))
"""
    )
    one = launch(script, "one", *flags(folder, tmp_path / "one", "--steps", 1))
    two = launch(script, "two", *flags(folder, tmp_path / "two", "--steps", 1, "--accum", 2), ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("reductions 1") == 2, two.stdout
    a, b = (torch.load(tmp_path / f"grads_{name}.pt", weights_only=True) for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL in mid-run, then --resume: the same weights, bit for bit; SIGTERM saves and exits with 75."""
    folder = write_npz(tmp_path / "data", [30] * 8)
    more, script = ["--steps", 80, "--save-every", 10, "--eval-every", 20], ROOT / "fsq_vqvae" / "train.py"
    assert launch(script, *flags(folder, tmp_path / "one", *more)).returncode == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        out = tmp_path / f"run{int(number)}"
        process = subprocess.Popen([sys.executable, script, *flags(folder, out, *more)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step_0000010").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == code
        assert not (out / "checkpoints" / "step_0000080").exists()
        done = launch(script, *flags(folder, out, *more, "--resume"))
        assert done.returncode == 0, done.stderr
        assert equal(weights(out, 80), weights(tmp_path / "one", 80))
        assert [line["step"] for line in logged(out)] == [line["step"] for line in logged(tmp_path / "one")]


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.slow
def test_full_disk_keeps_the_checkpoints_that_are_there(tmp_path):
    """A write that fails half-way ends in one line; what was saved before is whole and the run goes on from it."""
    folder, script = write_npz(tmp_path / "data", [30] * 8), ROOT / "fsq_vqvae" / "train.py"
    more = ["--steps", 9, "--save-every", 3]
    assert launch(script, *flags(folder, tmp_path / "one", *more)).returncode == 0
    out = tmp_path / "two"
    shutil.copytree(tmp_path / "one", out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step_0000009")
    words = [sys.executable, script, *flags(folder, out, *more, "--resume")]
    full = subprocess.run(words, preexec_fn=limit_file_size, capture_output=True, text=True, check=False)
    lines = [line for line in full.stderr.splitlines() if line.strip()]
    assert full.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), full.stderr
    assert sorted(path.name for path in (out / "checkpoints").glob("*step*")) == ["step_0000006"]
    assert launch(script, *flags(folder, out, *more, "--resume")).returncode == 0
    assert equal(weights(out, 9), weights(tmp_path / "one", 9))


@pytest.mark.slow
def test_folder_copied_into_another_project_runs_its_demo(tmp_path):
    """A host project with its own model.py, data.py and common.py on the path must not get in the way."""
    host = tmp_path / "host"
    shutil.copytree(ROOT / "fsq_vqvae", host / "third_party" / "tokens", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "common.py", host / "third_party")
    for name in ("model.py", "data.py", "common.py", "figures.py", "demo.py"):
        (host / name).write_text("raise SystemExit('the host project was imported')\n")
    more = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--log-every", 2]
    script = host / "third_party" / "tokens" / "train.py"
    done = launch(script, *more, cwd=host, env=dict(PYTHONPATH=str(host)))
    assert done.returncode == 0, done.stderr
    assert list(host.glob("runs/*/001/checkpoints/best/config.json"))


@pytest.mark.slow
def test_errors_are_one_line(tmp_path):
    folder = write_npz(tmp_path / "data", [30] * 8)
    script = ROOT / "fsq_vqvae" / "train.py"
    good = launch(script, *flags(folder, tmp_path / "good"))
    assert good.returncode == 0, good.stderr
    (tmp_path / "file").write_text("")
    cases = [
        (flags(folder, tmp_path / "good"), "holds a run already"),
        (flags(tmp_path / "absent", tmp_path / "b"), "no such file"),
        (flags(folder, tmp_path / "file" / "c"), "file"),
        (flags(folder, "/dev/full/d"), "/dev/full"),
        (["--hlep"], "did you mean --help"),
    ]
    for words, text in cases:
        done = launch(script, *words)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2 and len(lines) == 1 and text in lines[0], done.stderr
    assert equal(weights(tmp_path / "good"), weights(tmp_path / "good"))


# --- the report card


def test_baselines_against_plain_arithmetic():
    """A baseline that is worse than its definition would flatter the tokenizer."""
    baselines = load("fsq_vqvae", "baselines").baselines
    train, held = smooth(300, seed=1) / 10, smooth(40, seed=2) / 10
    coded = baselines.bins256(held)
    inside = np.abs(held) <= 1
    assert np.abs(coded.decoded - held)[inside].max() <= 1 / 255 + 1e-6 and (coded.tokens == 48).all()
    for scale in (2, 10):
        coded = baselines.fast(train, held, scale)
        # rounding DCT coefficients to 1/scale errs by 1/(12 scale^2) on average; the DCT keeps that
        assert coded.undecodable == 0 and np.square(coded.decoded - held).mean() < 1.3 / (12 * scale**2)
    mean, directions = baselines.pca(train)
    exact = baselines.pca_codec(train, held, mean, directions, 48)
    np.testing.assert_allclose(exact.decoded, held, atol=1e-4)
    errors = [
        np.square(baselines.pca_codec(train, held, mean, directions, 16, n).decoded - held).mean() for n in (4, 64)
    ]
    assert errors[1] < errors[0]


def test_reconstruction_numbers_of_the_card():
    """Against numpy on a case one can do by hand: the decoded chunk is the true one, shifted by 0.1."""
    metrics = load("fsq_vqvae", "metrics").metrics
    true = smooth(20)
    card = metrics.reconstruction(true, true + np.float32(0.1))
    assert card["mse"] == pytest.approx(0.01, rel=1e-4) and card["max"] == pytest.approx(0.1, rel=1e-4)
    assert card["jerk"] == pytest.approx(1, rel=1e-3) and card["vrr_0.3"] == 1 and card["vrr_0.03"] == 0
    assert card["mse_low"] == pytest.approx(0.01, rel=1e-4) and card["mse_high"] == pytest.approx(0, abs=1e-6)
    assert metrics.entropy(np.array([4, 4, 0, 8])) == pytest.approx(1.5)


def test_report_card_of_a_run(this, tmp_path):
    """From a checkpoint alone, on the run's own split; its MSE is what training logged."""
    evaluate = load("fsq_vqvae", "evaluate").evaluate
    write_npz(tmp_path / "a", [30] * 12)
    write_npz(tmp_path / "b", [30] * 12, dims=5, seed=1)
    words = flags(tmp_path / "a", tmp_path / "run")
    words.insert(2, f"b={tmp_path / 'b'}")
    assert this.train.main([*words, "--val-stride", 3]) == 0
    more = ["--out", tmp_path / "card", "--random-tuples", 300, "--val-stride", 3, "--device", "cpu"]
    checkpoint = ["--checkpoint", tmp_path / "run" / "checkpoints" / "last"]
    assert evaluate.main([*map(str, [*checkpoint, *more])]) == 0
    card = json.loads((tmp_path / "card" / "report.json").read_text())["sources"]
    last = logged(tmp_path / "run")[-1]
    for name in ("a", "b"):
        assert card[name]["reconstruction"]["mse"] == pytest.approx(last[f"val/{name}/mse"], rel=1e-3)
        assert card[name]["robustness"]["random_tuples_failed"] == 0
        assert card[name]["robustness"]["tokens_changed_by_pad_content"] == 0
        assert card[name]["robustness"]["codes_changed_in_round_trip"] == 0
    text = (tmp_path / "card" / "report.md").read_text()
    assert "| FSQVQVAE |" in text and "| 256 bins |" in text and "FAST" in text
    assert len(list((tmp_path / "card" / "figures").glob("*.png"))) == 4
    with pytest.raises(ValueError, match="knows a, b"):
        evaluate.main([*map(str, [*checkpoint, *more, "--data", f"c={tmp_path / 'a'}"])])


# --- real data


def test_real_lerobot_readers_agree_with_the_converted_arrays(this):
    """G1 in v2.1 and v3.0 against npz files made from the same parquet files."""
    g1 = shared("g1_lerobot_v21")
    source = this.data.read_source("g1", g1 / "original")
    assert len(source.ids) == 70 and source.fps == 30 and source.actions.shape[1] == 26
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
    source = this.data.read_source("x", found[0])
    assert np.isfinite(source.actions).all() and source.length.sum() == len(source.actions) > 300


@pytest.mark.slow
def test_real_g1_beats_pca_and_the_plain_learned_tokenizers(this, tmp_path):
    """8 tokens after 60 steps on the published split: PCA 8 at equal bits has 2.2e-2, a plain MLP-FSQ 1e-2."""
    folder = shared("g1_lerobot_v21/original")
    held = ",".join(str(i) for i in np.random.default_rng(0).permutation(70)[:14])
    words = ["--data", f"g1={folder}", "--val-episodes", held, "--out", tmp_path, "--steps", 60, "--hidden-dim", 32]
    assert this.train.main([*words, "--batch-size", 32, "--eval-every", 60, "--device", "cpu"]) == 0
    last = logged(tmp_path)[-1]
    assert last["val/g1/mse"] < 7e-3 and last["val/g1/usage"] > 0.85
