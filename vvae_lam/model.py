"""VVAELatentActionVQVAE: what happens between two latent frames of a video VAE, as a few discrete codes.

    frames t, t+1 -> patches -> space attention -> mean -> 3 vectors -> 3 codes          (sees t and t+1, nothing later)
    frames <= t, codes <= t -> space attention within a frame, causal attention in time -> frame t+1 minus frame t

One decoder serves teacher forcing, rollout and generation: keys and values are cached, and a cached step gives what
the parallel pass gives. Attention is factorised, so the cost is linear in T, and never materialised.

Letters: B batch, T frames, C H W channels and size of a latent frame, N patches, P width of a patch, D width of the
transformers, S code positions (codes per transition), K codes in a codebook.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from layers import Block, cells, optical_flow
from quantizer import VectorQuantizer
from torch import nn

from common import DataError


@dataclass
class Config:
    """Sizes, and what the model knows of its data. The defaults are those of the VideoVAE+ latent action model."""

    channels: int = 16  # of a latent frame
    height: int = 64  # any; a size that patches do not divide is padded inside
    width: int = 64
    patch: int = 4  # latent pixels per side of a patch
    patch_dim: int = 256  # P
    embed_dim: int = 512  # D
    encoder_depth: int = 3  # blocks
    decoder_depth: int = 3
    num_heads: int = 8
    num_codes: int = 3  # S
    num_embeddings: int = 12  # K
    codebook_dim: int = 128  # width of a code
    commitment_weight: float = 0.25
    flow: bool = False  # the encoder sees the optical flow of its two frames, and the codes must predict it
    context: int = 8  # latent frames that the decoder attends to; clips and rollouts may be longer
    mean: tuple = (0.0,)  # per channel; the model works on (latent - mean) / std, and its errors are in those units
    std: tuple = (1.0,)
    gap: int = 1  # latent frames from one frame of a training sequence to the next
    vae: str = "unknown"  # whose latents these are, as the files say


MAY_DIFFER = {"commitment_weight", "gap"}  # the weights fit all the same


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
    """Patches (B, N, P) -> latent frames (B, C, H, W). Starts at zero: the first prediction copies the frame before."""

    def __init__(self, channels, patch, patch_dim, height, width):
        super().__init__()
        self.height, self.width, self.rows = height, width, -(-height // patch)
        self.conv = nn.ConvTranspose2d(patch_dim, channels, patch, patch)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        x = self.conv(rearrange(x, "b (h w) p -> b p h w", h=self.rows))
        return x[..., : self.height, : self.width]


class VVAELatentActionVQVAE(nn.Module):
    """Latent action model over video-VAE latents; see Config."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.shape = c.channels, c.height, c.width
        if c.flow and min(c.height, c.width) < 3:
            raise DataError(f"--flow needs latent frames of 3x3 or more, not {c.height}x{c.width}")
        N, S, D = -(-c.height // c.patch) * -(-c.width // c.patch), c.num_codes, c.embed_dim
        self.register_buffer("mean", torch.tensor(c.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(-1, 1, 1), persistent=False)

        self.adapter_in = VVAEtoLAMAdapter(c.channels, c.patch, c.patch_dim)
        self.pair_proj = nn.Linear(2 * c.patch_dim, D)
        nn.init.zeros_(self.pair_proj.weight[:, : c.patch_dim])  # codes start as motion: equal where nothing moves
        self.encoder_pos_embed = nn.Parameter(torch.randn(N, D) * 0.02)
        self.encoder = nn.ModuleList(Block(D, c.num_heads) for _ in range(c.encoder_depth))
        if c.flow:
            size = 2 * math.prod(cells(c.height, c.width))
            self.flow_proj, self.to_flow = nn.Linear(size, D), nn.Linear(S * c.codebook_dim, size)
        self.to_vectors = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, S * c.codebook_dim))
        self.quantizer = VectorQuantizer(c.num_embeddings, S, c.codebook_dim)

        self.frame_proj = nn.Linear(c.patch_dim, D)
        self.code_proj = nn.Linear(c.codebook_dim, D)
        self.decoder_pos_embed = nn.Parameter(torch.randn(N + S, D) * 0.02)  # patches, then code positions
        self.decoder = nn.ModuleList(Block(D, c.num_heads, c.context) for _ in range(c.decoder_depth))
        self.to_patches = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, c.patch_dim))
        self.adapter_out = LAMtoVVAEAdapter(c.channels, c.patch, c.patch_dim, c.height, c.width)

    # --- encoder and decoder, on normalised latents

    def normalize(self, latents):
        """Latents (..., C, H, W) in the VAE's units -> zero mean, unit deviation per channel."""
        return (latents - self.mean) / self.std

    def patchify(self, x):
        """(B, T, C, H, W) -> (B, T, N, P)."""
        return self.adapter_in(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def encode_transitions(self, x, gap=1, patches=None):
        """Frames x (B, T, C, H, W) -> vectors (B, T-gap, S, codebook_dim); row t sees frames t and t+gap alone."""
        patches = self.patchify(x) if patches is None else patches
        before, after = patches[:, :-gap], patches[:, gap:]
        h = self.pair_proj(torch.cat([before, after - before], -1)) + self.encoder_pos_embed  # B T-gap N D
        for block in self.encoder:
            h, _ = block(h)
        h = h.mean(2)
        if self.config.flow:
            h = h + self.flow_proj(optical_flow(x[:, :-gap], x[:, gap:]))
        return self.to_vectors(h).unflatten(-1, (self.config.num_codes, -1))

    def decode(self, x, z, position, kv_cache=None, patches=None):
        """Frames x (B, T, C, H, W) and vectors z (B, T, S, codebook_dim) -> next frames, kv_cache.

        position (B, T): frame numbers. kv_cache: (keys and values of each block, their positions), as returned.
        """
        patches = self.patchify(x) if patches is None else patches
        h = torch.cat([self.frame_proj(patches), self.code_proj(z)], 2) + self.decoder_pos_embed  # B T N+S D
        caches = [None] * len(self.decoder) if kv_cache is None else [(kv, kv_cache[1]) for kv in kv_cache[0]]
        kept = []
        for block, cache in zip(self.decoder, caches, strict=True):
            h, kv = block(h, position, cache)
            kept.append(kv)
        change = self.adapter_out(self.to_patches(h[:, :, : -self.config.num_codes]).flatten(0, 1))
        positions = position if kv_cache is None else torch.cat([kv_cache[1], position], 1)
        return x + change.unflatten(0, x.shape[:2]), (kept, positions)

    # --- training

    def forward(self, batch):
        """batch: latents (B, T, C, H, W) and, in training, anchor (B,) -> (loss, metrics). Samples weigh the same.

        loss = MSE + commitment_weight * commitment + MSE of the rollout + error of the flow, if there is one. The
        second and third begin with quantization: a rollout before that would go on from an average over all actions,
        which slows the start.
        """
        x = self.normalize(batch["latents"])
        patches = self.patchify(x)
        z, _, commitment = self.quantizer(self.encode_transitions(x, patches=patches))
        position = torch.arange(z.shape[1], device=x.device).expand(len(x), -1)
        x_hat, kv_cache = self.decode(x[:, :-1], z, position, patches=patches[:, :-1])
        error = x_hat.float() - x[:, 1:]
        mse, vq = error.square().mean(), self.config.commitment_weight * commitment
        loss = mse + vq
        metrics = dict(mse_loss=mse, mae_loss=error.abs().mean(), vq_loss=vq, commitment_loss=commitment)
        metrics["codebook_loss"] = commitment.detach()  # the same distance; the moving average lowers it, no gradient
        if self.config.flow:
            metrics["flow_loss"] = self.flow_error(x, z)
            loss = loss + metrics["flow_loss"]
        if "anchor" in batch and self.quantizer.quantizing:
            metrics["rollout_loss"] = self.rollout_loss(x, x_hat, z, kv_cache, batch["anchor"])
            loss = loss + metrics["rollout_loss"]
        return loss, {"loss": loss, **metrics}

    def rollout_loss(self, x, x_hat, z, kv_cache, anchor):
        """MSE of the step that follows the prediction made at frame `anchor` (B,), fed with that prediction, detached.

        Keys and values up to the anchor are those of the parallel pass.
        """
        kv_cache = kv_cache[0], kv_cache[1].masked_fill(kv_cache[1] > anchor[:, None], 10**6)  # later: never seen
        rows, now = torch.arange(len(x), device=x.device), anchor + 1
        frame = x_hat[rows, anchor].detach()[:, None]
        frame = self.decode(frame, z[rows, now][:, None], now[:, None], kv_cache)[0]
        return F.mse_loss(frame[:, 0].float(), x[rows, now + 1])

    def flow_error(self, x, z):
        """MSE of the optical flow of frames x (B, T, C, H, W) that a linear map reads from the vectors z alone."""
        return F.mse_loss(self.to_flow(z.flatten(2)).float(), optical_flow(x[:, :-1], x[:, 1:]))

    @torch.no_grad()
    def init_codebook(self, latents, seed):
        """Make the codes of the vectors of clips (B, T, C, H, W), by k-means, and quantize from now on."""
        parts = (self.normalize(part.to(self.mean.device)) for part in latents.split(32))
        vectors = [self.encode_transitions(part).flatten(0, 1) for part in parts]
        self.quantizer.init_codebook(torch.cat(vectors), seed)

    # --- use, on latents in the VAE's own units

    def check_latents(self, latents, ndim):
        """Normalised, as float32 on the model's device with a batch axis; and whether it came without one."""
        x = torch.as_tensor(latents).to(self.mean.device).float()
        single = x.ndim == ndim - 1
        x = x[None] if single else x
        if x.ndim != ndim or tuple(x.shape[-3:]) != self.shape:
            expected = "(B, T, " if ndim == 5 else "(B, "
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {expected}{str(self.shape)[1:]}")
        if not x.isfinite().all():
            raise ValueError("latents hold NaN or infinity")
        return self.normalize(x), single

    def check_codes(self, codes, batch):
        """As a tensor (batch, T, S) on the model's device."""
        codes = torch.as_tensor(codes)
        codes = (codes[None] if codes.ndim == 2 else codes).to(self.mean.device)
        S, K = self.config.num_codes, self.config.num_embeddings
        if codes.ndim != 3 or len(codes) != batch or codes.shape[2] != S:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected ({batch}, T, {S})")
        if codes.is_floating_point() or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < K):
            raise ValueError(f"codes must be whole numbers in [0, {K})")
        return codes.long()

    def denormalize(self, x, single, like):
        """Normalised frames, as what they were made from: VAE's units, with or without batch axis, tensor or array."""
        x = x * self.std + self.mean
        x = x[0] if single else x
        return x if torch.is_tensor(like) else x.cpu().numpy()

    @torch.no_grad()
    def encode(self, latents, gap=1, vectors=False):
        """Latents (B, T, C, H, W) or (T, C, H, W) -> codes (B, T-gap, S) int64; vectors=True: and what was quantized.

        Array in, array out. The code of t -> t+gap depends on these two frames alone.
        """
        if not self.quantizer.quantizing:
            raise DataError("this checkpoint is from before quantization began (train.py says when): train longer")
        x, single = self.check_latents(latents, 5)
        z = self.encode_transitions(x, gap).float()
        out = [part[0] if single else part for part in (self.quantizer.nearest(z), self.quantizer.align(z))]
        out = out if torch.is_tensor(latents) else [part.cpu().numpy() for part in out]
        return tuple(out) if vectors else out[0]

    @torch.no_grad()
    def predict(self, latents, codes):
        """Latents (B, T, C, H, W), codes (B, T-1, S) -> frames 1 to T-1, each predicted from the true ones before."""
        x, single = self.check_latents(latents, 5)
        codes = self.check_codes(codes, len(x))
        if codes.shape[1] != x.shape[1] - 1:
            raise ValueError(f"{codes.shape[1]} transitions of codes for {x.shape[1]} frames, expected one less")
        position = torch.arange(codes.shape[1], device=x.device).expand(len(x), -1)
        x_hat = self.decode(x[:, :-1], self.quantizer.lookup(codes), position)[0]
        return self.denormalize(x_hat, single, latents)

    @torch.no_grad()
    def rollout(self, first, codes):
        """From one frame (B, C, H, W) or (C, H, W), follow the codes (B, T, S): T frames, each predicted from the last.

        Any T: keys and values of the last `context` frames are kept.
        """
        x, single = self.check_latents(first, 4)
        codes = self.check_codes(codes, len(x))
        frame, kv_cache, frames, keep = x[:, None], None, [], self.config.context - 1
        for t in range(codes.shape[1]):
            position = torch.full((len(x), 1), t, device=x.device)
            frame, kv_cache = self.decode(frame, self.quantizer.lookup(codes[:, t : t + 1]), position, kv_cache)
            frames.append(frame)
            old = max(0, kv_cache[1].shape[1] - keep)
            kv_cache = [tuple(part[:, :, :, old:] for part in kv) for kv in kv_cache[0]], kv_cache[1][:, old:]
        return self.denormalize(torch.cat(frames, 1), single, first)

    # --- files

    def save_pretrained(self, folder):
        """config.json (with the normalisation) and pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    def load_pretrained(self, folder, assign=False):
        """Weights of a checkpoint folder whose configuration is this model's; DataError if it is not.

        assign: put the file's tensors in place of this model's, which may have no memory (device "meta").
        """
        own = asdict(self.config)
        for name, value in asdict(read_config(folder)).items():
            if name not in MAY_DIFFER and not np.array_equal(value, own[name]):
                raise DataError(f"{folder}: {name} is {value}, but {own[name]} here")
        path = Path(folder) / "pytorch_model.bin"
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=assign)
        except Exception as error:  # for a corrupt file torch raises struct.error, IndexError and a dozen more
            reason = (str(error) or type(error).__name__).splitlines()[0][:150]
            raise DataError(f"{path}: cannot be loaded into this model ({reason})") from None
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a checkpoint folder, in eval mode. Never runs code from the files."""
        config = read_config(folder)
        try:
            with torch.device("meta"):  # a config that does not fit its weights takes no memory
                cls(config).load_pretrained(folder, assign=True)
            return cls(config).load_pretrained(folder).eval()
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # sizes that are none
            raise DataError(f"{folder}/config.json: no model can be built from it ({error})") from None


def read_config(folder):
    """The Config of a checkpoint folder."""
    path = Path(folder) / "config.json"
    try:
        config = Config(**json.loads(path.read_text()))
        for field in fields(config):
            value, most = getattr(config, field.name), 1000 if field.name.endswith("depth") else 65536
            if field.type is int and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{field.name} is {value!r}")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a configuration of VVAELatentActionVQVAE ({error})") from None
