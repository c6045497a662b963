"""VLA: a vision-language model from transformers that predicts latent actions, then robot commands.

LAPA (Ye et al. 2024, arXiv 2410.11758) stages 2 and 3. The prompt is followed by N learned query positions; what
the language model makes of them feeds small heads of our own, so the vocabulary, the tied embeddings and the
150,000-way softmax are left alone. All N slots are predicted in one pass.

Letters: B batch, L prompt length, N queries (codes per latent action), D width of the backbone, K codes in the
vocabulary, C dims of a code's vector, H steps of a chunk, A action dims, S state dims, W bins.
"""

import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from sim import film  # noqa: F401  makes itself known to transformers
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

PROMPT = "What action should the robot take to {instruction}?"


class LowRank(nn.Linear):
    """A linear layer plus two thin matrices (LoRA, Hu et al. 2021, arXiv 2106.09685); starts as the layer."""

    @classmethod
    def put_on(cls, linear, rank):
        """Turn a linear layer into this, in place: its weight keeps its name."""
        linear.__class__ = cls
        weight = linear.weight
        linear.low_rank_in = nn.Parameter(
            torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5
        )
        linear.low_rank_out = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.low_rank_in), self.low_rank_out)


def open_backbone(path):
    """(model, processor) of a local folder or a name on the hub; refuses what is not for images and text."""
    options = dict(dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    try:
        processor = AutoProcessor.from_pretrained(path, use_fast=True)
        backbone, found = AutoModelForImageTextToText.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a vision-language model that transformers can load ({text})") from None
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{path}: its processor ({type(processor).__name__}) does not take images and text")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{path}: its processor has no chat template: an instruction-tuned model is needed")
    if found["missing_keys"]:
        raise ValueError(f"{path}: has no weights for {sorted(found['missing_keys'])[0]}")
    return backbone, processor


