"""vvae_lam: causality, the one decoder, the codebook, the readers, the batches, the loop, the verbs and the VAEs."""

import gzip
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, launch, load, log_of, shared, weights_of
from matplotlib.figure import Figure
from torch import nn

FOLDER = ROOT / "vvae_lam"
H5 = partial(h5py.File, locking=False)  # HDF5 refuses to open a file twice with different locking
DataError = load("vvae_lam").train.common.DataError


def tiny(this, quantizing=True, **kwargs):
    """A model whose parameters all say something, with random codes."""
    torch.manual_seed(0)
    sizes = dict(channels=3, height=8, width=8, patch_dim=8, embed_dim=16, encoder_depth=1, decoder_depth=2)
    sizes |= dict(num_heads=2, codebook_dim=6, num_embeddings=5, mean=[0.5] * 3, std=[2.0] * 3)
    model = this.model.VVAELatentActionVQVAE(this.model.Config(**{**sizes, **kwargs}))
    for parameter in model.parameters():  # the head starts at zero
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.quantizer.codebook, std=0.3)
    model.quantizer.quantizing = quantizing
    return model.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- causality


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
        mixed = torch.cat([codes[:, : t + 1], (codes[:, t + 1 :] + 1) % 5], 1)
        after = model.predict(changed, mixed)
        torch.testing.assert_close(after[:, : t + 1], predicted[:, : t + 1], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t + 1], predicted[:, t + 1])


def test_a_code_sees_its_two_frames_alone(this):
    """Its gradient beyond them is exactly zero; with gap=2 it is the code of a clip of frames t and t + 2."""
    model, x = tiny(this), noise(6, 3, 8, 8)
    clip = x[None, :5].clone().requires_grad_()
    model.encode_transitions(clip)[0, 1].sum().backward()
    size = clip.grad[0].flatten(1).norm(dim=1)
    assert size[[0, 3, 4]].max() == 0 and size[[1, 2]].min() > 1e-3
    codes = model.encode(x, gap=2)
    assert codes.shape == (4, 3)
    for t in range(4):
        assert torch.equal(codes[t], model.encode(x[[t, t + 2]])[0])


# --- one decoder


@pytest.mark.parametrize("context", [3, 8])
def test_cached_steps_equal_the_parallel_pass(this, context):
    """Also where clips are longer than the context: then both attend to a window of it."""
    model, x = tiny(this, context=context), noise(2, 6, 3, 8, 8)
    z = noise(2, 6, 3, 6)
    position = torch.arange(6).expand(2, -1)
    parallel = model.decode(x, z, position)[0]
    cache, steps = None, []
    for t in range(6):
        frame, cache = model.decode(x[:, t : t + 1], z[:, t : t + 1], position[:, t : t + 1], cache)
        steps.append(frame)
    torch.testing.assert_close(torch.cat(steps, 1), parallel, rtol=0, atol=1e-5)
    far = x.clone()
    far[:, 0] += 1
    moved = (model.decode(far, z, position)[0] - parallel).abs().amax((0, 2, 3, 4)) > 1e-4
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


def test_rollout_loss_equals_the_loop_written_out(this):
    """Each sample goes on from its own anchor, on its own first prediction, which is detached."""
    model, x = tiny(this).train(), noise(3, 6, 3, 8, 8)
    anchor = torch.tensor([0, 2, 1])
    metrics = model(dict(latents=x, anchor=anchor))[1]
    normal = (x - model.mean) / model.std
    z = model.quantizer.lookup(model.encode(x))
    total = 0.0
    for i, t in enumerate(anchor.tolist()):
        frames = list(normal[i, : t + 1])
        for step in range(2):
            position = torch.arange(len(frames))[None]
            after = model.decode(torch.stack(frames)[None], z[i : i + 1, : len(frames)], position)[0][0, -1]
            frames.append(after.detach())
            total += (after - normal[i, t + step + 1]).square().mean().item() if step else 0.0
    assert metrics["rollout_loss"].item() == pytest.approx(total / 3, rel=1e-4)


def test_starts_as_the_copy_baseline(this):
    """The head is zero: the first prediction is the frame itself. Scenes at rest all have the same vectors."""
    config = this.model.Config(3, 8, 8, 4, 8, 16, 1, 1, 2)
    model, x = this.model.VVAELatentActionVQVAE(config), noise(2, 4, 3, 8, 8)
    mse = model(dict(latents=x))[1]["mse_loss"]
    assert mse.item() == pytest.approx((x[:, 1:] - x[:, :-1]).square().mean().item(), rel=1e-5)
    one, other = (noise(2, 1, 3, 8, 8, seed=s).expand(-1, 4, -1, -1, -1) for s in (4, 5))
    torch.testing.assert_close(*(model.encode_transitions(rest) for rest in (one, other)))


def test_optical_flow_of_a_shift(this):
    """Smooth latents that move 0.3 to the right and 0.2 up: that flow in every cell, and in the right one alone."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")

    def picture(across, down):
        waves = [torch.sin(0.6 * (x - across) + 0.9 * c) + torch.cos(0.7 * (y - down) + c) for c in range(3)]
        return torch.stack(waves)[None, None]

    layers = load("vvae_lam", "layers").layers
    flow = layers.optical_flow(picture(0, 0), picture(0.3, -0.2)).unflatten(2, (2, 2, 3))[0, 0] * layers.UNIT
    assert layers.cells(16, 24) == (2, 3)
    torch.testing.assert_close(flow, torch.tensor([0.3, -0.2]).view(2, 1, 1).expand(2, 2, 3), rtol=0, atol=0.03)
    half = picture(0, 0)
    half[..., 16:] = picture(0.3, 0)[..., 16:]
    flow = layers.optical_flow(picture(0, 0), half).unflatten(2, (2, 2, 3))[0, 0] * layers.UNIT
    assert flow[0, :, :2].abs().max() < 0.05 < 0.2 < flow[0, :, 2].min()


def test_codes_tell_the_flow(this):
    """flow_loss is the error of a linear map from the codes' vectors; a code still sees its two frames alone."""
    model, x = tiny(this, flow=True), noise(2, 5, 3, 8, 8)
    z = model.quantizer.lookup(model.encode(x)).flatten(2)
    normal = model.normalize(x)
    error = model.to_flow(z) - this.model.optical_flow(normal[:, :-1], normal[:, 1:])
    loss = model(dict(latents=x))[1]["flow_loss"]
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    changed = torch.cat([x[:, :2], x[:, 2:] + noise(2, 3, 3, 8, 8, seed=5)], 1)
    assert torch.equal(model.encode(changed)[:, 0], model.encode(x)[:, 0])


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 6, 10), (1, 5, 7), (16, 16, 16)])
def test_any_shape_trains_and_every_parameter_gets_a_gradient(this, shape):
    model = tiny(this, channels=shape[0], height=shape[1], width=shape[2], mean=[0.0], std=[1.0], flow=True).train()
    loss, _ = model(dict(latents=noise(2, 4, *shape), anchor=torch.tensor([0, 1])))
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert model.predict(noise(2, 3, *shape), torch.zeros(2, 2, 3, dtype=torch.int64)).shape == (2, 2, *shape)


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
    with pytest.raises(DataError, match="3x3 or more, not 2x8"):
        tiny(this, flow=True, height=2)


def test_checkpoint_round_trip_and_what_it_refuses(this, tmp_path):
    """Arrays in, arrays out; the same codes after save and load; another robot's sizes, corrupt files are named."""
    model, x = tiny(this), noise(2, 4, 3, 8, 8).numpy()
    model.save_pretrained(tmp_path)
    again = this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)
    assert isinstance(again.encode(x), np.ndarray) and np.array_equal(again.encode(x), model.encode(x))
    assert not again.training and again.quantizer.quantizing
    with pytest.raises(DataError, match="num_embeddings is 5, but 7 here"):
        tiny(this, num_embeddings=7).load_pretrained(tmp_path)
    tiny(this, commitment_weight=9.0, gap=2).load_pretrained(tmp_path)  # what the weights do not depend on may differ
    tiny(this, quantizing=False).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="before quantization began"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path).encode(x)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be loaded"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)
    for text in ('{"colour": 1}', '{"patch": "x"}', '{"patch": 0}', '{"encoder_depth": 100000}', '{"num_heads": true}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match="config.json: not a configuration"):
            this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"mean": ["x"]}')
    with pytest.raises(DataError, match="no model can be built"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)
    tiny(this).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(embed_dim=65536)))  # 50 GB of weights
    with pytest.raises(DataError, match="cannot be loaded into this model"):
        this.model.VVAELatentActionVQVAE.from_pretrained(tmp_path)


# --- codebook


@pytest.fixture(scope="module")
def quantizer():
    return load("vvae_lam", "quantizer").quantizer


def test_quantizer_against_brute_force(quantizer):
    """Nearest code by the definition, in the decoder's units; straight-through gradient; commitment loss. Before
    quantization vectors pass unchanged."""
    torch.manual_seed(0)
    vq, z = quantizer.VectorQuantizer(4, 2, 3).train(), noise(5, 2, 3, seed=3).requires_grad_()
    q, codes, commitment = vq(z)
    assert torch.equal(q, z) and codes is None and commitment == 0 and vq.ema_update() == {}
    vq.quantizing = True
    nn.init.normal_(vq.codebook)
    vq.mean.copy_(noise(2, 3))
    vq.scale.copy_(torch.tensor([[0.5], [2.0]]))
    q, codes, commitment = vq(z)
    aligned = (z - vq.mean) * vq.scale
    for n in range(5):
        for s in range(2):
            assert codes[n, s] == (vq.codebook[s] - aligned[n, s]).square().sum(1).argmin()
            torch.testing.assert_close(q[n, s], vq.codebook[s, codes[n, s]])
    assert commitment.item() == pytest.approx((q - aligned).square().mean().item(), rel=1e-5)
    q.sum().backward()
    torch.testing.assert_close(z.grad, vq.scale.expand(5, 2, 3))


