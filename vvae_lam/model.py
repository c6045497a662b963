"""VVAELatentActionVQVAE: what happens between two latent frames of a video VAE, as a few discrete codes.

    frames t, t+1 -> patches -> space attention -> mean -> 3 vectors -> 3 codes          (sees t and t+1, nothing later)
    frames <= t, codes <= t -> space attention within a frame, causal attention in time -> frame t+1 minus frame t

One decoder serves teacher forcing, rollout and generation: keys and values are kept, and a cached step gives what the
parallel pass gives. Attention is factorised, so the cost is linear in T, and never materialised.

Letters: B batch, T frames, C H W channels and size of a latent frame, N patches, P width of a patch, D width of the
transformers, S slots (codes per transition), K codes in the codebook.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from quantise import VectorQuantizer, total
from torch import nn


class VVAEtoLAMAdapter(nn.Module):
    """Latent frames (B, C, H, W) -> patches (B, N, P). LayerNorm: no statistics of a batch, so none of a rank."""

    def __init__(self, channels, patch, patch_dim):
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(channels, patch_dim, patch, patch)
        self.norm = nn.LayerNorm(patch_dim)

    def forward(self, x):
        H, W = x.shape[-2:]
        if H % self.patch or W % self.patch:
            x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch), mode="replicate")
        return self.norm(rearrange(self.conv(x), "b p h w -> b (h w) p"))


class LAMtoVVAEAdapter(nn.Module):
    """Patches (B, N, P) -> latent frames (B, C, H, W). Starts at zero: the first prediction is "nothing moves"."""

    def __init__(self, channels, patch, patch_dim, height, width):
        super().__init__()
        self.height, self.width, self.rows = height, width, -(-height // patch)
        self.conv = nn.ConvTranspose2d(patch_dim, channels, patch, patch)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        x = self.conv(rearrange(x, "b (h w) p -> b p h w", h=self.rows))
        return x[..., : self.height, : self.width]


def rotate(x, position):
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) of x (..., T, d) at `position` (T,) or (B, 1, T)."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** -(
        torch.arange(half, device=x.device) / half
    )  # clips are tens of frames, not thousands of words
    angle = position[..., None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class SpaceAttention(nn.Module):
    """The tokens of one frame look at one another. x (B, T, N, D) -> (B, T, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b t n (three h d) -> three (b t) h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "(b t) h n d -> b t n (h d)", b=len(x)))


class TimeAttention(SpaceAttention):
    """Each token looks at itself in its own and the `context - 1` frames before. x (B, T, N, D) -> the same, (k, v).

    place (B, T): frame number of each frame. past: (k, v), each (B, N, heads, L, d), and their places (B, L).
    """

    def __init__(self, dim, heads, context):
        super().__init__(dim, heads)
        self.context = context

    def forward(self, x, place, past=None):
        q, k, v = rearrange(self.qkv(x), "b t n (three h d) -> three b n h t d", three=3, h=self.heads)
        q, k = rotate(q, place[:, None, None]), rotate(k, place[:, None, None])
        seen, causal = None, past is None and x.shape[1] <= self.context
        before = place
        if past is not None:
            (past_k, past_v), past_place = past
            k, v, before = torch.cat([past_k, k], 3), torch.cat([past_v, v], 3), torch.cat([past_place, place], 1)
        if not causal:
            age = place[:, :, None] - before[:, None]  # B T L
            seen = ((age >= 0) & (age < self.context))[:, None, None].expand(-1, x.shape[2], -1, -1, -1)
            seen = seen.flatten(0, 1)
        y = F.scaled_dot_product_attention(*(part.flatten(0, 1) for part in (q, k, v)), seen, is_causal=causal)
        return self.out(rearrange(y, "(b n) h t d -> b t n (h d)", b=len(x))), (k, v)


class Block(nn.Module):
    """Pre-norm transformer block; with `context` it has attention in time too."""

    def __init__(self, dim, heads, context=0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3 if context else 2))
        self.space = SpaceAttention(dim, heads)
        self.time = TimeAttention(dim, heads, context) if context else None
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, place=None, past=None):
        """x (B, T, N, D) -> the same and, with attention in time, its keys and values."""
        kept = None
        x = x + self.space(self.norms[0](x))
        if self.time is not None:
            y, kept = self.time(self.norms[2](x), place, past)
            x = x + y
        return x + self.mlp(self.norms[1](x)), kept


