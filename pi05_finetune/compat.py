"""LeRobot 0.4's Pi05 on the transformers that PyPI has.

LeRobot 0.4.2 to 0.4.4 expect a git branch of transformers. What that branch adds is small, and LeRobot looks all of it
up by name in two modules of its own, `lerobot.policies.pi05.modeling_pi05` and `processor_pi05`. `install()` replaces
seven names there; the transformers package, torch, and LeRobot's other policies stay as they are. Needs transformers
>= 4.57.1, < 5.

| name in modeling_pi05 | what ours does |
| --- | --- |
| GemmaForCausalLM | the stock class; its norms are conditioned on time (adaptive RMSNorm) |
| PaliGemmaForConditionalGeneration | the stock class; image tokens are not scaled |
| modeling_gemma | the stock rotary embedding; gated residual; attention through torch's fused kernel |
| get_gemma_config | the stock sizes, or tiny ones |
| PI05Pytorch | heads in float32 under autocast; the check for the branch passes while it is built |
| resize_with_pad_torch | pads with black: LeRobot 0.4 pads images with -1 before [0, 1] becomes [-1, 1], so with -3 |

| name in processor_pi05 | what ours does |
| --- | --- |
| pad_vector | nothing: LeRobot 0.4 pads the state to 32 numbers before it goes into the prompt, openpi does not |

The computation is openpi's (github.com/Physical-Intelligence/openpi, `transformers_replace`), written anew.
LeRobot 0.6 (Python 3.12, transformers 5) brings its own version of all this: there `install()` has nothing to do.
"""

import importlib.metadata
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

# Like openpi's "dummy" variant: 408 thousand parameters. Eight heads are hard-coded in LeRobot.
TINY = {
    "gemma_2b": dict(width=64, depth=2, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    "gemma_300m": dict(width=64, depth=2, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
}
TINY_VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
TINY_VOCABULARY = 1024
STATE = types.SimpleNamespace(installed=False, tiny=False, attention="sdpa", old_inputs=False, pixels=224)


class Float32Linear(nn.Linear):
    """A linear layer that autocast leaves in float32: action and time heads, and what conditions the norms."""

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
    if STATE.attention == "eager":
        from transformers.models.gemma.modeling_gemma import eager_attention_forward

        return eager_attention_forward(module, query, key, value, mask, scaling)
    mask = mask.clamp(min=-3e4).to(query.dtype)  # finite in float16 too: a row that sees nothing must not be NaN
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def gemma_forward(self, inputs_embeds, attention_mask, position_ids, past_key_values=None, use_cache=None, **more):
    """Gemma over embeddings (B, N, D) that are not scaled by sqrt(D), with a condition `adarms_cond` (B, C) or None.

    past_key_values: list of (key, value) per layer that the tokens also look at; it is read, never grown, so that
    every denoising step can use it again. use_cache: return such a list.
    """
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    cond, cache = more.get("adarms_cond"), []
    x = inputs_embeds
    if self.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16)
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
    device = gemma.layers[0].self_attn.q_proj.weight.device
    with torch.device(device):
        for layer in gemma.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, RMSNorm(config.hidden_size, config.rms_norm_eps, config.adarms_cond_dim))
        gemma.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.adarms_cond_dim)
    gemma.forward = types.MethodType(gemma_forward, gemma)


