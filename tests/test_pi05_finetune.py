"""pi05_finetune: Pi05 on stock transformers, what it reads, readers, validator, norms, batches, loop, verbs."""

import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, launch, load, shared

MORE = "compat inputs spec episodes norms validate metrics convert compute_norms evaluate demo check_env".split()
CORE = "model."
VLM = "model.paligemma_with_expert.paligemma.model."
EXPERT = "model.paligemma_with_expert.gemma_expert."


@pytest.fixture(scope="module")
def this():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return load("pi05_finetune", *MORE)


@pytest.fixture(scope="module")
def toy(this, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    this.inputs.write_toy_tokenizer(folder)
    return folder


def statistics(dims, low=-1.0, high=1.0):
    row = dict(mean=0.0, std=1.0, min=low, max=high, q01=low, q99=high)
    return {name: [value] * dims for name, value in row.items()}


def tiny(this, toy, state_dim=3, action_dim=3, scale=0.15, **kwargs):
    """A tiny Pi05 whose every weight is random: as built, gates and adapters are zero and hide mistakes."""
    stats = {"observation.state": statistics(state_dim), "action": statistics(action_dim)}
    more = dict(stats=stats, size="tiny", chunk=4, image_size=28, prompt_tokens=64, tokenizer=toy)
    model = this.model.Pi05(["top", "wrist"], state_dim, action_dim, **{**more, **kwargs})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=scale, generator=generator)
    return model.eval()


def observation(B=2, state_dim=3, action_dim=3, chunk=4, pixels=28, seed=0):
    """A batch in robot units, with the second sample's chunk ending after 2 steps."""
    generator = torch.Generator().manual_seed(seed)
    batch = {f"observation.images.{n}": torch.rand(B, 3, pixels, pixels, generator=generator) for n in ("top", "wrist")}
    batch["observation.state"] = torch.rand(B, state_dim, generator=generator) * 2 - 1
    batch["task"] = ["pick up the red block", "push"][:B]
    batch["action"] = torch.randn(B, chunk, action_dim, generator=generator)
    batch["mask"] = torch.arange(chunk) < torch.tensor([chunk, 2])[:B, None]
    batch["noise"] = torch.randn(B, chunk, 32, generator=generator)
    batch["time"] = torch.tensor([0.3, 0.8])[:B]
    return batch


# --- Pi05 on stock transformers


def siglip(w, pixels):
    """SigLIP's vision transformer (Zhai et al. 2023) and PaliGemma's projection; pixels (B, 3, H, W) in [-1, 1]."""
    P = VLM + "vision_tower.vision_model."

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-6)

    kernel = w[P + "embeddings.patch_embedding.weight"]
    patches = F.unfold(pixels, 14, stride=14).transpose(1, 2)  # B N 3*14*14
    x = patches @ kernel.flatten(1).T + w[P + "embeddings.patch_embedding.bias"]
    x = x + w[P + "embeddings.position_embedding.weight"]
    L = P + "encoder.layers.0."
    y = norm(L + "layer_norm1", x)
    q, k, v = (linear(f"{L}self_attn.{n}_proj", y).unflatten(-1, (4, -1)).transpose(1, 2) for n in "qkv")
    attended = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    x = x + linear(L + "self_attn.out_proj", attended.transpose(1, 2).flatten(2))
    y = F.gelu(linear(L + "mlp.fc1", norm(L + "layer_norm2", x)), approximate="tanh")
    x = norm(P + "post_layernorm", x + linear(L + "mlp.fc2", y))
    return linear(VLM + "multi_modal_projector.linear", x)


def velocity(w, images, tokens, seen, x_t, t, depth=2, d=16):
    """pi0.5's velocity (Physical Intelligence 2025), joint over prefix and suffix, from the description, in float64."""
    width = w[VLM + "language_model.embed_tokens.weight"].shape[1]
    prefix = [siglip(w, image) for image in images]
    prefix.append(w[VLM + "language_model.embed_tokens.weight"][tokens] * math.sqrt(width))
    B, M, T = len(tokens), sum(part.shape[1] for part in prefix), x_t.shape[1]
    valid = torch.cat([torch.ones(B, M - tokens.shape[1], dtype=torch.bool), seen, torch.ones(B, T).bool()], 1)
    streams = [torch.cat(prefix, 1), x_t @ w[CORE + "action_in_proj.weight"].T + w[CORE + "action_in_proj.bias"]]
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, streams[1].shape[-1] // 2, dtype=torch.float64)
    angle = t[:, None] * 2 * math.pi / period
    condition = torch.cat([angle.sin(), angle.cos()], -1)
    for name in ("time_mlp_in", "time_mlp_out"):
        condition = F.silu(condition @ w[f"{CORE}{name}.weight"].T + w[f"{CORE}{name}.bias"])

    def norm(name, x, adaptive):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if not adaptive:
            return x * (1 + w[name + ".weight"]), 1
        scale, shift, gate = (condition @ w[name + ".dense.weight"].T + w[name + ".dense.bias"])[:, None].chunk(3, -1)
        return x * (1 + scale) + shift, gate

    position = valid.cumsum(1) - 1
    frequency = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    turn = (position[..., None] * frequency)[:, None]  # B 1 N d/2

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * turn.cos() - b * turn.sin(), b * turn.cos() + a * turn.sin()], -1)

    sees = valid[:, None, :].expand(B, M + T, M + T).clone()
    sees[:, :M, M:] = False  # the prefix does not look at the actions
    for i in range(depth):
        names = [f"{VLM}language_model.layers.{i}.", f"{EXPERT}model.layers.{i}."]
        normed = [norm(n + "input_layernorm", x, s) for s, (n, x) in enumerate(zip(names, streams, strict=True))]

        def heads_of(kind, names=names, normed=normed):
            parts = [x @ w[f"{n}self_attn.{kind}_proj.weight"].T for n, (x, _) in zip(names, normed, strict=True)]
            return torch.cat(parts, 1).unflatten(-1, (-1, d)).transpose(1, 2)  # B H N d

        q, k, v = rotate(heads_of("q")), rotate(heads_of("k")), heads_of("v")
        logits = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(~sees[:, None], -1e300)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).split([M, T], 1)
        for s, (n, x, out) in enumerate(zip(names, list(streams), attended, strict=True)):
            x = x + out @ w[n + "self_attn.o_proj.weight"].T * normed[s][1]
            y, gate = norm(n + "post_attention_layernorm", x, s)
            up, gated = (y @ w[f"{n}mlp.{part}_proj.weight"].T for part in ("up", "gate"))
            y = (F.gelu(gated, approximate="tanh") * up) @ w[n + "mlp.down_proj.weight"].T
            streams[s] = x + y * gate
    x, _ = norm(EXPERT + "model.norm", streams[1], True)
    return x @ w[CORE + "action_out_proj.weight"].T + w[CORE + "action_out_proj.bias"]


def weights_of(model):
    return {name: value.double() for name, value in model.policy.state_dict().items()}


def in_double(ready):
    return [ready[f"observation.images.{n}"].double() * 2 - 1 for n in ("top", "wrist")]


def test_loss_and_actions_are_those_of_an_independent_computation(this, toy):
    """The layer over stock transformers, the joint forward and the cached denoising, against float64 written out."""
    model, batch = tiny(this, toy), observation()
    ready = model.prepare(batch)
    w, images, depth = weights_of(model), in_double(ready), 2
    tokens, seen = ready["observation.language.tokens"], ready["observation.language.attention_mask"]
    noise, t = batch["noise"].double(), batch["time"].double()
    action = F.pad(ready["action"].double(), (0, 29))
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * action
    error = (velocity(w, images, tokens, seen, x_t, t, depth) - (noise - action)).square()[..., :3].mean(-1)
    expected = torch.stack([error[0].mean(), error[1, :2].mean()]).mean()  # the last two steps are past the end
    loss, metrics = model(ready)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["loss"] == loss
    x = noise
    for step in range(10):
        x = x - 0.1 * velocity(w, images, tokens, seen, x, torch.full((2,), 1 - step / 10).double(), depth)
    with torch.no_grad():
        actions = model.policy.predict_action_chunk(ready, noise=batch["noise"])
    torch.testing.assert_close(actions.double(), x[..., :3], rtol=1e-4, atol=1e-4)


