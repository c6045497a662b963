"""LeRobot 0.4's Pi05 on the transformers that PyPI has.

LeRobot 0.4.2 to 0.4.4 expect a git branch of transformers. What that branch adds is small, and LeRobot looks all of it
up by name in its own module `lerobot.policies.pi05.modeling_pi05`. Importing this file puts these names there; the
transformers package, torch, and LeRobot's other policies stay as they are:

| LeRobot's name | ours | what it changes |
| --- | --- | --- |
| PI05Pytorch | Core | the check for the branch passes; action and time heads stay in float32 under autocast |
| PaliGemmaForConditionalGeneration | PaliGemma | images are not scaled by 1 / sqrt(D), the prompt not by sqrt(D) |
| GemmaForCausalLM | Expert | its norms are conditioned on the time of the flow |
| modeling_gemma | attention, gated_residual | what LeRobot calls where it runs both streams layer by layer |
| get_gemma_config | get_gemma_config | the tiny size, which stands in a policy's `tags` |
| PI05Policy._preprocess_images | preprocess_images | the border of an image is black |
| ...StateTokenizer...get_config | prepare_state_config | the prompt holds the state's own dims, not 32 |

The computation is openpi's (github.com/Physical-Intelligence/openpi, `transformers_replace`), written anew.

Letters: B batch, N tokens, M tokens that attention looks at, H heads, d head width, D width, C width of the condition.
"""

import contextvars
import importlib.metadata
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

from common import DataError

SUPPORTED = dict(lerobot=((0, 4, 2), (0, 5)), transformers=((4, 57, 1), (5,)))


def version_of(package):
    """The version as text; DataError where the package is missing or outside SUPPORTED."""
    low, high = SUPPORTED[package]
    wanted = f"{package}>={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{package} is not installed: pip install '{wanted}'") from None
    if not low <= tuple(int(part) for part in text.split(".")[:3] if part.isdigit()) < high:
        raise DataError(f"{package} {text} does not fit: pip install '{wanted}'")
    return text


version_of("lerobot")
version_of("transformers")

from lerobot.policies.pi05 import modeling_pi05, processor_pi05  # noqa: E402
from transformers.models.gemma.modeling_gemma import GemmaForCausalLM, apply_rotary_pos_emb  # noqa: E402
from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration  # noqa: E402
from transformers.utils import logging  # noqa: E402

TINY_TAG = "pi05_finetune-tiny"
# Like openpi's "dummy" variant, both streams: 408 thousand parameters. Eight heads are hard-coded in LeRobot.
TINY = dict(width=64, depth=2, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)
TINY_VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
TINY_VOCABULARY = 1024
BUILDING = contextvars.ContextVar("the PI05Config of the policy under construction")  # set by Core alone


if not hasattr(modeling_pi05, "stock"):  # LeRobot's own, also where this file is imported a second time
    modeling_pi05.stock = types.SimpleNamespace(
        core=modeling_pi05.PI05Pytorch,
        get_gemma_config=modeling_pi05.get_gemma_config,
        preprocess_images=modeling_pi05.PI05Policy._preprocess_images,
    )
stock = modeling_pi05.stock


def is_tiny():
    return TINY_TAG in (BUILDING.get().tags or [])


# --- Gemma as openpi runs it


class Float32Linear(nn.Linear):
    """A linear layer that autocast leaves in float32: action and time heads, and what conditions the norms."""

    @classmethod
    def like(cls, linear):
        """A Float32Linear that holds the parameters of a nn.Linear."""
        made = cls(linear.in_features, linear.out_features, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class RMSNorm(nn.Module):
    """x (B, N, D), condition (B, C) or None -> normalised x and a gate (B, 1, D) or None. Statistics in float32.

    With a condition this is the adaptive norm of diffusion transformers (Peebles & Xie 2023, arXiv 2212.09748): scale,
    shift and gate are a linear function of it, zero at first.
    """

    def __init__(self, dim, eps, cond_dim=None):
        super().__init__()
        self.eps = eps
        if cond_dim is None:
            self.weight = nn.Parameter(torch.zeros(dim))
        else:
            self.dense = Float32Linear(cond_dim, 3 * dim)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)

    def forward(self, x, cond=None):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if hasattr(self, "weight"):
            return (normed * (1 + self.weight.float())).type_as(x), None
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, dim=-1)
        return (normed * (1 + scale) + shift).type_as(x), gate.type_as(x)