def test_vectors_that_shrink_do_not_take_the_codes_with_them(quantizer):
    """Mean and deviation are tracked: vectors ten times smaller keep their codes, and the decoder gets the same."""
    vq, z = quantizer.VectorQuantizer(6, 2, 3).train(), noise(60, 2, 3)
    vq.init_codebook(z, seed=0)
    before, codes, _ = vq(z)
    vq.ema_update()
    for step in range(800):
        vq(z * 0.1 ** min(1.0, step / 600))
        vq.ema_update()
    after, again, _ = vq(z / 10)
    assert (codes == again).float().mean() > 0.9
    assert (after - before).square().mean() < 0.1 * before.var()


def test_dead_codes_share_the_vectors_of_the_most_used(quantizer):
    """A code that no vector is near moves to where vectors are after some steps, and all codes are in use."""
    vq, z = quantizer.VectorQuantizer(4, 1, 2).train(), noise(200, 1, 2)
    vq.init_codebook(z, seed=0)
    vq.codebook[0, 3] = 900.0
    restarts = 0
    for _ in range(200):
        vq(z)
        restarts += vq.ema_update(seed=0)["restarts"]
    assert restarts >= 1 and len(vq.nearest(z).unique()) == 4
    again = quantizer.VectorQuantizer(4, 1, 2)
    again.load_state_dict(vq.state_dict())
    assert again.quantizing and again.age == 200


def test_one_nan_forward_leaves_the_codebook_as_it_was(quantizer):
    vq, z = quantizer.VectorQuantizer(4, 2, 3).train(), noise(50, 2, 3)
    vq.init_codebook(z, seed=0)
    before = {name: value.clone() for name, value in vq.state_dict().items() if torch.is_tensor(value)}
    vq(torch.full_like(z, torch.nan))
    assert vq.ema_update() == {}
    assert all(torch.equal(vq.state_dict()[name], value) for name, value in before.items())
    vq(z)
    assert vq.ema_update()["codebook_usage"] == 1 and vq.codebook.isfinite().all()


# --- recordings and batches


def write_h5(path, latents, chunk_frames=2, key="embeddings", attributes=(), **more):
    """Latents (T, C, H, W) in chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = latents.reshape(-1, chunk_frames, *latents.shape[1:]).swapaxes(1, 2)
    with H5(path, "w") as file:
        file.create_dataset(key, data=chunks, **more)
        file.attrs.update({"causal": True, **dict(attributes)})
    return path


def frames(count, channels=2, size=4, seed=0):
    """Latents (count, C, H, W); frame t's values lie in [t, t + 1)."""
    values = np.random.default_rng(seed).random((count, channels, size, size))
    return (values + np.arange(count)[:, None, None, None]).astype(np.float32)


def test_recordings_that_begin_alike_are_two(this, tmp_path):
    """Such as episodes of a simulator, which begin with the same frames."""
    one = frames(12)
    two = one.copy()
    two[-1] += 1
    marks = {
        load("vvae_lam", "recordings").recordings.inspect(write_h5(tmp_path / f"{i}.h5", x)).fingerprint()
        for i, x in enumerate((one, two, one))
    }
    assert len(marks) == 2


@pytest.fixture(scope="module")
def loaded():
    return load("vvae_lam", "recordings")


@pytest.fixture(scope="module")
def recordings(loaded):
    return loaded.recordings


@pytest.fixture(scope="module")
def sources(loaded):
    return loaded.data


@pytest.mark.parametrize("chunk_frames", [1, 2])
@pytest.mark.parametrize("storage", [{}, dict(compression="gzip", chunks=True), dict(dtype=np.float16)])
def test_frames_are_read_as_they_were_written(recordings, tmp_path, chunk_frames, storage):
    """Compressed or half precision, any increasing choice of frames; without `causal` the last of each chunk."""
    x = frames(24)
    recording = recordings.inspect(write_h5(tmp_path / "a.h5", x, chunk_frames, **storage))
    expected = x.astype(storage.get("dtype", np.float32)).astype(np.float32)
    assert len(recording) == 24 and recording.shape == (2, 4, 4)
    for chosen in ([23], [3, 4, 5], [1, 4, 7, 10], [0, 5, 7, 22], list(range(24))):
        assert np.array_equal(recording.read(chosen), expected[chosen])
    path = write_h5(tmp_path / "b.h5", x, chunk_frames, attributes=dict(causal=False), **storage)
    last, strict = expected[chunk_frames - 1 :: chunk_frames], recordings.inspect(path)
    assert len(strict) == len(last) and np.array_equal(strict.read(np.arange(len(last))), last)
    array(tmp_path / "c.h5", x)  # per-frame latents without a time axis
    assert np.array_equal(recordings.inspect(tmp_path / "c.h5").read([1, 4]), x[[1, 4]])


