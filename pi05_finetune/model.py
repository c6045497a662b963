"""Pi05: LeRobot's PI05Policy with what fine-tuning needs around it.

The policy is LeRobot's (pi0.5, Physical Intelligence 2025, arXiv 2504.16054): images and a prompt with task and state
go through PaliGemma, a flow-matching expert turns noise into a chunk of actions. Here are: the loss with padded steps
masked, noise and time that the batch brings, low-rank adapters, freezing, and a running average of the weights.

Letters: B batch, T steps of a chunk, A action dims, S state dims, H W camera pixels.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import lerobot_patch
import torch
import torch.nn.functional as F
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from processor import Processor, check_tokenizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from common import DataError

RANKS = dict(vlm=16, expert=32)  # openpi's gemma_2b_lora and gemma_300m_lora; alpha equals the rank
MAX_DIM = 32  # numbers that pi0.5's action heads, and its prompt, have room for


@dataclass
class Pi05Config:
    """What a checkpoint's pi05_finetune.json holds."""

    cameras: list  # names in the order in which the policy sees them: `observation.images.NAME`
    state_dim: int
    action_dim: int
    stats: dict  # {"observation.state": {q01, q99, ...: S numbers}, "action": {...: A numbers}}
    size: str = "full"  # or tiny
    chunk: int = 50  # actions per prediction
    image_size: int = 224
    prompt_tokens: int = 200
    denoise_steps: int = 10
    state_index: list | None = None  # relative actions: see ToRelative in processor.py; None: all are absolute
    train: str = "all"  # or frozen-vision, expert, lora
    ema: float = 0.0  # decay of the running average of the weights; 0: none

    def __post_init__(self):
        if not self.cameras:
            raise DataError("Pi05 reads at least one camera: name it in the spec's required_obs_keys")
        if max(self.action_dim, self.state_dim) > MAX_DIM:
            dims = f"{self.action_dim} action dims and {self.state_dim} state dims"
            raise DataError(f"{dims}: Pi05 has room for {MAX_DIM} of each: convert.py --dims, required_proprio_keys")

    def lerobot(self, device):
        """The same as LeRobot's PI05Config."""
        pixels = PolicyFeature(FeatureType.VISUAL, (3, self.image_size, self.image_size))
        inputs = {f"observation.images.{name}": pixels for name in self.cameras}
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (self.state_dim,))
        config = PI05Config(
            chunk_size=self.chunk,
            n_action_steps=self.chunk,
            num_inference_steps=self.denoise_steps,
            image_resolution=(self.image_size, self.image_size),
            tokenizer_max_length=self.prompt_tokens,
            input_features=inputs,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (self.action_dim,))},
            tags=[lerobot_patch.TINY_TAG] if self.size == "tiny" else None,
            device="cpu",
        )
        config.device = str(device)  # LeRobot would replace the ones that it does not know
        return config


class LoRALinear(nn.Linear):
    """A linear layer plus the product of two thin matrices (Hu et al. 2021, arXiv 2106.09685), zero at first."""

    def __init__(self, linear, rank):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **like).normal_(std=0.01))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


