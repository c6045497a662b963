"""Pi05: LeRobot's PI05Policy with what fine-tuning needs around it.

The policy is LeRobot's (pi0.5, Physical Intelligence 2025, arXiv 2504.16054): images and a prompt with task and state
go through PaliGemma, a flow-matching expert turns noise into a chunk of actions. Here are: the loss with padded steps
masked, noise and time that the batch brings, low-rank adapters, freezing, an average of the weights, strict loading,
and checkpoints that LeRobot opens.

Letters: B batch, T steps of a chunk, A action dims, S state dims, C H W camera pixels.
"""

import contextlib
import json
from pathlib import Path

import compat
import torch
import torch.nn.functional as F
from inputs import Inputs, check_dims, check_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

SIZES = ("full", "tiny")
TRAIN = ("all", "expert", "lora")
RANKS = dict(vlm=16, expert=32)  # openpi's gemma_2b_lora and gemma_300m_lora; alpha equals the rank
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"  # the same tensor


class LoRALinear(nn.Linear):
    """A linear layer plus the product of two thin matrices (Hu et al. 2021, arXiv 2106.09685), zero at first."""

    @staticmethod
    def adapt(linear, rank):
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        linear.__class__ = LoRALinear
        linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **like).normal_(std=0.01))
        linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