def array(path, x, **attributes):
    with H5(path, "w") as file:
        file["embeddings"] = x
        file.attrs.update(attributes)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: write_h5(p, frames(4), key="latents"), "no data set `embeddings`, only latents"),
        (lambda p: array(p, np.zeros((4, 2, 8))), "has shape"),
        (lambda p: array(p, np.zeros((0, 2, 2, 4, 4))), "has shape"),
        (lambda p: array(p, np.zeros((4, 2, 2, 4, 4), int)), "floating|float16"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n truncated"), "not a whole HDF5 file"),
        (lambda p: p.write_bytes(write_h5(p, frames(40)).read_bytes()[:3000]), "not a whole HDF5 file"),
        (lambda p: p.write_bytes(b""), "an empty file"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda p: write_h5(p, frames(4, channels=3)), r"C, H, W is \(3"),
        (lambda p: array(p, np.ones((4, 2, 16, 4, 4))), "look like"),
        (lambda p: array(p, np.ones((8, 24, 40, 4))), "channels last"),
        (lambda p: array(p, np.ones((4, 2, 2, 4, 4)), axes="NTCHW"), "axes` is NTCHW"),
        (lambda p: write_h5(p, frames(4), attributes=dict(vae="AutoencoderKLWan")), "latents of several VAEs"),
        (lambda p: write_h5(p, frames(4), attributes=dict(fps="8 fps")), "`fps` is 8 fps"),
        (lambda p: write_h5(p, frames(4), attributes=dict(causal="no")), "`causal` is no"),
    ],
)
def test_broken_files_are_named(sources, tmp_path, capsys, damage, message):
    """Wrong key, rank, type, axes, VAE, truncated: one error that names the file; make_manifest.py leaves it out."""
    write_h5(tmp_path / "a.h5", frames(4))
    write_h5(tmp_path / "b.h5", frames(4))
    damage(tmp_path / "ü c.h5")
    with pytest.raises(DataError, match=f"ü c.h5: .*({message})"):
        sources.read_sources([str(tmp_path)])
    assert load("vvae_lam", "make_manifest").make_manifest.main([str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["left_out"] == 1 and "ü c.h5" in capsys.readouterr().out
    assert {r.id for r in sources.read_sources([str(tmp_path)])} == {"a", "b"}


def test_chunks_that_cannot_be_trained_on_are_named(recordings, tmp_path):
    """Chunks without data, virtual data sets without their source, zeros or NaN inside, a file that disappeared."""
    with H5(tmp_path / "half.h5", "w") as file:
        data = file.create_dataset("embeddings", (8, 2, 2, 4, 4), np.float32, chunks=(1, 2, 2, 4, 4))
        data[:3] = 1
    with pytest.raises(DataError, match="half.h5: 5 of 8 chunks were never written"):
        recordings.inspect(tmp_path / "half.h5")
    layout = h5py.VirtualLayout((4, 2, 2, 4, 4), np.float32)
    layout[:] = h5py.VirtualSource(str(tmp_path / "gone.h5"), "embeddings", (4, 2, 2, 4, 4))
    with H5(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("embeddings", layout)
    with pytest.raises(DataError, match="1 source files are not there .*gone.h5"):
        recordings.inspect(tmp_path / "virtual.h5")
    for value, what in ((0, "nothing but zeros"), (np.nan, "NaN or infinity")):
        x = frames(8)
        x[4:6] = value
        with pytest.raises(DataError, match=f"{what[:3]}.h5: .*{what} in chunk 2"):
            recordings.inspect(write_h5(tmp_path / f"{what[:3]}.h5", x)).read(np.arange(8))
    gone = recordings.inspect(write_h5(tmp_path / "a.h5", frames(8)))
    gone.path.unlink()
    with pytest.raises(DataError, match="a.h5: .*cannot be read"):
        gone.read([0])


def test_how_recordings_are_read_is_said(sources, tmp_path):
    """The axes, frame rates that differ, and that only latents which have seen nothing later are used."""
    for n, fps in enumerate((2.0, 2.0, 7.5)):
        write_h5(tmp_path / "a" / f"{n}.h5", frames(4), attributes=dict(fps=fps))
    write_h5(tmp_path / "b" / "b.h5", frames(8), attributes=dict(causal=False))
    rates, strict = ("\n".join(sources.describe_recordings(sources.read_sources([str(tmp_path / n)]))) for n in "ab")
    assert "frame rates of the recordings differ: 2 (2), 7.5 (1)" in rates and "C 2, H 4, W 4" in rates
    assert "of each chunk only the last latent is used" in strict and "only the last" not in rates


def test_motion_of_a_transition(recordings, tmp_path):
    """Sums of actions and differences of states over the gap, also where only the last latent of a chunk is used."""

    def motion(gap, causal=True, **rows):
        path = write_h5(tmp_path / "a.h5", frames(8), attributes=dict(causal=causal))
        with H5(path, "a") as file:
            for name, values in rows.items():
                file[name] = values
        return recordings.inspect(path).motion(gap)

    floats, classes = np.arange(8, dtype=np.float32), np.arange(8)
    states = np.stack([np.arange(8.0) ** 2, [3.0, 3.1, -3.1, -3.0, -2.9, -2.8, -2.7, -2.6]], 1)
    assert motion(1) == (None, None)
    found, name = motion(3, actions=floats)
    assert name == "actions" and found[:, 0].tolist() == [0 + 1 + 2, 6, 9, 12, 15]
    assert motion(1, causal=False, actions=floats)[0][:, 0].tolist() == [1 + 2, 3 + 4, 5 + 6]
    found, name = motion(1, causal=False, actions=floats, states=states)
    assert name == "states" and found[:, 0].tolist() == [9 - 1, 25 - 9, 49 - 25]
    np.testing.assert_allclose(found[:, 1], [2 * np.pi - 6.1, 0.2, 0.2], atol=1e-9)  # 3.1 -> -3.0 is a small turn
    assert motion(1, causal=False, actions=classes) == (None, None)  # class numbers are of one step only
    assert motion(1, actions=classes)[0].tolist() == list(range(7))
    assert motion(1, actions=np.stack([classes, classes], 1))[0].tolist() == [[n, n] for n in range(7)]
    assert np.isfinite(motion(1, states=np.where(floats == 2, np.inf, floats))[0]).sum() == 5
    for rows in (np.arange(7), np.array([b"left"] * 8)):
        with pytest.raises(DataError, match="a row per latent frame"):
            motion(1, actions=rows)


def test_links_capitals_hidden_files_and_paths_with_an_equals_sign(sources, tmp_path, monkeypatch):
    """Linked folders are searched, once; .H5 counts; ._ files of a Mac do not; a path that is there is a path."""
    for name in ("lr=0.1/a.h5", "lr=0.1/B.H5", "elsewhere/c.hdf5"):
        write_h5(tmp_path / name, frames(4, seed=len(name)))
    (tmp_path / "lr=0.1" / "._a.h5").write_bytes(b"mac")
    (tmp_path / "lr=0.1" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "lr=0.1")
    monkeypatch.chdir(tmp_path)
    for word, name in ((str(tmp_path / "lr=0.1"), "lr=0.1"), ("lr=0.1", "lr=0.1"), ("x=lr=0.1", "x")):
        found = sources.read_sources([word])
        assert {r.id for r in found} == {"a", "B", "link/c"} and {r.source for r in found} == {name}
    with pytest.raises(DataError, match="NAME=PATH"):
        sources.read_sources(["lr=0.2"])
    write_h5(tmp_path / "lr=0.1" / "a.hdf5", frames(4))
    with pytest.raises(DataError, match="two files are called a"):
        sources.read_sources(["lr=0.1"])


def test_split_by_manifest_by_name_and_by_hash(sources, tmp_path):
    """The split belongs to the episode: other names of the source change nothing, its cameras stay together."""
    for n in range(12):
        for camera in "xy":
            about = dict(episode=f"r{n:02d}")
            write_h5(tmp_path / "d" / f"r{n:02d}_{camera}.h5", frames(4, seed=n), attributes=about)
        write_h5(tmp_path / "numbers" / f"{n:03d}.h5", frames(4, seed=n))
    (tmp_path / "empty").mkdir()
    data, other = ([f"{name}={tmp_path / 'd'}"] for name in ("d", "other"))

    def held_out(data=data, **how):
        return {r.id for r in sources.read_sources(data, **how) if r.split == "validation"}

    def both(*numbers):
        return {f"r{n:02d}_{camera}" for n in numbers for camera in "xy"}

    by_hash = [n for n in range(12) if sources.episode_hash(f"r{n:02d}") < 0.3]
    assert 0 < len(by_hash) < 12
    assert held_out(val_share=0.3) == held_out(other, val_share=0.3) == both(*by_hash)
    assert held_out(val_episodes=["r03", "d=r05", "r07_x"]) == both(3, 5) | {"r07_x"}
    assert held_out(val_share=0.0) == set()
    assert held_out([str(tmp_path / "numbers")], val_episodes=["2-3,5"]) == {"002", "003", "005"}
    alone = write_h5(tmp_path / "alone.h5", frames(4), attributes=dict(episode="e"))
    assert held_out([str(alone)], val_share=1) == set()  # one episode alone is trained on
    manifest, nothing = tmp_path / "m.json", tmp_path / "n.json"
    nothing.write_text('{"splits": {"train": []}}')
    splits = dict(train=["r00_x.h5"], val=["/elsewhere/r01_x.h5"], test=["r02_x"])  # written on another machine
    manifest.write_text(json.dumps(dict(splits=splits)))
    found = {r.id: r.split for r in sources.read_sources(data, manifest=manifest)}
    assert found == dict(r00_x="train", r01_x="validation", r02_x="test")
    manifest.write_text(json.dumps(dict(splits=splits | dict(train=["r00_x.h5", "gone.h5", "gone2.h5"]))))
    for words, how, message in (
        (data, dict(manifest=manifest), "2 files are not there, the first is gone.h5"),
        (data, dict(manifest=tmp_path / "d"), "not a manifest"),
        (data, dict(manifest=nothing), "its splits are empty"),
        (["d="], {}, "no such file or folder"),
        (data, dict(val_episodes=["r99"]), "no episode 'r99'"),
        ([str(tmp_path / "absent")], {}, "no such file or folder"),
        ([str(tmp_path / "empty")], {}, "no .h5 files"),
        ([*data, f"d={tmp_path / 'empty'}"], {}, "two sources are called d"),
    ):
        with pytest.raises(DataError, match=message):
            sources.read_sources(words, **how)


def test_a_checkpoint_knows_its_recordings_by_content(sources, tmp_path):
    """Renamed, moved and doubled files keep their split; new and missing ones are told."""
    for n in range(4):
        write_h5(tmp_path / "d" / f"{n}.h5", frames(4, seed=n))
    table = sources.split_of(sources.read_sources([str(tmp_path / "d")], val_episodes=["2"]))
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "d" / "2.h5", tmp_path / "moved" / "other.h5")
    shutil.copy(tmp_path / "d" / "1.h5", tmp_path / "moved" / "copy.h5")
    shutil.move(tmp_path / "d" / "1.h5", tmp_path / "moved" / "name.h5")
    write_h5(tmp_path / "moved" / "1.h5", frames(4, seed=9))
    found = sources.read_sources([str(tmp_path / "moved")])
    lines = "\n".join(sources.restore_split(found, json.loads(json.dumps(table))))
    assert {r.id: r.split for r in found} == {"other": "validation", "name": "train", "copy": "train", "1": "new"}
    assert "1 recordings are new" in lines and "2 recordings of the run are gone" in lines


def test_manifest_is_seeded_and_counts(tmp_path):
    """8:1:1 by recording, the same for the same seed; counts of frames are right."""
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
    assert one["counts"]["train"]["frames"] == sum(4 + 2 * (int(name[1:3]) % 5) for name in one["splits"]["train"])
    assert len(manifest("--train-ratio", "1", "--val-ratio", "0", "--test-ratio", "0")["splits"]["train"]) == 20
    with pytest.raises(SystemExit):
        make.main([str(tmp_path), "--train-ratio", "0.5"])


def test_sequences_cover_every_window(this, recordings, tmp_path):
    found = [recordings.inspect(write_h5(tmp_path / f"{n}.h5", frames(n))) for n in (4, 10, 8)]
    sequences = this.data.Sequences(found, length=4, gap=2, stride=1)
    starts = [(owner, first) for owner, first in zip(sequences.owner.tolist(), sequences.first.tolist(), strict=True)]
    assert starts == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]  # 7 frames are needed
    assert np.array_equal(sequences[1], frames(10)[[1, 3, 5, 7]])
    assert len(this.data.Sequences(found, 4, stride=3)) == 1 + 3 + 2


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, recordings, tmp_path):
    found = [recordings.inspect(write_h5(tmp_path / "a.h5", frames(30)))]
    sequences = this.data.Sequences(found, 4)
    whole = this.data.TrainBatches(sequences, 8, seed=3)
    for accum, world in ((2, 1), (1, 2), (2, 2)):
        ranks = [this.data.TrainBatches(sequences, 8, 3, accum, rank, world) for rank in range(world)]
        for step in (0, 5):
            parts = [ranks[rank][step * accum + micro] for micro in range(accum) for rank in range(world)]
            for key in ("latents", "anchor"):
                assert torch.equal(torch.cat([part[key] for part in parts]), whole[step][key])
            assert torch.equal(ranks[-1].head(step, 11)[:8], whole[step]["latents"])
    with pytest.raises(DataError, match="no sequence of 40 latent frames"):
        this.data.TrainBatches(this.data.Sequences(found, 40), 8)


def test_every_sequence_comes_once_per_pass(this, recordings, tmp_path):
    sequences = this.data.Sequences([recordings.inspect(write_h5(tmp_path / "a.h5", frames(30)))], 3)  # 28 of them
    batches = this.data.TrainBatches(sequences, 7, seed=1)
    first = [int(x[0, 0, 0, 0]) for step in range(4) for x in batches[step]["latents"]]
    second = [int(x[0, 0, 0, 0]) for step in range(4, 8) for x in batches[step]["latents"]]
    assert sorted(first) == sorted(second) == list(range(28)) and first != second
    anchors = torch.cat([batches[step]["anchor"] for step in range(20)])
    assert anchors.min() == 0 and anchors.max() == 3 - 2 - 1


def test_validation_is_shared_without_repeats(this, recordings, tmp_path):
    found = [recordings.inspect(write_h5(tmp_path / f"{n}.h5", frames(n) + 100 * n), "d") for n in (10, 14)]
    for recording in found:
        recording.split = "validation"
    seen = []
    for rank in range(2):
        for latents in this.data.validation_loaders(found, 4, 1, 2, rank, 2)["d"]:
            seen += [int(x[t, 0, 0, 0]) for x in latents for t in range(3)]
    assert sorted(seen) == [*range(1000, 1009), *range(1400, 1412)]  # a tail shorter than a sequence is left out


