"""vvae_lam: causality, the one decoder, the codebook, the readers, the batches, the loop, the verbs and the VAEs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, launch, load, shared
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FOLDER = ROOT / "vvae_lam"
H5 = partial(h5py.File, locking=False)  # HDF5 refuses to open a file twice with different locking


def tiny(this, started=True, **kwargs):
    """A model whose parameters all say something; its codes have begun."""
    torch.manual_seed(0)
    sizes = dict(channels=3, height=8, width=8, patch_dim=8, embed_dim=16, encoder_depth=1, decoder_depth=2)
    sizes |= dict(num_heads=2, codebook_dim=6, num_embeddings=5, mean=[0.5] * 3, std=[2.0] * 3)
    model = this.model.VVAELatentActionVQVAE(**{**sizes, **kwargs})
    for parameter in model.parameters():  # the head starts at zero
        nn.init.normal_(parameter, std=0.3)
    model.quantizer.started = started
    return model.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- causality


class ShiftedMaskEncoder(nn.Module):
    """The ancestor's construction, from its description: in every block frame t looks at frames <= t + 1."""

    def __init__(self, dim, depth):
        super().__init__()
        layer = dict(nhead=2, dim_feedforward=2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, **layer) for _ in range(depth))

    def forward(self, x):
        """(B, T, N, D) -> (B, T, D), row t being the code of t -> t + 1."""
        frame = torch.arange(x.shape[1]).repeat_interleave(x.shape[2])
        hidden = frame[None] > frame[:, None] + 1
        h = x.flatten(1, 2)
        for block in self.blocks:
            h = block(h, src_mask=hidden)
        return h.unflatten(1, x.shape[1:3]).mean(2)


def test_a_shifted_mask_in_every_block_leaks_the_future_and_this_check_sees_it():
    """The check below can fail: it does on the ancestor's construction from two blocks on, and not with one."""
    x, changed = noise(1, 6, 4, 8), noise(1, 6, 4, 8)
    changed[:, 2:] += 1
    changed[:, :2] = x[:, :2]
    for depth, leaks in ((1, False), (3, True)):
        torch.manual_seed(0)
        encoder = ShiftedMaskEncoder(8, depth).eval()
        code, other = encoder(x)[:, 0], encoder(changed)[:, 0]
        assert (not torch.equal(code, other)) == leaks


def test_codes_and_predictions_see_nothing_later(this):
    """Changing frame t + 2 and all after it changes neither the code of t -> t + 1 nor a prediction up to t + 1."""
    model, x = tiny(this), noise(2, 6, 3, 8, 8)
    codes, vectors = model.encode(x, vectors=True)
    predicted = model.predict(x, codes)
    for t in range(4):
        changed = x.clone()
        changed[:, t + 2 :] = noise(2, 4 - t, 3, 8, 8, seed=9) * 5
        later, other = model.encode(changed, vectors=True)
        torch.testing.assert_close(other[:, : t + 1], vectors[:, : t + 1], rtol=0, atol=1e-6)
        assert torch.equal(later[:, : t + 1], codes[:, : t + 1])
        assert not torch.allclose(other[:, t + 1], vectors[:, t + 1])
        words = torch.cat([codes[:, : t + 1], (codes[:, t + 1 :] + 1) % 5], 1)
        after = model.predict(changed, words)
        torch.testing.assert_close(after[:, : t + 1], predicted[:, : t + 1], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t + 1], predicted[:, t + 1])


def test_gradient_of_a_code_beyond_its_two_frames_is_exactly_zero(this):
    model = tiny(this)
    x = noise(1, 5, 3, 8, 8).requires_grad_()
    model.infer(model.patches(x))[0, 1].sum().backward()
    size = x.grad[0].flatten(1).norm(dim=1)
    assert size[[0, 3, 4]].max() == 0 and size[[1, 2]].min() > 1e-3


# --- one decoder


@pytest.mark.parametrize("context", [3, 8])
def test_cached_steps_equal_the_parallel_pass(this, context):
    """Also where clips are longer than the context: then both see a window of it."""
    model, x = tiny(this, context=context), noise(2, 6, 3, 8, 8)
    z = noise(2, 6, 3, 6)
    place = torch.arange(6).expand(2, -1)
    whole = model.decode(x, z, place)[0]
    past, steps = None, []
    for t in range(6):
        frame, past = model.decode(x[:, t : t + 1], z[:, t : t + 1], place[:, t : t + 1], past)
        steps.append(frame)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)
    far = x.clone()
    far[:, 0] += 1
    moved = (model.decode(far, z, place)[0] - whole).abs().amax((0, 2, 3, 4)) > 1e-4
    reach = 2 * (context - 1)  # two blocks
    assert moved[0] and moved[: min(6, context)].all() and not moved[reach + 1 :].any()


def test_rollout_equals_decoding_from_scratch_at_every_step(this):
    model, first = tiny(this, context=3), noise(2, 3, 8, 8)
    codes = torch.randint(5, (2, 7, 3), generator=torch.Generator().manual_seed(2))
    frames = [(first - model.mean) / model.std]
    for t in range(7):
        x = torch.stack(frames, 1)
        z = model.quantizer.lookup(codes[:, : t + 1])
        frames.append(model.decode(x, z, torch.arange(t + 1).expand(2, -1))[0][:, -1].detach())
    expected = torch.stack(frames[1:], 1) * model.std + model.mean
    torch.testing.assert_close(model.rollout(first, codes), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.rollout(first[0], codes[0]), expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("horizon", [2, 3])
def test_rollout_loss_equals_the_loop_written_out(this, horizon):
    """Each sample goes on from its own anchor, on its own first prediction, which is detached."""
    model, x = tiny(this, rollout_horizon=horizon).train(), noise(3, 6, 3, 8, 8)
    anchor = torch.tensor([0, 2, 1])
    metrics = model(dict(latents=x, anchor=anchor))[1]
    normal = (x - model.mean) / model.std
    z = model.quantizer.lookup(model.encode(x))
    total = 0.0
    for i, t in enumerate(anchor.tolist()):
        frames = list(normal[i, : t + 1])
        for step in range(horizon):
            place = torch.arange(len(frames))[None]
            after = model.decode(torch.stack(frames)[None], z[i : i + 1, : len(frames)], place)[0][0, -1]
            frames.append(after.detach())
            total += (after - normal[i, t + step + 1]).square().mean().item() if step else 0.0
    assert metrics["rollout_loss"].item() == pytest.approx(total / 3 / (horizon - 1), rel=1e-4)


def test_loss_is_the_published_sum(this):
    """MSE + codebook + 0.25 commitment + rollout; every term from its definition, in normalised units."""
    model, x = tiny(this).train(), noise(2, 4, 3, 8, 8)
    loss, metrics = model(dict(latents=x, anchor=torch.zeros(2, dtype=torch.int64)))
    codes, z = model.encode(x, vectors=True)
    normal, q = (x - model.mean) / model.std, model.quantizer.lookup(codes)
    error = (model.predict(x, codes) - x[:, 1:]) / model.std
    expected = dict(mse_loss=error.square().mean(), mae_loss=error.abs().mean(), codebook_loss=(q - z).square().mean())
    expected["commitment_loss"] = expected["codebook_loss"]
    expected["codebook_usage"] = torch.tensor(len(codes.unique()) / 5)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name
    vq = 1.25 * expected["codebook_loss"]
    assert metrics["vq_loss"].item() == pytest.approx(vq.item(), rel=1e-4)
    assert loss.item() == pytest.approx((expected["mse_loss"] + vq + metrics["rollout_loss"]).item(), rel=1e-4)
    assert normal.shape == x.shape


def test_samples_weigh_the_same_and_do_not_mix(this):
    """No batch statistics: the loss of a batch is the mean of its samples' losses, and a code does not depend on it."""
    model, x = tiny(this).train(), noise(4, 4, 3, 8, 8)
    anchor = torch.tensor([0, 1, 0, 1])
    together = model(dict(latents=x, anchor=anchor))[0]
    alone = [model(dict(latents=x[i : i + 1], anchor=anchor[i : i + 1]))[0] for i in range(4)]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)
    for i in range(4):
        assert torch.equal(model.encode(x)[i], model.encode(x[i]))


