"""VLA: a vision-language model from transformers that predicts latent actions, then robot commands.

LAPA (Ye et al. 2024, arXiv 2410.11758), stages 2 and 3. N learned query embeddings follow the prompt. Linear heads
read the last layer at these N positions, so the vocabulary and the softmax over it stay as they are, and all N codes
are predicted in one forward pass.

Letters: B batch, L prompt length, N queries (= codes per latent action), D width of the backbone, K codebook size,
C dims of a code's vector, H commands per chunk, A action dims, S state dims.
"""

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sim import film  # noqa: F401  registers the small FiLM backbone with transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from common import DataError

PROMPT = "What action should the robot take to {instruction}?"


def prompt_error(prompt):
    """What is wrong with a prompt, or None. Its only field is {instruction}."""
    fields = re.findall(r"{(\w*)}", prompt)
    if "instruction" not in fields:
        return f"{prompt!r} has no {{instruction}}: the model would not know its task"
    other = [field for field in fields if field != "instruction"]
    return f"{prompt!r} has a field {{{other[0]}}}; only {{instruction}} is filled in" if other else None


@dataclass
class LatentConfig:
    """The latent actions to predict. mean, std, weight: statistics of the training vectors (data.describe_latents)."""

    codebook_size: int  # K
    code_seq_len: int  # N
    code_dim: int  # C
    codebook: list  # N K C
    mean: list  # N C
    std: list  # N C
    weight: list  # N C, each dim's share of its position's variance
    target: str = "vectors"  # codes: cross-entropy (LAPA); vectors: regress what the tokenizer quantised


@dataclass
class ActionConfig:
    """The commands to predict, in robot units: normalised = (command - center) / scale (data.describe_actions)."""

    action_dim: int  # A
    chunk_size: int  # H
    center: list  # A
    scale: list  # A
    state_dim: int = 0  # S; 0: the robot's state is not read
    state_center: list | None = None  # S
    state_scale: list | None = None  # S


@dataclass
class VLAConfig:
    """All that a checkpoint holds beside the backbone's own configuration: vla.json."""

    prompt: str = PROMPT
    num_queries: int = 4  # N, as many as LAPA's codes
    image_size: int = 224  # frames are squashed to this side for the image processor
    lora_rank: int = 0  # of LoRA layers in the language model; 0: none
    dropout: float = 0.1  # on what the heads read
    latent: LatentConfig | None = None
    action: ActionConfig | None = None

    @classmethod
    def from_pretrained(cls, folder):
        path = Path(folder) / "vla.json"
        try:
            values = json.loads(path.read_text())
            values["latent"] = values["latent"] and LatentConfig(**values["latent"])
            values["action"] = values["action"] and ActionConfig(**values["action"])
            return cls(**values)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path}: not there; expected a checkpoint of vla/train.py or vla/finetune.py") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not the description of a checkpoint ({error})") from None

    def save_pretrained(self, folder):
        (Path(folder) / "vla.json").write_text(json.dumps(dataclasses.asdict(self), indent=1))


class LoRALinear(nn.Linear):
    """A linear layer plus a low-rank update, W x + B A x (Hu et al. 2021, arXiv 2106.09685). B starts at zero."""

    def __init__(self, linear, rank):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, device=device) / self.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def open_backbone(path, device=None):
    """(model, processor) of a local folder or a name on the hub. device: build it there, without loading weights."""
    Auto, options = AutoModelForImageTextToText, dict(dtype=torch.float32, attn_implementation="sdpa")
    try:
        processor = AutoProcessor.from_pretrained(path, use_fast=True)
        if device is None:
            backbone, found = Auto.from_pretrained(path, **options, output_loading_info=True)
        else:
            with torch.device(device):
                backbone, found = Auto.from_config(AutoConfig.from_pretrained(path), **options), dict(missing_keys=[])
    except Exception as error:  # of a dozen kinds, as for a missing file or one of another version
        text = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a vision-language model that transformers can load ({text})") from None
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise DataError(f"{path}: its processor ({type(processor).__name__}) does not take images and text")
    if not getattr(processor, "chat_template", None):
        raise DataError(f"{path}: its processor has no chat template; use an instruction-tuned model")
    if found["missing_keys"]:
        raise DataError(f"{path}: has no weights for {sorted(found['missing_keys'])[0]}")
    return backbone, processor