def test_demo_is_in_the_layout_of_the_data_and_is_not_written_twice(tmp_path, recordings):
    demo = load("vvae_lam", "demo").demo
    demo.ABOUT = dict(demo.ABOUT, recordings=3)
    demo.write(tmp_path / "d")
    files = sorted((tmp_path / "d").glob("*.h5"))
    before = [file.stat().st_mtime_ns for file in files]
    demo.write(tmp_path / "d")
    assert [file.stat().st_mtime_ns for file in files] == before and len(files) == 3
    recording = recordings.inspect(files[0])
    assert recording.shape == (16, 16, 16) and recording.chunk_frames == 2 and len(recording) == 12
    assert recording.read(np.arange(12)).std() == pytest.approx(1, abs=0.05) and len(recording.motion(1)[0]) == 11
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    for folder in (tmp_path / "mine", tmp_path / "mine/thesis.txt"):  # what is not a demo's is never replaced
        with pytest.raises(DataError, match="is no demo's data"):
            demo.write(folder)
    assert (tmp_path / "mine/thesis.txt").exists()


# --- the loop


def write_moving(folder, count, scale=1):
    """Recordings of 12 latent frames (2, 8, 8) in which a bright bar moves right or left, around the edges too."""
    rng = np.random.default_rng(0)
    for n in range(count):
        moves = rng.choice([-2, 2], 12)
        place = np.cumsum(moves) - moves + 2 * rng.integers(4)
        x = rng.normal(0, 0.1, (1, 2, 8, 8)).repeat(12, 0)
        for t in range(12):
            x[t, :, 2:6, (place[t] + np.arange(2)) % 8] += 3
        with H5(write_h5(folder / f"r{n}.h5", scale * x.astype(np.float32)), "a") as file:
            file["actions"] = (moves > 0).astype(np.int64)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_moving(tmp_path_factory.mktemp("latents"), 6)


@pytest.fixture(autouse=True)
def soon(this, monkeypatch, request):
    """Runs of six steps: quantization may begin at the second; the figures of runs are drawn in one test alone."""
    monkeypatch.setattr(this.train, "CHECK_EVERY", 2)
    if request.node.name != "test_run_resume_and_what_it_leaves":
        monkeypatch.setattr(this.train.figures, "of_run", lambda *what: ())


def flags(folder, out, *more):
    sizes = "--patch-dim 8 --embed-dim 16 --encoder-depth 1 --decoder-depth 1 --num-heads 2 --codebook-dim 4"
    times = "--steps 6 --batch-size 4 --log-every 2 --eval-every 3 --save-every 3 --warmup 1 --lr 0.01 --device cpu"
    codes = "--sequence-length 4 --quantize-after -1 --num-embeddings 4 --val-episodes r1 r4"
    words = [*sizes.split(), *times.split(), *codes.split()]
    return ["--data", f"a={folder}", "--out", str(out), *words, *map(str, more)]


def start(*command):
    """A process of its own group, to be killed."""
    env, quiet = {**os.environ, "OMP_NUM_THREADS": "1"}, dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([str(word) for word in command], env=env, start_new_session=True, **quiet)


def wait_until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


TRAINING = "loss mse_loss mae_loss vq_loss codebook_loss commitment_loss codebook_usage lr grad_norm rollout_loss"
VALIDATION = "loss mse_loss mae_loss vq_loss codebook_loss commitment_loss codebook_usage codebook_perplexity "
VALIDATION += "relative_mse relative_mse_shuffled code_sensitivity psnr_gain_over_copy action_sensitivity_l2"
MONITORED = [f"train/{name}" for name in TRAINING.split()] + [f"val/{name}" for name in VALIDATION.split()]


def test_run_resume_and_what_it_leaves(this, latents, tmp_path, capsys):
    """Lost after step 3 (quantization began at 2) and resumed equals uninterrupted, bit for bit; metrics are there.
    A recording ten times as large that joins the folder meanwhile is told and changes nothing."""
    folder, one, two = shutil.copytree(latents, tmp_path / "data"), tmp_path / "one", tmp_path / "two runs"
    assert this.train.main(flags(folder, one)) == 0
    assert "advice: " in capsys.readouterr().out
    shutil.copytree(one, two, symlinks=True)
    shutil.rmtree(two / "checkpoints" / "step_0000006")
    with pytest.raises(DataError, match="--lr"):
        this.train.main(flags(folder, two, "--resume", "--lr", 1))
    write_h5(folder / "r0_new.h5", 10 * frames(12, size=8))
    assert this.train.main(flags(folder, two, "--resume", "--accum", 1, "--log-every", 2)) == 0
    assert "1 recordings are new since the run began (a/r0_new" in capsys.readouterr().out
    assert weights_of(two) == weights_of(one) != weights_of(two, "step_0000003")
    assert [line["step"] for line in log_of(two)] == [line["step"] for line in log_of(one)]
    last = log_of(one)[-1]
    assert not [name for name in MONITORED if name not in last]
    assert {path.stem for path in (one / "figures").glob("*.png")} == {"curves", "prediction"}
    for link in ("last", "best"):
        assert this.model.VVAELatentActionVQVAE.from_pretrained(one / "checkpoints" / link).quantizer.quantizing
    with pytest.raises(DataError, match="holds a run already"):
        this.train.main(flags(folder, two))


def test_quantization_waits_until_codes_are_used(this, evaluate, latents, tmp_path, capsys):
    """With a threshold out of reach vectors stay continuous, and the run says so; nothing is called best."""
    assert this.train.main(flags(latents, tmp_path / "out", "--quantize-after", 9)) == 0
    assert "quantization never began" in capsys.readouterr().out
    lines = log_of(tmp_path / "out")
    assert {line["train/vq_loss"] for line in lines if "train/vq_loss" in line} == {0.0}
    assert [line["step"] for line in lines if "code_sensitivity" in line] == [2, 4, 6]
    assert not (tmp_path / "out" / "checkpoints" / "best").exists()
    for name, why in (("best", "is not there"), ("last", "has no codes")):
        with pytest.raises(DataError, match=f"{name} {why}.*quantization had not begun: train longer"):
            evaluate.main(["--checkpoint", str(tmp_path / "out" / "checkpoints" / name), "--device", "cpu"])


def test_accumulation_and_amp_train_the_same_model(this, latents, tmp_path):
    """4 micro-steps are one step of the whole batch, also with codes; bf16 stays close, its codes are float32."""
    runs = dict(one=[], four=["--accum", 4], bf16=["--amp", "bf16"])
    for name, more in runs.items():
        assert this.train.main(flags(latents, tmp_path / name, "--eval-every", 6, "--lr", 1e-3, "--flow", *more)) == 0
    load_model = this.model.VVAELatentActionVQVAE.from_pretrained
    one, four, bf16 = (load_model(tmp_path / name / "checkpoints" / "last") for name in runs)
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.quantizer.codebook, four.quantizer.codebook, rtol=1e-3, atol=1e-4)
    assert bf16.quantizer.codebook.dtype == torch.float32
    last = [log_of(tmp_path / name)[-1]["val/mse_loss"] for name in runs]
    assert max(last) < 1.05 * min(last)


@pytest.mark.slow
def test_it_learns_to_use_its_codes(this, tmp_path, monkeypatch):
    """A bar goes left or right: the frame before cannot tell which; the codes do, and other codes hurt."""
    monkeypatch.setattr(this.train, "CHECK_EVERY", 20)
    folder = write_moving(tmp_path / "data", 40)
    more = ["--steps", 500, "--eval-every", 500, "--save-every", 500, "--log-every", 100, "--quantize-after", 0.1]
    more += ["--batch-size", 16, "--embed-dim", 32, "--lr-end", 2e-3, "--lr", 5e-3, "--patch", 2]
    words = flags(folder, tmp_path / "out", *more)
    assert this.train.main([*words, "--val-episodes", *(f"r{n}" for n in range(8))]) == 0
    last = log_of(tmp_path / "out")[-1]
    assert last["val/relative_mse"] < 0.5 and last["val/code_sensitivity"] > 0.1
    assert last["val/relative_mse_shuffled"] > 2 * last["val/relative_mse"]
    # one bit is enough for two directions: 7 of 12 codes are in use
    assert last["val/action_sensitivity_l2"] > 0.05 and last["val/codebook_usage"] > 0.5


def test_overfit_says_whether_it_got_there(this, latents, tmp_path, capsys, monkeypatch):
    """Exit code 0 and an early end once MSE and MAE are low, with codes, also when asked again; 1 if the steps do not
    suffice."""
    assert this.train.OVERFIT == dict(mse_loss=0.01, mae_loss=0.05)
    monkeypatch.setattr(this.train, "OVERFIT", dict(mse_loss=0.1, mae_loss=0.2))  # sooner
    monkeypatch.setattr(this.train, "CHECK_EVERY", 20)
    more = ["--overfit", "--patch", 2, "--embed-dim", 32, "--eval-every", 25, "--save-every", 500]
    long = [*more, "--quantize-after", 0.15, "--steps", 600, "--lr", 3e-3, "--log-every", 100]
    assert this.train.main(flags(latents, tmp_path / "good", *long)) == 0
    last = log_of(tmp_path / "good")[-1]
    assert last["val/mse_loss"] < 0.1 and last["val/mae_loss"] < 0.2 and last["step"] < 600
    assert "overfit test passed" in capsys.readouterr().out
    assert this.train.main([*flags(latents, tmp_path / "good", *long), "--resume"]) == 0
    assert "overfit test passed" in capsys.readouterr().out
    assert this.train.main(flags(latents, tmp_path / "bad", *more, "--steps", 2)) == 1
    assert "overfit test FAILED" in capsys.readouterr().out