def test_state_dict_keys_are_lerobots(this, toy):
    """A key that is named otherwise would not load from pi05_base, or not into LeRobot."""
    mlp = [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    layer = [f"self_attn.{n}_proj.weight" for n in "qkvo"] + mlp
    two = ("input_layernorm", "post_attention_layernorm")
    expected = {f"model.{n}.{w}" for n in ("action_in_proj", "action_out_proj") for w in ("weight", "bias")}
    expected |= {f"model.{n}.{w}" for n in ("time_mlp_in", "time_mlp_out") for w in ("weight", "bias")}
    for i in range(2):
        expected |= {f"{VLM}language_model.layers.{i}.{n}" for n in [*layer, *(f"{n}.weight" for n in two)]}
        adaptive = [f"{n}.dense.{w}" for n in two for w in ("weight", "bias")]
        expected |= {f"{EXPERT}model.layers.{i}.{n}" for n in [*layer, *adaptive]}
    expected |= {EXPERT + n for n in ("model.norm.dense.weight", "model.norm.dense.bias", "lm_head.weight")}
    expected |= {VLM + f"language_model.{n}.weight" for n in ("norm", "embed_tokens")}
    expected |= {"model.paligemma_with_expert.paligemma.lm_head.weight"}
    expected |= {f"{VLM}multi_modal_projector.linear.{w}" for w in ("weight", "bias")}
    inner = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + [
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm1",
        "layer_norm2",
    ]
    vision = [f"encoder.layers.0.{n}" for n in inner] + ["post_layernorm", "embeddings.patch_embedding"]
    names = [f"{n}.{w}" for n in vision for w in ("weight", "bias")] + ["embeddings.position_embedding.weight"]
    expected |= {f"{VLM}vision_tower.vision_model.{n}" for n in names}
    assert set(tiny(this, toy).policy.state_dict()) == expected


def test_attention_kernels_agree_and_padding_is_not_seen(this, toy):
    model, batch = tiny(this, toy), observation()
    ready = model.prepare(batch)
    loss = model(ready)[0]
    this.compat.STATE.attention = "eager"
    torch.testing.assert_close(model(ready)[0], loss, rtol=1e-5, atol=1e-6)
    this.compat.STATE.attention = "sdpa"
    seen = ready["observation.language.attention_mask"]
    other = torch.where(seen, ready["observation.language.tokens"], 77)
    assert not torch.equal(other, ready["observation.language.tokens"])
    torch.testing.assert_close(model({**ready, "observation.language.tokens": other})[0], loss, rtol=1e-5, atol=1e-6)
    longer = {key: F.pad(ready[key], (0, 9)) for key in ready if "language" in key}
    torch.testing.assert_close(model({**ready, **longer})[0], loss, rtol=1e-5, atol=1e-6)
    for key in ("observation.images.top", "observation.language.tokens", "noise", "time"):
        changed = ready[key].flip(0)
        assert abs(model({**ready, key: changed})[0] - loss) > 1e-4, f"{key} does not matter"


def test_the_layer_touches_nothing_outside_pi05(this, toy):
    """Another policy or another user of transformers in the same process would meet our classes."""
    import transformers
    from lerobot.policies.pi05 import modeling_pi05
    from transformers.models.gemma import modeling_gemma

    tiny(this, toy)
    assert not hasattr(modeling_gemma, "_gated_residual") and "transformers.models.siglip.check" not in sys.modules
    assert modeling_gemma.GemmaRMSNorm(8).__class__.__module__ == "transformers.models.gemma.modeling_gemma"
    assert transformers.PaliGemmaForConditionalGeneration is not modeling_pi05.PaliGemmaForConditionalGeneration
    from lerobot.policies.pi0 import modeling_pi0

    assert modeling_pi0.GemmaForCausalLM is transformers.GemmaForCausalLM


def test_bf16_autocast_keeps_heads_in_float32_and_stays_close(this, toy):
    model, batch = tiny(this, toy), observation()
    ready = model.prepare(batch)
    plain = model(ready)[0]
    seen = []
    hook = model.policy.model.action_out_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ready)[0]
    hook.remove()
    assert seen == [torch.float32] and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.05) and loss != plain


# --- what is trained


LEARNS = {
    "all": lambda name: True,
    "expert": lambda name: ".paligemma." not in name,
    "lora": lambda name: ".lora_" in name or ".paligemma_with_expert." not in name,
}


@pytest.mark.parametrize("train", LEARNS)
@pytest.mark.parametrize("freeze_vision", [False, True])
def test_gradients_reach_exactly_what_learns(this, toy, train, freeze_vision):
    """DDP would hang or need a search on a parameter without gradient; a frozen one that moves spoils the mode."""
    model = tiny(this, toy, train=train, freeze_vision=freeze_vision).train()
    model(model.prepare(observation()))[0].backward()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    wanted = {name for name, _ in model.named_parameters() if LEARNS[train](name)}
    if freeze_vision:
        wanted = {name for name in wanted if ".vision_tower." not in name}
    unused = {name for name in wanted - learned}
    last = (
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.o_proj",
        "layers.1.mlp.",
        "layers.1.post_attention_layernorm",
        "language_model.norm",
    )
    assert learned <= wanted
    assert all(("paligemma" in n and any(part in n for part in last)) or "lm_head" in n for n in unused), unused


def test_adapters_start_as_nothing_and_merge_into_the_weights(this, toy, tmp_path):
    plain, batch = tiny(this, toy), observation()
    plain.save_pretrained(tmp_path / "base")
    model = this.model.Pi05(
        ["top", "wrist"], 3, 3, plain.about["stats"], tokenizer=toy, size="tiny", chunk=4, image_size=28,
        prompt_tokens=64, train="lora",
    ).load_pretrained(tmp_path / "base")  # fmt: skip
    torch.testing.assert_close(model(model.prepare(batch))[0], plain(plain.prepare(batch))[0])
    ranks = {p.shape[0] for name, p in model.named_parameters() if name.endswith("lora_a")}
    assert ranks == {16, 32}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    merged = this.model.Pi05.from_pretrained(tmp_path / "lora")
    assert not [name for name in merged.policy.state_dict() if "lora" in name]
    torch.testing.assert_close(merged.predict(batch), model.eval().predict(batch), rtol=1e-4, atol=1e-5)
    assert (merged.predict(batch) - plain.predict(batch)).abs().max() > 0.01


def test_checkpointing_gives_the_same_gradients(this, toy):
    grads = []
    for more in ({}, dict(gradient_checkpointing=True)):
        model = tiny(this, toy, **more).train()
        model(model.prepare(observation()))[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_average_is_the_running_one_and_is_what_is_exported(this, toy, tmp_path):
    model = tiny(this, toy, ema=0.9)
    name = "policy.model.action_in_proj.weight"
    parameter = dict(model.named_parameters())[name]
    expected = model.average[name].clone().copy_(parameter.data)
    model.average[name].copy_(parameter.data)
    for step in range(3):
        parameter.data.add_(step + 1.0)
        model.update_average()
        expected = 0.9 * expected + 0.1 * parameter.data
    torch.testing.assert_close(model.average[name], expected)
    before = parameter.data.clone()
    with model.averaged():
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(parameter.data, before)
    model.save_pretrained(tmp_path)
    again = this.model.Pi05.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(again.named_parameters())[name].data, expected)


# --- what it reads


def prompt_of(model, batch, tokenizer):
    from transformers import AutoTokenizer

    ready = model.prepare(batch)
    tokens, seen = ready["observation.language.tokens"], ready["observation.language.attention_mask"]
    decode = AutoTokenizer.from_pretrained(str(tokenizer)).decode
    return [decode(row[mask], skip_special_tokens=True) for row, mask in zip(tokens, seen, strict=True)]


def test_prompt_holds_task_and_state_in_256_bins(this, toy):
    """The text of a whole prompt, with a state beyond [-1, 1] on both sides; LeRobot 0.4 would add 29 times 128."""
    batch = observation()
    batch["observation.state"] = torch.tensor([[-1.0, 0.0, 0.999], [-1.5, 0.5, 7.0]])
    batch["task"] = ["pick_up\nthe cup ", "öffne 1"]
    one, two = prompt_of(tiny(this, toy), batch, toy)
    assert one == "Task: pick up the cup, State: 0 128 255;\nAction: "
    assert two == "Task: öffne 1, State: -1 192 255;\nAction: "
    old = tiny(this, toy, old_inputs=True, prompt_tokens=200)
    assert prompt_of(old, batch, toy)[0] == "Task: pick up the cup, State: 0 128 255" + " 128" * 29 + ";\nAction: "


def test_border_of_images_is_black(this, toy):
    """LeRobot 0.4 pads with -3 where black is -1."""
    for old, value in ((False, -1.0), (True, -3.0)):
        model = tiny(this, toy, old_inputs=old)
        wide = torch.rand(1, 3, 14, 28)
        images, present = model.policy._preprocess_images({f"observation.images.{n}": wide for n in ("top", "wrist")})
        assert images[0].shape == (1, 3, 28, 28) and present[0].all()
        assert (images[0][:, :, :7] == value).all() and (images[0][:, :, 21:] == value).all()
        torch.testing.assert_close(images[0][:, :, 7:21], wide * 2 - 1)


def test_a_prompt_that_does_not_fit_is_an_error(this, toy):
    batch = observation()
    batch["task"] = ["x" * 60, "y"]
    with pytest.raises(ValueError, match="fills all 64 tokens: raise --prompt-tokens"):
        tiny(this, toy).prepare(batch)