class Preprocessor:
    """Images and instructions -> the backbone's tensors. It holds no weights, so loader processes can run it."""

    def __init__(self, processor, config, names):
        self.processor, self.prompt, self.num_queries, self.names = processor, config.prompt, config.num_queries, names
        processor.tokenizer.padding_side = "left"  # the queries are the last N positions of every row
        added = processor.tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special]

    def __call__(self, images, instructions):
        """images (B x (H, W, 3) uint8), instructions (B texts) -> dict of tensors, N placeholder tokens at the end."""
        texts = []
        for instruction in instructions:
            text = self.prompt.replace("{instruction}", instruction).encode("utf-8", "replace").decode()
            for token in self.special:  # <|image_pad|> in a text is no image
                text = text.replace(token, f"{token[:1]} {token[1:]}")
            content = [dict(type="image"), dict(type="text", text=text)]
            talk = [dict(role="user", content=content)]
            texts.append(self.processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
        bos, more = self.processor.tokenizer.bos_token, dict(padding=True, return_tensors="pt")
        if bos and texts[0].startswith(bos):  # Gemma's template has it, and its tokenizer would add another
            more["add_special_tokens"] = False
        tensors = self.processor(text=texts, images=[[image] for image in images], **more)
        tensors = {name: value for name, value in tensors.items() if name in self.names}
        last = dict(input_ids=self.processor.tokenizer.eos_token_id, attention_mask=1)
        shape = tensors["input_ids"].shape
        for name, value in tensors.items():
            if value.shape == shape:  # one per token, as the token types of some families: 0 is text
                more = value.new_full((len(value), self.num_queries), last.get(name, 0))
                tensors[name] = torch.cat([value, more], 1)
        return tensors


class VLA(nn.Module):
    """Backbone, queries and heads. With a target other than "codes" the classifier of codes sends no gradient back."""

    def __init__(self, config, backbone, processor):
        super().__init__()
        self.config, self.backbone, self.processor = config, backbone, processor
        latent, action = config.latent, config.action
        N, D = config.num_queries, backbone.config.get_text_config().hidden_size
        if latent and latent.code_seq_len != N:
            raise DataError(f"the labels have {latent.code_seq_len} codes per latent action, the model {N} queries")
        embedding = backbone.get_input_embeddings().weight
        self.queries = nn.Parameter(torch.randn(N, D, device=embedding.device) * embedding.detach().float().std())
        self.dropout = nn.Dropout(config.dropout)
        with torch.device(embedding.device):
            if latent:
                self.to_codes = nn.Linear(D, latent.codebook_size)
                for name in ("mean", "std", "weight"):
                    self.remember(name, getattr(latent, name))
                if latent.target != "codes":
                    self.to_vectors = nn.Linear(D, latent.code_dim)
            if action:
                self.to_actions = nn.Linear(N * D, action.chunk_size * action.action_dim)
                self.remember("action_center", action.center)
                self.remember("action_scale", action.scale)
                if action.state_dim:
                    self.from_state = nn.Linear(action.state_dim, D, bias=False)
                    nn.init.zeros_(self.from_state.weight)  # what was pretrained starts unchanged
                    self.remember("state_center", action.state_center)
                    self.remember("state_scale", action.state_scale)
        if config.lora_rank:
            for parent in list(self.decoder_layers().modules()):
                for name, part in list(parent.named_children()):
                    if type(part) is nn.Linear:
                        setattr(parent, name, LoRALinear(part, config.lora_rank))
        output = backbone.get_output_embeddings()
        if output is not None and output.weight is not embedding:
            output.requires_grad_(False)  # nothing here reads the softmax over the vocabulary
        self.names = set(inspect.signature(backbone.model.forward).parameters)
        self.preprocess = Preprocessor(processor, config, self.names)

    def remember(self, name, values):
        """A constant of the configuration as a buffer: it moves with the model and is not in its weights."""
        self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    # --- the backbone

    def decoder_layers(self):
        """The language model's layers, the ModuleList of its text model."""
        language = self.backbone.model.language_model
        return getattr(language, "layers", None) or language.model.layers

    def vision_encoder(self):
        names = ("visual", "vision_tower", "vision_model")
        return next(getattr(self.backbone.model, name) for name in names if hasattr(self.backbone.model, name))

    def checkpoint_activations(self):
        """Compute layers twice in place of keeping what they hand on: much less memory."""
        if not self.backbone.supports_gradient_checkpointing:
            raise DataError(f"--checkpointing: a {type(self.backbone).__name__} does not support it")
        self.backbone.gradient_checkpointing_enable(dict(use_reentrant=False))

    def freeze(self, what):
        """Stop training "vision" (the vision encoder) or "backbone" (all but queries, heads and LoRA layers)."""
        if what != "none":
            part = self.backbone if what == "backbone" else self.vision_encoder()
            for name, parameter in part.named_parameters():
                parameter.requires_grad_("lora_" in name)
        return self

    def query_states(self, batch):
        """A batch with the backbone's tensors -> the last layer at the queries, (B, N, D)."""
        N, model = self.config.num_queries, self.backbone.model
        queries = self.queries.expand(len(batch["input_ids"]), -1, -1)
        if self.config.action and self.config.action.state_dim:
            queries = queries + self.from_state((batch["state"] - self.state_center) / self.state_scale)[:, None]
        embedded = self.backbone.get_input_embeddings()(batch["input_ids"])  # B L+N D
        embedded = torch.cat([embedded[:, :-N], queries.to(embedded.dtype)], 1)
        tensors = {name: batch[name] for name in self.names & batch.keys() - {"input_ids"}}
        if hasattr(model, "get_rope_index"):  # Qwen: positions are three-dimensional and come from the tokens
            names = inspect.signature(model.get_rope_index).parameters.keys() & batch.keys()
            tensors["position_ids"] = model.get_rope_index(**{name: batch[name] for name in names})[0]
        hidden = model(inputs_embeds=embedded, **tensors, use_cache=False).last_hidden_state
        return self.dropout(hidden[:, -N:])

    # --- training

    def forward(self, batch):
        """A batch of latent actions, or of commands (dict, see data.py) -> (loss, metrics)."""
        hidden = self.query_states(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            compute_loss = self.latent_loss if "codes" in batch else self.action_loss
            loss, metrics = compute_loss(hidden.float(), batch)
            loss = loss.mean()
        return loss, {"loss": loss.detach(), **{name: value.detach().mean() for name, value in metrics.items()}}

    def latent_loss(self, hidden, batch):
        """Per sample (B,): the loss; token accuracy, exact match, cross-entropy in nats per code, squared error."""
        codes, target = batch["codes"], self.config.latent.target
        # from detached states, so with "vectors" this cross-entropy trains the classifier alone
        logits = self.to_codes(hidden if target == "codes" else hidden.detach())  # B N K
        cross_entropy = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)
        right = (logits.argmax(2) == codes).float()
        metrics = dict(token_accuracy=right.mean(1), exact_match=right.amin(1), cross_entropy=cross_entropy)
        metrics |= {f"token_accuracy_{n}": right[:, n] for n in range(right.shape[1])}
        if target == "codes":
            return cross_entropy, metrics
        error = self.to_vectors(hidden) - (batch["vectors"] - self.mean) / self.std
        metrics["vector_mse"] = (error.square() * self.weight).sum(2).mean(1)
        return metrics["vector_mse"] + cross_entropy, metrics

    def action_loss(self, hidden, batch):
        """Per sample (B,): the loss, and the mean absolute error, normalised, over all dims and steps of the chunk."""
        mask = batch["mask"]
        weight = (mask / mask.sum(1, keepdim=True).clamp(min=1))[..., None] / self.config.action.action_dim  # B H 1
        target, out = (batch["actions"] - self.action_center) / self.action_scale, self.predict_chunk(hidden)
        error = F.smooth_l1_loss(out, target, reduction="none")  # B H A
        return (error * weight).sum((1, 2)), dict(action_mae=((out - target).abs() * weight).sum((1, 2)))

    def predict_chunk(self, hidden):
        """(B, N, D) -> normalised commands (B, H, A)."""
        action = self.config.action
        return self.to_actions(hidden.flatten(1)).view(-1, action.chunk_size, action.action_dim)

    # --- use

    @torch.no_grad()
    def predict_actions(self, batch):
        """-> commands in robot units (B, H, A)."""
        return self.predict_chunk(self.query_states(batch).float()) * self.action_scale + self.action_center

    # --- files

    def save_pretrained(self, folder, state=None):
        """A plain Hugging Face folder of the backbone and its processor, vla.json, heads.safetensors.

        state: the whole weights, where this model holds only a shard of them.
        """
        state = self.state_dict() if state is None else state
        plain = {name: value for name, value in state.items() if name.startswith("backbone.") and "lora_" not in name}
        own = {name: value.contiguous() for name, value in state.items() if name not in plain}
        plain = {name.removeprefix("backbone."): value for name, value in plain.items()}
        self.backbone.save_pretrained(folder, state_dict=plain)
        self.processor.save_pretrained(folder)
        self.config.save_pretrained(folder)
        save_file(own, Path(folder) / "heads.safetensors", dict(format="pt"))

    @classmethod
    def from_pretrained(cls, folder, config=None):
        """The model that `save_pretrained` wrote. config: another; what the folder has no weights for starts new.

        With a config the folder may also be a plain backbone, or its name on the hub.
        """
        model = cls(config or VLAConfig.from_pretrained(folder), *open_backbone(folder))
        if config is None or (Path(folder) / "vla.json").exists():
            model.load_heads(folder)
        return model

    def load_heads(self, folder):
        """Queries, LoRA layers, and those heads whose configuration is the checkpoint's; the others stay new."""
        path, other = Path(folder) / "heads.safetensors", VLAConfig.from_pretrained(folder)
        if other.lora_rank not in (0, self.config.lora_rank):
            raise DataError(f"{folder}: has LoRA layers of rank {other.lora_rank}; give --lora-rank {other.lora_rank}")
        new = () if other.latent == self.config.latent else ("to_codes.", "to_vectors.")
        new += () if other.action == self.config.action else ("to_actions.", "from_state.")
        own = {name: value.shape for name, value in self.state_dict().items() if not name.startswith(new)}
        own = {name: shape for name, shape in own.items() if "backbone." not in name or "lora_" in name}
        own = {name: shape for name, shape in own.items() if other.lora_rank or "lora_" not in name}
        try:
            weights = {name: value for name, value in load_file(path).items() if not name.startswith(new)}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not a readable checkpoint ({error})") from None
        if own != {name: value.shape for name, value in weights.items()}:
            differs = sorted(own.keys() ^ weights.keys()) or ["a shape"]
            raise DataError(f"{path}: does not fit this model ({differs[0]} differs)")
        self.load_state_dict(weights, strict=False)