def test_init_takes_weights_codes_and_normalisation(this, latents, tmp_path):
    """On latents of another scale, too; a model of other sizes is refused."""
    this.train.main(flags(latents, tmp_path / "one"))
    init, scaled = tmp_path / "one" / "checkpoints" / "last", write_moving(tmp_path / "scaled", 6, scale=3)
    still = ["--init", init, "--lr", 1e-12, "--weight-decay", 0, "--steps", 1]
    this.train.main(flags(scaled, tmp_path / "two", *still))
    load_model = this.model.VVAELatentActionVQVAE.from_pretrained
    one, two = load_model(init), load_model(tmp_path / "two" / "checkpoints" / "last")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert two.quantizer.quantizing and one.config.std == two.config.std
    with pytest.raises(DataError, match="num_embeddings is 4, but 5 here"):
        this.train.main(flags(latents, tmp_path / "three", "--init", init, "--num-embeddings", 5))


@pytest.mark.slow
def test_errors_are_one_line(latents, tmp_path):
    """From train.py, with and without workers, and from every verb."""
    broken = shutil.copytree(latents, tmp_path / "broken")
    with H5(broken / "r0.h5", "a") as file:
        file["embeddings"][3] = np.nan
    cases = [
        (["train.py", *flags(broken, tmp_path / "a")], "NaN or infinity"),
        (["train.py", *flags(broken, tmp_path / "b", "--workers", 1)], "NaN or infinity"),
        (["make_manifest.py", tmp_path / "absent"], "no .h5 files"),
        (["label.py", "--checkpoint", tmp_path, "--data", latents, "--out", tmp_path / "e"], "config.json"),
        (["evaluate.py", "--checkpoint", tmp_path, "--out", tmp_path / "f"], "config.json"),
        (["video_vae/encode_videos.py", "--data", tmp_path, "--vae", tmp_path, "--out", tmp_path / "g"], "no videos"),
        (["video_vae/convert_droid.py", "--data", tmp_path, "--out", tmp_path / "h"], "no latent_videos"),
    ]
    for (script, *words), text in cases:
        done = launch(FOLDER / script, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and text in done.stderr, (script, done.stderr)


# --- verbs


@pytest.fixture(scope="module")
def checkpoint(this, tmp_path_factory):
    """A tiny model of the `latents` fixture's shape with random codes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny(this, channels=2, mean=[0.0], std=[1.0]).save_pretrained(folder)
    return folder


def labels_of(shard):
    """{key: arrays} of a label shard."""
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    return {name.partition(".")[0]: dict(np.load(io.BytesIO(data))) for name, data in members.items()}


def test_labels_are_the_codes_of_the_transitions(this, latents, checkpoint, tmp_path, capsys):
    """Batch size plays no part; a broken recording is named and the others labelled; another model is refused."""
    label = load("vvae_lam", "label").label
    folder, out = shutil.copytree(latents, tmp_path / "data"), tmp_path / "labels"
    with H5(folder / "r2.h5", "a") as file:
        file["embeddings"][1] = np.nan

    def run(checkpoint, *more):
        words = ["--checkpoint", checkpoint, "--data", folder, "--out", out, "--device", "cpu", *more]
        return label.main([str(word) for word in words]), capsys.readouterr().out

    code, said = run(checkpoint, "--batch-size", 4)
    assert code == 1 and "left out" in said and "r2.h5" in said
    found, about = labels_of(out / "shard-000000.tar"), json.loads((out / "labels.json").read_text())
    assert sorted(found) == ["r0", "r1", "r3", "r4", "r5"]
    sizes = {name: about[name] for name in ("code_seq_len", "codebook_size", "code_dim", "gap")}
    assert sizes == dict(code_seq_len=3, codebook_size=5, code_dim=6, gap=1)
    model, codebook = this.model.VVAELatentActionVQVAE.from_pretrained(checkpoint), np.array(about["codebook"])
    for key, labels in found.items():
        with H5(latents / f"{key}.h5") as file:
            x = file["embeddings"][()].swapaxes(1, 2).reshape(-1, 2, 8, 8)
        assert np.array_equal(labels["codes"], model.encode(x)) and labels["valid"].all() and labels["gap"] == 1
        distance = np.square(codebook - labels["vectors"][:, :, None]).sum(3)  # the vectors are in the codebook's units
        assert np.array_equal(distance.argmin(2), labels["codes"])
    code, said = run(checkpoint)
    assert code == 1 and "r2.h5" in said  # it is not forgotten
    shutil.copy(latents / "r2.h5", folder / "r2.h5")
    code, said = run(checkpoint)
    assert code == 0 and len(labels_of(out / "shard-000000.tar")) == 6
    code, said = run(checkpoint)
    assert code == 0 and "6 were there already" in said
    nn.init.normal_(model.quantizer.codebook)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="holds labels of another model"):
        run(tmp_path / "other")


@pytest.mark.parametrize(
    "about, size, there, message",
    [
        ({}, 8, True, "holds labels of other data"),
        ({}, 10, False, r"C, H, W are \(2, 10, 10\), but the checkpoint has \(2, 8, 8\)"),
        (dict(shard="s.tar", key="k"), 8, False, "two recordings are of the clip k of s.tar"),
        (dict(frame_index=[0, 1]), 8, False, "`frame_index` is not a growing frame number"),
        (dict(frame_index=[3, 2, 1, 0, 0, 0]), 8, False, "`frame_index` is not a growing frame number"),
    ],
)
def test_what_labels_cannot_be_made_of_is_named(checkpoint, tmp_path, about, size, there, message):
    """A folder with labels of other data, other sizes, two recordings of one clip, impossible frame numbers."""
    main = load("vvae_lam", "label").label.main
    rows = about.pop("frame_index", None)
    for name, width in (("old", 8), ("new", size)):
        for n in "ab":
            path = write_h5(tmp_path / name / f"{name}_{n}.h5", frames(6, size=width), attributes=about)
            if rows:
                with H5(path, "a") as file:
                    file["frame_index"] = rows
    words = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "labels"), "--device", "cpu", "--data"]
    assert not there or main([*words, str(tmp_path / "old")]) == 0
    with pytest.raises(DataError, match=message):
        main([*words, str(tmp_path / "new")])


def test_labels_of_videos_stand_at_the_frames_that_end_a_latent(this, checkpoint, tmp_path):
    """4 frames to a latent: row 3 is the code of latents 0 -> 1, rows between are not valid; keys are the video's.
    Of a video whose length is not known, nothing is said of what follows its last latent."""
    x, label = frames(6, size=8), load("vvae_lam", "label").label

    def labelled(name, ends, **about):
        with H5(write_h5(tmp_path / name / "a.h5", x, attributes=about), "a") as file:
            file["frame_index"] = ends
        words = ["--checkpoint", checkpoint, "--data", tmp_path / name, "--out", tmp_path / f"{name} labels"]
        assert label.main([*map(str, words), "--device", "cpu"]) == 0
        return labels_of(next((tmp_path / f"{name} labels").glob("*.tar")))

    labels = labelled("video", np.arange(6) * 4 + 3, shard="shard-7.tar", key="k-1", frames=26)["k-1"]
    assert labels["gap"] == 4 and labels["codes"].shape == (22, 3) and labels["vectors"].shape == (22, 3, 6)
    assert np.flatnonzero(labels["valid"]).tolist() == [3, 7, 11, 15, 19]
    model = this.model.VVAELatentActionVQVAE.from_pretrained(checkpoint)
    assert np.array_equal(labels["codes"][3::4], model.encode(x))
    assert labelled("unknown length", np.arange(6) * 4 + 3)["a"]["codes"].shape == (20, 3)
    uneven = labelled("uneven", [3, 7, 11, 16, 20, 24])["a"]  # as of a video of another rate
    assert uneven["gap"] == 4 and np.flatnonzero(uneven["valid"]).tolist() == [3, 7, 16, 20]


@pytest.fixture(scope="module")
def evaluate():
    return load("vvae_lam", "evaluate").evaluate


def test_report(this, evaluate, latents, checkpoint, tmp_path):
    """Against the numbers computed here: one step, rollouts from the first frame, copy baseline."""
    (tmp_path / "two").mkdir()
    for name in ("r0.h5", "r1.h5"):
        shutil.copy(latents / name, tmp_path / "two" / name)
    words = ["--checkpoint", checkpoint, "--data", tmp_path / "two", "--steps", "3", "--device", "cpu"]
    assert evaluate.main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    model = this.model.VVAELatentActionVQVAE.from_pretrained(checkpoint)
    errors, rolled, copied = [], [], []
    for n in (0, 1):
        with H5(latents / f"r{n}.h5") as file:
            x = file["embeddings"][()].swapaxes(1, 2).reshape(-1, 2, 8, 8)
        window = x[:8]  # the one sequence of 8 that fits
        errors.append(np.square(model.predict(window, model.encode(window)) - window[1:]).mean())
        rolled.append(np.square(model.rollout(x[0], model.encode(x[:4])) - x[1:4]).mean((1, 2, 3)))
        copied.append(np.square(window[1:] - window[:-1]).mean())
    one = report["one_step"]
    assert one["mse"] == pytest.approx(np.mean(errors), rel=1e-3) and one["transitions"] == 14
    assert one["relative_mse"] == pytest.approx(np.mean(errors) / np.mean(copied), rel=1e-3)
    np.testing.assert_allclose(report["short_rollout"]["mse"]["true"], np.mean(rolled, 0), rtol=1e-3)
    assert report["full_rollout"]["steps"] == 11
    wanted = {"codes", "vectors", "first_frame", "latent_difference", "optical_flow", "shuffled_codes"}
    text = (tmp_path / "one" / "report.md").read_text()
    assert set(report["probes"]) >= wanted and "Advice: not good enough" in text
    assert text.count(".png") == len(list((tmp_path / "one" / "figures").glob("*.png"))) == 2
    with H5(tmp_path / "one" / "rollouts" / "two-r0.h5") as file:
        assert file["embeddings"].shape == (12, 2, 1, 8, 8)


@pytest.mark.slow
def test_trained_recordings_are_known_and_new_data_need_no_flags(this, evaluate, latents, tmp_path):
    """What was trained on is left out. A new folder is evaluated whole. Rows of NaN are told."""
    assert this.train.main(flags(latents, tmp_path / "run")) == 0
    last = ["--checkpoint", str(tmp_path / "run" / "checkpoints" / "last"), "--device", "cpu", "--steps", "3"]

    def report(*words):
        assert evaluate.main([*last, *map(str, words), "--out", str(tmp_path / "report")]) == 0
        return json.loads((tmp_path / "report" / "report.json").read_text())

    found = report()
    assert (found["split"], found["recordings"]) == ("held out", 2)
    assert report("--split", "train")["recordings"] == 4
    rng = np.random.default_rng(1)
    for n in range(5):
        with H5(write_h5(tmp_path / "new" / f"n{n}.h5", frames(12, size=8, seed=20 + n)), "a") as file:
            file["actions"] = rng.normal(size=(12, 2)) if n else np.full((12, 2), np.nan)
    found = report("--data", tmp_path / "new")
    assert (found["split"], found["recordings"]) == ("new data", 5)
    assert [Path(name).name for name in found["left_out_of_probes"]] == ["n0.h5"]
    assert np.isfinite(found["probes"]["codes"]["r2"]) and "r2_low" in found["probes"]["codes"]
    assert "n0.h5" in (tmp_path / "report" / "report.md").read_text()
    for n, rows in enumerate((np.ones((12, 3)), np.ones((12, 2)))):
        with H5(write_h5(tmp_path / "odd" / f"{n}.h5", frames(12, size=8, seed=30 + n)), "a") as file:
            file["states"] = rows
    found = report("--data", tmp_path / "odd")  # nothing moves, and the second has other states
    assert found["probes"] is None and [Path(name).name for name in found["left_out_of_probes"]] == ["1.h5"]


@pytest.fixture(scope="module")
def metrics():
    return load("vvae_lam", "metrics").metrics


def test_probe_leaves_episodes_out(metrics):
    """Near 1 for a linear map, at or below 0 for noise; an offset of each episode's own cannot be learned by heart."""
    x, linear, episodes = noise(300, 5), noise(5, 3, seed=3), torch.arange(300) // 30
    found = metrics.probe(x, x @ linear, episodes)
    assert found["r2"] > 0.99 and found["r2_weighted"] > 0.99 and len(found["r2_per_dim"]) == 3
    assert found["r2_low"] <= found["r2"] <= found["r2_high"]
    assert metrics.probe(x, noise(300, 3, seed=4), episodes)["r2"] < 0.05
    own = torch.nn.functional.one_hot(episodes).float()  # features that name the episode
    assert metrics.probe(own, noise(10, 3, seed=5)[episodes], episodes)["r2"] < 0.05
    classes = x[:, :3].argmax(1)
    found = metrics.probe(x, classes, episodes)
    assert found["accuracy"] > 0.8 and found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert found["chance"] == pytest.approx(torch.bincount(classes).max().item() / 300)
    assert metrics.probe(x, classes * 10**10 - 7, episodes) == found  # any numbers may stand for classes
    rests = torch.where((episodes > 0)[:, None], noise(300, 3, seed=4), 0.0)  # in a third of the episodes
    assert metrics.probe(x, rests, episodes.clamp(max=2))["r2_low"] > -2
    one = metrics.probe(x, x @ linear, torch.zeros(300, dtype=torch.int64))  # one episode: blocks in time
    assert one["r2"] > 0.99 and "r2_low" not in one
    tested = episodes < 2
    scored = metrics.probe(x, torch.where(tested[:, None], x @ linear, x @ linear * 2), episodes, tested)
    assert scored["r2"] < 0.5  # fitted on others, scored on the tested alone


def test_probe_against_least_squares(metrics):
    """Two episodes, one strength: the closed form, on standardised features, wide and tall."""
    for width in (5, 80):
        x, y, episodes = noise(60, width).double(), noise(60, 2, seed=2).double(), torch.arange(60) // 30
        guess = np.empty((60, 2))
        for test, train in ((slice(0, 30), slice(30, 60)), (slice(30, 60), slice(0, 30))):
            mean, std = x[train].mean(0), x[train].std(0)
            a = np.r_[((x[train] - mean) / std).numpy(), np.sqrt(7) * np.eye(width)]
            b = np.r_[(y[train] - y[train].mean(0)).numpy(), np.zeros((width, 2))]
            w = np.linalg.lstsq(a, b, rcond=None)[0]
            guess[test] = ((x[test] - mean) / std).numpy() @ w + y[train].mean(0).numpy()
        base = np.repeat([y[30:].mean(0).numpy(), y[:30].mean(0).numpy()], 30, 0)
        r2 = 1 - np.square(guess - y.numpy()).sum(0) / np.square(base - y.numpy()).sum(0)
        found = metrics.probe(x, y, episodes, strengths=[7.0])
        np.testing.assert_allclose(found["r2_per_dim"], r2, rtol=1e-4)
    assert metrics.ridge(x[:1], y[:1], x[:2], [7.0])[0].isfinite().all()  # fitted on one row: its mean


@pytest.mark.parametrize("B, T", [(1, 2), (2, 1), (1, 5), (2, 3), (4, 3)])
def test_shuffled_codes_are_those_of_another_transition(metrics, B, T):
    """Of another clip and another time where there are any; never the same, at any batch size."""
    x = torch.arange(B * T).view(B, T, 1)
    moved = metrics.shuffle(x)
    assert sorted(moved.flatten().tolist()) == list(range(B * T)) and (moved != x).all()
    if B > 2 and T > 1:
        assert ((moved // T != x // T) & (moved % T != x % T)).float().mean() > 0.6


def test_numbers_to_watch(this, metrics):
    """Sensitivity, gain and perplexity from their definitions; a model that ignores codes has no sensitivity."""
    means = dict(true=0.1, shuffled=0.3, random=0.4, copy=1.0, flow=0.2, no_flow=0.8)
    wanted = dict(relative_mse=0.1, relative_mse_shuffled=0.3, code_sensitivity=0.2, psnr_gain_over_copy=10)
    wanted |= dict(action_sensitivity_l2=0.3, flow_r2=0.75)
    assert metrics.reconstruction_metrics(means) == pytest.approx(wanted)
    used = metrics.codebook_metrics(torch.tensor([[5, 5, 0, 0], [10, 0, 0, 0]]))
    wanted = dict(codebook_perplexity_position1=2, codebook_perplexity_position2=1)
    assert used == pytest.approx(dict(codebook_usage=3 / 8, codebook_perplexity=1.5) | wanted)
    model, x = tiny(this), noise(3, 4, 3, 8, 8)
    found, codes = metrics.assess(model, x)
    assert (metrics.assess(tiny(this), x)[0]["random"] != found["true"]).all()
    error = (model.predict(x, codes) - x[:, 1:]) / model.std
    torch.testing.assert_close(found["true"], error.square().mean((1, 2, 3, 4)))
    torch.testing.assert_close(found["mae"], error.abs().mean((1, 2, 3, 4)))
    nn.init.zeros_(model.code_proj.weight)
    found, _ = metrics.assess(model, x)
    for name in ("random", "shuffled"):
        torch.testing.assert_close(found[name], found["true"])


def test_advice_names_what_is_amiss(metrics):
    """Codes are good enough only if other codes are worse, however much of the flow or the motion they tell."""
    good = dict(relative_mse=0.4, code_sensitivity=0.2, codebook_perplexity=9.0)
    codes = dict(codes=dict(r2=0.5, r2_low=0.4), first_frame=dict(r2=0.1))
    assert metrics.advice(good, 12).startswith("good enough") and metrics.advice(good, 12, codes).startswith("good eno")
    for wrong, probes, text in (
        (dict(relative_mse=1.1), codes, "worse than the frame before"),
        (dict(code_sensitivity=0.001), codes, "other codes would do nearly as well .*0.001.* or with --flow"),
        (dict(code_sensitivity=0.001, flow_r2=0.9), codes, "other codes would do nearly as well .*train longer$"),
        (dict(codebook_perplexity=2.0), codes, "perplexity of 2.0 of 12"),
        ({}, codes | dict(first_frame=dict(r2=0.45)), "no more of the motion than the first frame"),
    ):
        found = metrics.advice(good | wrong, 12, probes)
        assert re.search(text, found) and not found.startswith("good enough")


# --- VAEs


@pytest.fixture(scope="module")
def encode():
    return vars(load("vvae_lam", "video_vae.encode_videos"))["video_vae.encode_videos"]


def write_video(encode, path, count=20, size=32, fps=10):
    """A bright square that moves right over a grey ramp."""
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
        wan22=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        ),
        image=diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, **image, **up),
        svd=diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), **image),
    )
    for name, vae in made.items():
        vae.save_pretrained(folder / name)
    return folder