def test_relative_actions_go_out_and_come_back(this, toy):
    """Normalised action = (action - state) in its range, except for the absolute dim; prediction undoes it."""
    model, batch = tiny(this, toy, absolute=[2]), observation()
    ready = model.prepare(batch)
    expected = batch["action"].clone()
    expected[..., :2] -= batch["observation.state"][:, None, :2]
    torch.testing.assert_close(ready["action"], expected)
    torch.testing.assert_close(model.prepare.undo(ready["action"], batch["observation.state"]), batch["action"])


def test_loader_processes_get_no_weights(this, toy):
    """The callable that loaders keep must stay small: a started process would get a copy of the model."""
    assert len(pickle.dumps(vars(tiny(this, toy).prepare))) < 200_000


def test_tokenizers_are_checked(this, toy, tmp_path):
    check = this.inputs.check_tokenizer
    for folder, size, message in (
        (None, "full", "--tokenizer is needed"),
        (toy, "full", "about 257,000"),
        (tmp_path / "absent", "tiny", "no such folder; expected PaliGemma"),
        (tmp_path, "tiny", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            check(folder, size)
    assert len(check(toy, "tiny")) == 356 + 246  # of 0 to 255 the digits were there


@pytest.mark.parametrize(
    "words, message",
    [(([], 3, 3), "at least one camera"), ((["a"], 3, 33), "room for 32"), ((["a"], 40, 3), "room for 32")],
)
def test_dims_that_pi05_cannot_hold(this, words, message):
    with pytest.raises(ValueError, match=message):
        this.inputs.check_dims(*words)


# --- files


def test_lerobot_opens_a_checkpoint_and_predicts_the_same(this, toy, tmp_path, capsys):
    """PI05Policy.from_pretrained and LeRobot's own loading of the processors, as a robot's program does it."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy

    stats = {"observation.state": statistics(3), "action": statistics(3, -1.0, 3.0)}
    model, batch = tiny(this, toy, stats=stats), observation()
    model.save_pretrained(tmp_path / "c")
    expected = model.predict(batch)
    policy = PI05Policy.from_pretrained(tmp_path / "c")
    own = dict(tokenizer_processor=dict(tokenizer_name=str(tmp_path / "c" / "tokenizer")))
    before, after = make_pre_post_processors(policy.config, str(tmp_path / "c"), preprocessor_overrides=own)
    raw = {key: value for key, value in batch.items() if key.startswith("observation.") or key == "task"}
    actions = after(policy.predict_action_chunk(before(raw), noise=batch["noise"]))
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(this.model.Pi05.from_pretrained(tmp_path / "c").predict(batch), expected)


def break_missing(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.action_in_proj.bias"]
    save_file(state, folder / "model.safetensors")


def break_shape(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.action_in_proj.bias"] = torch.zeros(7)
    save_file(state, folder / "model.safetensors")


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_missing, "1 tensors are missing .*action_in_proj.bias"),
        (break_shape, r"action_in_proj.bias has shape \(7,\), expected \(64,\)"),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors: cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "pi05_finetune.json").write_text("{"), "pi05_finetune.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer.*no such folder"),
    ],
)
def test_damaged_checkpoints_are_refused(this, toy, tmp_path, damage, message):
    """LeRobot's own loader prints a warning and goes on with random weights."""
    tiny(this, toy).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        this.model.Pi05.from_pretrained(tmp_path)


def test_weights_under_openpis_names_load(this, toy, tmp_path):
    """pi05_base on the hub has no `model.` in front, and the tied embedding once."""
    from safetensors.torch import load_file, save_file

    model, batch = tiny(this, toy), observation()
    model.save_pretrained(tmp_path)
    state = {name.removeprefix("model."): value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    again = this.model.Pi05.from_pretrained(tmp_path)
    assert torch.equal(again.predict(batch), model.predict(batch))


# --- spec and readers

SPEC = dict(
    name="arm", action_dim=3, control_freq_hz=10, required_obs_keys=["camera"], required_proprio_keys=["joint_pos"],
    action_names=["x", "y", "gripper"], action_min=[-9, -9, -9], action_max=9, max_episode_steps=50,
)  # fmt: skip


def an_episode(length=20, seed=0, pixels=28):
    rng = np.random.default_rng(seed)
    actions = np.cumsum(rng.normal(size=(length, 3)) * 0.1, 0).astype(np.float32)
    return {
        "actions": actions,
        "timestamps": np.arange(length) / 10,
        "obs.joint_pos": np.concatenate([actions[:1] - 0.05, actions[:-1]]),
        "obs.camera": rng.integers(0, 255, (length, pixels, pixels, 3), dtype=np.uint8),
        "task": np.array(f"task {seed % 2} ü"),
    }


def write_data(folder, lengths=(20, 15, 30, 12), **changes):
    """npz episodes of SPEC. changes: {episode number as eN: function(arrays) that spoils them}."""
    (folder / "episodes").mkdir(parents=True)
    (folder / "spec.yaml").write_text(json.dumps(SPEC))
    for i, length in enumerate(lengths):
        arrays = an_episode(length, i)
        arrays = changes[f"e{i}"](arrays) if f"e{i}" in changes else arrays
        np.savez(folder / "episodes" / f"ep{i}.npz", **arrays)
    return folder


def test_spec_reads_every_field_of_the_seed(this, tmp_path):
    fields = dict(
        name="lekiwi", version="2", control_freq_hz=30.0, control_freq_tolerance_pct=15.0, required_obs_keys=["c"],
        required_proprio_keys=["p"], action_dim=2, action_names=["a", "b"], action_type="delta", action_min=[-1, -2],
        action_max=[1, 2], max_episode_steps=600, allow_nan=True, clip_actions=True,
    )  # fmt: skip
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    for name, text in (("s.json", json.dumps(fields)), ("s.yaml", lines)):
        (tmp_path / name).write_text(text)
        assert vars(this.spec.load_spec(tmp_path / name)) == fields
    assert this.spec.load_spec(tmp_path / "s.json").clip(np.array([[5.0, -5.0]])).tolist() == [[1, -2]]
    for file in (ROOT / "pi05_finetune" / "specs").glob("*.yaml"):
        assert this.spec.load_spec(file).action_dim in (3, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(action_dims=3), "unknown field 'action_dims'; did you mean action_dim"),
        (dict(action_dim="three"), "action_dim is 'three', expected a whole number"),
        (dict(action_names=["x"]), "expected 3 names"),
        (dict(action_min=[0, 0]), "expected 3 numbers"),
        (dict(action_type="velocity"), "absolute or delta"),
        (dict(control_freq_hz=0), "a rate above 0"),
        (dict(clip_actions=True, action_min=None), "clip_actions"),
        (dict(required_obs_keys="camera"), "a list of names"),
        (None, "missing 2 required"),
    ],
)
def test_wrong_spec_is_named(this, tmp_path, change, message):
    fields = SPEC | change if change else {k: v for k, v in SPEC.items() if k not in ("name", "action_dim")}
    (tmp_path / "spec.yaml").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        this.spec.load_spec(tmp_path / "spec.yaml")


def test_npz_frames_are_read_one_by_one_and_right(this, tmp_path):
    """Stored and compressed files alike, in any order."""
    arrays = an_episode()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "e.npz", **arrays)
        this.episodes.npz_array.cache_clear()
        (stored,) = this.episodes.list_episodes("x", tmp_path)
        episode = stored.load(None)
        frames = episode.frames["camera"]
        for i in (7, 0, 19):
            np.testing.assert_array_equal(frames[i], arrays["obs.camera"][i])
        np.testing.assert_array_equal(episode.vectors["joint_pos"], arrays["obs.joint_pos"])
        assert episode.task == "task 0 ü" and len(episode) == 20
        this.episodes.npz_array.cache_clear()


def write_lerobot_v21(folder, episodes):
    """A minimal v2.1 set with a state and no camera, from its description."""
    import pyarrow
    import pyarrow.parquet

    (folder / "meta").mkdir(parents=True)
    feature = dict(dtype="float32", shape=[3], names=["x", "y", "gripper"])
    info = dict(
        codebase_version="v2.1", fps=10, chunks_size=1000, features={"action": feature, "observation.state": feature}
    )
    info |= dict(data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", video_path="v")
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "tasks.jsonl").write_text(
        '{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "pull"}\n'
    )
    lines = [json.dumps(dict(episode_index=i)) for i in range(len(episodes))]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for i, arrays in enumerate(episodes):
        n = len(arrays["actions"])
        table = {
            "action": arrays["actions"].tolist(), "observation.state": arrays["obs.joint_pos"].tolist(),
            "timestamp": arrays["timestamps"].tolist(), "frame_index": list(range(n)), "episode_index": [i] * n,
            "task_index": [i % 2] * n,
        }  # fmt: skip
        file = folder / "data" / "chunk-000" / f"episode_{i:06d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    return folder