class Pi05(nn.Module):
    """PI05Policy, ready to be fine-tuned.

    cameras: names; the policy reads `observation.images.NAME`. state_dim, action_dim: at most 32. chunk: actions per
    prediction. stats, tokenizer (a local folder), absolute: see Inputs; without a tokenizer (None) there is the loss of
    batches that are ready, nothing else. old_inputs: LeRobot 0.4's letterbox of -3 and prompt with the state padded to
    32 numbers, for checkpoints trained so. ema: decay of the average, 0 for none.
    """

    def __init__(
        self,
        cameras,
        state_dim,
        action_dim,
        stats,
        tokenizer=None,
        size="full",
        chunk=50,
        image_size=224,
        prompt_tokens=200,
        denoise_steps=10,
        train="all",
        freeze_vision=False,
        absolute=None,
        old_inputs=False,
        gradient_checkpointing=False,
        ema=0.0,
        attention="sdpa",
        device="cpu",
    ):
        super().__init__()
        self.about = dict(
            cameras=list(cameras), state_dim=state_dim, action_dim=action_dim, stats=stats, size=size, chunk=chunk,
            image_size=image_size, prompt_tokens=prompt_tokens, denoise_steps=denoise_steps, absolute=absolute,
            old_inputs=old_inputs,
        )  # fmt: skip
        self.fit = dict(train=train, freeze_vision=freeze_vision, ema=ema)
        check_dims(cameras, state_dim, action_dim)
        if size not in SIZES or train not in TRAIN:
            raise ValueError(f"size {size!r}, train {train!r}: expected one of {SIZES}, one of {TRAIN}")
        if tokenizer is not None:
            check_tokenizer(tokenizer, size)
        compat.install(tiny=size == "tiny", attention=attention, old_inputs=old_inputs)
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.pi05.configuration_pi05 import PI05Config
        from lerobot.policies.pi05.modeling_pi05 import PI05Policy

        pixels = PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))
        inputs = {f"observation.images.{name}": pixels for name in cameras}
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (state_dim,))
        config = PI05Config(
            chunk_size=chunk,
            n_action_steps=chunk,
            num_inference_steps=denoise_steps,
            image_resolution=(image_size, image_size),
            tokenizer_max_length=prompt_tokens,
            input_features=inputs,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (action_dim,))},
            device="cpu",
        )
        config.device = str(device)  # LeRobot would replace the ones that it does not know
        with torch.device(device):
            self.policy = PI05Policy(config)
        if gradient_checkpointing:
            self.policy.model.gradient_checkpointing_enable()
        self.prepare = None if tokenizer is None else Inputs(config, stats, tokenizer, absolute, old_inputs)
        self.choose(train, freeze_vision)
        self.average, self.decay = {}, ema
        if ema:
            self.average = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    # --- what is trained

    def choose(self, train, freeze_vision):
        """Which parameters get gradients. What the loss does not reach is always frozen, so DDP need not search."""
        vlm = self.policy.model.paligemma_with_expert
        language, expert = vlm.paligemma.model.language_model, vlm.gemma_expert
        if train == "lora":
            for layers, rank in ((language.layers, RANKS["vlm"]), (expert.model.layers, RANKS["expert"])):
                for layer in layers:
                    for linear in [*layer.self_attn.children(), *layer.mlp.children()]:
                        if isinstance(linear, nn.Linear):
                            LoRALinear.adapt(linear, rank)
        if train == "expert":
            vlm.paligemma.requires_grad_(False)
        if train == "lora":
            for name, parameter in vlm.named_parameters():
                parameter.requires_grad_("lora_" in name)
        if freeze_vision:
            vlm.paligemma.model.vision_tower.requires_grad_(False)
        last = language.layers[-1]  # the expert reads its keys and values, nothing after them
        unread = (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, last.post_attention_layernorm, language.norm)
        for module in (expert.lm_head, *unread):
            module.requires_grad_(False)

    def shrink_frozen(self):
        """Hold the matrices that are not trained in bfloat16, as autocast would read them: half the memory."""
        for parameter in self.parameters():
            if not parameter.requires_grad and parameter.ndim >= 2:
                parameter.data = parameter.data.bfloat16()

    @torch.no_grad()
    def update_average(self):
        """After each optimizer step: average += (1 - decay) (weights - average)."""
        if self.average:
            now = [p.detach() for name, p in self.named_parameters() if name in self.average]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - self.decay)

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the weights are their average (if there is one)."""
        mine = dict(self.named_parameters())
        before = {name: mine[name].data for name in self.average}
        for name, value in self.average.items():
            mine[name].data = value
        try:
            yield
        finally:
            for name, value in before.items():
                mine[name].data = value

    # --- loss and prediction

    def forward(self, batch):
        """batch of `prepare` -> loss, metrics. Steps past the episode's end do not count; samples weigh the same."""
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
        losses = losses[..., : self.about["action_dim"]].float().mean(-1)  # B T
        mask = batch["mask"].float()
        each = (losses * mask).sum(1) / mask.sum(1).clamp(min=1)  # B
        loss = each.mean()
        return loss, dict(loss=loss.detach())

    @torch.no_grad()
    def predict(self, batch):
        """batch with `noise`, as for `prepare` -> actions (B, T, A) in robot units, on the CPU, float32."""
        training = self.training
        self.eval()
        device = next(self.parameters()).device
        ready = {key: value.to(device) for key, value in self.prepare(batch).items() if key != "action"}
        actions = self.policy.predict_action_chunk(ready, noise=ready["noise"])
        self.train(training)
        return self.prepare.undo(actions, batch["observation.state"])

    # --- files

    def exported(self):
        """The policy's weights as LeRobot names them: averaged, adapters merged, the tied embedding once."""
        with self.averaged():
            state = {name: value.detach().to("cpu", copy=True) for name, value in self.policy.state_dict().items()}
        for name in [name for name in state if name.endswith(".lora_a")]:
            stem = name.removesuffix("lora_a")
            change = state.pop(stem + "lora_b").float() @ state.pop(name).float()
            state[stem + "weight"] = state[stem + "weight"].float() + change  # bfloat16 would round it away
        del state[EMBEDDING]  # safetensors refuses two names for one tensor
        return {name: value.contiguous() for name, value in state.items()}

    def save_pretrained(self, folder):
        """A LeRobot policy folder: config, weights, processors; beside them our configuration and the tokenizer.

        Where the weights in training differ from the exported ones (average, adapters), they are in raw.safetensors.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.config.save_pretrained(folder)
        save_file(self.exported(), folder / "model.safetensors", metadata=dict(format="pt"))
        if self.average or self.fit["train"] == "lora":
            raw = {name: value.cpu() for name, value in self.policy.state_dict().items() if name != EMBEDDING}
            raw |= {f"average.{name}": value.cpu() for name, value in self.average.items()}
            save_file(raw, folder / "raw.safetensors", metadata=dict(format="pt"))
        self.prepare.save_pretrained(folder, self.about["size"])
        (folder / "pi05_finetune.json").write_text(json.dumps({**self.about, **self.fit}, indent=1))

    def load_pretrained(self, folder):
        """Weights of a folder with model.safetensors, strictly: a missing, unexpected or misshapen tensor is an error.

        A checkpoint of a run with the same --train and --ema also gives back the weights in training.
        """
        folder, about = Path(folder), Path(folder) / "pi05_finetune.json"
        same = about.exists() and {**json.loads(about.read_text()), **self.fit} == json.loads(about.read_text())
        file = folder / ("raw.safetensors" if same and (folder / "raw.safetensors").exists() else "model.safetensors")
        if not file.exists():
            raise ValueError(f"{folder}: no {file.name} in it; expected the folder of a Pi05 policy")
        try:
            state = load_file(file)
        except Exception as error:  # safetensors has an exception of its own that is no ValueError
            raise ValueError(f"{file}: cannot be read ({str(error)[:150]}); fetch or copy it again") from None
        average = {name: state.pop(name) for name in list(state) if name.startswith("average.")}
        if not any(name.startswith("model.") for name in state):  # openpi's own names
            state = self.policy._fix_pytorch_state_dict_keys(state, self.policy.config)
            state = {f"model.{name}": value for name, value in state.items()}
        state.setdefault(EMBEDDING, state.get(HEAD))
        state.setdefault(HEAD, state[EMBEDDING])
        wanted = self.policy.state_dict()
        fresh = {name for name in wanted if ".lora_" in name} if file.name == "model.safetensors" else set()
        missing, unknown = sorted(set(wanted) - set(state) - fresh), sorted(set(state) - set(wanted))
        if missing or unknown or state[HEAD] is None:
            raise ValueError(
                f"{file}: {len(missing)} tensors are missing ({', '.join(missing[:2]) or '-'}) and {len(unknown)} are "
                f"unknown ({', '.join(unknown[:2]) or '-'}): not the weights of this policy"
            )
        wrong = [name for name in state if state[name].shape != wanted[name].shape]
        if wrong:
            shapes = f"{tuple(state[wrong[0]].shape)}, expected {tuple(wanted[wrong[0]].shape)}"
            raise ValueError(f"{file}: {wrong[0]} has shape {shapes} ({len(wrong)} such): another size of the model")
        self.policy.load_state_dict(state, strict=not fresh)
        for name, parameter in self.named_parameters():
            if name in self.average:
                self.average[name].copy_(average.get(f"average.{name}", parameter.detach()))
        return self

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """The model of a checkpoint, for prediction: in eval mode, averaged and merged. Runs no code from the files."""
        path = Path(folder) / "pi05_finetune.json"
        try:
            about = json.loads(path.read_text())
            about = {key: value for key, value in about.items() if key not in ("train", "freeze_vision", "ema")}
            model = cls(**about, tokenizer=str(Path(folder) / "tokenizer"), device=device)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a configuration of Pi05 ({error})") from None
        return model.load_pretrained(folder).eval()