STUB = """
import torch
class VAE(torch.nn.Module):
    def __init__(self, ddconfig, ppconfig, lossconfig):
        super().__init__()
        self.loss = torch.nn.PReLU() if "PReLU" in lossconfig["target"] else torch.nn.Identity()
        self.gain = torch.nn.Parameter(torch.ones(()))
    def encode(self, x, sample_posterior=True):
        assert not sample_posterior
        return self.gain * x[:, :1, ::4, ::8, ::8].repeat(1, 16, 1, 1, 1), None
    def decode(self, z):
        return z[:, :3].repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
"""


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    """(weights, checkout) of a stand-in for VideoVAE+."""
    folder = tmp_path_factory.mktemp("plus")
    checkout = folder / "VideoVAEPlus"
    (checkout / "configs" / "inference").mkdir(parents=True)
    (checkout / "stub_models").mkdir()
    (checkout / "stub_models" / "vae.py").write_text(STUB)
    params = (
        "    ckpt_path: absent.ckpt\n    ddconfig: {}\n    ppconfig: {}\n    lossconfig: {target: torch.nn.PReLU}\n"
    )
    config = f"model:\n  target: stub_models.vae.VAE\n  params:\n{params}"
    (checkout / "configs" / "inference" / "config_16z.yaml").write_text(config)
    torch.save(dict(state_dict=dict(gain=torch.tensor(3.0))), folder / "w.ckpt")
    return folder / "w.ckpt", checkout