def test_lerobot_reads_to_the_same_arrays(this, tmp_path):
    arrays = [an_episode(12, 0), an_episode(9, 1)]
    root = write_lerobot_v21(tmp_path / "d", arrays)
    stored = this.episodes.list_episodes("x", root)
    for item, want, task in zip(stored, arrays, ("push", "pull"), strict=True):
        episode = item.load(None)
        np.testing.assert_array_equal(episode.actions, want["actions"])
        np.testing.assert_array_equal(episode.vectors["state"], want["obs.joint_pos"])
        np.testing.assert_allclose(episode.timestamps, want["timestamps"])
        assert episode.task == task and item.action_names == ["x", "y", "gripper"]
    next(root.glob("data/**/*_000001.parquet")).unlink()
    spec, train, held = this.episodes.open_data([f"x={root}"], None, 0, say=lambda text: None)
    assert [e.id for e in train] == ["0"] and not held and spec.control_freq_hz == 10
    truncate(next(root.glob("data/**/*_000000.parquet")))
    this.episodes.read_table.cache_clear()
    with pytest.raises(ValueError, match="episode_000000.parquet: not a whole parquet"):
        this.episodes.open_data([f"x={root}"])
    (root / "meta" / "info.json").write_text("{}")
    with pytest.raises(ValueError, match="info.json: not the description"):
        this.episodes.list_episodes("x", root)


def change(**arrays):
    return lambda old: {**old, **arrays}


def without(name):
    return lambda old: {key: value for key, value in old.items() if key != name}


def spoil(name, *where, value):
    def function(arrays):
        arrays = {**arrays, name: arrays[name].copy()}
        arrays[name][where] = value
        return arrays

    return function


def scaled_time(factor):
    return lambda old: {**old, "timestamps": old["timestamps"] * factor}