def test_starts_as_nothing_moves(this):
    """The head is zero: the first prediction is the frame itself, so the error starts at that of persistence."""
    model, x = this.model.VVAELatentActionVQVAE(3, 8, 8, 4, 8, 16, 1, 1, 2), noise(2, 4, 3, 8, 8)
    mse = model(dict(latents=x))[1]["mse_loss"]
    assert mse.item() == pytest.approx((x[:, 1:] - x[:, :-1]).square().mean().item(), rel=1e-5)
    still = x[:, :1].expand(-1, 4, -1, -1, -1)
    z = model.infer(model.patches(still))
    other = model.infer(model.patches(noise(2, 1, 3, 8, 8, seed=5).expand(-1, 4, -1, -1, -1)))
    torch.testing.assert_close(z, other)  # and a scene that rests has no code of its own


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 6, 10), (1, 5, 7), (16, 16, 16)])
def test_any_shape_trains_and_every_parameter_gets_a_gradient(this, shape):
    model = tiny(this, channels=shape[0], height=shape[1], width=shape[2], mean=[0.0], std=[1.0]).train()
    loss, _ = model(dict(latents=noise(2, 4, *shape), anchor=torch.tensor([0, 1])))
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert model.predict(noise(2, 3, *shape), torch.zeros(2, 2, 3, dtype=torch.int64)).shape == (2, 2, *shape)


def test_works_in_the_units_of_its_latents(this):
    """The same weights with another mean and std give the same codes and predictions for latents scaled likewise."""
    one, two = tiny(this), tiny(this, mean=[-1.0, 0.0, 3.0], std=[0.1, 1.0, 10.0])
    x = noise(2, 4, 3, 8, 8)
    moved = (x - one.mean) / one.std * two.std + two.mean
    codes = one.encode(x)
    assert torch.equal(codes, two.encode(moved))
    back = (two.predict(moved, codes) - two.mean) / two.std * one.std + one.mean
    torch.testing.assert_close(back, one.predict(x, codes), rtol=1e-4, atol=1e-4)


def test_flops_match_torchs_counter(this):
    """Within 5 %: the loss-against-FLOPs curve has the right axis. (SDPA's math kernel: torch counts its matmuls.)"""
    model = tiny(this, patch_dim=32, embed_dim=64, channels=4, height=32, width=32, mean=[0.0], std=[1.0]).train()
    batch = dict(latents=noise(2, 5, 4, 32, 32), anchor=torch.tensor([0, 1]))
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(batch)[0].backward()
    assert 2 * model.training_flops(5) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(noise(2, 4, 3, 8, 9)), "expected"),
        (lambda m: m.encode(noise(3, 8, 8)), "expected"),
        (lambda m: m.encode(noise(4, 3, 8, 8) / 0), "NaN"),
        (lambda m: m.predict(noise(4, 3, 8, 8), torch.zeros(2, 3).long()), "transitions"),
        (lambda m: m.predict(noise(4, 3, 8, 8), torch.zeros(3, 3)), "whole numbers"),
        (lambda m: m.rollout(noise(3, 8, 8), torch.full((3, 3), 5)), r"\[0, 5\)"),
        (lambda m: m.rollout(noise(2, 3, 8, 8), torch.zeros(3, 3).long()), "expected"),
    ],
)
def test_wrong_arguments_are_named(this, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny(this))


def test_checkpoint_round_trip_and_what_it_refuses(this, tmp_path):
    """Arrays in, arrays out; the same codes after save and load; before codes began encode says so."""
    model, x = tiny(this), noise(2, 4, 3, 8, 8).numpy()
    model.save_pretrained(tmp_path)
    again = this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)
    assert isinstance(again.encode(x), np.ndarray) and np.array_equal(again.encode(x), model.encode(x))
    assert not again.training and again.quantizer.started
    tiny(this, started=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="before its codes began"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path).encode(x)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"colour": 1}')
    with pytest.raises(ValueError, match="not a configuration"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)


# --- codebook


@pytest.fixture(scope="module")
def quantise():
    return load("vvae_lam", "quantise").quantise


def test_quantiser_against_brute_force(quantise):
    """Nearest code by the definition; straight-through gradient; both losses; slots centred and scaled."""
    torch.manual_seed(0)
    vq = quantise.VectorQuantizer(4, 2, 3).train()
    vq.started = True
    for moved in (vq.mean, vq.offset):
        moved.copy_(noise(2, 3))
    for wide in (vq.spread, vq.scale):
        wide.copy_(torch.tensor([[0.5], [2.0]]))
    z = noise(5, 2, 3, seed=3).requires_grad_()
    q, codes, codebook, commitment = vq(z)
    for n in range(5):
        for s in range(2):
            placed = vq.codebook * vq.scale[s] + vq.offset[s]
            away = (placed - z[n, s]).square().sum(1)
            assert codes[n, s] == away.argmin()
            torch.testing.assert_close(q[n, s], placed[codes[n, s]])
    assert codebook.item() == pytest.approx((q - z).square().mean().item(), rel=1e-5)
    q.sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones_like(z)) and vq.codebook.grad is None
    codebook.backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones_like(z)) and vq.codebook.grad.abs().max() > 0
    before = vq.codebook.grad.clone()
    commitment.backward()
    assert torch.equal(vq.codebook.grad, before) and not torch.equal(z.grad, torch.ones_like(z))


def test_vectors_pass_unchanged_until_the_codes_begin(quantise):
    vq, z = quantise.VectorQuantizer(4, 2, 3).train(), noise(5, 2, 3)
    q, _, codebook, commitment = vq(z)
    assert torch.equal(q, z) and codebook == commitment == 0
    assert vq.update(torch.optim.AdamW(vq.parameters()), 0) == 0 and not vq.pending


def test_kmeans_finds_separate_clusters(quantise):
    """Well separated clusters are found exactly, whatever the seed."""
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10], [5, 30]])
    x = (centres[:, None] + noise(5, 40, 2) * 0.1).flatten(0, 1)
    for seed in range(5):
        found = quantise.kmeans(x, 5, torch.Generator().manual_seed(seed))
        assert torch.cdist(centres, found).amin(1).max() < 0.1


def test_slots_with_means_far_apart_share_all_codes(quantise):
    """Without centring, each slot would sit on its own share of the codes and could say little."""
    vq, pattern = quantise.VectorQuantizer(4, 3, 2), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    words = torch.randint(4, (200, 3), generator=torch.Generator().manual_seed(0))
    z = pattern[words] * torch.tensor([1.0, 5.0, 0.1])[:, None] + torch.tensor([0.0, 50.0, -80.0])[:, None]
    vq.start(z, seed=0)
    codes = vq.nearest(z)
    for slot in range(3):
        assert len(codes[:, slot].unique()) == 4
        assert len({(w, c) for w, c in zip(words[:, slot].tolist(), codes[:, slot].tolist(), strict=True)}) == 4