class VLA(nn.Module):
    """Backbone, queries and heads. config (vla.json), all of it optional but `prompt`, `queries`:

    latent: vocabulary, codes, dim, gap, codebook (N K C), center, scale, weight (N C), target; see
      data.describe_latents.
      target "codes": cross-entropy on the indices, as LAPA. "codebook": regression of the codes' vectors. "vectors":
      regression of the vectors before quantisation. With the last two a linear classifier of the codes reads the
      queries too and sends no gradient back.
    action: dims, chunk, center, scale, bins, state ...; see data.describe_actions. bins 0: the chunk is regressed
      (smooth L1, normalised); otherwise classified into quantile bins, as LAPA.
    rank: of the low-rank layers in the language model; 0: none. dropout: on what the heads read.
    """

    def __init__(self, backbone, processor, config):
        super().__init__()
        self.backbone, self.processor = backbone, processor
        self.config = json.loads(json.dumps(config))
        latent, action = self.config.get("latent"), self.config.get("action")
        self.latent, self.action, self.rank = latent, action, self.config.get("rank", 0)
        N, D = self.config["queries"], backbone.config.get_text_config().hidden_size
        if latent and latent["codes"] != N:
            raise ValueError(f"the labels have {latent['codes']} codes, the checkpoint {N} queries")
        std = backbone.get_input_embeddings().weight.float().std().item()
        self.queries = nn.Parameter(torch.randn(N, D) * std)
        self.dropout = nn.Dropout(self.config.get("dropout", 0.0))
        if latent:
            K, C = latent["vocabulary"], latent["dim"]
            self.to_codes = nn.Linear(D, K)
            self.register_buffer("codebook", torch.tensor(latent["codebook"]), persistent=False)  # N K C
            self.register_buffer("center", torch.tensor(latent["center"]), persistent=False)  # N C
            self.register_buffer("scale", torch.tensor(latent["scale"]), persistent=False)
            self.register_buffer("weight", torch.tensor(latent["weight"]), persistent=False)
            if latent["target"] != "codes":
                self.to_vectors = nn.Linear(D, C)
        if action:
            A, H, S, W = action["dims"], action["chunk"], action["state"], action["bins"]
            self.to_actions = nn.Linear(N * D, H * A * max(1, W))
            self.register_buffer("action_center", torch.tensor(action["center"]), persistent=False)  # A
            self.register_buffer("action_scale", torch.tensor(action["scale"]), persistent=False)
            if W:
                self.register_buffer("edges", torch.tensor(action["edges"]), persistent=False)  # A W-1
                self.register_buffer("values", torch.tensor(action["values"]), persistent=False)  # A W
            if S:
                self.from_state = nn.Linear(S, D)
                self.register_buffer("state_center", torch.tensor(action["state_center"]), persistent=False)
                self.register_buffer("state_scale", torch.tensor(action["state_scale"]), persistent=False)
                nn.init.zeros_(self.from_state.weight)  # what was pretrained starts unchanged
                nn.init.zeros_(self.from_state.bias)
        if self.rank:
            for layer in self.decoder_layers():
                for part in list(layer.modules()):
                    if type(part) is nn.Linear:
                        LowRank.put_on(part, self.rank)
        output = backbone.get_output_embeddings()
        if output is not None and output.weight is not backbone.get_input_embeddings().weight:
            output.requires_grad_(False)  # nothing here reads the softmax over the vocabulary
        self.takes = set(inspect.signature(backbone.model.forward).parameters)
        self.extra = None  # B N D, what the next forward adds to the last N positions' embeddings
        backbone.get_input_embeddings().register_forward_hook(self.add_queries)

    # --- the backbone

    def decoder_layers(self):
        """The language model's layers, the ModuleList of its text model."""
        language = self.backbone.model.language_model
        return getattr(language, "layers", None) or language.model.layers

    def image_tower(self):
        """The part of the backbone that reads pixels."""
        names = ("visual", "vision_tower", "vision_model")
        return next(getattr(self.backbone.model, name) for name in names if hasattr(self.backbone.model, name))

    def add_queries(self, module, args, embedded):
        if self.extra is None:
            return embedded
        N = self.extra.shape[1]
        return torch.cat([embedded[:, :-N], self.extra.to(embedded.dtype)], 1)

    def inputs(self, images, instructions):
        """images (B x (H, W, 3) uint8), instructions (B texts) -> the backbone's tensors, N placeholders at the end."""
        talk = [dict(type="image"), dict(type="text", text="")]
        texts = []
        for instruction in instructions:
            talk[1]["text"] = self.config["prompt"].format(instruction=instruction)
            texts.append(
                self.processor.apply_chat_template(
                    [dict(role="user", content=talk)], tokenize=False, add_generation_prompt=True
                )
            )
        self.processor.tokenizer.padding_side = "left"  # so that the queries are the last positions of every row
        tensors = self.processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
        tensors = {name: value for name, value in tensors.items() if name in self.takes}
        N, filler = self.config["queries"], self.processor.tokenizer.eos_token_id
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        tensors["input_ids"] = torch.cat([ids, ids.new_full((len(ids), N), filler)], 1)
        tensors["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), N)], 1)
        if "mm_token_type_ids" in tensors:
            kinds = tensors["mm_token_type_ids"]
            tensors["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(kinds), N)], 1)
        return tensors

    def read(self, batch):
        """A batch with the backbone's tensors -> what the last layer holds at the queries, (B, N, D)."""
        B, N = len(batch["input_ids"]), self.config["queries"]
        extra = self.queries.expand(B, -1, -1)
        if self.action and self.action["state"]:
            state = (batch["state"] - self.state_center) / self.state_scale
            extra = extra + self.from_state(state)[:, None]
        self.extra = extra
        try:
            tensors = {name: value for name, value in batch.items() if name in self.takes}
            hidden = self.backbone.model(**tensors, use_cache=False).last_hidden_state
        finally:
            self.extra = None
        return self.dropout(hidden[:, -N:])

    # --- training

    def freeze(self, what):
        """Stop training "vision" (the image tower) or "backbone" (all but queries, heads and low-rank layers)."""
        if what != "none":
            part = self.backbone if what == "backbone" else self.image_tower()
            for name, parameter in part.named_parameters():
                parameter.requires_grad_("low_rank_" in name)

    def flops(self, batch):
        """Floating point operations of one training step on `batch`, without attention scores and recomputation.

        6 per weight and token that trains, 4 per one that only passes gradients on, 2 in a frozen image tower
        (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
        """

        def matrices(part):
            return sum(p.numel() for p in part.parameters() if p.ndim > 1)

        vision, layers, pixels = self.image_tower(), self.decoder_layers(), batch["pixel_values"]
        config = self.backbone.config
        size = getattr(config, "vision_config", config).patch_size
        patches = len(pixels) if pixels.ndim == 2 else pixels.numel() // (3 * size**2)
        tokens = batch["attention_mask"].sum().item()
        trains = any(p.requires_grad for p in layers.parameters())
        passes = any(p.requires_grad for p in vision.parameters())
        return (6 if trains else 4) * matrices(layers) * tokens + (6 if passes else 2) * matrices(vision) * patches

    def forward(self, batch):
        """A batch (dict, see data.py) -> (loss, metrics). Every sample counts the same, whatever it teaches."""
        hidden = self.read(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, loss, metrics = hidden.float(), 0.0, {}
            if self.latent and "codes" in batch:
                each, more = self.latent_loss(hidden, batch)
                loss = loss + self.add_up(each, more, batch["has_latents"], metrics)
            if self.action and "actions" in batch:
                each, more = self.action_loss(hidden, batch)
                loss = loss + self.add_up(each, more, batch["has_actions"], metrics)
        return loss, {"loss": loss, **metrics}

    @staticmethod
    def add_up(each, more, there, metrics):
        """Mean over the whole batch of `each` (B,) where `there`; the metrics are means over those rows alone."""
        share = there.float() / len(there)
        count = there.float().mean().clamp(min=1e-12)
        metrics.update({name: (value.detach() * share).sum() / count for name, value in more.items()})
        return (each * share).sum()

    def latent_loss(self, hidden, batch):
        """Per sample: the loss (B,), and token and word accuracy, cross-entropy in nats per code, squared error."""
        codes, target = batch["codes"], self.latent["target"]
        logits = self.to_codes(hidden if target == "codes" else hidden.detach())  # B N K
        entropy = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)
        right = (logits.argmax(2) == codes).float()
        metrics = dict(token_accuracy=right.mean(1), word_accuracy=right.amin(1), cross_entropy=entropy)
        metrics |= {f"token_accuracy_{n}": right[:, n] for n in range(right.shape[1])}
        if target == "codes":
            return entropy, metrics
        vectors = self.vectors_of(codes) if target == "codebook" else batch["vectors"]
        vectors = (vectors - self.center) / self.scale
        metrics["vector_mse"] = ((self.to_vectors(hidden) - vectors).square() * self.weight).sum(2).mean(1)
        return metrics["vector_mse"] + entropy, metrics

    def vectors_of(self, codes):
        """The codebook's vectors (B, N, C) of codes (B, N)."""
        return self.codebook[torch.arange(codes.shape[1], device=codes.device), codes]

    def action_loss(self, hidden, batch):
        """Per sample: the loss (B,), and absolute errors: normalised, over all dims and steps of the chunk."""
        actions, mask = batch["actions"], batch["mask"]
        share = (mask / mask.sum(1, keepdim=True).clamp(min=1))[..., None] / self.action["dims"]  # B H 1
        out = self.chunk(hidden)
        if self.action["bins"]:
            which = torch.stack(
                [torch.bucketize(actions[..., a].contiguous(), e, right=True) for a, e in enumerate(self.edges)], -1
            )
            error = F.cross_entropy(out.permute(0, 3, 1, 2), which, reduction="none")  # B H A
        else:
            error = F.smooth_l1_loss(out, (actions - self.action_center) / self.action_scale, reduction="none")
        distance = (self.commands(out) - actions).abs() / self.action_scale
        return (error * share).sum((1, 2)), dict(action_mae=(distance * share).sum((1, 2)))

    def chunk(self, hidden):
        """(B, N, D) -> normalised commands (B, H, A), or logits of their bins (B, H, A, W)."""
        H, A, W = self.action["chunk"], self.action["dims"], self.action["bins"]
        return self.to_actions(hidden.flatten(1)).view(-1, H, A, *([W] if W else []))

    def commands(self, out):
        """`chunk`'s output -> commands in robot units (B, H, A)."""
        if self.action["bins"]:
            return self.values.expand(*out.shape[:2], -1, -1).gather(3, out.argmax(3, keepdim=True))[..., 0]
        return out * self.action_scale + self.action_center

    # --- use

    @torch.no_grad()
    def predict_latents(self, batch):
        """-> probabilities of the codes (B, N, K), vectors (B, N, C) before quantisation (or of the codes)."""
        hidden = self.read(batch).float()
        probabilities = self.to_codes(hidden).softmax(2)
        if self.latent["target"] == "codes":
            return probabilities, self.vectors_of(probabilities.argmax(2))
        return probabilities, self.to_vectors(hidden) * self.scale + self.center

    @torch.no_grad()
    def predict_actions(self, batch):
        """-> commands in robot units, (B, H, A)."""
        return self.commands(self.chunk(self.read(batch).float()))

    # --- files

    def own_weights(self):
        """All weights that a plain backbone does not have: queries, heads, low-rank layers."""
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
        return own | {name: value for name, value in self.state_dict().items() if "low_rank_" in name}

    def save_pretrained(self, folder, state=None):
        """A plain Hugging Face folder of the backbone, vla.json, heads.bin. state: whole weights, if sharded."""
        folder = Path(folder)
        state = self.state_dict() if state is None else state
        plain = {
            n.removeprefix("backbone."): v
            for n, v in state.items()
            if n.startswith("backbone.") and "low_rank_" not in n
        }
        self.backbone.save_pretrained(folder, state_dict=plain)
        self.save_about(folder)
        torch.save({name: state[name] for name in self.own_weights()}, folder / "heads.bin")

    def save_about(self, folder):
        """All of a checkpoint but the weights."""
        self.backbone.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (Path(folder) / "vla.json").write_text(json.dumps(self.config, indent=1))

    def load_pretrained(self, folder):
        """Weights of a checkpoint folder; see read_heads."""
        self.load_state_dict(self.read_weights(folder), strict=False)

    def read_weights(self, folder):
        """{name: tensor} of a checkpoint folder for load_state_dict(strict=False); what it lacks is in `read_heads`."""
        plain = open_backbone(folder)[0].state_dict()
        own = {name.removeprefix("backbone.") for name in self.state_dict() if name.startswith("backbone.")}
        missing = {name for name in own if "low_rank_" not in name} - set(plain)
        if missing:
            raise ValueError(f"{folder}: another backbone: it has no {sorted(missing)[0]}")
        return {f"backbone.{name}": value for name, value in plain.items()} | self.read_heads(folder)

    def read_heads(self, folder):
        """Queries, heads and low-rank layers of a checkpoint. A head that it lacks, or of another kind, stays new."""
        path, about = Path(folder) / "heads.bin", read_config(folder)
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # for a damaged or unsafe file torch raises a dozen kinds
            raise ValueError(f"{path}: not a checkpoint that is safe to load ({type(error).__name__})") from None
        fresh = [] if about.get("latent") == self.latent else ["to_codes", "to_vectors"]
        fresh += [] if about.get("action") == self.action else ["to_actions", "from_state"]
        fresh += [] if about.get("rank", 0) == self.rank else ["low_rank_"]
        own = {name for name in self.own_weights() if not any(part in name for part in fresh)}
        weights = {name: value for name, value in weights.items() if not any(part in name for part in fresh)}
        if own != set(weights) or any(self.state_dict()[name].shape != value.shape for name, value in weights.items()):
            raise ValueError(f"{path}: does not fit this model: {sorted(own ^ set(weights)) or 'other shapes'}")
        return weights

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """The model that `save_pretrained` wrote; `changes` replace parts of its config (a new head starts new)."""
        about = read_config(folder)
        model = cls(*open_backbone(folder), about | changes)
        model.load_state_dict(model.read_heads(folder), strict=False)
        return model


def read_config(folder):
    """vla.json of a checkpoint folder."""
    path = Path(folder) / "vla.json"
    try:
        about = json.loads(path.read_text())
        assert "prompt" in about and about["queries"] >= 1
    except FileNotFoundError:
        raise ValueError(f"{path}: not there: expected a checkpoint of vla/train.py or vla/finetune.py") from None
    except (ValueError, AssertionError, KeyError, TypeError):
        raise ValueError(f"{path}: not the description of a checkpoint") from None
    return about