def names():
    """{module of lerobot: {name: ours}}, built on the installed lerobot and transformers."""
    from lerobot.policies.pi05 import modeling_pi05 as stock
    from lerobot.policies.pi05 import processor_pi05
    from transformers.models.gemma import modeling_gemma
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    stock_core, stock_config, stock_resize = stock.PI05Pytorch, stock.get_gemma_config, stock.resize_with_pad_torch
    stock_pad = processor_pi05.pad_vector

    class Gemma(modeling_gemma.GemmaForCausalLM):
        """The action expert."""

        def __init__(self, config):
            config.vocab_size = TINY_VOCABULARY if STATE.tiny else config.vocab_size
            super().__init__(config)
            adapt(self.model)

    class PaliGemma(PaliGemmaForConditionalGeneration):
        """The vision-language model that reads images and prompt."""

        def __init__(self, config):
            config.vision_config.image_size = STATE.pixels  # LeRobot 0.4.2 leaves it at 224
            if STATE.tiny:
                for name, value in TINY_VISION.items():
                    setattr(config.vision_config, name, value)
                config.vision_config.projection_dim = config.text_config.hidden_size
                config.text_config.vocab_size = config._vocab_size = TINY_VOCABULARY
            super().__init__(config)
            adapt(self.model.language_model)
            # LeRobot keeps SigLIP's embeddings in float32 when its encoder is bfloat16
            encoder = self.model.vision_tower.vision_model.encoder
            encoder.register_forward_pre_hook(cast_to_encoder, with_kwargs=True)

        def embed(self, pixels):
            """pixels (B, 3, H, W) in [-1, 1] -> image tokens (B, N, D), not scaled by 1 / sqrt(D)."""
            return self.model.multi_modal_projector(self.model.vision_tower(pixels).last_hidden_state)

    class Core(stock_core):
        """PI05Pytorch."""

        def __init__(self, config, *args, **kwargs):
            STATE.pixels = config.image_resolution[0]
            name = "transformers.models.siglip.check"
            check = types.ModuleType(name)
            check.check_whether_transformers_replace_is_installed_correctly = lambda: True
            sys.modules[name] = check
            level = logging.get_verbosity()
            logging.set_verbosity_error()  # LeRobot's own use of `torch_dtype` is deprecated
            try:
                super().__init__(config, *args, **kwargs)
            finally:
                logging.set_verbosity(level)
                del sys.modules[name]
            for head in (self.action_in_proj, self.action_out_proj, self.time_mlp_in, self.time_mlp_out):
                head.__class__ = Float32Linear
            vlm = self.paligemma_with_expert
            vlm.paligemma.model.get_image_features = vlm.paligemma.embed

        def gradient_checkpointing_enable(self):
            """Each layer once. LeRobot also wraps all of them in one more, which runs every layer a third time."""
            vlm = self.paligemma_with_expert
            vlm.gemma_expert.model.gradient_checkpointing = True
            vlm.paligemma.model.vision_tower.gradient_checkpointing_enable(dict(use_reentrant=False))

    def get_gemma_config(variant):
        return stock.GemmaConfig(**TINY[variant]) if STATE.tiny else stock_config(variant)

    def resize_with_pad(images, height, width, mode="bilinear"):
        """Images (B, H, W, 3) float in [0, 1] or uint8 -> (B, height, width, 3), aspect kept, black around."""
        if STATE.old_inputs or not images.is_floating_point():
            return stock_resize(images, height, width, mode)
        return (stock_resize(images * 2 - 1, height, width, mode) + 1) / 2

    def pad_vector(state, size):
        """state (B, S) -> itself, or (B, size) as in LeRobot 0.4."""
        return stock_pad(state, size) if STATE.old_inputs else state

    modeling = dict(
        GemmaForCausalLM=Gemma,
        PaliGemmaForConditionalGeneration=PaliGemma,
        modeling_gemma=types.SimpleNamespace(
            apply_rotary_pos_emb=modeling_gemma.apply_rotary_pos_emb,
            eager_attention_forward=attention,
            _gated_residual=gated_residual,
        ),
        get_gemma_config=get_gemma_config,
        PI05Pytorch=Core,
        resize_with_pad_torch=resize_with_pad,
    )
    return {stock: modeling, processor_pi05: dict(pad_vector=pad_vector)}


def cast_to_encoder(encoder, args, kwargs):
    kwargs["inputs_embeds"] = kwargs["inputs_embeds"].to(encoder.layers[0].mlp.fc1.weight.dtype)
    return args, kwargs


def versions():
    """(lerobot, transformers) as tuples of ints; a package that is missing is a ValueError."""
    found = []
    for package in ("lerobot", "transformers"):
        try:
            text = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{package} is not installed: pip install -r requirements.txt") from None
        found.append(tuple(int(part) for part in text.split(".")[:3] if part.isdigit()))
    return found


def install(tiny=False, attention="sdpa", old_inputs=False):
    """Make `lerobot.policies.pi05` work. Calling it again only changes the options.

    tiny: the sizes of TINY for policies built from now on. attention: sdpa or eager. old_inputs: LeRobot 0.4's padding
    of images with -3 and of the prompt's state to 32 numbers, for checkpoints trained so. These two are looked up at
    every call, in all policies of the process.
    """
    lerobot, transformers = versions()
    if lerobot < (0, 4, 2) or (0, 5) <= lerobot < (0, 6):
        raise ValueError(f"lerobot {dotted(lerobot)}: this folder needs 0.4.2 to 0.4.4 (or 0.6, as it is)")
    if lerobot >= (0, 6):
        if tiny or old_inputs or attention != "sdpa":
            raise ValueError("the tiny size, eager attention and the old inputs need lerobot 0.4.2 to 0.4.4")
        return
    if not (4, 57, 1) <= transformers < (5,):
        found = dotted(transformers)
        raise ValueError(f"transformers {found}: lerobot 0.4 needs >=4.57.1,<5 (pip install -r requirements.txt)")
    STATE.tiny, STATE.attention, STATE.old_inputs = tiny, attention, old_inputs
    if not STATE.installed:
        for module, ours in names().items():
            vars(module).update(ours)
        STATE.installed = True


def dotted(version):
    return ".".join(map(str, version))