def test_vectors_that_shrink_do_not_take_the_codes_with_them(quantise):
    """Mean and spread are tracked: vectors ten times smaller keep their codes, and the decoder sees the same."""
    vq, z = quantise.VectorQuantizer(6, 2, 3).train(), noise(60, 2, 3)
    vq.start(z, seed=0)
    before, codes, *_ = vq(z)
    opt, small = torch.optim.AdamW(vq.parameters()), z / 10 + 7
    vq.pending.clear()
    for _ in range(60):
        vq(small)
        vq.update(opt, seed=0, momentum=0.2)
    after, again, *_ = vq(small)
    assert torch.equal(codes, again)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_dead_codes_move_to_where_vectors_are(quantise):
    """Codes without use for `restart_every` steps move and forget their moments; used ones stay."""
    torch.manual_seed(0)
    vq = quantise.VectorQuantizer(4, 1, 2, restart_every=3).train()
    vq.started = True
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[0.0, 0], [5, 5], [900, 900], [-900, 0]]))
    opt = torch.optim.AdamW(vq.parameters(), lr=0.0, weight_decay=0.0)
    z = torch.cat([centre + noise(20, 1, 2) * 0.1 for centre in (0, 5, 8)])
    moved = []
    for _ in range(3):
        q, _, codebook, _ = vq(z)
        codebook.backward()
        opt.step()
        moved.append(vq.update(opt, seed=0, momentum=0.0))
    assert moved == [0, 0, 2] and vq.used.sum() == 0
    assert torch.equal(vq.codebook[:2], torch.tensor([[0.0, 0], [5, 5]]))
    assert all((row == z[:, 0]).all(1).any() for row in vq.codebook[2:])
    assert opt.state[vq.codebook]["exp_avg"][2:].abs().max() == 0 < opt.state[vq.codebook]["exp_avg"][1].abs().max()
    again = quantise.VectorQuantizer(4, 1, 2)
    again.load_state_dict(vq.state_dict())
    assert again.started and again.age == 3


# --- recordings and batches


def write_h5(path, latents, chunk_frames=2, key="embeddings", **more):
    """Latents (T, C, H, W) in the seed's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = latents.reshape(-1, chunk_frames, *latents.shape[1:]).swapaxes(1, 2)
    with H5(path, "w") as file:
        file.create_dataset(key, data=chunks, **more)
    return path


def frames(count, channels=2, size=4, seed=0):
    """Latents (count, C, H, W); frame t's values lie in [t, t + 1)."""
    values = np.random.default_rng(seed).random((count, channels, size, size))
    return (values + np.arange(count)[:, None, None, None]).astype(np.float32)


@pytest.fixture(scope="module")
def recordings():
    return load("vvae_lam", "recordings").recordings


@pytest.mark.parametrize("chunk_frames", [1, 2, 4])
@pytest.mark.parametrize("storage", [{}, dict(compression="gzip", chunks=True), dict(dtype=np.float16)])
def test_frames_are_read_as_they_were_written(recordings, tmp_path, chunk_frames, storage):
    """Any T_latent, compressed or half precision, any increasing choice of frames, alone or through Sequences."""
    x = frames(24)
    recording = recordings.inspect(write_h5(tmp_path / "a.h5", x, chunk_frames, **storage))
    expected = x.astype(storage.get("dtype", np.float32)).astype(np.float32)
    assert len(recording) == 24 and recording.shape == (2, 4, 4)
    for chosen in ([0], [23], [3, 4, 5], [1, 4, 7, 10], [0, 5, 7, 22], list(range(24))):
        assert np.array_equal(recording.read(chosen), expected[chosen])
    recording.causal_only = True
    last = expected[chunk_frames - 1 :: chunk_frames]
    assert len(recording) == len(last) and np.array_equal(recording.read(np.arange(len(last))), last)


def test_per_frame_latents_without_a_time_axis(recordings, tmp_path):
    x = frames(5)
    with H5(tmp_path / "a.h5", "w") as file:
        file["embeddings"] = x
    assert np.array_equal(recordings.inspect(tmp_path / "a.h5").read([1, 4]), x[[1, 4]])