def test_sizes_that_a_vae_does_not_take_are_named(encode, vaes):
    """Wan2.2 takes multiples of 16 only."""
    with pytest.raises(DataError, match="another --size"):
        encode.open_vae(vaes / "wan22").encode(np.zeros((9, 36, 36, 3), np.uint8))


def test_decoders_of_single_frames_take_a_few_at_a_time(encode, vaes, monkeypatch):
    """Two hundred at once would not fit a GPU."""
    one, seen = encode.open_vae(vaes / "svd"), []
    decode = one.module.decode
    monkeypatch.setattr(one.module, "decode", lambda z, **more: seen.append(len(z)) or decode(z, **more))
    assert len(one.decode(torch.zeros(30, 4, 2, 2))) == 30 and seen == [14, 14, 2]


def test_a_lerobot_dataset_is_no_folder_of_videos(encode, tmp_path):
    """v3 puts many episodes into one video."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    write_video(encode, tmp_path / "a.mp4")
    with pytest.raises(DataError, match="LeRobotDataset"):
        encode.find_videos(tmp_path)


@pytest.mark.parametrize(
    "name, takes, latents, wrong, causal",
    [("cogvideox", 8, 2, 9, False), ("wan", 9, 2, 8, True), ("image", 3, 3, 0, True), ("svd", 3, 3, 0, True)],
)
def test_every_vae_keeps_all_frames_or_says_no(encode, vaes, name, takes, latents, wrong, causal):
    """Frames in, latents out and back to as many frames; a count that the VAE would cut is an error. CogVideoX is not
    causal: it normalises over the frames of a chunk, so its first latent sees the last frame."""
    one = encode.open_vae(vaes / name)
    frames = np.random.default_rng(0).integers(0, 255, (takes, 32, 32, 3), dtype=np.uint8)
    z = one.encode(frames)
    assert len(z) == latents and torch.equal(z, one.encode(frames)) and one.is_causal(frames) == causal
    decoded = one.decode(z)
    assert decoded.shape == (takes - one.lead, 32, 32, 3) and decoded.dtype == np.uint8
    assert len(one.decode(z[:1])) == one.ratio and len(one.decode(torch.cat([z, z[:1]]))) == one.ratio * (latents + 1)
    if wrong:
        with pytest.raises(DataError, match=f"not {wrong}"):
            one.encode(frames[:1].repeat(wrong, 0))
    x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    if name == "wan":
        config = one.module.config
        mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        expected = (one.module.encode(x).latent_dist.mode()[0] - mean) / std
        torch.testing.assert_close(z, expected[:, 1:].transpose(0, 1), rtol=1e-4, atol=1e-4)
    if name == "image":
        expected = one.module.encode(x[0].transpose(0, 1)).latent_dist.mode() * one.module.config.scaling_factor
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def read(encode, path, fps=None, size=None):
    """(rate, frames) of a video as encode_videos.py takes them."""
    video = encode.Video(path, "x")
    rate, _, picked, _ = encode.frame_times(video, fps)
    return rate, np.stack(list(encode.pictures(video, picked, size)))


def test_videos_become_latents_and_back(recordings, encode, vaes, tmp_path, capsys):
    """Frames beyond a chunk are refused, dropped or repeated; a rerun leaves files; other settings are an error."""
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    source = write_video(encode, tmp_path / "videos" / "sub" / "a b.mp4")
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")

    def run(out, *more):
        """What is said; exit code 1, because of broken.mp4."""
        words = ["--data", tmp_path / "videos", "--vae", vaes / "cogvideox", "--out", out, "--device", "cpu", *more]
        assert encode.main([str(word) for word in words]) == 1
        return capsys.readouterr().out

    said = run(tmp_path / "latents")
    assert "20 frames, but AutoencoderKLCogVideoX takes 8 k: --tail drop leaves out the last 4" in said
    assert "broken.mp4: not a readable video" in said and not list((tmp_path / "latents").rglob("*.h5"))
    for tail, chunks, dropped, repeated in (("drop", 2, 4, 0), ("repeat", 3, 0, 4)):
        run(tmp_path / tail, "--tail", tail)
        recording = recordings.inspect(tmp_path / tail / "sub" / "a b.h5")
        assert (recording.chunks, recording.chunk_frames, recording.shape) == (chunks, 2, (16, 4, 4))
        about = recording.attributes
        assert about["vae"] == "AutoencoderKLCogVideoX" and about["fps"] == pytest.approx(2.5) and not about["causal"]
        assert (about["frames"], about["frames_dropped"], about["frames_repeated"]) == (20, dropped, repeated)
        assert recording.frame_index().tolist() == [7, 15, 19][:chunks]
        assert "0 videos encoded, 1 left out, 1 were there" in run(tmp_path / tail, "--tail", tail)
    with pytest.raises(DataError, match="there already, with tail drop"):
        run(tmp_path / "drop", "--tail", "repeat")
    one, (rate, images) = encode.open_vae(vaes / "cogvideox"), read(encode, source)
    assert (round(rate, 3), len(images)) == (10, 20)
    expected = torch.cat([one.encode(images[:8]), one.encode(images[8:16])]).numpy()
    recording = recordings.inspect(tmp_path / "drop" / "sub" / "a b.h5")
    np.testing.assert_allclose(recording.read([0, 1]), expected[1::2], rtol=2e-3, atol=2e-3)
    words = ["--decode", recording.path, "--vae", vaes / "cogvideox", "--out", tmp_path / "decoded.mp4"]
    assert encode.main([str(word) for word in words]) == 0
    assert len(read(encode, tmp_path / "decoded.mp4")[1]) == 16


def test_rollouts_decode_as_one_video_at_the_true_rate(encode, vaes, tmp_path):
    """5 latents, one per chunk, of a VAE with 4 frames to a latent are 20 frames, as long as what they were made of."""
    with H5(tmp_path / "r.h5", "w") as file:
        file["embeddings"] = np.random.default_rng(0).normal(size=(5, 16, 1, 4, 4)).astype(np.float32)
        file.attrs.update(fps=1.25, rollout=True)  # a gap of 2 latents at 2.5 a second
    for name in ("cogvideox", "wan"):
        words = ["--decode", str(tmp_path / "r.h5"), "--vae", str(vaes / name), "--out", str(tmp_path / f"{name}.mp4")]
        assert encode.main(words) == 0
        rate, images = read(encode, tmp_path / f"{name}.mp4")
        assert len(images) == 20 and len(images) / rate == pytest.approx(5 / 1.25, rel=0.01)


@pytest.fixture(scope="module")
def clips(encode, tmp_path_factory):
    """Shards of vla: four clips of 25 frames, one of them a video, with a Mac's hidden file beside it."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    shards, video = load("vla", "shards").shards, write_video(encode, folder / "v.mp4", count=25).read_bytes()
    samples = [{"__key__": "._c-0", "mp4": b"mac"}]
    for n in range(4):
        about = dict(episode=f"e{n}", camera="top", fps=10, length=25, source="s", instruction="go")
        images = shards.npy(rng.integers(0, 255, (25, 32, 32, 3), dtype=np.uint8))
        frames = {"frames.npy": images} if n else {"mp4": video}
        samples.append({"__key__": f"c-{n}", "json": json.dumps(about).encode(), **frames})
    shards.write_shard(folder / "shard-000000.tar", samples)
    return folder