class VVAELatentActionVQVAE(nn.Module):
    """Latent action model over video-VAE latents.

    channels, height, width: of a latent frame (any; a size that patches do not divide is padded inside). patch: latent
    pixels per side of a patch. patch_dim: P. embed_dim: D. num_codes: S. num_embeddings: K. codebook_dim: width of a
    code. context: latent frames that the decoder looks back on; clips and rollouts may be longer. rollout_horizon: 2
    adds one step on the model's own prediction to the loss; 1 turns it off. mean, std: per channel; the model works on
    (latent - mean) / std, and its errors are in those units. gap, causal_only: how the training frames were chosen.
    """

    def __init__(
        self, channels=16, height=64, width=64, patch=4, patch_dim=256, embed_dim=512, encoder_depth=3, decoder_depth=3,
        num_heads=8, num_codes=3, num_embeddings=12, codebook_dim=128, commitment_weight=0.25, rollout_horizon=2,
        context=8, restart_every=20, mean=(0.0,), std=(1.0,), gap=1, causal_only=False,
    ):  # fmt: skip
        super().__init__()
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.config = json.loads(json.dumps(config))
        if embed_dim % num_heads or embed_dim // num_heads % 2:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of twice the {num_heads} heads")
        self.shape, self.num_codes, self.rollout_horizon = (channels, height, width), num_codes, rollout_horizon
        self.commitment_weight, self.gap, self.causal_only = commitment_weight, gap, causal_only
        N, S, D = -(-height // patch) * -(-width // patch), num_codes, embed_dim
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

        self.adapter_in = VVAEtoLAMAdapter(channels, patch, patch_dim)
        self.pair = nn.Linear(2 * patch_dim, D)
        nn.init.zeros_(self.pair.weight[:, :patch_dim])  # codes start as motion: a scene that rests has none of its own
        self.encoder_place = nn.Parameter(torch.randn(N, D) * 0.02)
        self.encoder = nn.ModuleList(Block(D, num_heads) for _ in range(encoder_depth))
        self.to_vectors = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, S * codebook_dim))
        self.quantizer = VectorQuantizer(num_embeddings, num_codes, codebook_dim, restart_every)

        self.frame = nn.Linear(patch_dim, D)
        self.code = nn.Linear(codebook_dim, D)
        self.decoder_place = nn.Parameter(torch.randn(N + S, D) * 0.02)  # patches, then slots
        self.decoder = nn.ModuleList(Block(D, num_heads, context) for _ in range(decoder_depth))
        self.to_patches = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, patch_dim))
        self.adapter_out = LAMtoVVAEAdapter(channels, patch, patch_dim, height, width)

    # --- encoder and decoder, on normalised latents

    def patches(self, x):
        """(B, T, C, H, W) -> (B, T, N, P)."""
        return self.adapter_in(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def infer(self, patches):
        """Patches (B, T, N, P) -> vectors (B, T-1, S, codebook_dim) before quantisation; row t sees t and t+1 alone."""
        before, after = patches[:, :-1], patches[:, 1:]
        h = self.pair(torch.cat([before, after - before], -1)) + self.encoder_place  # B T-1 N D
        for block in self.encoder:
            h, _ = block(h)
        return self.to_vectors(h.mean(2)).unflatten(-1, (self.num_codes, -1))

    def decode(self, x, z, place, past=None, patches=None):
        """Frames x (B, T, C, H, W) and vectors z (B, T, S, codebook_dim) -> next frames, and what to keep of the past.

        place (B, T): frame numbers. past: (keys and values of each block, their places), as returned.
        """
        patches = self.patches(x) if patches is None else patches
        h = torch.cat([self.frame(patches), self.code(z)], 2) + self.decoder_place  # B T N+S D
        layers = [None] * len(self.decoder) if past is None else [(kept, past[1]) for kept in past[0]]
        kept = []
        for block, before in zip(self.decoder, layers, strict=True):
            h, pair = block(h, place, before)
            kept.append(pair)
        change = self.adapter_out(self.to_patches(h[:, :, : -self.num_codes]).flatten(0, 1))
        places = place if past is None else torch.cat([past[1], place], 1)
        return x + change.unflatten(0, x.shape[:2]), (kept, places)

    # --- training

    def forward(self, batch):
        """batch: latents (B, T, C, H, W) and, in training, anchor (B,) -> (loss, metrics). Samples weigh the same.

        loss = MSE + codebook + commitment_weight * commitment + MSE of the rollout. The last three begin with the
        codes: a rollout before that goes on from an average over all actions, which slows the start.
        """
        x = (batch["latents"] - self.mean) / self.std
        patches = self.patches(x)
        z, codes, codebook, commitment = self.quantizer(self.infer(patches))
        place = torch.arange(z.shape[1], device=x.device).expand(len(x), -1)
        x_hat, past = self.decode(x[:, :-1], z, place, patches=patches[:, :-1])
        error = x_hat.float() - x[:, 1:]
        mse, vq = error.square().mean(), codebook + self.commitment_weight * commitment
        loss = mse + vq
        used = torch.bincount(codes.flatten(), minlength=len(self.quantizer.codebook))
        used = (total(used) if self.training else used) > 0  # a code that any rank uses is in use
        metrics = dict(mse_loss=mse, mae_loss=error.abs().mean(), vq_loss=vq, codebook_loss=codebook)
        metrics |= dict(commitment_loss=commitment, codebook_usage=used.float().mean())
        if self.rollout_horizon > 1 and "anchor" in batch and self.quantizer.started:
            metrics["rollout_loss"] = self.rollout_loss(x, x_hat, z, past, batch["anchor"])
            loss = loss + metrics["rollout_loss"]
        return loss, {"loss": loss, **metrics}

    def rollout_loss(self, x, x_hat, z, past, anchor):
        """MSE of the steps that follow the prediction made at frame `anchor` (B,), each fed with the one before.

        The keys and values of frames up to the anchor are those of the teacher-forced pass; the first prediction is
        detached, so the loss teaches to go on from it, not to move it.
        """
        kept, places = past
        places = torch.where(places <= anchor[:, None], places, 1_000_000)  # teacher-forced frames after it: never seen
        rows, loss = torch.arange(len(x), device=x.device), 0.0
        frame = x_hat[rows, anchor].detach()[:, None]
        for step in range(1, self.rollout_horizon):
            now = anchor + step
            frame, (kept, places) = self.decode(frame, z[rows, now][:, None], now[:, None], (kept, places))
            loss = loss + F.mse_loss(frame[:, 0].float(), x[rows, now + 1])
        return loss / (self.rollout_horizon - 1)

    def training_flops(self, frames):
        """Floating-point operations of a sequence's forward and backward pass: 2 per multiply-add, backward twice."""
        D, N, S, T = self.config["embed_dim"], len(self.encoder_place), self.num_codes, frames - 1
        P, area = self.config["patch_dim"], self.shape[0] * self.config["patch"] ** 2
        rolled = self.rollout_horizon - 1

        def block(tokens, times):  # linear layers, space attention, time attention
            linear = (12 + 4 * (times > 0)) * D * D
            return tokens * (linear + 2 * tokens * D + 2 * times * D)

        encode = frames * N * area * P + T * (N * 2 * P * D + len(self.encoder) * block(N, 0))
        encode += T * D * S * self.config["codebook_dim"]
        decode = N * P * D + S * self.config["codebook_dim"] * D + len(self.decoder) * block(N + S, (T + 1) / 2)
        decode += N * (D * P + P * area)
        return 2 * 3 * (encode + (T + rolled) * decode + rolled * N * area * P)

    # --- use, on latents in the VAE's own units

    def check(self, latents, ndim):
        """As a float32 tensor on the model's device with a batch axis, and whether it came without one."""
        x = (
            torch.as_tensor(np.asarray(latents) if not torch.is_tensor(latents) else latents)
            .to(self.mean.device)
            .float()
        )
        single = x.ndim == ndim - 1
        x = x[None] if single else x
        if x.ndim != ndim or tuple(x.shape[-3:]) != self.shape:
            expected = "(B, T, " if ndim == 5 else "(B, "
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {expected}{str(self.shape)[1:]}")
        if not x.isfinite().all():
            raise ValueError("latents hold NaN or infinity")
        return (x - self.mean) / self.std, single

    def check_codes(self, codes, batch):
        """As a tensor (batch, T, S) on the model's device."""
        codes = codes if torch.is_tensor(codes) else torch.as_tensor(np.asarray(codes))
        codes = (codes[None] if codes.ndim == 2 else codes).to(self.mean.device)
        K, S = len(self.quantizer.codebook), self.num_codes
        if codes.ndim != 3 or len(codes) != batch or codes.shape[2] != S:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected ({batch}, T, {S})")
        if codes.is_floating_point() or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < K):
            raise ValueError(f"codes must be whole numbers in [0, {K})")
        return codes.long()

    @torch.no_grad()
    def encode(self, latents, vectors=False):
        """Latents (B, T, C, H, W) or (T, C, H, W) -> codes (B, T-1, S) int64; vectors=True: and what was quantised.

        Array in, array out. The code of t -> t+1 depends on these two frames alone.
        """
        if not self.quantizer.started:
            raise ValueError("this checkpoint is from before its codes began (train.py says when): train longer")
        x, single = self.check(latents, 5)
        z = self.infer(self.patches(x)).float()
        codes = self.quantizer.nearest(z)
        out = [part[0] if single else part for part in (codes, z)]
        out = out if torch.is_tensor(latents) else [part.cpu().numpy() for part in out]
        return tuple(out) if vectors else out[0]

    @torch.no_grad()
    def predict(self, latents, codes):
        """Latents (B, T, C, H, W), codes (B, T-1, S) -> frames 1 to T-1, each predicted from the true ones before."""
        x, single = self.check(latents, 5)
        codes = self.check_codes(codes, len(x))
        if codes.shape[1] != x.shape[1] - 1:
            raise ValueError(f"{codes.shape[1]} transitions of codes for {x.shape[1]} frames, expected one less")
        place = torch.arange(codes.shape[1], device=x.device).expand(len(x), -1)
        x_hat = self.decode(x[:, :-1], self.quantizer.lookup(codes), place)[0]
        return self.leave(x_hat, single, latents)

    @torch.no_grad()
    def rollout(self, first, codes):
        """From one frame (B, C, H, W) or (C, H, W), follow the codes (B, T, S): T frames, each predicted from the last.

        Any T: keys and values of the last `context` frames are kept.
        """
        x, single = self.check(first, 4)
        codes = self.check_codes(codes, len(x))
        frame, past, frames = x[:, None], None, []
        for t in range(codes.shape[1]):
            place = torch.full((len(x), 1), t, device=x.device)
            frame, past = self.decode(frame, self.quantizer.lookup(codes[:, t : t + 1]), place, past)
            frames.append(frame)
            keep = self.config["context"] - 1
            past = [tuple(part[:, :, :, -keep:] for part in pair) for pair in past[0]], past[1][:, -keep:]
        return self.leave(torch.cat(frames, 1), single, first)

    def leave(self, x, single, like):
        x = x * self.std + self.mean
        x = x[0] if single else x
        return x if torch.is_tensor(like) else x.cpu().numpy()

    # --- files

    def save_pretrained(self, folder):
        """config.json (with the normalisation) and pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    def load_pretrained(self, folder):
        """Weights of a checkpoint folder whose configuration is this model's."""
        path = Path(folder) / "pytorch_model.bin"
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except OSError:
            raise
        except Exception as error:  # for a damaged file torch raises struct.error, IndexError and a dozen more
            reason = (str(error) or type(error).__name__).splitlines()[0][:150]
            raise ValueError(f"{path}: cannot be loaded into this model ({reason})") from None
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a checkpoint folder, in eval mode. Never runs code from the files."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
            big = [k for k, v in config.items() if isinstance(v, (int, float)) and not abs(v) < 1e6]
            if big:
                raise ValueError(f"{big[0]} is {config[big[0]]}")  # a depth of 1e30 is built for ever
            model = cls(**config)
        except OSError:
            raise
        except Exception as error:  # for sizes that are none torch raises a dozen kinds
            raise ValueError(f"{path}: not a configuration of VVAELatentActionVQVAE ({error})") from None
        return model.load_pretrained(folder).eval()