def gated_residual(x, y, gate):
    return x + y if gate is None else x + y * gate


def attention(module, query, key, value, mask, scaling, **unused):
    """query (B, H, N, d), key and value (B, 1, M, d), additive mask (B, 1, N, M) -> (B, N, H, d), None."""
    mask = mask.clamp(min=-3e4).to(query.dtype)  # finite in float16 too: a row that sees nothing must not be NaN
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def gemma_forward(self, inputs_embeds, attention_mask, position_ids, past_key_values=None, use_cache=None, **more):
    """Gemma over embeddings (B, N, D) that are not scaled by sqrt(D), with a condition `adarms_cond` (B, C) or None.

    past_key_values: list of (key, value) per layer that the tokens also look at; it is read, never grown, so that
    every denoising step can use it again. use_cache: return such a list.
    """
    cond, cache = more.get("adarms_cond"), []
    x = inputs_embeds.to(torch.promote_types(torch.bfloat16, self.layers[0].self_attn.q_proj.weight.dtype))
    cos, sin = self.rotary_emb(x, position_ids)
    for i, layer in enumerate(self.layers):
        normed, gate = layer.input_layernorm(x, cond)
        shape = (*normed.shape[:2], -1, layer.self_attn.head_dim)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        query, key, value = (project(normed).view(shape).transpose(1, 2) for project in projections)  # B H N d
        query, key = apply_rotary_pos_emb(query, key, cos.to(query.dtype), sin.to(query.dtype))
        cache.append((key, value))
        if past_key_values is not None:
            key = torch.cat([past_key_values[i][0], key], dim=2)
            value = torch.cat([past_key_values[i][1], value], dim=2)
        out = attention(layer.self_attn, query, key, value, attention_mask, layer.self_attn.scaling)[0]
        out = out.flatten(2).to(layer.self_attn.o_proj.weight.dtype)
        x = gated_residual(x, layer.self_attn.o_proj(out), gate)
        normed, gate = layer.post_attention_layernorm(x, cond)
        x = gated_residual(x, layer.mlp(normed.to(layer.mlp.up_proj.weight.dtype)), gate)
    x, _ = self.norm(x, cond)
    return types.SimpleNamespace(last_hidden_state=x, past_key_values=cache if use_cache else None)


def adapt(gemma):
    """Give a stock GemmaModel our norms and our forward; its other weights stay where they are."""
    config = gemma.config
    with torch.device(gemma.layers[0].self_attn.q_proj.weight.device):
        for layer in gemma.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, RMSNorm(config.hidden_size, config.rms_norm_eps, config.adarms_cond_dim))
        gemma.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.adarms_cond_dim)
    gemma.forward = types.MethodType(gemma_forward, gemma)


# --- what LeRobot builds


class Expert(GemmaForCausalLM):
    """The action expert: its norms are conditioned on the time of the flow."""

    def __init__(self, config):
        config.vocab_size = TINY_VOCABULARY if is_tiny() else config.vocab_size
        super().__init__(config)
        adapt(self.model)