@pytest.mark.parametrize("name, gap, valid", [("svd", 1, 23), ("plus", 4, 5), ("wan", 4, 5), ("cogvideox", 8, 2)])
def test_every_kind_of_latents_goes_from_videos_to_stage_2(
    this, encode, evaluate, vaes, plus, clips, tmp_path, monkeypatch, name, gap, valid
):
    """Encode, train, evaluate, label; vla reads each clip's codes under its key, at the frames that end a latent."""
    latents, labels, checkpoint = tmp_path / "latents", tmp_path / "labels", tmp_path / "run" / "checkpoints" / "last"
    vae = ["--vae", plus[0], "--checkout", plus[1]] if name == "plus" else ["--vae", vaes / name]
    words = ["--data", clips, *vae, "--out", latents, "--device", "cpu", "--tail", "drop"]
    assert encode.main([str(word) for word in words]) == 0
    more = ["--val-episodes", "e1", "--sequence-length", 3, "--steps", 3, "--patch", 2]
    assert this.train.main(flags(latents, tmp_path / "run", *more)) == 0
    blank = dict.fromkeys(("prediction", "code_motion"), lambda *what: Figure())
    monkeypatch.setattr(evaluate, "figures", SimpleNamespace(**blank))
    words = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert evaluate.main([*words, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["recordings"] == 1 and np.isfinite(report["one_step"]["relative_mse"])
    label = load("vvae_lam", "label").label
    assert label.main([*words, "--data", str(latents), "--out", str(labels)]) == 0
    reader = load("vla", "sources").sources
    (source,) = reader.read_sources([f"s={clips}"], "latents", [str(labels)], 0.3)
    assert len(source.train) + len(source.validation) == 4 and source.labels["gap"] == gap
    for clip in source.train:
        codes, vectors, rows = reader.read_latents(clip, source.labels)
        assert codes.shape == (25 - gap, 3) and rows.sum() == valid and vectors.shape == (25 - gap, 3, 4)


def test_frames_are_resampled_and_cropped(encode, tmp_path):
    """10 Hz to 5 Hz takes every second frame, to 20 Hz every one twice; the crop keeps proportions."""
    path = write_video(encode, tmp_path / "a.mp4")
    _, every = read(encode, path)
    rate, half = read(encode, path, fps=5)
    assert rate == 5 and np.array_equal(half, every[::2])
    _, double = read(encode, path, fps=20)
    assert len(double) == 40 and np.array_equal(double[7], every[3])
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 200
    assert (encode.resize(image, 10, 10) == 200).all()


def test_times_come_from_timestamps(encode, tmp_path):
    """A pause of 5 s in a video of 10 frames a second: the rate is 10, the pause is told, --fps shows it as it was."""
    import av

    path = tmp_path / "pause.mkv"
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for n in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 100 * n + (5000 if n >= 10 else 0), stream.codec_context.time_base
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    rate, length, picked, warning = encode.frame_times(encode.Video(path, "x"), None)
    assert rate == pytest.approx(10, rel=0.02) and length == 20 and "apart" in warning
    _, _, picked, warning = encode.frame_times(encode.Video(path, "x"), 2)
    assert warning is None and (picked == 9).sum() == pytest.approx(10, abs=1)


@pytest.mark.parametrize("space, matrix", [("bt709", 1), ("smpte170m", 6), ("bt2020nc", 9)])
def test_colours_follow_the_tags_of_the_video(encode, tmp_path, space, matrix):
    """Red 220, 20, 20 comes back within 6 levels under every colour matrix."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("ffmpeg is not here to write the video")
    path, kernel = tmp_path / "red.mp4", dict(bt709="bt709", smpte170m="bt601", bt2020nc="bt2020")[space]
    source = ["-f", "lavfi", "-i", "color=0xDC1414:s=64x64:r=10:d=1,format=rgb24"]
    scale = ["-vf", f"scale=out_color_matrix={kernel}:out_range=tv,format=yuv420p", "-colorspace", space]
    subprocess.run([ffmpeg, "-v", "error", *source, *scale, "-crf", "1", str(path)], check=True)
    _, images = read(encode, path)
    assert np.abs(images[3, 30, 30].astype(int) - [220, 20, 20]).max() <= 6


def test_a_depth_video_is_named(encode, tmp_path):
    import av

    with av.open(str(tmp_path / "depth.mkv"), "w") as video:
        stream = video.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "gray16le"
        video.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32), np.uint16), format="gray16le")))
        video.mux(stream.encode())
    with pytest.raises(DataError, match="depth.mkv: .*depth, not colour"):
        read(encode, tmp_path / "depth.mkv")


def test_shards_that_are_no_clips_are_named(encode, clips, tmp_path):
    """A compressed tar would be read at the wrong place; frames of another order or type are no pictures."""
    (tmp_path / "a.tar").write_bytes(gzip.compress((clips / "shard-000000.tar").read_bytes()))
    with pytest.raises(DataError, match="not a complete WebDataset shard"):
        encode.find_videos(tmp_path)
    shards = load("vla", "shards").shards
    for frames in (np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 8, 8, 3))):
        sample = {"__key__": "k", "json": b'{"fps": 5}', "frames.npy": shards.npy(frames)}
        shards.write_shard(tmp_path / "a.tar", [sample])
        with pytest.raises(ValueError, match=r"expected uint8 \(T, H, W, 3\)"):
            encode.frame_times(encode.find_videos(tmp_path)[0], None)


@pytest.mark.slow
def test_jobs_share_a_folder_and_a_killed_one_leaves_nothing_half_written(encode, vaes, tmp_path):
    """kill -9 in mid-run, then two jobs at once: every file is complete, none is written twice, no leftovers."""
    (tmp_path / "videos").mkdir()
    for n in range(12):
        write_video(encode, tmp_path / "videos" / f"{n:02d}.mp4", count=16)
    out = tmp_path / "out"
    command = [sys.executable, FOLDER / "video_vae" / "encode_videos.py", "--data", tmp_path / "videos"]
    command += ["--vae", vaes / "cogvideox", "--out", out, "--device", "cpu"]
    process = start(*command)
    wait_until(lambda: len(list(out.glob("*.h5"))) >= 2)
    process.kill()
    process.wait(60)
    (out / f".11.h5.{socket.gethostname()}-{process.pid}.tmp").write_bytes(b"half")  # what a kill inside a file leaves
    complete = {path: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert 0 < len(complete) < 12
    jobs = [start(*command) for _ in range(2)]
    assert [job.wait(200) for job in jobs] == [0, 0]
    assert len(list(out.glob("*.h5"))) == 12 and not list(out.glob(".*"))
    assert all(path.stat().st_mtime_ns == before for path, before in complete.items())


def test_videovae_plus_from_a_checkout(encode, plus, tmp_path):
    """A stand-in with the repository's layout and interface: its config names the class, its .ckpt is loaded safely."""
    weights, checkout = plus
    one = encode.open_vae(weights, checkout=checkout)
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    z = one.encode(frames)
    assert z.shape == (2, 16, 2, 2) and one.decode(z).shape == (8, 16, 16, 3)
    np.testing.assert_allclose(z[:, 5], 3 * (frames[::4, ::8, ::8, 0] / 127.5 - 1), rtol=1e-5)
    (tmp_path / "w.ckpt").write_bytes(b"nonsense")
    for words, message in (
        ((tmp_path / "w.ckpt", checkout), "cannot be opened"),
        ((weights, tmp_path), "no readable config_16z.yaml"),
    ):
        with pytest.raises(DataError, match=message):
            encode.open_vae(words[0], checkout=words[1])


# --- real data


def test_real_droid_latents_and_states(sources, tmp_path):
    """The converter's files hold the published latents and states; all cameras of an episode are one episode."""
    root = shared("droid_ctrlworld") / "original" / "droid_subset"
    convert = vars(load("vvae_lam", "video_vae.convert_droid"))["video_vae.convert_droid"]
    assert convert.main(["--data", str(root), "--out", str(tmp_path)]) == 0
    found = {r.id: r for r in sources.read_sources([f"droid={tmp_path}"], val_episodes=["3"])}
    assert len(found) == 21 and {i for i, r in found.items() if r.split != "train"} == {f"3_cam{c}" for c in "012"}
    published = np.load(root.parents[1] / "converted" / "droid_train_3_cam0_latents.npy")
    assert found["3_cam0"].shape == (4, 24, 40) and len(found["3_cam0"]) == 80
    assert found["3_cam0"].attributes["scaling"].tolist() == [
        float(np.float32(0.18215))
    ]  # as encode_videos.py writes it
    assert np.array_equal(found["3_cam0"].read(np.arange(80)), published)
    states = np.asarray(json.loads((root / "annotation" / "train" / "3.json").read_text())["states"], np.float32)
    motion, _ = found["3_cam0"].motion(1)
    moved = np.diff(states, axis=0)
    np.testing.assert_allclose(np.sin(motion[:, 3:6]), np.sin(moved[:, 3:6]), atol=1e-5)
    np.testing.assert_allclose(motion[:, :3], moved[:, :3], atol=1e-6)
    assert np.abs(motion).max() < np.pi


def test_copies_of_a_held_out_recording_are_held_out(this, latents, tmp_path, capsys):
    """In the first run as after --resume."""
    folder = shutil.copytree(latents, tmp_path / "data")
    shutil.copy(folder / "r1.h5", folder / "copy.h5")
    for more in (["--steps", 2], ["--steps", 4, "--resume"]):
        assert this.train.main(flags(folder, tmp_path / "run", *more)) == 0
        assert "training sequences of 4 from 4 recordings" in capsys.readouterr().out


def test_attributes_of_any_text_type(recordings, tmp_path):
    about = dict(axes=list("NCTHW"), causal=np.bytes_("true"), key=np.bytes_("k"))
    found = recordings.inspect(write_h5(tmp_path / "a.h5", frames(4), attributes=about))
    assert found.every and found.attributes["key"] == "k"


def test_a_recording_is_the_same_in_any_float_type(recordings, tmp_path):
    x = frames(4).astype(np.float16)
    a, b = (write_h5(tmp_path / f"{n}.h5", x.astype(n)) for n in ("float16", "float32"))
    assert recordings.inspect(a).fingerprint() == recordings.inspect(b).fingerprint()


def test_rows_that_were_never_written_are_named(recordings, tmp_path):
    for name in ("states", "frame_index"):
        path = write_h5(tmp_path / f"{name}.h5", frames(4))
        with h5py.File(path, "a") as file:
            file.create_dataset(name, (4,), "i8")
        with pytest.raises(DataError, match=f"`{name}`: no value was written"):
            found = recordings.inspect(path)
            found.motion(1), found.frame_index()


def test_avi_with_b_frames(encode, tmp_path):
    """AVI gives a frame the time of its packet, which comes in another order."""
    with encode.av.open(str(tmp_path / "a.avi"), "w") as video:
        stream = video.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
        images = [encode.av.VideoFrame.from_ndarray(np.roll(picture, 2 * k, 1), format="rgb24") for k in range(24)]
        video.mux([packet for image in [*images, None] for packet in stream.encode(image)])
    video = encode.Video(tmp_path / "a.avi", "a")
    assert encode.frame_times(video, 4.0)[2].tolist() == list(range(0, 24, 2))


def test_every_rank_takes_the_codebook_of_rank_0(monkeypatch):
    """k-means adds in another order on every GPU."""
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, source: sent.append((x, source)))
    quantizer = load("vvae_lam", "quantizer").quantizer.VectorQuantizer(4, 2, 3)
    quantizer.init_codebook(torch.randn(64, 2, 3), 0)
    assert sent[0][0] is quantizer.codebook and sent[0][1] == 0