BROKEN = {
    "no actions": (without("actions"), "readable", "no array `actions`"),
    "no timestamps": (without("timestamps"), "readable", "no array `timestamps`"),
    "no joints": (without("obs.joint_pos"), "readable", "no array `obs.joint_pos`"),
    "no camera": (without("obs.camera"), "readable", "no array `obs.camera`"),
    "unequal lengths": (change(timestamps=np.arange(19) / 10), "readable", "19 rows of timestamps, but 20 actions"),
    "too many dims": (change(actions=np.zeros((20, 4))), "readable", "4 action dims, but the spec has 3"),
    "no steps": (lambda old: {k: v if v.ndim == 0 else v[:0] for k, v in old.items()}, "readable", "no steps"),
    "float images": (change(**{"obs.camera": np.zeros((20, 8, 8, 3))}), "readable", "expected uint8"),
    "pickled": (change(actions=np.array([{}], dtype=object)), "readable", "pickle|Object"),
    "NaN": (spoil("actions", 4, 2, value=np.nan), "readable", "NaN or infinity at step 4, dim 2"),
    "infinite state": (spoil("obs.joint_pos", 3, 1, value=np.inf), "readable", "joint_pos hold NaN or infinity"),
    "clock set back": (spoil("timestamps", 9, value=0.1), "boundaries", "do not rise at step 9"),
    "lost frames": (
        spoil("timestamps", slice(15, None), value=np.arange(5) / 10 + 3),
        "boundaries",
        "frames were lost",
    ),
    "wrong rate": (scaled_time(0.7), "rate", "14.29 Hz, but the spec says 10 Hz"),
    "too long": (lambda old: an_episode(60), "length", "60 steps, but the spec allows 50"),
    "one step": (lambda old: an_episode(1), "length", "one step only"),
    "out of range": (spoil("actions", 5, 1, value=11), "range", "y is 11 at step 5, the limit is 9"),
    "no task": (change(task=np.array(" ")), "task", "no task text"),
    "frozen camera": (spoil("obs.camera", slice(None), value=an_episode()["obs.camera"][0]), "frozen", "same picture"),
    "covered lens": (spoil("obs.camera", slice(None), value=3), "frozen", "same picture"),
    "duplicate": (lambda old: an_episode(15, 1), "duplicate", "the same actions as episode data/ep0|ep1"),
    "jump": (spoil("actions", 8, 0, value=5), "jump", "x jumps from"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validator_finds_each_fault(this, tmp_path, name):
    """One episode is spoilt in one way: just this rule speaks, of just this episode, and the exit code tells."""
    damage, rule, text = BROKEN[name]
    data = write_data(tmp_path / "data", e0=damage)
    code = this.validate.main(["--data", str(data), "--report", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    found = [row for row in report["problems"] if row["rule"] == rule]
    assert len(found) == 1 and re.search(text, found[0]["text"]), report["problems"]
    assert {row["rule"] for row in report["problems"]} <= {rule, "jump"}
    assert code == (0 if this.validate.is_warning(rule) else 1)
    if rule not in ("frozen", "duplicate", "jump"):
        with pytest.raises(ValueError):
            spec, train, held = this.episodes.open_data([str(data)])
            this.validate.refuse(train + held, spec)


def test_validator_passes_good_data_and_counts(this, tmp_path):
    data = write_data(tmp_path / "data")
    words = ["--data", str(data), "--report", str(tmp_path / "r.json")]
    assert this.validate.main(words) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["episodes"], report["steps"], report["errors"], report["problems"]) == (4, 77, 0, [])
    assert this.validate.main([*words, "--max-episodes", "2"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["steps"] == 35

    def still(arrays):
        return {**arrays, "actions": arrays["actions"] * np.float32([1, 1, 1e-6])}

    data = write_data(tmp_path / "still", **{f"e{i}": still for i in range(4)})
    assert this.validate.main(["--data", str(data), "--report", str(tmp_path / "r.json")]) == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())["problems"]
    assert row["rule"] == "constant" and row["text"].startswith("gripper hardly moves")


def test_truncated_npz_is_named(this, tmp_path):
    data = write_data(tmp_path / "data")
    truncate(data / "episodes" / "ep2.npz")
    this.episodes.npz_array.cache_clear()
    with pytest.raises(ValueError, match="ep2.npz: "):
        this.episodes.open_data([str(data)])


def test_split_by_hash_and_by_name(this, tmp_path):
    data = write_data(tmp_path / "data", lengths=[5] * 30)
    wider = write_data(tmp_path / "wider", e1=lambda old: {**old, "obs.joint_pos": old["obs.joint_pos"][:, :2]})
    share = [f"ep{i}" for i in range(30) if digest_share("a", f"ep{i}") < 0.25]
    _, train, held = this.episodes.open_data([f"a={data}"], None, 0.25)
    assert sorted(e.id for e in held) == sorted(share) and len(train) + len(held) == 30 and 2 < len(share) < 15
    _, _, held = this.episodes.open_data([f"a={data}", f"b={data}"], None, 0.25, ["b=ep3,ep7"])
    assert sorted(e.id for e in held if e.source == "a") == sorted(share)
    assert sorted(e.id for e in held if e.source == "b") == ["ep3", "ep7"]
    for words, message in (
        (([str(data)], None, 0.1, ["99"]), "no episode of data is called 99"),
        (([str(data), str(data)],), "two data sets are called data"),
        (([str(tmp_path / "absent")],), "no such folder"),
        (([str(wider)],), "episode ep1: `obs.joint_pos` has 2 dims, but 3 in episode ep0"),
    ):
        with pytest.raises(ValueError, match=message):
            this.episodes.open_data(*words)


def digest_share(source, episode):
    return int.from_bytes(hashlib.sha256(f"{source}/{episode}".encode()).digest()[:8], "big") / 2**64


# --- norms


def test_statistics_against_numpy_and_their_floors(this):
    """A joint that stands still, or moves in 0.7 % of the steps, must not be blown up to hundreds of units."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, 4)) * [1, 5, 1e-6, 0] + [0, 1, 2, 3]
    rows[:14, 2] += 0.5
    stats, warnings = this.norms.measure(rows, ["a", "b", "rare", "still"])
    for name, expected in (
        ("mean", rows.mean(0)), ("min", rows.min(0)), ("max", rows.max(0)),
    ):  # fmt: skip
        np.testing.assert_allclose(stats[name], expected, rtol=1e-5, atol=1e-6)
    low, high = np.quantile(rows[:, :2], [0.01, 0.99], axis=0)
    np.testing.assert_allclose(stats["q01"][:2], low, rtol=1e-5)
    np.testing.assert_allclose(stats["q99"][:2], high, rtol=1e-5)
    np.testing.assert_allclose(stats["std"][:2], rows[:, :2].std(0), rtol=1e-5)
    x = (rows - stats["q01"]) / (stats["q99"] - stats["q01"]) * 2 - 1
    assert np.abs(x).max() < 4 and np.abs((rows - stats["mean"]) / stats["std"]).max() < 110
    assert [w.split()[0] for w in warnings] == ["rare", "still"]


def test_norms_are_of_training_episodes_and_refuse_other_data(this, tmp_path):
    data = write_data(tmp_path / "data", lengths=[20] * 6)
    words = ["--data", f"a={data}", "--val-episodes", "ep5", "--out", str(tmp_path / "norms")]
    assert this.compute_norms.main(words) == 0
    norms = this.norms.load_norms(tmp_path / "norms")
    spec, train, _ = this.episodes.open_data([f"a={data}"], None, 0, ["ep5"])
    rows = np.concatenate([an_episode(20, i)["actions"] for i in range(5)])
    np.testing.assert_allclose(norms.action_mean, rows.mean(0), rtol=1e-4, atol=1e-6)
    states = np.concatenate([an_episode(20, i)["obs.joint_pos"] for i in range(5)])
    np.testing.assert_allclose(norms.proprio_std["joint_pos"], states.std(0), rtol=1e-4)
    norms.check(train, 4, None)
    for other, what in (
        (this.episodes.open_data([f"a={data}"], None, 0, ["ep4"])[1], "data_hash"),
        (this.episodes.open_data([f"b={data}"], None, 0, ["ep5"])[1], "data_hash"),
    ):
        with pytest.raises(ValueError, match=what):
            norms.check(other, 4, None)
    with pytest.raises(ValueError, match="relative"):
        norms.check(train, 4, [2])
    file = data / "episodes" / "ep1.npz"
    np.savez(file, **spoil("actions", 3, 0, value=0.123)(an_episode(20, 1)))
    changed = this.episodes.open_data([f"a={data}"], None, 0, ["ep5"])[1]
    with pytest.raises(ValueError, match="another data set"):
        norms.check(changed, 4, None)
    for more, message in ((["--proprio-keys", "joint_vel"], "the spec requires joint_pos"), ([], "holds other files")):
        (tmp_path / "norms" / "mine.txt").write_text("")
        with pytest.raises(ValueError, match=message):
            this.compute_norms.main([*words, *more])
    truncate(tmp_path / "norms" / "norms.npz")
    with pytest.raises(ValueError, match="not norms.npz and metadata.json"):
        this.norms.load_norms(tmp_path / "norms")


def test_relative_statistics_are_of_action_minus_state(this, tmp_path):
    data = write_data(tmp_path / "data")
    spec, train, _ = this.episodes.open_data([str(data)], None, 0)
    norms = this.norms.compute(spec, train, None, 3, [2])
    rows = []
    for episode in train:
        for k in range(3):
            for t in range(len(episode) - k):
                rows.append(episode.actions[t + k] - episode.vectors["joint_pos"][t] * [1, 1, 0])
    np.testing.assert_allclose(norms.action_mean, np.mean(rows, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norms.action["max"], np.max(rows, 0), rtol=1e-5)


# --- windows and batches


def opened(this, folder, **kwargs):
    return this.episodes.open_data([f"a={folder}"], None, kwargs.pop("val_share", 0), **kwargs)


def test_the_seeds_example_works_as_written(this, tmp_path):
    """Its names, imported from one place, and what it promises about the batch."""
    data = write_data(tmp_path / "data", lengths=(20, 15, 33))
    assert this.compute_norms.main(["--data", str(data), "--val-share", "0", "--out", str(tmp_path / "norms")]) == 0
    d = this.data
    spec = d.load_spec(data / "spec.yaml")
    norms = d.load_norms(tmp_path / "norms")
    normalizer = d.Normalizer(
        action_mean=norms.action_mean,
        action_std=norms.action_std,
        proprio_mean=norms.proprio_mean,
        proprio_std=norms.proprio_std,
    )
    augment = d.build_augmentations(None)
    dataset = d.EpisodeDataset(
        spec=spec,
        data_root=data,
        sequence=d.SequenceConfig(seq_len=16, stride=8),
        normalizer=normalizer,
        augment_fn=augment,
        seed=123,
    )
    loader = d.build_dataloader(dataset, batch_size=4, shuffle=True, num_workers=0, seed=42)
    batches = list(loader)
    assert sum(len(batch["lengths"]) for batch in batches) == len(dataset) == 2 + 1 + 4
    for batch in batches:
        lengths = batch["lengths"]
        assert batch["actions"].shape == (len(lengths), lengths.max(), 3)
        assert batch["attention_mask"].sum(1).tolist() == lengths.tolist()
        assert not batch["actions"][~batch["attention_mask"]].any()
        assert batch["obs.camera"].shape[2:] == (28, 28, 3) and len(batch["task"]) == len(lengths)
    item = dataset[1]
    rows = an_episode(20, 0)["actions"][8:20]
    np.testing.assert_allclose(item["actions"], (rows - norms.action_mean) / norms.action_std, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normalizer.undo(item["actions"].numpy()), rows, rtol=1e-4, atol=1e-5)
    again = list(d.build_dataloader(dataset, batch_size=4, shuffle=True, num_workers=0, seed=42))
    for one, two in zip(batches, again, strict=True):
        assert one["task"] == two["task"] and all(torch.equal(one[k], two[k]) for k in one if torch.is_tensor(one[k]))


@pytest.mark.parametrize("seq_len, stride", [(1, 1), (4, 2), (5, 5), (32, 16), (3, 7)])
def test_windows_cover_every_step_without_one_inside_another(this, seq_len, stride):
    for length in range(1, 40):
        starts = this.data.SequenceConfig(seq_len, stride).starts(length)
        windows = [range(s, min(s + seq_len, length)) for s in starts]
        steps = {i for window in windows for i in window}
        assert steps == set(range(length)) or stride > seq_len
        assert all(a.stop < b.stop for a, b in zip(windows[:-1], windows[1:], strict=True))
    with pytest.raises(ValueError, match="stride is 0"):
        this.data.SequenceConfig(4, 0)


def test_chunks_of_future_actions_stop_at_the_episodes_end(this):
    actions = np.arange(12, dtype=np.float32).reshape(6, 2)
    actions[5, 0] = np.nan
    for step in range(6):
        chunk, mask = this.data.future(actions, step, 4)
        for k in range(4):
            there = step + k < 6 and step + k != 5
            assert mask[k] == there
            if there:
                np.testing.assert_array_equal(chunk[k], actions[step + k])
        assert np.isfinite(chunk).all()


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, toy, tmp_path):
    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    augment = this.data.build_augmentations(this.data.AugmentConfig.openpi())

    def batch(step, accum, world, seed=3):
        more = dict(batch_size=8, seed=seed, accum=accum, world=world, augment=augment)
        ranks = [this.data.TrainBatches(spec, train, 4, 28, rank=rank, **more) for rank in range(world)]
        parts = [rank[step * accum + micro] for micro in range(accum) for rank in ranks]
        tasks = sum((part.pop("task") for part in parts), [])
        return tasks, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    tasks, whole = batch(5, 1, 1)
    for accum, world in ((2, 1), (1, 2), (2, 4)):
        same, other = batch(5, accum, world)
        assert same == tasks and equal(other, whole)
    assert not torch.equal(batch(6, 1, 1)[1]["action"], whole["action"])
    assert not torch.equal(batch(5, 1, 1, seed=4)[1]["noise"], whole["noise"])
    with pytest.raises(ValueError, match="not divisible"):
        this.data.TrainBatches(spec, train, 4, 28, batch_size=8, accum=3)


def test_samples_are_recorded_steps(this, tmp_path):
    """Image, state, chunk, mask and task of one sample belong together, and every step is drawn."""
    spec, train, _ = opened(this, write_data(tmp_path / "data", lengths=(6, 9)))
    batches, seen = this.data.TrainBatches(spec, train, 4, 28, batch_size=64), set()
    for item in range(4):
        batch = batches[item]
        for i in range(64):
            state = batch["observation.state"][i].numpy()
            places = [
                (n, t)
                for n, e in enumerate(train)
                for t, row in enumerate(e.vectors["joint_pos"])
                if (row == state).all()
            ]
            ((number, step),) = places
            episode = train[number]
            left = min(4, len(episode) - step)
            np.testing.assert_array_equal(batch["action"][i, :left], episode.actions[step : step + left])
            assert batch["mask"][i].sum() == left and batch["task"][i] == f"task {number} ü"
            seen.add((number, step))
    assert seen == {(0, t) for t in range(6)} | {(1, t) for t in range(9)}


def test_noise_and_time_have_openpis_distributions(this, tmp_path):
    from scipy.stats import beta, kstest, norm

    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    batch = this.data.TrainBatches(spec, train, 4, 28, batch_size=500)[0]
    assert kstest((batch["time"].numpy() - 0.001) / 0.999, beta(1.5, 1).cdf).pvalue > 1e-3
    assert kstest(batch["noise"].numpy().ravel()[:20_000], norm.cdf).pvalue > 1e-3


def test_validation_is_fixed_and_shared_without_repeats(this, tmp_path):
    spec, train, held = opened(this, write_data(tmp_path / "data"), val_episodes=["ep2,ep3"])
    whole = this.data.ValidationSteps(spec, held, 4, 28, stride=3)
    parts = [this.data.ValidationSteps(spec, held, 4, 28, stride=3, rank=rank, world=3) for rank in range(3)]
    assert len(whole) == 10 + 4 == sum(map(len, parts))
    for i in range(len(whole)):
        one, two = whole[i], parts[i % 3][i // 3]
        assert one["time"] == two["time"] and (one["noise"] == two["noise"]).all()
        assert (one["action"] == two["action"]).all()
    assert not (whole[0]["noise"] == whole[1]["noise"]).all()


def test_augmentation_is_what_it_says(this):
    build, config = this.data.build_augmentations, this.data.AugmentConfig
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    nothing = config(brightness=0, contrast=0)
    np.testing.assert_array_equal(build(nothing)(images, 0), images)
    assert build(None) is None
    bright = build(config(brightness=0.5, contrast=0))
    ratio = bright(images / 510, 3).mean() / (images / 510).mean()
    assert 0.5 < ratio < 1.5 and abs(ratio - 1) > 0.01
    np.testing.assert_allclose(bright(images / 510, 3), images / 510 * ratio, atol=1e-6)
    flat = build(config(brightness=0, contrast=0.4))(images / 255, 1)
    grey = (images / 255) @ [0.299, 0.587, 0.114]
    for before, after, mean in zip(images / 255, flat, grey.mean((1, 2)), strict=True):
        inside = (after > 0) & (after < 1)
        slope = (after - mean)[inside] / np.where(before == mean, np.nan, before - mean)[inside]
        assert np.nanstd(slope) < 1e-3 and 0.6 < np.nanmean(slope) < 1.4
    full = build(config.openpi())
    np.testing.assert_array_equal(full(images, 5), full(images, 5))
    assert (full(images, 5) != full(images, 6)).any() and full(images, 5).dtype == np.uint8
    moved, kept = (build(config(brightness=0, contrast=0, crop=0.8, rotate=10))(images, 5, c) for c in ("top", "wrist"))
    assert (moved != images).mean() > 0.5
    np.testing.assert_array_equal(kept, images)
    crop = build(config(brightness=0, contrast=0, crop=0.5))
    ramp = np.tile(np.linspace(0, 1, 64)[None, None, :, None], (1, 64, 1, 3))
    inner = crop(ramp, 2)[0, 32, 4:-4, 0]
    np.testing.assert_allclose(np.diff(inner), 0.5 / 63, rtol=0.05)  # half of the picture over its whole width


def test_rotation_keeps_shapes_in_a_wide_picture(this):
    """Points at the same distance from the middle, beside and below it, stay at that distance."""
    config = this.data.AugmentConfig(brightness=0, contrast=0, rotate=80)
    turned = this.data.build_augmentations(config)
    for row, column in ((32, 84), (52, 64)):
        image = np.zeros((1, 64, 128, 3))
        image[0, row - 1 : row + 1, column - 1 : column + 1] = 1
        moved = turned(image, 3)[0, :, :, 0]
        weight = moved / moved.sum()
        y, x = (weight.sum(1 - axis) @ np.arange(weight.shape[axis]) for axis in (0, 1))
        assert np.hypot(y - 31.5, x - 63.5) == pytest.approx(20, abs=1) and abs(y - (row - 0.5)) > 2


def test_images_are_shrunk_without_distortion(this):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[12:36, 16:48] = 255
    small = this.data.shrink(frame, 28)
    assert small.shape == (21, 28, 3) and small[10, 14, 0] == 1 and small[2, 2, 0] == 0
    assert small.mean() == pytest.approx(0.25, abs=0.02)
    assert this.data.shrink(frame[:1], 28).shape == (1, 28, 3)


# --- convert


def converted(this, *words):
    assert this.convert.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("images", [[], ["--images"]])
def test_npz_to_lerobot_and_back(this, tmp_path, images):
    """Numbers, rate and tasks come back exactly; pictures exactly, video as good as its codec."""
    data = write_data(tmp_path / "data", lengths=(8, 6))
    for file in sorted((data / "episodes").glob("*.npz")):  # noise is what no video codec can keep
        arrays = dict(np.load(file))
        ramp = np.linspace(0, 255, 64)
        steps = range(len(arrays["actions"]))
        arrays["obs.camera"] = np.stack([np.uint8(np.tile((ramp * t / 8)[None, :, None], (64, 1, 3))) for t in steps])
        np.savez(file, **arrays)
    converted(this, "--data", data, "--to", "lerobot", "--out", tmp_path / "l", *images)
    converted(this, "--data", tmp_path / "l", "--to", "npz", "--out", tmp_path / "back")
    for i in range(2):
        one = dict(np.load(data / "episodes" / f"ep{i}.npz"))
        two = dict(np.load(tmp_path / "back" / "episodes" / f"{i:06d}.npz"))
        np.testing.assert_array_equal(one["actions"], two["actions"])
        np.testing.assert_array_equal(one["obs.joint_pos"], two["obs.joint_pos"])
        np.testing.assert_allclose(one["timestamps"], two["timestamps"], atol=1e-5)
        assert str(one["task"]) == str(two["task"])
        error = np.abs(one["obs.camera"].astype(int) - two["obs.images.camera"])
        assert error.max() == 0 if images else error.mean() < 4
    spec = this.spec.load_spec(tmp_path / "back" / "spec.yaml")
    assert spec.control_freq_hz == 10 and spec.required_obs_keys == ["images.camera"]
    with pytest.raises(ValueError, match="is there already"):
        converted(this, "--data", data, "--to", "npz", "--out", tmp_path / "back")


def test_dims_by_name_and_hdf5(this, tmp_path):
    import h5py

    root = write_lerobot_v21(tmp_path / "d", [an_episode(12, 0)])
    converted(this, "--data", root, "--to", "npz", "--dims", "grip*", "x", "--out", tmp_path / "n")
    arrays = np.load(tmp_path / "n" / "episodes" / "000000.npz")
    np.testing.assert_array_equal(arrays["actions"], an_episode(12, 0)["actions"][:, [0, 2]])
    np.testing.assert_array_equal(arrays["obs.state"], an_episode(12, 0)["obs.joint_pos"][:, [0, 2]])
    with pytest.raises(ValueError, match="--dims elbow: no such dim among x, y, gripper"):
        converted(this, "--data", root, "--to", "npz", "--dims", "elbow", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    with h5py.File(tmp_path / "demo.hdf5", "w") as h5:
        for name in ("demo_10", "demo_2"):
            h5[f"data/{name}/actions"] = an_episode(9)["actions"].astype(np.float64)
            h5[f"data/{name}/states"] = np.ones((9, 5))
            h5[f"data/{name}/obs/agentview_image"] = an_episode(9)["obs.camera"]
    words = ["--data", tmp_path / "demo.hdf5", "--to", "npz", "--out", tmp_path / "h"]
    with pytest.raises(ValueError, match="give --rate"):
        converted(this, *words)
    converted(this, *words, "--rate", 20, "--task", "lift", "--image-size", 14)
    arrays = np.load(tmp_path / "h" / "episodes" / "demo_2.npz")
    np.testing.assert_allclose(arrays["actions"], an_episode(9)["actions"])
    assert str(arrays["task"]) == "lift" and arrays["timestamps"][1] == 0.05
    assert arrays["obs.agentview_image"].shape == (9, 14, 14, 3) and arrays["obs.states"].shape == (9, 5)
    (tmp_path / "bad.hdf5").write_bytes(b"not hdf5")
    with pytest.raises(ValueError, match="bad.hdf5: not a robosuite"):
        converted(this, "--data", tmp_path / "bad.hdf5", "--rate", 20, "--to", "npz", "--out", tmp_path / "b")


# --- the report


def test_scores_against_a_case_done_by_hand(this):
    true = np.cumsum(np.ones((2, 5, 2)), 1) * [1, 10]
    predicted = true + [0.5, 2.0]
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False
    predicted[1, 3:] = 1e6
    score = this.metrics.score(predicted, true, mask, np.array([1.0, 20.0]), np.array([0, 0]), np.array([5, 60.0]))
    assert score["mse"] == pytest.approx((0.25 + 4) / 2) and score["mae"] == pytest.approx(1.25)
    assert score["mse_normalised"] == pytest.approx((0.25 + 0.01) / 2)
    assert score["mse_normalised_per_dim"] == pytest.approx([0.25, 0.01])
    assert score["mse_normalised_by_step"] == pytest.approx([0.13] * 5)
    assert score["delta"] == pytest.approx((1 + 0.5) / 2) and score["jerk"] == pytest.approx(0)
    assert score["clipping"] == pytest.approx(1 / 16)  # 5.5 is above 5, once
    bumpy = true.copy()
    bumpy[:, 2] += 1
    jerk = this.metrics.score(bumpy, true, mask, np.ones(2), np.zeros(2), np.ones(2) * 99)["jerk"]
    assert jerk == pytest.approx(3)  # 1, -3, 3, -1 is the third difference of a spike: -3 and 3 are whole inside


def test_references_see_the_past_only(this, tmp_path):
    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    places = [(train[0], 0), (train[0], 7), (train[2], 3)]
    made = this.metrics.references(train, places, 4, np.array([1.0, 2, 3]))
    np.testing.assert_array_equal(made["hold last"][1], np.repeat(train[0].actions[6:7], 4, 0))
    np.testing.assert_array_equal(made["hold last"][0], np.repeat(train[0].actions[:1], 4, 0))
    assert (made["mean"] == [1, 2, 3]).all() and made["mean"].shape == (3, 4, 3)


def test_mock_report_shows_the_error_it_was_given(this, tmp_path):
    data = write_data(tmp_path / "data", lengths=[40] * 6)
    words = ["--mock-model", "--data", f"a={data}", "--out", str(tmp_path / "r"), "--val-stride", "2", "--chunk", "8"]
    assert this.evaluate.main([*words, "--val-share", "0.4", "--device", "cpu", "--draws", "4"]) == 0
    card = json.loads((tmp_path / "r" / "report.json").read_text())["sources"]["a"]
    assert card["methods"]["model"]["mse_normalised"] == pytest.approx(0.01, rel=0.1)
    assert card["methods"]["mean of draws"]["mse_normalised"] == pytest.approx(0.0025, rel=0.1)
    text = (tmp_path / "r" / "report.md").read_text()
    assert "| MSE, normalised | 0.0" in text and "| gripper | " in text
    assert len(list((tmp_path / "r" / "figures").glob("*.png"))) == 3
    with pytest.raises(SystemExit):
        this.evaluate.main(["--out", str(tmp_path / "r")])


# --- the loop


def flags(folder, out, *more):
    sizes = "--size tiny --image-size 28 --chunk 4 --prompt-tokens 64 --val-episodes ep3 --val-stride 5"
    times = "--steps 6 --batch-size 4 --log-every 2 --eval-every 3 --save-every 3 --warmup 1 --lr 1e-3 --device cpu"
    return ["--data", f"a={folder}", "--out", str(out), *sizes.split(), *times.split(), *map(str, more)]


def weights(out, step=6):
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / f"step_{step:07d}" / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "more",
    [
        ["--augment", "openpi", "--ema", 0.5],
        ["--train", "lora", "--relative", "--amp", "bf16", "--seq-len", 8, "--stride", 4],
        ["--train", "expert", "--freeze-vision", "--ema", 0, "--gradient-checkpointing"],
    ],
)
def test_run_resume_and_what_it_leaves(this, tmp_path, more):
    """Lost after step 3 and resumed equals uninterrupted, bit for bit: weights in training, average and log."""
    folder, one, two = write_data(tmp_path / "data"), tmp_path / "one", tmp_path / "two ü"
    assert this.train.main(flags(folder, one, *more)) == 0
    shutil.copytree(one, two, symlinks=True)
    shutil.rmtree(two / "checkpoints" / "step_0000006")
    with pytest.raises(ValueError, match="--lr was"):
        this.train.main(flags(folder, two, *more, "--resume", "--lr", 1))
    assert this.train.main(flags(folder, two, *more, "--resume")) == 0
    assert equal(weights(two), weights(one)) and not equal(weights(two), weights(two, 3))
    assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
    assert logged(two)[-1]["val/loss"] == logged(one)[-1]["val/loss"]
    raw = [run / "checkpoints" / "last" / "raw.safetensors" for run in (one, two)]
    assert raw[0].exists() == ("expert" not in more)
    if raw[0].exists():
        assert raw[0].read_bytes() == raw[1].read_bytes()
    model = this.model.Pi05.from_pretrained(two / "checkpoints" / "best")
    spec, _, held = opened(this, folder, val_episodes=["ep3"])
    steps = this.data.ValidationSteps(spec, held, 4, 28, stride=5)
    assert model.predict(steps.collate([steps[0]])).isfinite().all()
    names = {path.name for path in (two / "figures").glob("*")}
    assert names == {"curves.png", "traces.png"} and (two / "norms" / "norms.npz").exists()


def test_accumulation_trains_the_same_model(this, tmp_path):
    folder = write_data(tmp_path / "data")
    for name, more in (("one", []), ("four", ["--accum", 4])):
        assert this.train.main(flags(folder, tmp_path / name, "--ema", 0, *more)) == 0
    a, b = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=2e-4)
    assert logged(tmp_path / "one")[-1]["val/loss"] == pytest.approx(
        logged(tmp_path / "four")[-1]["val/loss"], rel=1e-3
    )


def test_loss_falls(this, tmp_path):
    folder = write_data(tmp_path / "data")
    times = ["--steps", 60, "--eval-every", 60, "--save-every", 60, "--log-every", 10, "--lr", 3e-3, "--batch-size", 8]
    this.train.main(flags(folder, tmp_path / "out", *times))
    losses = [line["train/loss"] for line in logged(tmp_path / "out")]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]


def widened(arrays):
    return {**arrays, "actions": np.tile(arrays["actions"], 11)}


def test_what_a_run_refuses(this, toy, tmp_path):
    """Norms of another data set, a changed data set, a missing tokenizer, too many dims: before anything is written."""
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    words = ["--data", f"a={folder}", "--val-episodes", "ep0", "--out", str(tmp_path / "n")]
    assert this.compute_norms.main(words) == 0
    wide = write_data(tmp_path / "wide", lengths=(20, 20, 20, 20), **{f"e{i}": widened for i in range(4)})
    fields = SPEC | dict(action_dim=33, action_names=None, action_min=None, action_max=None)
    (wide / "spec.yaml").write_text(json.dumps(fields))
    for words, message in (
        (flags(folder, out, "--norms", tmp_path / "n"), "another data set, split"),
        (flags(folder, out, "--data-hash", "0123"), "the data changed"),
        (flags(folder, out, "--size", "full"), "--tokenizer is needed"),
        (flags(folder, out, "--size", "full", "--tokenizer", toy), "about 257,000"),
        (flags(folder, out, "--tokenizer", tmp_path / "absent"), "no such folder"),
        (flags(wide, out), "33 action dims and 3 state dims"),
        (
            flags(folder, out, "--absolute", "elbow", "--relative"),
            "--absolute elbow: the action dims are x, y, gripper",
        ),
        (flags(folder, out, "--batch-size", 3, "--accum", 2), "not divisible"),
    ):
        with pytest.raises(ValueError, match=message):
            this.train.main(words)
        assert not (out / "checkpoints").exists()
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("flag, value", [("--chunk", 0), ("--image-size", 30), ("--ema", 1), ("--val-stride", 0)])
def test_flags_out_of_range(this, capsys, flag, value):
    with pytest.raises(SystemExit) as ended:
        this.train.parse(["--data", "x", flag, str(value)])
    assert ended.value.code == 2 and flag in capsys.readouterr().err


def test_report_of_a_run_has_its_split(this, tmp_path):
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    this.train.main(flags(folder, out))
    words = ["--checkpoint", str(out / "checkpoints" / "last"), "--out", str(tmp_path / "r"), "--device", "cpu"]
    assert this.evaluate.main([*words, "--val-stride", "4"]) == 0
    card = json.loads((tmp_path / "r" / "report.json").read_text())["sources"]["a"]
    assert card["episodes"] == 1 and card["predictions"] == 3 and set(card["methods"]) == {"model", "hold last", "mean"}
    other = write_data(tmp_path / "other")
    fields = SPEC | dict(required_proprio_keys=["joint_pos", "joint_pos"])
    (other / "spec.yaml").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="state dims are 6, but the checkpoint has 3"):
        this.evaluate.main([*words, "--data", str(other)])


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "lora"])
def test_two_ranks_and_micro_steps_give_the_gradient_of_one_process(tmp_path, train):
    """Without a search for unused parameters, and with one reduction per optimizer step."""
    folder, script = write_data(tmp_path / "data"), tmp_path / "ranks.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT / "pi05_finetune")!r}, {str(ROOT)!r}]
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
    more = ["--steps", 1, "--train", train]
    one = launch(script, "one", *flags(folder, tmp_path / "one", *more))
    two = launch(script, "two", *flags(folder, tmp_path / "two", *more, "--accum", 2), ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("reductions 1") == 2, two.stdout
    a, b = (torch.load(tmp_path / f"grads_{name}.pt", weights_only=True) for name in ("one", "two"))
    assert len(a) == len(b) > 20
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL in mid-run, then --resume: the same weights, bit for bit; SIGTERM saves and exits with 75."""
    folder, script = write_data(tmp_path / "data"), ROOT / "pi05_finetune" / "train.py"
    more = ["--steps", 60, "--save-every", 10, "--eval-every", 20]
    done = launch(script, *flags(folder, tmp_path / "one", *more))
    assert done.returncode == 0, done.stderr
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        out = tmp_path / f"run{int(number)}"
        words = [sys.executable, script, *flags(folder, out, *more)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step_0000010").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == code
        assert not (out / "checkpoints" / "step_0000060").exists()
        done = launch(script, *flags(folder, out, *more, "--resume"))
        assert done.returncode == 0, done.stderr
        assert equal(weights(out, 60), weights(tmp_path / "one", 60))
        assert [line["step"] for line in logged(out)] == [line["step"] for line in logged(tmp_path / "one")]


@pytest.mark.slow
def test_loader_processes_give_the_same_run(tmp_path):
    folder, script = write_data(tmp_path / "data"), ROOT / "pi05_finetune" / "train.py"
    for name, workers in (("none", 0), ("two", 2)):
        done = launch(script, *flags(folder, tmp_path / name, "--workers", workers))
        assert done.returncode == 0, done.stderr
    assert equal(weights(tmp_path / "none"), weights(tmp_path / "two"))


@pytest.mark.slow
def test_errors_are_one_line(tmp_path):
    """Of the verbs too; nothing is left half-made."""
    folder, home = write_data(tmp_path / "data"), ROOT / "pi05_finetune"
    broken = write_data(tmp_path / "broken", e1=spoil("actions", 4, 2, value=np.nan))
    good = launch(home / "train.py", *flags(folder, tmp_path / "good"))
    assert good.returncode == 0, good.stderr
    truncate(tmp_path / "good" / "checkpoints" / "last" / "model.safetensors")
    (tmp_path / "file").write_text("")
    last, out = tmp_path / "good" / "checkpoints" / "last", tmp_path / "x"
    cases = [
        ("train.py", flags(folder, tmp_path / "good"), "holds a run already"),
        ("train.py", flags(tmp_path / "absent", out), "no such folder"),
        ("train.py", flags(folder, tmp_path / "file" / "c"), "file"),
        ("train.py", flags(broken, out), "episode ep1: actions hold NaN or infinity at step 4, dim 2"),
        ("train.py", ["--hlep"], "did you mean --help"),
        ("evaluate.py", ["--checkpoint", last, "--out", out], "model.safetensors: cannot be read"),
        ("evaluate.py", ["--checkpoint", tmp_path / "absent", "--data", folder, "--out", out], "absent"),
        ("validate.py", ["--data", tmp_path / "absent", "--report", out], "no such folder"),
        ("compute_norms.py", ["--data", folder, "--out", "/dev/full/x"], "/dev/full"),
        ("convert.py", ["--data", folder, "--to", "npz", "--out", tmp_path / "file"], "is there already"),
        ("download_mechalabs.py", ["--out", out], "CRPlab/MechaLabs: cannot be fetched"),
    ]
    for script, words, text in cases:
        done = launch(home / script, *words, env=dict(HF_HUB_OFFLINE="1"))
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2 and len(lines) == 1 and text in lines[0], (script, done.stderr[-3000:])
        assert not out.exists()


@pytest.mark.slow
def test_folder_copied_into_another_project_runs_its_demo(tmp_path):
    """A host project with its own model.py, data.py and common.py on the path must not get in the way."""
    host = tmp_path / "host"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pi05_finetune", host / "third_party" / "pi05", ignore=ignore)
    shutil.copy(ROOT / "common.py", host / "third_party")
    for name in ("model.py", "data.py", "common.py", "figures.py", "demo.py", "inputs.py", "spec.py"):
        (host / name).write_text("raise SystemExit('the host project was imported')\n")
    more = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--log-every", 2]
    done = launch(host / "third_party" / "pi05" / "train.py", *more, cwd=host, env=dict(PYTHONPATH=str(host)))
    assert done.returncode == 0, done.stderr
    assert list(host.glob("runs/*/001/checkpoints/best/config.json"))


@pytest.mark.slow
def test_environment_check(tmp_path):
    """All is well here; a package that is missing or too old is named with its cure."""
    script = ROOT / "pi05_finetune" / "check_env.py"
    done = launch(script)
    assert done.returncode == 0 and "Pi05 of lerobot" in done.stdout and "all is well" in done.stdout, done.stdout
    (tmp_path / "r.txt").write_text("numpy<1  # old\nnot-there-at-all\n\nh5py\n")
    done = launch(script, "--requirements", tmp_path / "r.txt")
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert done.returncode == 1 and len(problems) == 2
    assert "pip install 'numpy<1'" in problems[0] and "not-there-at-all is missing" in problems[1]


# --- real data


def test_real_g1_frames_and_numbers(this):
    """LeRobot v2.1 and v3.0 hold the same two episodes: same frames, in any order of reading, same numbers."""
    g1 = shared("g1_lerobot_v21")
    old = {e.id: e for e in this.episodes.open_data([f"g1={g1 / 'original'}"], None, 0, say=lambda text: None)[1]}
    spec, new, _ = this.episodes.open_data([str(g1 / "converted" / "lerobot_v30")], None, 0)
    assert len(old) == 14 and spec.control_freq_hz == 30 and spec.names[0] == "kLeftShoulderPitch"
    for episode, name in zip(new, ("29", "30"), strict=True):
        np.testing.assert_array_equal(episode.actions, old[name].actions)
        assert episode.task == old[name].task == "Pick up the yellow bottle on the table."
        video = g1 / "original" / "videos" / "chunk-000" / "observation.images.cam_high" / f"episode_0000{name}.mp4"
        with av.open(str(video)) as container:
            first = itertools.islice(container.decode(video=0), 60)
            plain = [frame.to_ndarray(format="rgb24") for frame in first]
        for i in (50, 3, 4, 59, 0):
            for source in (episode, old[name]):
                np.testing.assert_array_equal(source.frames["images.cam_high"][i], plain[i])


def test_real_v30_opens_in_lerobot_with_our_numbers(this):
    """The official library reads the same state, action, task and frame."""
    root = shared("g1_lerobot_v21/converted/lerobot_v30")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    theirs = LeRobotDataset("x", root=root, video_backend="pyav")
    _, (_, ours), _ = this.episodes.open_data([str(root)], None, 0)
    first = 221
    for step in (0, 100):
        item = theirs[first + step]
        np.testing.assert_array_equal(item["action"], ours.actions[step])
        np.testing.assert_array_equal(item["observation.state"], ours.vectors["state"][step])
        assert item["task"] == ours.task
        frame = torch.from_numpy(ours.frames["images.cam_high"][step].copy()).permute(2, 0, 1) / 255
        assert (item["observation.images.cam_high"] - frame).abs().mean() < 0.01


@pytest.mark.parametrize("name", ["reachy2_lerobot_v30/converted", "g1_lerobot_v21/converted", "robosuite_hdf5_sim"])
def test_other_real_sets_are_read_or_named(this, tmp_path, name):
    folder = shared(name)
    if "robosuite" in name:
        words = ["--data", next(folder.rglob("demo.hdf5")), "--rate", 20, "--task", "lift", "--to", "npz"]
        converted(this, *words, "--out", tmp_path / "n")
        folder = tmp_path / "n"
    spec, train, _ = this.episodes.open_data([f"x={folder}"], None, 0)
    assert sum(map(len, train)) > 300 and not spec.required_obs_keys
    with pytest.raises(ValueError, match="at least one camera"):
        this.train.main(["--data", f"x={folder}", "--out", str(tmp_path / "o"), "--size", "tiny", "--device", "cpu"])


@pytest.mark.slow
def test_real_g1_validates_trains_and_reports(this, tmp_path):
    """The seed's whole path on real episodes with video, from validation to the report."""
    g1 = shared("g1_lerobot_v21/converted/lerobot_v30")
    assert this.validate.main(["--data", str(g1), "--report", str(tmp_path / "v.json")]) == 0
    split = ["--data", f"g1={g1}", "--val-episodes", "1"]
    assert this.compute_norms.main([*split, "--out", str(tmp_path / "n")]) == 0
    words = "--size tiny --image-size 28 --chunk 8 --prompt-tokens 128 --val-stride 40 --device cpu"
    times = "--steps 30 --batch-size 8 --lr 2e-3 --warmup 5 --log-every 5"
    more = ["--norms", str(tmp_path / "n"), "--out", str(tmp_path / "run")]
    assert this.train.main([*split, *words.split(), *times.split(), *more]) == 0
    losses = logged(tmp_path / "run")
    assert losses[-1]["train/loss"] < 0.9 * losses[0]["train/loss"]
    last = str(tmp_path / "run" / "checkpoints" / "last")
    words = ["--checkpoint", last, "--out", str(tmp_path / "r"), "--device", "cpu", "--val-stride", "40"]
    assert this.evaluate.main(words) == 0
    card = json.loads((tmp_path / "r" / "report.json").read_text())["sources"]["g1"]
    assert np.isfinite(card["methods"]["model"]["mse_normalised"]) and len(card["dims"]) == 26