class PaliGemma(PaliGemmaForConditionalGeneration):
    """The vision-language model that reads images and prompt; image tokens are not scaled by 1 / sqrt(D)."""

    def __init__(self, config):
        config.vision_config.image_size = BUILDING.get().image_resolution[0]  # LeRobot 0.4.2 leaves it at 224
        if is_tiny():
            for name, value in TINY_VISION.items():
                setattr(config.vision_config, name, value)
            config.vision_config.projection_dim = config.text_config.hidden_size
            config.text_config.vocab_size = config._vocab_size = TINY_VOCABULARY
        super().__init__(config)
        adapt(self.model.language_model)
        self.model.get_image_features = self.embed

    def embed(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> image tokens (B, N, D)."""
        vision = self.model.vision_tower.vision_model
        x = vision.embeddings(pixels)
        x = x.to(vision.encoder.layers[0].mlp.fc1.weight.dtype)  # LeRobot keeps the embeddings in float32
        x = vision.post_layernorm(vision.encoder(inputs_embeds=x).last_hidden_state)
        return self.model.multi_modal_projector(x)


class Core(stock.core):
    """PI05Pytorch: heads in float32 under autocast. LeRobot's check for the branch passes while it is built."""

    def __init__(self, config, *args, **kwargs):
        name, level = "transformers.models.siglip.check", logging.get_verbosity()
        check = types.ModuleType(name)
        check.check_whether_transformers_replace_is_installed_correctly = lambda: True
        sys.modules[name], token = check, BUILDING.set(config)
        logging.set_verbosity_error()  # LeRobot's own use of `torch_dtype` is deprecated
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            logging.set_verbosity(level)
            BUILDING.reset(token)
            del sys.modules[name]
        for head in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
            setattr(self, head, Float32Linear.like(getattr(self, head)))

    def gradient_checkpointing_enable(self):
        """Each layer once. LeRobot also wraps all of them in one more, which runs every layer a third time."""
        vlm = self.paligemma_with_expert
        vlm.gemma_expert.model.gradient_checkpointing = True
        vlm.paligemma.model.vision_tower.gradient_checkpointing_enable(dict(use_reentrant=False))


def get_gemma_config(variant):
    return modeling_pi05.GemmaConfig(**TINY) if is_tiny() else stock.get_gemma_config(variant)


# --- inputs


def preprocess_images(self, batch):
    """Images in [0, 1] -> [-1, 1] at the policy's size, black around. LeRobot 0.4 pads with -3 (its issue 2218)."""
    batch = dict(batch)
    for key in set(self.config.image_features) & set(batch):
        image, (height, width) = batch[key], self.config.image_resolution
        image = image if image.shape[1] == 3 else image.movedim(-1, 1)
        h, w = image.shape[2:]  # in whole numbers, as data.shrink: 720 x 1280 becomes 126 x 224
        size = [max(1, min(height, h * width // w)), max(1, min(width, w * height // h))]
        if list(image.shape[2:]) != [height, width]:
            image = F.interpolate(image.float(), size, mode="bilinear", align_corners=False).clamp(0, 1)
        top, left = (height - image.shape[2]) // 2, (width - image.shape[3]) // 2
        batch[key] = F.pad(image, (left, width - image.shape[3] - left, top, height - image.shape[2] - top))
    return stock.preprocess_images(self, batch)


def prepare_state_config(self):
    """LeRobot 0.4 pads the state to 32 numbers before it goes into the prompt; openpi and LeRobot 0.5 do not."""
    return dict(max_state_dim=self.max_state_dim, task_key=self.task_key)


# --- into LeRobot's modules

modeling_gemma = types.SimpleNamespace(
    apply_rotary_pos_emb=apply_rotary_pos_emb, eager_attention_forward=attention, _gated_residual=gated_residual
)
PATCHES = [
    (modeling_pi05, "GemmaForCausalLM", Expert),
    (modeling_pi05, "PaliGemmaForConditionalGeneration", PaliGemma),
    (modeling_pi05, "modeling_gemma", modeling_gemma),
    (modeling_pi05, "get_gemma_config", get_gemma_config),
    (modeling_pi05, "PI05Pytorch", Core),
    (modeling_pi05.PI05Policy, "_preprocess_images", preprocess_images),
    (processor_pi05.Pi05PrepareStateTokenizerProcessorStep, "get_config", prepare_state_config),
]
for owner, name, ours in PATCHES:
    setattr(owner, name, ours)