def test_sequences_cover_every_window(this, recordings, tmp_path):
    found = [recordings.inspect(write_h5(tmp_path / f"{n}.h5", frames(n))) for n in (4, 10, 8)]
    sequences = this.data.Sequences(found, length=4, gap=2, stride=1)
    starts = [(owner, first) for owner, first in zip(sequences.owner.tolist(), sequences.first.tolist(), strict=True)]
    assert starts == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]  # 7 frames are needed
    assert np.array_equal(sequences[1], frames(10)[[1, 3, 5, 7]])
    assert len(this.data.Sequences(found, 4, stride=3)) == 1 + 3 + 2


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: write_h5(p, frames(4), key="latents"), "no data set `embeddings`, only latents"),
        (lambda p: H5(p, "w").create_dataset("embeddings", data=np.zeros((4, 2, 8))), "has shape"),
        (lambda p: H5(p, "w").create_dataset("embeddings", data=np.zeros((0, 2, 2, 4, 4))), "has shape"),
        (lambda p: H5(p, "w").create_dataset("embeddings", data=np.zeros((4, 2, 2, 4, 4), int)), "floating"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n truncated"), "not a whole HDF5 file"),
        (lambda p: p.write_bytes(write_h5(p, frames(40)).read_bytes()[:3000]), "not a whole HDF5 file"),
        (lambda p: write_h5(p, frames(4, channels=3)), "C, H, W are"),
    ],
)
def test_broken_files_are_named(recordings, tmp_path, damage, message):
    """Wrong key, rank, type, truncated or other sizes: one error naming the file; and the manifest leaves it out."""
    write_h5(tmp_path / "a.h5", frames(4))
    write_h5(tmp_path / "b.h5", frames(4))
    damage(tmp_path / "ü c.h5")
    with pytest.raises(ValueError, match=f"ü c.h5: .*{message}"):
        recordings.read_sources([str(tmp_path)])
    assert load("vvae_lam", "make_manifest").make_manifest.main([str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["bad"]) == ["ü c.h5"]
    assert {r.id for r in recordings.read_sources([str(tmp_path)])} == {"a", "b"}


def test_nan_inside_a_chunk_is_named(recordings, tmp_path):
    x = frames(8)
    x[5, 0, 1, 1] = np.nan
    recording = recordings.inspect(write_h5(tmp_path / "a.h5", x))
    recording.read([0, 1, 2])
    with pytest.raises(ValueError, match="a.h5: .*NaN or infinity in chunk 2"):
        recording.read([3, 4, 5])


def test_actions_follow_the_frames(recordings, tmp_path):
    path = write_h5(tmp_path / "a.h5", frames(8))
    recording = recordings.inspect(path)
    assert recording.actions() is None
    with H5(path, "a") as file:
        file["actions"] = np.arange(8)
    assert recording.actions().tolist() == list(range(8))
    recording.causal_only = True
    assert recording.actions().tolist() == [1, 3, 5, 7]
    with H5(path, "a") as file:
        del file["actions"]
        file["actions"] = np.arange(7)
    with pytest.raises(ValueError, match="a row per latent frame"):
        recording.actions()


def test_the_leak_is_reported_where_there_is_one(recordings, tmp_path):
    """Transitions inside a jointly encoded chunk are counted; not with causal_only, nor for a causal VAE."""
    path = write_h5(tmp_path / "a.h5", frames(8))
    assert recordings.leak_report([recordings.inspect(path)]).startswith("4 of 7 transitions")
    assert recordings.leak_report([recordings.inspect(path, causal_only=True)]) is None
    inside = recordings.same_chunk(recordings.inspect(path), np.arange(8))
    assert inside.tolist() == [True, False, True, False, True, False, True]
    with H5(path, "a") as file:
        file.attrs["causal"] = True
    assert recordings.leak_report([recordings.inspect(path)]) is None


def test_split_by_manifest_by_name_and_by_hash(recordings, tmp_path):
    for n in range(12):
        write_h5(tmp_path / "d" / f"r{n:02d}.h5", frames(4))
    data = [f"d={tmp_path / 'd'}"]

    def held(**how):
        return {r.id for r in recordings.read_sources(data, **how) if r.split == "validation"}

    by_hash = held(val_share=0.3)
    assert by_hash == {f"r{n:02d}" for n in range(12) if recordings.episode_hash("d", f"r{n:02d}") < 0.3} != set()
    assert held(val_episodes=["r03", "d=r05"]) == {"r03", "r05"} and held(val_share=0.0) == set()
    manifest = dict(splits=dict(train=["r00.h5"], val=[f"/elsewhere/{'r01.h5'}"], test=["r02"]))  # the seed's, moved
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    splits = {r.id: r.split for r in recordings.read_sources(data, manifest=tmp_path / "m.json")}
    assert splits == dict(r00="train", r01="validation", r02="test")
    manifest["splits"]["train"] += ["gone.h5", "gone2.h5"]
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    for how, message in (
        (dict(manifest=tmp_path / "m.json"), "2 files are not there, the first is gone.h5"),
        (dict(manifest=tmp_path / "d"), "not a manifest"),
        (dict(val_episodes=["r99"]), "no recording 'r99'"),
    ):
        with pytest.raises(ValueError, match=message):
            recordings.read_sources(data, **how)
    with pytest.raises(ValueError, match="no such file or folder"):
        recordings.read_sources([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .h5 files"):
        recordings.read_sources([str(tmp_path / "empty")])


def test_manifest_is_seeded_and_counts(tmp_path):
    """8:1:1 by recording, the same for the same seed; counts of frames and sequences are right."""
    make = load("vvae_lam", "make_manifest").make_manifest
    for n in range(20):
        write_h5(tmp_path / f"r{n:02d}.h5", frames(4 + 2 * (n % 5)))

    def manifest(*words):
        assert make.main([str(tmp_path), *words]) == 0
        return json.loads((tmp_path / "manifest.json").read_text())

    one, again, other = manifest(), manifest(), manifest("--seed", "1")
    assert one == again and one["splits"] != other["splits"]
    assert [len(one["splits"][name]) for name in ("train", "validation", "test")] == [16, 2, 2]
    assert len(set(sum(one["splits"].values(), []))) == 20
    lengths = [4 + 2 * (int(name[1:3]) % 5) for name in one["splits"]["train"]]
    assert one["counts"]["train"]["frames"] == sum(lengths)
    assert one["counts"]["train"]["sequences"] == sum(max(0, n - 7) for n in lengths)
    assert len(manifest("--train-ratio", "1", "--val-ratio", "0", "--test-ratio", "0")["splits"]["train"]) == 20
    with pytest.raises(SystemExit):
        make.main([str(tmp_path), "--train-ratio", "0.5"])


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, recordings, tmp_path):
    found = [recordings.inspect(write_h5(tmp_path / "a.h5", frames(30)))]
    sequences = this.data.Sequences(found, 4)
    whole = this.data.TrainBatches(sequences, 8, seed=3, flip=True)
    for accum, world in ((2, 1), (1, 2), (2, 2)):
        ranks = [this.data.TrainBatches(sequences, 8, 3, accum, rank, world, flip=True) for rank in range(world)]
        for step in (0, 5):
            parts = [ranks[rank][step * accum + micro] for micro in range(accum) for rank in range(world)]
            for key in ("latents", "anchor"):
                assert torch.equal(torch.cat([part[key] for part in parts]), whole[step][key])
    with pytest.raises(ValueError, match="not divisible"):
        this.data.TrainBatches(sequences, 8, accum=3)
    with pytest.raises(ValueError, match="no sequence of 40 latent frames"):
        this.data.TrainBatches(this.data.Sequences(found, 40), 8)


def test_every_sequence_comes_once_per_pass_and_flip_mirrors_half(this, recordings, tmp_path):
    sequences = this.data.Sequences([recordings.inspect(write_h5(tmp_path / "a.h5", frames(30)))], 3)  # 28 of them
    plain, flipped = (this.data.TrainBatches(sequences, 7, seed=1, flip=flip) for flip in (False, True))
    first = [int(x[0, 0, 0, 0]) for step in range(4) for x in plain[step]["latents"]]
    second = [int(x[0, 0, 0, 0]) for step in range(4, 8) for x in plain[step]["latents"]]
    assert sorted(first) == sorted(second) == list(range(28)) and first != second
    same, count = 0, 0
    for step in range(20):
        for a, b in zip(plain[step]["latents"], flipped[step]["latents"], strict=True):
            assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
            same, count = same + torch.equal(a, b), count + 1
    assert 0.35 < same / count < 0.65
    anchors = torch.cat([plain[step]["anchor"] for step in range(20)])
    assert anchors.min() == 0 and anchors.max() == 3 - 2 - 1


def test_validation_is_shared_without_repeats(this, recordings, tmp_path):
    found = [recordings.inspect(write_h5(tmp_path / f"{n}.h5", frames(n) + 100 * n), "d") for n in (10, 14)]
    for recording in found:
        recording.split = "validation"
    seen = []
    for rank in range(2):
        for batch in this.data.validation_loaders(found, 4, 1, 2, rank, 2)["d"]:
            seen += [int(x[t, 0, 0, 0]) for x in batch["latents"] for t in range(3)]
    assert sorted(seen) == [*range(1000, 1009), *range(1400, 1412)]  # a tail shorter than a sequence is left out


def test_a_look_at_the_data(this, tmp_path, capsys):
    """Counts, ranges, the leak and the loader's speed; an error is one line and exit code 2."""
    for n in range(3):
        write_h5(tmp_path / f"{n}.h5", frames(10))
    assert this.data.main(["--data", str(tmp_path), "--seconds", "0.05", "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    for part in ("3 recordings, 30 latent frames of (C, H, W) (2, 4, 4)", "2 recordings, 6 sequences of 8", "15 of 27"):
        assert part in said
    assert "values 0" in said and "batches (2, 8, 2, 4, 4)" in said
    assert this.data.main(["--data", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: --data")


def test_demo_is_in_the_seeds_layout_and_is_not_written_twice(tmp_path, recordings):
    """Unit variance, persistence above 0.1, actions that explain the motion; the same on every machine."""
    demo = load("vvae_lam", "demo").demo
    demo.ABOUT = dict(demo.ABOUT, recordings=3)
    demo.write(tmp_path / "d")
    files = sorted((tmp_path / "d").glob("*.h5"))
    before = [file.stat().st_mtime_ns for file in files]
    demo.write(tmp_path / "d")
    assert [file.stat().st_mtime_ns for file in files] == before and len(files) == 3
    recording = recordings.inspect(files[0])
    assert recording.shape == (16, 16, 16) and recording.chunk_frames == 2
    x, actions = recording.read(np.arange(len(recording))), recording.actions()
    assert x.std() == pytest.approx(1, abs=0.05)
    assert np.square(x[1:] - x[:-1]).mean() > 0.1
    assert set(actions) <= set(range(8)) and len(actions) == len(x)
    still = x.mean(0)  # the same step moves the blob alike wherever it is, around the edges too
    blob = np.abs(x - still).sum(1)
    for t in range(len(x) - 1):
        angle = actions[t] * np.pi / 4
        move = np.rint(np.array([np.sin(angle), np.cos(angle)]) * demo.ABOUT["shift"]).astype(int)
        rolled = np.roll(blob[t], move, (0, 1))
        assert np.corrcoef(rolled.ravel(), blob[t + 1].ravel())[0, 1] > 0.5


# --- the loop


def write_moving(folder, count):
    """Recordings of 12 latent frames (2, 8, 8) in which a bright bar moves right or left, around the edges too."""
    rng = np.random.default_rng(0)
    for n in range(count):
        moves = rng.choice([-2, 2], 12)
        place = np.cumsum(moves) - moves + 2 * rng.integers(4)
        x = rng.normal(0, 0.1, (1, 2, 8, 8)).repeat(12, 0)
        for t in range(12):
            x[t, :, 2:6, (place[t] + np.arange(2)) % 8] += 3
        path = write_h5(folder / f"r{n}.h5", x.astype(np.float32))
        with H5(path, "a") as file:
            file["actions"] = (moves > 0).astype(np.int64)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_moving(tmp_path_factory.mktemp("latents"), 6)


def flags(folder, out, *more):
    sizes = "--patch-dim 8 --embed-dim 16 --encoder-depth 1 --decoder-depth 1 --num-heads 2 --codebook-dim 4"
    times = "--steps 6 --batch-size 4 --log-every 2 --eval-every 3 --save-every 3 --warmup 1 --lr 0.01 --device cpu"
    codes = "--sequence-length 4 --margin -1 --check-every 2 --restart-every 2 --num-embeddings 4 --val-episodes r1 r4"
    words = [*sizes.split(), *times.split(), *codes.split()]
    return ["--data", f"a={folder}", "--out", str(out), *words, *map(str, more)]


def weights(out, step=6):
    return torch.load(out / "checkpoints" / f"step_{step:07d}" / "pytorch_model.bin", weights_only=True)


def equal(a, b):
    def same(x, y):
        return torch.equal(x, y) if torch.is_tensor(x) else x == y

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


TRAINING = "loss mse_loss mae_loss vq_loss codebook_loss commitment_loss codebook_usage lr grad_norm rollout_loss"
VALIDATION = "loss mse_loss mae_loss vq_loss codebook_loss commitment_loss codebook_usage"
MONITORED = [f"train/{name}" for name in TRAINING.split()] + [
    f"val/{name}" for name in VALIDATION.split()
]  # the seed's


def test_run_resume_and_what_it_leaves(this, latents, tmp_path):
    """Lost after step 3 (codes began at 2) and resumed equals uninterrupted, bit for bit; all metrics are there."""
    one, two = tmp_path / "one", tmp_path / "two ü"
    assert this.train.main(flags(latents, one, "--flip")) == 0
    shutil.copytree(one, two, symlinks=True)
    shutil.rmtree(two / "checkpoints" / "step_0000006")
    with pytest.raises(ValueError, match="--lr was"):
        this.train.main(flags(latents, two, "--flip", "--resume", "--lr", 1))
    assert this.train.main(flags(latents, two, "--flip", "--resume")) == 0
    assert equal(weights(two), weights(one)) and not equal(weights(two), weights(two, 3))
    steps = [line["step"] for line in logged(two)]
    assert steps == sorted(set(steps)) == [line["step"] for line in logged(one)]
    last = logged(one)[-1]
    assert not [name for name in MONITORED if name not in last]
    more = (
        "psnr_gain action_sensitivity_l1 action_sensitivity_l2 action_sensitivity_cos dsnr codebook_perplexity".split()
    )
    assert not [name for name in more if f"val/{name}" not in last] and "train/tflops" in last
    drawn = {path.stem for path in (one / "figures").glob("*.png")}
    assert drawn == {"curves", "codes", "prediction", "code_scene_grid"}
    for link in ("last", "best"):
        assert this.model.VVAELatentActionVQVAE.from_pretrained(one / "checkpoints" / link).quantizer.started
    with pytest.raises(ValueError, match="holds a run already"):
        this.train.main(flags(latents, two))


def test_codes_wait_until_they_are_used(this, latents, tmp_path, capsys):
    """With a margin out of reach vectors stay continuous to the end, and the run says so; nothing is called best."""
    assert this.train.main(flags(latents, tmp_path / "out", "--margin", 9)) == 0
    assert "the codes never began" in capsys.readouterr().out
    lines = logged(tmp_path / "out")
    assert {line["train/vq_loss"] for line in lines if "train/vq_loss" in line} == {0.0}
    assert [line["step"] for line in lines if "code_gain" in line] == [2, 4, 6]
    assert not (tmp_path / "out" / "checkpoints" / "best").exists()


def test_accumulation_and_amp_train_the_same_model(this, latents, tmp_path):
    """4 micro-steps are one step of the whole batch; bf16 stays close, and its quantiser runs in float32."""
    rare = ["--eval-every", 6, "--margin", 9, "--lr", 1e-3]
    for name, more in (("one", []), ("four", ["--accum", 4]), ("bf16", ["--amp", "bf16"])):
        assert this.train.main(flags(latents, tmp_path / name, *rare, *more)) == 0
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "four").values(), strict=True):
        if torch.is_tensor(a):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    last = [logged(tmp_path / name)[-1]["val/mse_loss"] for name in ("one", "four", "bf16")]
    assert max(last) < 1.05 * min(last)
    assert this.train.main(flags(latents, tmp_path / "codes", "--amp", "bf16", "--eval-every", 6)) == 0
    assert weights(tmp_path / "codes")["quantizer.codebook"].dtype == torch.float32


@pytest.mark.slow
def test_it_learns_to_use_its_codes(this, tmp_path):
    """A bar goes left or right: the frame before cannot tell which, so codes come to be used, and wrong ones hurt."""
    folder = write_moving(tmp_path / "data", 40)
    more = ["--steps", 500, "--eval-every", 500, "--save-every", 500, "--log-every", 100, "--margin", 0.1, "--patch", 2]
    more += ["--check-every", 20, "--batch-size", 16, "--embed-dim", 32, "--lr-end", 2e-3, "--lr", 5e-3]
    words = flags(folder, tmp_path / "out", *more, "--restart-every", 20)
    assert this.train.main([*words, "--val-episodes", *(f"r{n}" for n in range(8))]) == 0
    last = logged(tmp_path / "out")[-1]
    assert last["val/relative"] < 0.5 and last["val/shuffled"] > last["val/relative"] + 0.1
    assert last["val/action_sensitivity_l2"] > 0.05 and last["val/codebook_usage"] == 1


def test_overfit_says_whether_it_got_there(this, latents, tmp_path, capsys):
    """Exit code 0 and an early end once MSE < 0.01 and MAE < 0.05 with codes; 1 if the steps do not suffice."""
    more = ["--overfit", "--patch", 2, "--embed-dim", 32, "--eval-every", 25, "--save-every", 500, "--margin", 0.1]
    long = [*more, "--steps", 600, "--lr", 3e-3, "--check-every", 20, "--log-every", 100]
    assert this.train.main(flags(latents, tmp_path / "good", *long)) == 0
    last = logged(tmp_path / "good")[-1]
    assert last["val/mse_loss"] < 0.01 and last["val/mae_loss"] < 0.05 and last["step"] < 600
    assert "overfit test passed" in capsys.readouterr().out
    assert this.train.main(flags(latents, tmp_path / "bad", *more, "--steps", 2)) == 1
    assert "overfit test FAILED" in capsys.readouterr().out


def test_init_takes_weights_and_codes(this, latents, tmp_path):
    this.train.main(flags(latents, tmp_path / "one"))
    init = tmp_path / "one" / "checkpoints" / "last"
    this.train.main(flags(latents, tmp_path / "two", "--init", init, "--lr", 1e-12, "--weight-decay", 0, "--steps", 1))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two", 1)
    for name in a:
        tracked = name in ("quantizer.mean", "quantizer.spread", "quantizer.used")
        if torch.is_tensor(a[name]) and not tracked:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_a_chunk_with_nan_stops_a_run_with_its_checkpoints_whole(this, latents, tmp_path):
    """Named with file and chunk; once the file is mended the run goes on from its last checkpoint."""
    folder = shutil.copytree(latents, tmp_path / "data")
    with H5(folder / "r0.h5", "a") as file:
        file["embeddings"][3, 0, 1, 0, 0] = np.nan
    quiet = ["--normalise", "none", "--steps", 10, "--save-every", 3, "--eval-every", 10]  # a pass takes 9
    with pytest.raises(ValueError, match="r0.h5: .*NaN or infinity in chunk 3"):
        this.train.main(flags(folder, tmp_path / "out", *quiet))
    shutil.copy(latents / "r0.h5", folder / "mended.h5")  # the run still holds r0.h5 open
    os.replace(folder / "mended.h5", folder / "r0.h5")
    this.train.read_sources.__globals__["opened"].cache_clear()
    assert this.train.main(flags(folder, tmp_path / "out", *quiet, "--resume")) == 0


def test_a_file_that_disappears_in_mid_run_is_named(this, recordings, latents, tmp_path):
    folder = shutil.copytree(latents, tmp_path / "data")
    sequences = this.data.Sequences(recordings.read_sources([str(folder)], val_share=0.0), 4)
    (folder / "r3.h5").unlink()
    with pytest.raises(ValueError, match="r3.h5: .*cannot be read"):
        list(this.data.train_loader(this.data.TrainBatches(sequences, 4), 0, 40))


@pytest.mark.slow
def test_two_ranks_and_micro_steps_give_the_gradient_of_one_process(latents, tmp_path):
    """In the last of 3 steps, after the codes began at 2; reduced once per optimizer step."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(FOLDER)!r}, {str(ROOT)!r}]
import torch, train
clip = torch.nn.utils.clip_grad_norm_
def keep(parameters, limit):
    parameters = list(parameters)
    torch.save([p.grad.clone() for p in parameters], {str(tmp_path)!r} + "/grads_" + sys.argv[1] + ".pt")
    return clip(parameters, limit)
torch.nn.utils.clip_grad_norm_ = keep
assert train.main(sys.argv[2:]) == 0
"""
    )
    late = ["--steps", 3, "--eval-every", 9, "--save-every", 9]
    one = launch(script, "one", *flags(latents, tmp_path / "one", *late))
    two = launch(script, "two", *flags(latents, tmp_path / "two", *late, "--accum", 2), ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (torch.load(tmp_path / f"grads_{name}.pt", weights_only=True) for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    assert logged(tmp_path / "two")[-1]["train/vq_loss"] > 0


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(latents, tmp_path):
    """SIGKILL in mid-run, then --resume: the same weights, bit for bit; SIGTERM saves and exits with 75."""
    more, script = ["--steps", 80, "--save-every", 10, "--eval-every", 40], FOLDER / "train.py"
    assert launch(script, *flags(latents, tmp_path / "one", *more)).returncode == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        out = tmp_path / f"run{int(number)}"
        process = subprocess.Popen([sys.executable, script, *flags(latents, out, *more)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step_0000010").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == code
        assert not (out / "checkpoints" / "step_0000080").exists()
        done = launch(script, *flags(latents, out, *more, "--resume"))
        assert done.returncode == 0, done.stderr
        assert equal(weights(out, 80), weights(tmp_path / "one", 80))
        assert [line["step"] for line in logged(out)] == [line["step"] for line in logged(tmp_path / "one")]


@pytest.mark.slow
def test_errors_are_one_line(latents, tmp_path):
    """From train.py, with and without workers, from data.py and from every verb."""
    broken = shutil.copytree(latents, tmp_path / "broken")
    with H5(broken / "r0.h5", "a") as file:
        file["embeddings"][:] = np.nan
    run = flags(broken, tmp_path / "a", "--normalise", "none")
    cases = [
        (["train.py", *run], "NaN or infinity"),
        (["train.py", *flags(broken, tmp_path / "b", "--normalise", "none", "--workers", 1)], "NaN or infinity"),
        (["train.py", *flags(tmp_path / "absent", tmp_path / "c")], "no such file"),
        (["train.py", *flags(latents, tmp_path / "d", "--sequence-length", 99)], "no sequence of 99"),
        (["data.py", "--data", tmp_path / "absent"], "no such file"),
        (["make_manifest.py", tmp_path / "absent"], "no .h5 files"),
        (["label.py", "--checkpoint", tmp_path, "--data", latents, "--out", tmp_path / "e"], "config.json"),
        (["evaluate.py", "--checkpoint", tmp_path, "--out", tmp_path / "f"], "config.json"),
        (["encode_videos.py", "--data", tmp_path, "--vae", tmp_path, "--out", tmp_path / "g"], "no videos"),
        (["convert_droid.py", "--data", tmp_path, "--out", tmp_path / "h"], "no latent_videos"),
    ]
    for (script, *words), text in cases:
        done = launch(FOLDER / script, *words)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2 and len(lines) == 1 and text in lines[0], (script, done.stderr)


# --- verbs


@pytest.fixture(scope="module")
def checkpoint(this, tmp_path_factory):
    """A tiny model of the `latents` fixture's shape whose codes have begun."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny(this, channels=2, mean=[0.0], std=[1.0])
    model.save_pretrained(folder)
    return folder


def test_labels_are_the_codes_of_the_transitions(this, latents, checkpoint, tmp_path, capsys):
    """Batch size plays no part; a broken recording is named and the others labelled; a second call goes on."""
    label = load("vvae_lam", "label").label
    folder, out = shutil.copytree(latents, tmp_path / "data"), tmp_path / "labels"
    with H5(folder / "r2.h5", "a") as file:
        file["embeddings"][1] = np.nan
    words = ["--checkpoint", str(checkpoint), "--data", str(folder), "--out", str(out), "--device", "cpu"]
    assert label.main([*words, "--batch-size", "4"]) == 1
    assert "left out" in capsys.readouterr().out and not (out / "r2.h5").exists()
    shutil.copy(latents / "r2.h5", folder / "mended.h5")
    os.replace(folder / "mended.h5", folder / "r2.h5")
    label.read_sources.__globals__["opened"].cache_clear()
    assert label.main(words) == 0
    assert "1 recordings labelled, 0 left out, 5 were there already" in capsys.readouterr().out
    model = this.model.VVAELatentActionVQVAE.from_pretrained(checkpoint)
    for n in range(6):
        with H5(latents / f"r{n}.h5") as file, H5(out / f"r{n}.h5") as labels:
            x = file["embeddings"][()].swapaxes(1, 2).reshape(-1, 2, 8, 8)
            codes, vectors = model.encode(x, vectors=True)
            assert np.array_equal(labels["codes"], codes) and labels.attrs["gap"] == 1
            np.testing.assert_allclose(labels["vectors"], vectors, rtol=2e-3, atol=2e-3)
    model.quantizer.started = False
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds labels of"):
        label.main(["--checkpoint", str(tmp_path / "other"), *words[2:]])


@pytest.fixture(scope="module")
def evaluate():
    return load("vvae_lam", "evaluate").evaluate


def test_report_card(this, evaluate, latents, checkpoint, tmp_path):
    """Against the numbers computed here: within and across chunks, rollouts from the first frame, code shares."""
    words = ["--checkpoint", str(checkpoint), "--data", f"a={latents}", "--val-episodes", "r0", "r1", "--steps", "3"]
    assert evaluate.main([*words, "--out", str(tmp_path / "one"), "--device", "cpu"]) == 0
    card = json.loads((tmp_path / "one" / "report.json").read_text())
    model = this.model.VVAELatentActionVQVAE.from_pretrained(checkpoint)
    inside, across, rolled = [], [], []
    for n in (0, 1):
        with H5(latents / f"r{n}.h5") as file:
            x = file["embeddings"][()].swapaxes(1, 2).reshape(-1, 2, 8, 8)
        window = x[:8]  # the one sequence of 8 that fits
        error = np.square(model.predict(window, model.encode(window)) - window[1:]).mean((1, 2, 3))
        inside, across = inside + list(error[::2]), across + list(error[1::2])
        rolled.append(np.square(model.rollout(x[0], model.encode(x[:4])) - x[1:4]).mean((1, 2, 3)))
    one = card["one_step"]
    assert one["within chunk"]["mse"] == pytest.approx(np.mean(inside), rel=1e-3)
    assert one["across chunks"]["mse"] == pytest.approx(np.mean(across), rel=1e-3)
    assert one["mse"] == pytest.approx(np.mean(inside + across), rel=1e-3)
    np.testing.assert_allclose(card["short_rollout"]["mse"]["true"], np.mean(rolled, 0), rtol=1e-3)
    assert card["full_rollout"]["steps"] == 11 and set(card["probes"]) >= {"word", "frame_only", "shuffled_word"}
    assert 0 <= card["transfer"]["agreement"] <= 1 and 1 / 5 <= card["transfer"]["chance"] <= 1
    text = (tmp_path / "one" / "report.md").read_text()
    assert text.count(".png") == len(list((tmp_path / "one" / "figures").glob("*.png"))) == 4
    with H5(tmp_path / "one" / "rollouts" / "r0.h5") as file:
        assert file["embeddings"].shape == (11, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="the test split is empty"):
        evaluate.main([*words, "--out", str(tmp_path / "two"), "--split", "test"])


def test_figures_show_decoded_frames_if_there_is_a_vae(this):
    """One decoded picture per latent frame, whatever the VAE's rate; the colours of latents are their components."""
    figures = load("vvae_lam", "figures").figures

    class FourFramesEach:
        def decode(self, latents):
            assert latents.shape == (5, 3, 8, 8)  # with the first frame, so that the VAE has its context
            return np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)

    figure = figures.prediction(tiny(this), noise(5, 3, 8, 8), FourFramesEach())
    rows = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert rows == ["true", "predicted", "rollout", "change", "error", *(f"{x}, decoded" for x in rows[:3])]
    shown = [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes[20:24]]
    assert shown == [5, 10, 14, 19]
    pictures = figures.colours(noise(6, 4, 8, 8))(noise(2, 4, 8, 8))
    assert pictures.shape == (2, 8, 8, 3) and 0 <= pictures.min() <= pictures.max() <= 1
    assert figures.colours(noise(6, 1, 8, 8))(noise(2, 1, 8, 8)).shape == (2, 8, 8, 3)


@pytest.fixture(scope="module")
def metrics():
    return load("vvae_lam", "metrics").metrics


def test_probe_against_least_squares(metrics):
    """R2 and accuracy of a known linear map, of noise, and of a constant dim; test rows are never fitted."""
    x, test_x, map_ = noise(200, 5), noise(100, 5, seed=2), noise(5, 3, seed=3)
    y, test_y = x @ map_, test_x @ map_
    assert metrics.probe(x, y, test_x, test_y, ridge=1e-6)["r2"] == pytest.approx(1, abs=1e-4)
    shuffled = metrics.probe(x, y[torch.randperm(200)], test_x, test_y)
    assert shuffled["r2"] < 0.1
    flat = torch.cat([y, torch.ones(200, 1)], 1), torch.cat([test_y, torch.ones(100, 1)], 1)
    assert len(metrics.probe(x, flat[0], test_x, flat[1])["r2_per_dim"]) == 3
    classes, test_classes = x[:, :3].argmax(1), test_x[:, :3].argmax(1)
    found = metrics.probe(x, classes, test_x, test_classes)
    assert found["accuracy"] > 0.8
    assert found["chance"] == pytest.approx(torch.bincount(test_classes).max().item() / 100)
    # by hand: ridge on standardised features
    X = (x - x.mean(0)) / x.std(0)
    w = np.linalg.lstsq(np.r_[X, np.sqrt(7) * np.eye(5)], np.r_[(y - y.mean(0)).numpy(), np.zeros((5, 3))], rcond=None)[
        0
    ]
    guess = ((test_x - x.mean(0)) / x.std(0)).numpy() @ w + y.mean(0).numpy()
    r2 = 1 - np.square(guess - test_y.numpy()).mean(0) / np.square(test_y.numpy() - y.mean(0).numpy()).mean(0)
    np.testing.assert_allclose(metrics.probe(x, y, test_x, test_y, ridge=7)["r2_per_dim"], r2, rtol=1e-4)


def test_wrong_codes_are_wrong(metrics):
    """Random codes differ from the true ones in every slot, flipped ones in exactly one."""
    codes = torch.randint(5, (40, 6, 3), generator=torch.Generator().manual_seed(0))
    random, flipped = metrics.wrong_codes(codes, 5)
    assert (random != codes).all() and ((flipped != codes).sum(2) == 1).all()
    assert random.min() == 0 and random.max() == 4


def test_numbers_to_watch(this, metrics):
    """Sensitivity, DSNR, PSNR gain and perplexity from their definitions; a model that ignores codes scores 0."""
    means = dict(true_l1=0.2, true_l2=0.1, true_cos=0.3, random_l1=0.5, random_l2=0.4, random_cos=0.5)
    means |= dict(flipped_l2=0.2, still_l2=1.0, shuffled_l2=0.3)
    found = metrics.summary(means)
    assert found["psnr_gain"] == pytest.approx(10) and found["dsnr"] == pytest.approx(3)
    assert found["action_sensitivity_l2"] == pytest.approx(0.3) and found["relative"] == pytest.approx(0.1)
    used = metrics.codebook_use(torch.tensor([[5, 5, 0, 0], [10, 0, 0, 0]]))
    assert used["codebook_usage"] == 0.5 and used["codebook_perplexity_slot1"] == pytest.approx(2)
    assert used["codebook_perplexity_slot2"] == pytest.approx(1)
    model = tiny(this)
    nn.init.zeros_(model.code.weight)
    found, _ = metrics.assess(model, noise(3, 4, 3, 8, 8))
    assert found["true_l2"] == pytest.approx(found["random_l2"]) == pytest.approx(found["shuffled_l2"])


# --- VAEs


def write_video(path, count=20, size=32, fps=10):
    """A bright square that moves right over a grey ramp."""
    encode = load("vvae_lam", "encode_videos").encode_videos
    video = np.tile(np.linspace(40, 120, size)[:, None, None], (count, 1, size, 3))
    for t in range(count):
        video[t, 8:16, (2 * t) % (size - 8) : (2 * t) % (size - 8) + 8] = 230
    encode.write_video(path, video.astype(np.uint8), fps)
    return path


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Tiny VAEs of diffusers with random weights, saved as users have theirs."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vaes")
    small = dict(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2)
    image = dict(down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4)
    up = dict(up_block_types=("UpDecoderBlock2D",) * 2)
    made = dict(
        cogvideox=diffusers.AutoencoderKLCogVideoX(latent_channels=16, **small),
        wan=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        image=diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, **image, **up),
        svd=diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), **image),
    )
    for name, vae in made.items():
        vae.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def vae():
    return load("vvae_lam", "vae").vae


@pytest.mark.parametrize(
    "name, takes, latents, wrong", [("cogvideox", 8, 2, 9), ("wan", 9, 2, 8), ("image", 3, 3, 0), ("svd", 3, 3, 0)]
)
def test_every_vae_keeps_all_frames_or_says_no(vae, vaes, name, takes, latents, wrong):
    """Frames in, latents out and back to as many frames; a count that the VAE would cut is an error."""
    one = vae.open_vae(vaes / name)
    frames = np.random.default_rng(0).integers(0, 255, (takes, 32, 32, 3), dtype=np.uint8)
    z = one.encode(frames)
    assert z.shape[:2] == (latents, one.mean.numel() if one.mean.numel() > 1 else z.shape[1])
    assert torch.equal(z, one.encode(frames))
    decoded = one.decode(z)
    assert decoded.shape == (takes - one.lead, 32, 32, 3) and decoded.dtype == np.uint8
    if wrong:
        with pytest.raises(ValueError, match=f"not {wrong}"):
            one.encode(frames[:1].repeat(wrong, 0))
    raw = one.module.encode
    x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    if name == "wan":
        config = one.module.config
        mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        expected = (raw(x).latent_dist.mode()[0] - mean) / std
        torch.testing.assert_close(z, expected[:, 1:].transpose(0, 1), rtol=1e-4, atol=1e-4)
    if name == "image":
        expected = raw(x[0].transpose(0, 1)).latent_dist.mode() * one.module.config.scaling_factor
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_causality_of_a_vae_is_measured(vae, vaes):
    """Wan is causal; CogVideoX normalises over the frames of a chunk, so its first latent sees the last frame."""
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    assert vae.open_vae(vaes / "wan").is_causal(frames)
    assert not vae.open_vae(vaes / "cogvideox").is_causal(frames[:8])
    assert vae.open_vae(vaes / "image").is_causal(frames)


def test_videos_become_latents_and_back(recordings, vae, vaes, tmp_path, capsys):
    """Frames beyond a chunk are refused, dropped or repeated; a rerun passes over; other settings are an error."""
    encode = load("vvae_lam", "encode_videos").encode_videos
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    write_video(tmp_path / "videos" / "sub" / "a b.mp4")
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "latents"
    words = ["--data", str(tmp_path / "videos"), "--vae", str(vaes / "cogvideox"), "--out", str(out), "--device", "cpu"]
    assert encode.main(words) == 1
    said = capsys.readouterr().out
    assert "20 frames, but AutoencoderKLCogVideoX takes 8 k: --tail drop leaves out the last 4" in said
    assert "broken.mp4: not a readable video" in said and not list(out.rglob("*.h5"))
    for tail, chunks in (("drop", 2), ("repeat", 3)):
        here = [*words[:5], str(tmp_path / tail), *words[6:], "--tail", tail]
        assert encode.main(here) == 1  # broken.mp4
        recording = recordings.inspect(tmp_path / tail / "sub" / "a b.h5")
        assert (recording.chunks, recording.chunk_frames, recording.shape) == (chunks, 2, (16, 4, 4))
        about = recording.attributes
        assert about["vae"] == "AutoencoderKLCogVideoX" and about["fps"] == 2.5 and not about["causal"]
        assert (about["frames_dropped"], about["frames_repeated"]) == ((4, 0) if tail == "drop" else (0, 4))
        assert encode.main(here) == 1 and "there already" in capsys.readouterr().out
    rate, count, images = encode.read_video(tmp_path / "videos" / "sub" / "a b.mp4")
    images, one = np.stack(list(images)), vae.open_vae(vaes / "cogvideox")
    assert (rate, count) == (10, 20)
    expected = torch.cat([one.encode(images[:8]), one.encode(images[8:16])]).numpy()
    recording = recordings.inspect(tmp_path / "drop" / "sub" / "a b.h5")
    np.testing.assert_allclose(recording.read([0, 1, 2, 3]), expected, rtol=2e-3, atol=2e-3)
    assert encode.main([*words[:5], str(tmp_path / "drop"), *words[6:], "--tail", "repeat"]) == 1
    assert "there already, with tail drop" in capsys.readouterr().out
    video = tmp_path / "decoded.mp4"
    assert encode.main(["--decode", str(recording.path), "--vae", str(vaes / "cogvideox"), "--out", str(video)]) == 0
    assert encode.read_video(video)[:2] == (10, 16)


def test_frames_are_resampled_and_cropped(tmp_path):
    """10 Hz to 5 Hz takes every second frame, to 20 Hz every one twice; the crop keeps proportions."""
    encode = load("vvae_lam", "encode_videos").encode_videos
    path = write_video(tmp_path / "a.mp4")
    every = list(encode.read_video(path)[2])
    rate, count, half = encode.read_video(path, fps=5)
    assert (rate, count) == (5, 10) and all(np.array_equal(a, b) for a, b in zip(half, every[::2], strict=True))
    double = list(encode.read_video(path, fps=20)[2])
    assert len(double) == 40 and np.array_equal(double[7], every[3])
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 200
    assert (encode.resize(image, 10, 10) == 200).all()


@pytest.mark.slow
def test_killed_while_encoding_leaves_nothing_half_written(vaes, tmp_path):
    """kill -9 in mid-run: whole files stay, none is half-written, and the same command goes on."""
    (tmp_path / "videos").mkdir()
    for n in range(12):
        write_video(tmp_path / "videos" / f"{n:02d}.mp4", count=16)
    out = tmp_path / "out"
    command = [sys.executable, FOLDER / "encode_videos.py", "--data", tmp_path / "videos", "--vae", vaes / "cogvideox"]
    command = [str(word) for word in [*command, "--out", out, "--device", "cpu"]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.h5"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    (out / ".11.h5.99999.tmp").write_bytes(b"half")  # what a kill inside a file leaves
    whole = {path: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert 0 < len(whole) < 12
    done = launch(*command[1:])
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.h5"))) == 12 and not list(out.glob(".*"))
    assert all(path.stat().st_mtime_ns == before for path, before in whole.items())


STUB = """
import torch
class VAE(torch.nn.Module):
    def __init__(self, ddconfig, ppconfig):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
    def encode(self, x, sample_posterior=True):
        assert not sample_posterior
        return self.gain * x[:, :1, ::4, ::8, ::8].repeat(1, 16, 1, 1, 1), None
    def decode(self, z):
        return z[:, :3].repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
"""


def test_videovae_plus_from_a_checkout(vae, tmp_path):
    """A stand-in with the repository's layout and interface: its config names the class, its .ckpt is loaded safely."""
    checkout = tmp_path / "VideoVAEPlus"
    (checkout / "configs" / "inference").mkdir(parents=True)
    (checkout / "stub_models").mkdir()
    (checkout / "stub_models" / "vae.py").write_text(STUB)
    params = "    ckpt_path: absent.ckpt\n    ddconfig: {}\n    ppconfig: {}\n"
    config = f"model:\n  target: stub_models.vae.VAE\n  params:\n{params}"
    (checkout / "configs" / "inference" / "config_16z.yaml").write_text(config)
    torch.save(dict(state_dict=dict(gain=torch.tensor(3.0))), tmp_path / "w.ckpt")
    one = vae.open_vae(tmp_path / "w.ckpt", checkout=checkout)
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    z = one.encode(frames)
    assert z.shape == (2, 16, 2, 2) and one.decode(z).shape == (8, 16, 16, 3)
    expected = 3 * (frames[::4, ::8, ::8, 0] / 127.5 - 1)
    np.testing.assert_allclose(z[:, 5], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="takes 4 k"):
        one.encode(frames[:7])
    (tmp_path / "w.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be opened"):
        vae.open_vae(tmp_path / "w.ckpt", checkout=checkout)
    with pytest.raises(ValueError, match="no readable config_16z.yaml"):
        vae.open_vae(tmp_path / "w.ckpt", checkout=tmp_path)


# --- real data


def test_real_droid_latents_and_states(recordings, tmp_path):
    """The converter's files hold the published latents, and the state changes that go with them."""
    root = shared("droid_ctrlworld") / "original" / "droid_subset"
    assert load("vvae_lam", "convert_droid").convert_droid.main(["--data", str(root), "--out", str(tmp_path)]) == 0
    found = {r.id: r for r in recordings.read_sources([f"droid={tmp_path}"])}
    assert set(found) == {"1_cam0", "3_cam0", "6_cam0", "6_cam1", "6_cam2"}
    published = np.load(root.parents[1] / "converted" / "droid_train_3_cam0_latents.npy")
    assert found["3_cam0"].shape == (4, 24, 40) and len(found["3_cam0"]) == 80
    assert np.array_equal(found["3_cam0"].read(np.arange(80)), published)
    states = np.asarray(json.loads((root / "annotation" / "train" / "3.json").read_text())["states"], np.float32)
    np.testing.assert_allclose(found["3_cam0"].actions()[:-1], states[1:] - states[:-1], atol=1e-6)
