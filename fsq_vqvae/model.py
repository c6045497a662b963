"""FSQVQVAE: a chunk of robot actions <-> a few discrete tokens.

Every token is finite scalar quantised (FSQ, Mentzer et al. 2023, arXiv 2309.15505). Tokens are residual: token i codes
what tokens < i left over. A linear residual coder, fitted in closed form, is the skeleton of encoder and decoder; a
transformer on each side learns what a linear map cannot say. It starts at zero, so training starts from the skeleton.

Letters: B batch, T steps, A action dims, P patches, N tokens, L levels per token, D width, S sources (data sets).
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

GAIN_SLACK = 1.03  # see fit_skeleton


class FSQ(nn.Module):
    """Rounds each of L bounded numbers to one of `levels[i]` values; their product is the vocabulary.

    bound "atanh" maps 0 to 0 exactly (vector-quantize-pytorch); "paper" is equation 1 of the paper's reference code,
    with tan and 1 - eps. About 1 % of the codes differ between the two, so the choice belongs to the checkpoint.
    Always float32: in bfloat16 2 % of the codes would change.
    """

    def __init__(self, levels, bound="atanh", eps=1e-3):
        super().__init__()
        if bound not in ("atanh", "paper"):
            raise ValueError(f"fsq_bound is {bound!r}; expected 'atanh' or 'paper'")
        if min(levels) < 3:
            raise ValueError(f"levels {list(levels)}: each must be at least 3")
        levels = torch.tensor(levels, dtype=torch.int64)
        half = (levels - 1).double() * (1 + eps if bound == "atanh" else 1 - eps) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
        shift = torch.atanh(offset / half) if bound == "atanh" else torch.tan(offset / half)
        basis = torch.cumprod(torch.cat([torch.ones(1, dtype=torch.int64), levels[:-1]]), 0)
        for name, value in dict(reach=half, offset=offset, shift=shift, width=(levels // 2).double()).items():
            self.register_buffer(name, value.float(), persistent=False)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        # index = sum((digit + width) * basis)
        self.register_buffer("weight", basis.float(), persistent=False)
        self.register_buffer("zero", (basis * (levels // 2)).sum().float(), persistent=False)
        self.size = int(levels.prod())

    def bound(self, z):
        """(..., L) any real -> within half a level of the outermost levels; unit steps."""
        return torch.tanh(z.float() + self.shift) * self.reach - self.offset

    def forward(self, z):
        """z (..., L) -> codes (..., L) in [-1, 1] with a straight-through gradient, indices (...) int64."""
        bounded = self.bound(z)
        digits = bounded.detach().round()
        codes = (bounded + (digits - bounded.detach())) / self.width
        return codes, ((digits * self.weight).sum(-1) + self.zero).long()  # a matmul would run in bfloat16

    def codes(self, indices):
        """indices (...) int64 in [0, size) -> codes (..., L) float32."""
        digits = indices[..., None] // self.basis % self.levels
        return digits / self.width - 1


class Block(nn.Module):
    """Pre-norm transformer block, full attention; `mask` (B, 1, 1, N) is True where a token may be looked at."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask=None):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        x = x + F.dropout(self.out(rearrange(y, "b h n d -> b n (h d)")), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class FSQVQVAE(nn.Module):
    """Action tokenizer. A chunk of up to T steps of one of its sources becomes `num_tokens` indices below prod(levels).

    sources: one dict per data set with `name`, `action_dim`, `chunk` (steps), `fps` (Hz or None), and `center` and
    `scale` (per dim; normalised = (action - center) / scale). They live in config.json, so a checkpoint is complete.
    ordered: nested dropout (Rippel et al. 2014) trains every prefix of the tokens to decode by itself.
    relative: code the chunk minus its first action, which decode then needs as `start` (a policy knows where its robot
    is): side information that halves the error and more, and lets the joints drift.
    """

    def __init__(
        self,
        sources,
        num_tokens=8,
        levels=(8, 5, 5, 5),
        hidden_dim=128,
        latent_dim=64,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        patch=5,
        dropout=0.0,
        commitment_weight=0.0,
        spectral_weight=0.0,
        ordered=0.0,
        relative=False,
        fsq_bound="atanh",
    ):
        super().__init__()
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.config = json.loads(json.dumps(config))
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} is not divisible by {num_heads} heads")
        self.sources, self.names = sources, [source["name"] for source in sources]
        self.num_tokens, self.patch, self.ordered, self.relative = num_tokens, patch, ordered, relative
        self.commitment_weight, self.spectral_weight = commitment_weight, spectral_weight
        self.fsq = FSQ(levels, fsq_bound)
        S, N, L, D = len(sources), num_tokens, len(levels), hidden_dim
        self.dim = A = max(source["action_dim"] for source in sources)
        self.patches = P = math.ceil(max(source["chunk"] for source in sources) / patch)
        self.steps = T = P * patch

        def table(key):
            rows = [source[key] + [float(key == "scale")] * (A - source["action_dim"]) for source in sources]
            return torch.tensor(rows, dtype=torch.float32)

        dims = torch.tensor([source["action_dim"] for source in sources])
        self.register_buffer("center", table("center"), persistent=False)  # S A
        self.register_buffer("scale", table("scale"), persistent=False)  # S A
        self.register_buffer("has_dim", torch.arange(A) < dims[:, None], persistent=False)  # S A
        self.register_buffer("chunk", torch.tensor([source["chunk"] for source in sources]), persistent=False)
        self.register_buffer("dct", dct_matrix(T), persistent=False)

        # the linear skeleton, one per source (fit_skeleton)
        self.mean = nn.Parameter(torch.zeros(S, T * A))
        self.analysis = nn.Parameter(torch.randn(S, T * A, N * L) / math.sqrt(T * A))
        self.feedback = nn.Parameter(torch.zeros(S, N * L, N * L))  # token j -> token i > j
        self.threshold = nn.Parameter(torch.zeros(S, N * L))
        self.synthesis = nn.Parameter(torch.randn(S, N, L + 1, T * A) / math.sqrt(N * L))

        # the transformers, shared by all sources but for their first and last layer
        self.patch_in = nn.Parameter(torch.randn(S, patch * A, D) / math.sqrt(patch * A))
        self.patch_out = nn.Parameter(torch.zeros(S, D, patch * A))
        self.time = nn.Parameter(torch.randn(2, P, D) * 0.02)  # encoder, decoder
        self.slots = nn.Parameter(torch.randn(2, N, D) * 0.02)
        self.source = nn.Parameter(torch.randn(2, S, 1, D) * 0.02)
        self.absent = nn.Parameter(torch.randn(D) * 0.02)  # a token that a prefix leaves out
        self.encoder = nn.ModuleList(Block(D, num_heads, dropout) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(Block(D, num_heads, dropout) for _ in range(num_decoder_layers))
        self.to_latent = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, latent_dim), nn.GELU(), nn.Linear(latent_dim, L))
        self.from_latent = nn.Sequential(nn.Linear(L, latent_dim), nn.GELU(), nn.Linear(latent_dim, D))
        self.norm_out = nn.LayerNorm(D)
        nn.init.zeros_(self.to_latent[-1].weight)
        nn.init.zeros_(self.to_latent[-1].bias)

    # --- from actions to tokens and back, normalised, padded to (B, steps, dim)

    def normalise(self, actions, mask, source):
        """Padded steps hold the last valid action; absent dims and steps beyond the source's chunk are 0."""
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)
        step = torch.arange(self.steps, device=mask.device).clamp(max=last[:, None])  # B T
        actions = actions.gather(1, step[..., None].expand(-1, -1, actions.shape[2]))
        x = (actions - self.center[source, None]) / self.scale[source, None]
        x = x - x[:, :1] if self.relative else x
        inside = torch.arange(self.steps, device=x.device) < self.chunk[source, None]  # B T
        return torch.where(inside[..., None] & self.has_dim[source, None], x, 0.0)

    def look(self, source, tokens):
        """Attention mask over [patches, tokens]: patches beyond a source's chunk are not looked at."""
        if len(self.sources) == 1:
            return None
        start = torch.arange(self.patches, device=source.device) * self.patch
        inside = start < self.chunk[source, None]
        return torch.cat([inside, inside.new_ones(len(source), tokens)], 1)[:, None, None]

    def quantise(self, x, source):
        """x (B, T, A) normalised -> codes (B, N, L), indices (B, N), and what was rounded, (B, N, L)."""
        N, L = self.num_tokens, len(self.fsq.levels)
        patches = rearrange(x, "b (p t) a -> b p (t a)", t=self.patch)
        h = per_source(patches, self.patch_in, source) + self.time[0] + self.source[0, source]
        h = torch.cat([h, self.slots[0].expand(len(x), -1, -1)], 1)  # B P+N D
        mask = self.look(source, N)
        for block in self.encoder:
            h = block(h, mask)
        h = self.to_latent(h[:, self.patches :])  # B N L

        with torch.autocast(x.device.type, enabled=False):
            flat = x.float().flatten(1) - self.mean[source]
            h = h.float().flatten(1) - self.threshold[source] + per_source(flat[:, None], self.analysis, source)[:, 0]
            codes, indices, bounded = [], [], []
            for i in range(N):
                slot = slice(i * L, (i + 1) * L)
                z = h[:, slot]
                q, index = self.fsq(z)
                h = h - per_source(q[:, None], self.feedback[:, slot], source)[:, 0]  # only later slots are read again
                codes.append(q)
                indices.append(index)
                bounded.append(self.fsq.bound(z))
        return torch.stack(codes, 1), torch.stack(indices, 1), torch.stack(bounded, 1)

    def reconstruct(self, codes, source, keep):
        """codes (B, N, L), keep (B, N) True for the tokens that are there -> (B, T, A) normalised."""
        h = torch.where(keep[..., None], self.from_latent(codes), self.absent) + self.slots[1]
        queries = (self.time[1] + self.source[1, source]).expand(len(codes), -1, -1)
        mask = self.look(source, self.num_tokens)
        h = torch.cat([queries, h.to(queries.dtype)], 1)
        for block in self.decoder:
            h = block(h, mask)
        learned = per_source(self.norm_out(h[:, : self.patches]), self.patch_out, source)
        learned = rearrange(learned, "b p (t a) -> b (p t) a", t=self.patch)
        with torch.autocast(codes.device.type, enabled=False):
            codes = F.pad(codes, (0, 1), value=1.0) * keep[..., None]  # B N L+1
            linear = per_source(codes.flatten(1)[:, None], self.synthesis.flatten(1, 2), source)[:, 0]
            return (self.mean[source] + linear).view_as(learned) + learned.float()

    # --- training

    def forward(self, batch):
        """A batch (dict, see data.py) -> (loss, metrics); chunks (array or tensor) -> list[list[int]], as FAST does."""
        return self.compute_loss(batch) if isinstance(batch, dict) else self.encode(batch).tolist()

    def compute_loss(self, batch):
        """All loss terms. Each chunk counts the same however many valid entries it has, so ranks and micro-steps can
        average: mean squared error in time, the same on the DCT's magnitude (L1) and the commitment term."""
        mask, source = batch["mask"], batch["source"]
        x = self.normalise(batch["actions"], mask, source)
        codes, indices, bounded = self.quantise(x, source)
        keep = torch.ones_like(indices, dtype=torch.bool)
        if self.ordered and self.training:
            kept = torch.randint(1, self.num_tokens + 1, (len(x), 1), device=x.device)
            kept = torch.where(torch.rand(len(x), 1, device=x.device) < self.ordered, kept, self.num_tokens)
            keep = torch.arange(self.num_tokens, device=x.device) < kept
        x_hat = self.reconstruct(codes, source, keep)
        mask = F.pad(mask, (0, self.steps - mask.shape[1]))
        valid = mask[..., None] & self.has_dim[source, None]
        share = valid / valid.sum((1, 2), keepdim=True) / len(x)
        error = x_hat - x
        mse = (error.square() * share).sum()
        loss, metrics = mse, {"mse": mse, "mae": (error.abs() * share).sum()}
        if self.spectral_weight:
            spectrum = torch.einsum("f t, b t a -> b f a", self.dct, error * valid)
            metrics["spectral"] = (spectrum.abs().sum((1, 2)) / valid.sum((1, 2))).mean()
            loss = loss + self.spectral_weight * metrics["spectral"]
        if self.commitment_weight:
            metrics["commitment"] = (bounded / self.fsq.width - codes.detach()).square().mean()
            loss = loss + self.commitment_weight * metrics["commitment"]
        return loss, {"loss": loss, **metrics}

    @torch.no_grad()
    def fit_skeleton(self, name, actions, mask):
        """Fit one source's linear residual coder to chunks (B, T, A), in robot units, B of some thousands.

        Token by token: the residual's leading principal directions, scaled into the quantiser's range by a gain, then
        the least-squares decoder of the codes. The gain is the largest whose error is within GAIN_SLACK of the
        smallest: a larger one puts more of the vocabulary to use. Deterministic; seconds.
        """
        s, L = self.names.index(name), len(self.fsq.levels)
        actions = F.pad(actions, (0, self.dim - actions.shape[2]))
        source = torch.full((len(actions),), s)
        x = self.normalise(actions, mask, source).flatten(1).double()
        mean, rows = x.mean(0), len(x)
        residual = x - mean
        analysis, decoders = [], []
        ridge = 1e-3 * torch.eye(L + 1, dtype=x.dtype)
        for _ in range(self.num_tokens):
            generator_state = torch.get_rng_state()
            torch.manual_seed(0)  # svd_lowrank draws its test matrix
            _, strength, directions = torch.svd_lowrank(residual, q=min(L + 8, *residual.shape), niter=6)
            torch.set_rng_state(generator_state)
            directions = F.pad(directions, (0, max(0, L - directions.shape[1])))[:, :L]
            deviation = F.pad(strength, (0, max(0, L - len(strength))))[:L] / math.sqrt(rows) + 1e-6
            tried = []
            for gain in (0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7):
                encode = directions * gain / deviation
                codes = F.pad(self.fsq((residual @ encode).float())[0].double(), (0, 1), value=1.0)
                decode = torch.linalg.solve(codes.T @ codes + ridge, codes.T @ residual)
                tried.append(((residual - codes @ decode).square().mean(), encode, decode, codes))
            limit = GAIN_SLACK * min(error for error, *_ in tried)
            _, encode, decode, codes = [trial for trial in tried if trial[0] <= limit][-1]
            analysis.append(encode)
            decoders.append(decode)
            residual = residual - codes @ decode
        E, Y = torch.stack(analysis), torch.stack(decoders)  # N TA L, N L+1 TA
        back = torch.einsum("j c x, i x l -> j c i l", Y, E)
        for i in range(self.num_tokens):
            back[i:, :, i] = 0  # only earlier tokens feed back
        self.mean[s] = mean
        self.analysis[s] = rearrange(E, "n x l -> x (n l)")
        self.feedback[s] = rearrange(back[:, :L], "j c i l -> (j c) (i l)")
        self.threshold[s] = rearrange(back[:, L].sum(0), "i l -> (i l)")
        self.synthesis[s] = Y.float()

    # --- the tokenizer, in robot units

    def source_index(self, name):
        if name is None and len(self.names) > 1:
            raise ValueError(f"this tokenizer knows {', '.join(self.names)}: say which with source=")
        if name is not None and name not in self.names:
            raise ValueError(f"source {name!r} is unknown; this tokenizer knows {', '.join(self.names)}")
        return 0 if name is None else self.names.index(name)

    @torch.no_grad()
    def encode(self, actions, mask=None, source=None):
        """Actions in robot units -> indices, int64, on the CPU in float32 unless the model was moved.

        actions: (T, A) or (B, T, A), array or tensor, T up to the source's chunk. mask: (T,) or (B, T), False for
        padded steps at the end, whose content never matters. Returns (N,) or (B, N) of the same kind, each below
        prod(levels).
        """
        s = self.source_index(source)
        about, array, device = self.sources[s], not torch.is_tensor(actions), self.mean.device
        x = torch.as_tensor(np.asarray(actions, dtype=np.float32) if array else actions, device=device).float()
        single = x.ndim == 2
        x = x[None] if single else x
        if x.ndim != 3 or x.shape[2] != about["action_dim"] or not 1 <= x.shape[1] <= about["chunk"]:
            expected = f"(B, T <= {about['chunk']}, {about['action_dim']})"
            raise ValueError(f"actions of {about['name']} have shape {tuple(x.shape)}, expected {expected}")
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
        mask = (mask[None] if single and mask.ndim == 1 else mask).to(device)
        if mask.shape != x.shape[:2] or not mask[:, 0].all() or (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError("mask must be (B, T), True for the first valid steps and False for the padding after them")
        index = torch.full((len(x),), s, device=device)
        x = F.pad(torch.where(mask[..., None], x, 0.0), (0, self.dim - x.shape[2]))
        if not x.isfinite().all():
            raise ValueError(f"actions of {about['name']} hold NaN or infinity")
        if len(x) and self.normalise(x, mask, index).abs().max() > 1e6:
            raise ValueError(f"actions of {about['name']} lie a million times outside the range of its training data")
        training = self.training
        self.eval()
        with torch.autocast(device.type, enabled=False):
            indices = self.quantise(self.normalise(x, mask, index), index)[1]
        self.train(training)
        indices = indices[0] if single else indices
        return indices.cpu().numpy() if array else indices

    @torch.no_grad()
    def decode(self, indices, source=None, prefix=None, start=None, time_horizon=None, action_dim=None):
        """Indices (N,) or (B, N), list, array or tensor -> actions (T, A) or (B, T, A) in robot units.

        prefix: decode from the first so many tokens alone (a model trained with `ordered`).
        start: (A,) or (B, A), where the chunk starts (a `relative` model needs it).
        time_horizon, action_dim: FAST's arguments; the chunk is cut to the first, the second must be the source's own.
        """
        s = self.source_index(source)
        about, array, device = self.sources[s], not torch.is_tensor(indices), self.mean.device
        indices = torch.as_tensor(np.asarray(indices) if array else indices, device=device)
        single = indices.ndim == 1
        indices = indices[None] if single else indices
        N = self.num_tokens
        if indices.ndim != 2 or indices.shape[1] != N or indices.is_floating_point():
            raise ValueError(f"indices have shape {tuple(indices.shape)}, expected whole numbers (B, {N})")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.fsq.size:
            raise ValueError(f"indices must lie in [0, {self.fsq.size})")
        if prefix is not None and (not 1 <= prefix <= N or (prefix < N and not self.ordered)):
            raise ValueError(
                f"prefix {prefix}: must be 1 to {N}, and shorter than {N} only for a model trained --ordered"
            )
        if action_dim not in (None, about["action_dim"]):
            raise ValueError(f"action_dim {action_dim}: {about['name']} has {about['action_dim']}")
        if (start is None) == self.relative:
            raise ValueError("decode needs start= for a model trained --relative, and takes none otherwise")
        horizon = about["chunk"] if time_horizon is None else time_horizon
        if not 1 <= horizon <= about["chunk"]:
            raise ValueError(f"time_horizon {horizon}: {about['name']} has chunks of {about['chunk']} steps")
        index = torch.full((len(indices),), s, device=device)
        keep = torch.arange(N, device=device).expand(len(indices), -1) < (prefix or N)
        training = self.training
        self.eval()
        with torch.autocast(device.type, enabled=False):
            x = self.reconstruct(self.fsq.codes(indices), index, keep)
        self.train(training)
        x = x[:, :horizon] * self.scale[s] + (0.0 if self.relative else self.center[s])
        actions = x[..., : about["action_dim"]]
        if self.relative:
            start = torch.as_tensor(np.asarray(start) if array else start, dtype=torch.float32, device=device)
            actions = actions + start.reshape(-1, 1, about["action_dim"])
        actions = actions[0] if single else actions
        return actions.cpu().numpy() if array else actions

    # --- files

    def save_state(self, path):
        """Weights alone, as one file."""
        torch.save(self.state_dict(), path)

    def save_pretrained(self, folder):
        """config.json (with the normalisation) and pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        self.save_state(folder / "pytorch_model.bin")

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
            raise ValueError(f"{path}: not a configuration of FSQVQVAE ({error})") from None
        return model.load_pretrained(folder).eval()


def per_source(x, weight, source):
    """x (B, P, I) times each sample's own weight (S, I, O)[source] -> (B, P, O)."""
    return x @ (weight[0] if len(weight) == 1 else weight[source])


def dct_matrix(steps):
    """Orthonormal DCT-II, (steps, steps)."""
    t = torch.arange(steps, dtype=torch.float64)
    matrix = torch.cos(math.pi / steps * (t + 0.5) * t[:, None]) * math.sqrt(2 / steps)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