class Pi05(nn.Module):
    """PI05Policy, ready to be fine-tuned.

    tokenizer: a local folder. Without one there is the loss of batches that are processed already, nothing else.
    """

    def __init__(self, config, tokenizer=None, gradient_checkpointing=False, device="cpu"):
        super().__init__()
        self.config = config
        if tokenizer is not None:
            check_tokenizer(tokenizer, config.size)
        policy = config.lerobot(device)
        with torch.device(device):
            self.policy = modeling_pi05.PI05Policy(policy)
        if config.size == "tiny":
            init_tiny(self.policy)
        if gradient_checkpointing:
            self.policy.model.gradient_checkpointing_enable()
        self.processor = None
        if tokenizer is not None:
            self.processor = Processor(policy, config.stats, tokenizer, config.state_index)
        self.set_trainable()
        self.ema, self.is_split = {}, False

    # --- what is trained

    def set_trainable(self):
        """Which parameters get gradients. What the loss does not reach is always frozen, so DDP need not search."""
        vlm, train = self.policy.model.paligemma_with_expert, self.config.train
        language, expert = vlm.paligemma.model.language_model, vlm.gemma_expert
        if train == "lora":
            vlm.requires_grad_(False)
            for layers, rank in ((language.layers, RANKS["vlm"]), (expert.model.layers, RANKS["expert"])):
                for owner in [part for layer in layers for part in (layer.self_attn, layer.mlp)]:
                    for name, linear in list(owner.named_children()):
                        if isinstance(linear, nn.Linear):
                            setattr(owner, name, LoRALinear(linear, rank))
        if train == "expert":
            vlm.paligemma.requires_grad_(False)
        if train == "frozen-vision":
            vlm.paligemma.model.vision_tower.requires_grad_(False)
        last = language.layers[-1]  # the expert reads its keys and values, nothing after them
        unread = (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, last.post_attention_layernorm, language.norm)
        for module in (expert.lm_head, *unread):
            module.requires_grad_(False)

    def hold_frozen_in_bf16(self):
        """Hold the matrices that are not trained in bfloat16, as autocast would read them: half the memory."""
        for parameter in self.parameters():
            if not parameter.requires_grad and parameter.ndim >= 2:
                parameter.data = parameter.data.bfloat16()

    def start_ema(self):
        """Begin the running average at the weights as they are now: those of --init, after `split`."""
        if self.config.ema:
            self.ema = {name: local(p).clone() for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update_ema(self):
        """After each optimizer step: average += (1 - decay) (weights - average)."""
        if self.ema:
            now = [local(p) for name, p in self.named_parameters() if name in self.ema]
            torch._foreach_lerp_(list(self.ema.values()), now, 1 - self.config.ema)

    @contextlib.contextmanager
    def use_ema(self):
        """Inside, the weights are their running average (if there is one): the two change places, tensor by tensor."""
        mine = [(local(p), self.ema[name]) for name, p in self.named_parameters() if name in self.ema]

        def exchange():
            for weight, average in mine:
                held = weight.clone()
                weight.copy_(average)
                average.copy_(held)

        exchange()
        try:
            yield
        finally:
            exchange()

    # --- several processes

    def groups(self):
        """Lists of modules whose weights `split` gathers together; what is in none of them stays gathered for a step.

        LeRobot runs the two streams' layers in turns and calls their parts, not the layers. So a layer is two groups,
        before and after its attention.
        """
        vlm = self.policy.model.paligemma_with_expert
        groups = [[layer] for layer in vlm.paligemma.model.vision_tower.vision_model.encoder.layers]
        for layer in [*vlm.paligemma.model.language_model.layers, *vlm.gemma_expert.model.layers]:
            inner = layer.self_attn
            groups.append([layer.input_layernorm, inner.q_proj, inner.k_proj, inner.v_proj])
            groups.append([inner.o_proj, layer.post_attention_layernorm, layer.mlp])
        return [*groups, [vlm.gemma_expert.lm_head]]  # the head is never called, so never gathered

    def split(self, device):
        """Split the weights over all processes (FSDP2). Until then each process has them whole, in the host's memory.

        Weights are gathered in float32 and autocast reads them as ever: the arithmetic is that of one process.
        """
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for group in self.groups():
            fully_shard(group, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)  # predict comes between two steps
        register_fsdp_forward_method(self, "predict")
        self.is_split = True

    # --- loss and prediction

    def forward(self, batch):
        """batch of the processor -> loss, metrics. Steps past an episode's end do not count; samples weigh the same."""
        policy = self.policy
        images, present = policy._preprocess_images(batch)
        losses = policy.model(
            images,
            present,
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
            policy.prepare_action(batch),
            noise=batch["noise"],
            time=batch["time"],
        )  # B T 32
        losses = losses[..., : self.config.action_dim].float().mean(-1)  # B T
        mask = batch["mask"].float()
        loss = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        return loss, dict(loss=loss.detach())

    @torch.no_grad()
    def predict(self, batch):
        """batch in robot units with noise (B, T, 32), as for the processor -> actions (B, T, A) float32 on the CPU."""
        if not batch["observation.state"].isfinite().all():
            raise ValueError("the state holds NaN or infinity: the robot would get NaN back")
        training = self.training
        self.eval()
        device = next(self.parameters()).device
        ready = {key: value.to(device) for key, value in self.processor(batch).items() if key != "action"}
        noise = ready["noise"].clone()  # LeRobot 0.4.2 denoises in place
        mixed = any(p.dtype == torch.bfloat16 for p in self.parameters())  # of hold_frozen_in_bf16
        with torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            actions = self.policy.predict_action_chunk(ready, noise=noise)
        self.train(training)
        return self.processor.undo(actions)

    # --- files

    def save_pretrained(self, folder):
        """A LeRobot policy folder: config, weights, processors, and beside them our configuration and the tokenizer."""
        checkpoint.save(self, folder)

    def load_pretrained(self, folder):
        """Weights of a policy folder, strictly: a tensor that is missing, unexpected or misshapen is a DataError."""
        checkpoint.load_weights(self, folder)
        return self

    @classmethod
    def from_pretrained(cls, folder, device="cpu", tokenizer=None):
        """The model of a checkpoint, for prediction: in eval mode, averaged and merged. Runs no code from the files.

        A folder that LeRobot itself has written lacks the tokenizer: give PaliGemma's.
        """
        config = Pi05Config(**{**checkpoint.read_config(folder), "train": "all", "ema": 0.0})
        model = cls(config, tokenizer or Path(folder) / "tokenizer", device=device).load_pretrained(folder).eval()
        checkpoint.verify(model, folder)
        return model


def local(parameter):
    """This process's part of a parameter, without its gradient; of a model that is not split all of it."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def init_tiny(policy):
    """Random weights that learn fast at 64 dims: matrices scaled by their inputs, residual branches of the expert open.

    The stock ones, of 0.02 and with closed branches, are meant for pretrained sizes.
    """
    for name, parameter in policy.named_parameters():
        if "position_embedding" in name:
            parameter.normal_(std=0.5)
        elif parameter.ndim >= 2:  # embed_tokens: LeRobot multiplies what it looks up by the root of the width
            fan_in = parameter.shape[1] if "embed_tokens" in name else parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5)
        if name.endswith("norm.dense.weight"):
            parameter.zero_()
        if name.endswith("norm.dense.bias"):
            parameter[2 * len(parameter) // 3 :] = 1.0  # scale, shift, gate


# --- before a long run


def check_first_step(model, batch, loss):
    """After the first backward pass: lines on what is odd; DataError where training could only go wrong.

    A policy that predicts zero has a loss of about 1 plus the mean square of the normalised actions. A loss far above
    that means that weights and inputs do not fit each other.
    """
    mask = batch["mask"][..., None]
    square = float((batch["action"].square() * mask).sum() / (mask.sum() * batch["action"].shape[-1]).clamp(min=1))
    if not square < 10:
        raise DataError(f"the normalised actions have a mean square of {square:.3g}, not below 1: the norms do not fit")
    if not loss < 10 * (1 + square):
        raise DataError(
            f"the loss at step 0 is {loss:.3g}, a policy that predicts zero has {1 + square:.2g}: wrong --init?"
        )
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    lines = [f"loss at step 0: {loss:.3g} (a policy that predicts zero has {1 + square:.3g})"]
    return lines + ([f"warning: {len(idle)} trained tensors get no gradient, such as {idle[0]}"] if idle else [])


def plan(config, amp, device, parts=1):
    """Lines on parameters, memory of a process and the size of a checkpoint, counted without allocating anything.

    parts: processes that the weights are split over.
    """
    model = Pi05(config, device="meta")

    def count(module):
        return sum(p.numel() for p in module.parameters())

    total, learned = count(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 2 if amp == "bf16" and parts == 1 else 4  # bytes of a frozen number
    average = 4 * learned * bool(config.ema)
    memory = dict(weights=4 * learned + held * (total - learned), gradients=4 * learned, Adam=8 * learned)
    memory["average"] = average
    merged = 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, LoRALinear))  # beside their bases
    on_disk = memory["weights"] + merged + memory["Adam"] + average
    if parts > 1:  # weights and gradients of two groups, and of what is in none
        sizes = [sum(map(count, group)) for group in model.groups()]
        memory = {name: size / parts for name, size in memory.items()}
        memory["gathered"] = 8 * (total - sum(sizes) + 2 * max(sizes[:-1]))
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else room
    shown, needed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items()), sum(memory.values())
    lines = [
        f"{learned:,} of {total:,} parameters learn (--train {config.train})",
        f"memory without activations: {needed / 1e9:.1f} GB ({shown}); {device} has {room / 1e9:.1f}",
        f"a checkpoint takes {on_disk / 1e9:.1f} GB on disk; --keep holds that many, and the best",
    ]
    if needed > room:
        cure = "--amp bf16, --ema 0, --train expert or lora, --fsdp on more GPUs"
        raise DataError("; ".join([*lines, f"too little memory: {cure}"]))
    return lines
