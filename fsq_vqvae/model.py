"""FSQVQVAE: a chunk of robot actions <-> a few discrete tokens, by finite scalar quantisation (FSQ) of coefficients.

As in FSQ, each coefficient is rounded to one of a few levels, and a token is several levels in one number. Other than
in FSQ, transform_coding.py chooses in closed form what the coefficients are, how many levels each has and where these
lie: so `encode` needs no training. A network then learns to decode the same tokens better, and is used
where validation shows that it does.

Letters: B batch, T steps, A action dims, X = T A, R rows of the context, C = (R - 1) A, K coefficients, N tokens,
L levels of a coefficient, D width of the network.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transform_coding
from einops import rearrange
from torch import nn

from common import DataError

# what a policy knows when its chunk begins, and encode and decode are given: (what, at which step)
CONTEXT = dict(none=(), action=(("action", 0),), state=(("state", 0), ("action", -1), ("state", -1), ("action", -2)))


@dataclass
class Config:
    """sources: one dict per data set: `name`, `action_dim`, `chunk` (steps), `fps` (Hz or None), `center` and `scale`
    (per dim; normalised = (action - center) / scale), `low` and `high` (of the training actions), `spread` (see
    transform_coding.spread), and `levels`: for each token the levels of its coefficients. They live in config.json, so
    a checkpoint is complete.

    condition: a key of CONTEXT. Chunks are coded relative to the context's first row, and predicted from the
    differences of the other rows to it: a robot whose joints have drifted since the training keeps its tokens.
    """

    sources: list
    codebook_size: int = 1024
    condition: str = "action"
    hidden_dim: int = 512  # of the network
    dropout: float = 0.1

    def __post_init__(self):
        if self.condition not in CONTEXT:
            raise ValueError(f"condition {self.condition!r}: expected one of {', '.join(CONTEXT)}")
        if not 2 <= self.codebook_size < 2**63:
            raise ValueError(f"codebook_size {self.codebook_size}: expected 2 to 2^63 - 1 (an int64 index)")


class SourceCoder(nn.Module):
    """Encodes and decodes chunks of one source: its transform, levels and points, and its own layers of the network."""

    def __init__(self, source, config):
        super().__init__()
        self.source, self.steps, self.dims = source, source["chunk"], source["action_dim"]
        self.rows = len(CONTEXT[config.condition])
        X, C = self.steps * self.dims, max(0, self.rows - 1) * self.dims
        levels = [n for token in source["levels"] for n in token]
        K, L = len(levels), max(levels, default=1)
        token = [n for n, of_token in enumerate(source["levels"]) for _ in of_token]
        radix = [math.prod(of_token[:i]) for of_token in source["levels"] for i in range(len(of_token))]
        for name, value in dict(levels=levels, token=token, radix=radix).items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64))  # index = sum of digit * radix
        self.register_buffer("center", torch.tensor(source["center"]))  # A
        self.register_buffer("scale", torch.tensor(source["scale"]))  # A
        M = min(X, transform_coding.COEFFICIENTS_PER_TOKEN * len(source["levels"]))
        shapes = dict(weight=(C, X), mean=(X,), basis=(K, X), span=(M, X), points=(K, L), edges=(K, L - 1))
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(K))  # of the coefficients
        self.register_buffer("use_network", torch.tensor(False))  # set by train.py's validation
        self.enter = nn.Linear(K + C, config.hidden_dim)
        self.leave = nn.Linear(config.hidden_dim, M)
        nn.init.zeros_(self.leave.weight)  # training starts from the closed form
        nn.init.zeros_(self.leave.bias)

    def load_fit(self, fit):
        """Copy a transform_coding.Fit into the buffers."""
        for name in ("weight", "mean", "basis", "span", "deviation"):
            getattr(self, name).copy_(torch.from_numpy(getattr(fit, name)))
        self.edges.fill_(torch.inf)  # beyond a coefficient's own levels, so that no value gets there
        for k, points in enumerate(fit.points):
            self.points[k] = torch.from_numpy(np.pad(points, (0, self.points.shape[1] - len(points)), "edge"))
            self.edges[k, : len(points) - 1] = torch.from_numpy((points[1:] + points[:-1]) / 2)

    def context(self, context):
        """context (B, R, A) in robot units -> where the chunk is coded from, (B, A), and the features (B, C)."""
        if not self.rows:
            return context.new_zeros(len(context), self.dims), context.new_zeros(len(context), 0)
        rows = (context.float() - self.center) / self.scale
        return rows[:, 0], (rows[:, 1:] - rows[:, :1]).flatten(1)

    def normalise(self, actions, mask, base):
        """actions (B, T, A), mask (B, T) -> (B, X); steps past the last valid one repeat it."""
        last = (mask * torch.arange(self.steps, device=mask.device)).amax(1)
        step = torch.arange(self.steps, device=mask.device).clamp(max=last[:, None])  # B T
        actions = actions.gather(1, step[..., None].expand(-1, -1, self.dims))
        return ((actions - self.center) / self.scale - base[:, None]).flatten(1)

    def chunks_of(self, sample):
        """A sample (dict of actions, mask, context) -> x (B, X), features (B, C), as float64 arrays."""
        base, features = self.context(sample["context"])
        x = self.normalise(sample["actions"], sample["mask"], base)
        return x.double().numpy(), features.double().numpy()

    def quantize(self, x, features):
        """x (B, X), features (B, C) -> digits (B, K): the number of the nearest point of each coefficient."""
        z = (x - features @ self.weight - self.mean) @ self.basis.T
        return (z[..., None] > self.edges).sum(-1)  # B K L-1 -> B K

    def pack(self, digits):
        """digits (B, K) -> indices (B, N) int64, each below its token's product of levels."""
        indices = digits.new_zeros(len(digits), len(self.source["levels"]))
        return indices.index_add_(1, self.token, digits * self.radix)

    def unpack(self, indices):
        """indices (B, N), any whole numbers -> digits (B, K). Beyond a token's product of levels they begin anew."""
        return indices[:, self.token] // self.radix % self.levels

    def values(self, digits):
        """digits (B, K) -> the coefficients' points (B, K)."""
        return self.points.T.gather(0, digits)

    def reconstruct(self, values, features):
        """The closed form's decoding: coefficients (B, K), features (B, C) -> (B, X)."""
        return values @ self.basis + self.mean + features @ self.weight


def as_tensor(values, name):
    """A tensor as it is; an array or list of numbers, in whatever byte order, as a tensor."""
    if torch.is_tensor(values):
        return values
    values = np.asarray(values)
    values = np.asarray(values.tolist()) if values.dtype == object else values
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name} are {values.dtype}, expected numbers")
    return torch.tensor(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))


class FSQVQVAE(nn.Module):
    """Action tokenizer: up to T steps of one of its sources become N indices below `codebook_size`, and back."""

    def __init__(self, config):
        super().__init__()
        self.config, self.sources = config, config.sources
        self.names = [source["name"] for source in config.sources]
        self.num_tokens = len(config.sources[0]["levels"])
        self.coders = nn.ModuleList(SourceCoder(source, config) for source in config.sources)
        D = config.hidden_dim  # the trunk is shared by all sources
        drop = nn.Dropout(config.dropout)
        self.trunk = nn.Sequential(nn.GELU(), drop, nn.Linear(D, D), nn.GELU(), drop)

    @classmethod
    def fit(cls, sources, samples, tokens=8, validation=None, **config):
        """The closed form alone, for sources described without `levels` and a sample of chunks of each: dicts with
        actions (B, T, A) in robot units, mask (B, T), context (B, R, A). Some thousands of chunks are enough.

        validation: a sample of held-out chunks of each source, or None: they choose its `spread`, where the source
        does not say.
        """
        size, fits, described = config.get("codebook_size", Config.codebook_size), [], []
        for source, sample, held_out in zip(sources, samples, validation or [None] * len(sources), strict=True):
            empty = SourceCoder({**source, "levels": [[2]]}, Config([], **config))  # for its normalisation
            transform = transform_coding.klt(*empty.chunks_of(sample), tokens)
            if "spread" in source or held_out is None:
                spread = source.get("spread", 1)
                found = transform_coding.fit(transform, tokens, size, spread)
            else:
                chunks = empty.chunks_of(held_out)
                tried = {
                    spread: transform_coding.fit(transform, tokens, size, spread) for spread in transform_coding.SPREADS
                }
                spread = min(tried, key=lambda spread: tried[spread].error(*chunks))
                found = tried[spread]
            fits.append(found)
            described.append({**source, "spread": spread, "levels": found.levels})
        model = cls(Config(described, **config))
        for own, found in zip(model.coders, fits, strict=True):
            own.load_fit(found)
        return model

    # --- training

    def forward(self, batch):
        """A batch (dict, see data.py) -> (loss, metrics); chunks (array or tensor) -> list[list[int]], as FAST does."""
        return self.compute_loss(batch) if isinstance(batch, dict) else self.encode(batch).tolist()

    def compute_loss(self, batch):
        """Mean squared error of the network's decoding, normalised. Each chunk counts the same however many valid
        entries it has, so ranks and micro-steps can average. `mse_closed_form`: without the network."""
        decoded, entered = [], []
        for s, own in enumerate(self.coders):  # sources that this batch lacks too: DDP needs all their gradients
            rows = batch["source"] == s
            actions, mask = batch["actions"][rows, : own.steps, : own.dims], batch["mask"][rows, : own.steps]
            with torch.autocast(actions.device.type, enabled=False), torch.no_grad():
                base, features = own.context(batch["context"][rows, :, : own.dims])
                x = own.normalise(actions, mask, base)
                values = own.values(own.quantize(x, features))
                decoded.append((x, own.reconstruct(values, features), mask))
            entered.append(own.enter(torch.cat([values / own.deviation, features], 1)))
        hidden = self.trunk(torch.cat(entered)).split([len(h) for h in entered])
        totals = 0.0
        for own, h, (x, closed, mask) in zip(self.coders, hidden, decoded, strict=True):
            weight = mask.repeat_interleave(own.dims, 1) / (mask.sum(1, keepdim=True) * own.dims)  # B X
            error = closed + own.leave(h).float() @ own.span - x
            sums = [(e * weight).sum() for e in (error.square(), error.abs(), (closed - x).square())]
            totals = totals + torch.stack(sums)
        mse, mae, closed = totals / len(batch["source"])
        return mse, dict(loss=mse, mse=mse, mae=mae, mse_closed_form=closed)

    # --- the tokenizer, in robot units

    def coder_of(self, source):
        if source is None and len(self.names) > 1:
            raise ValueError(f"this tokenizer knows {', '.join(self.names)}: say which with source=")
        if source is not None and source not in self.names:
            raise ValueError(f"source {source!r} is unknown; this tokenizer knows {', '.join(self.names)}")
        return self.coders[0 if source is None else self.names.index(source)]

    def wanted(self):
        """What context= holds, in words."""
        return ", ".join(f"{what} at step {at}" for what, at in CONTEXT[self.config.condition])

    def context_of(self, own, context, batch):
        """The context as (B, R, A); ValueError says what it must hold."""
        device, wanted = own.mean.device, CONTEXT[self.config.condition]
        if context is None and wanted:
            raise ValueError(f"this tokenizer needs context=: {self.wanted()}")
        if not wanted:
            return torch.zeros(batch, 0, own.dims, device=device)
        context = as_tensor(context, "context").float().to(device)
        rows = context[..., None, :] if own.rows == 1 and context.ndim < 3 else context  # (A,) and (B, A) are enough
        rows = rows[None] if rows.ndim == 2 else rows
        if rows.ndim != 3 or len(rows) not in (1, batch) or rows.shape[1:] != (own.rows, own.dims):
            raise ValueError(f"context has shape {tuple(context.shape)}, expected ({batch}, {own.rows}, {own.dims})")
        if not rows.isfinite().all():
            raise ValueError("context holds NaN or infinity")
        return rows.expand(batch, -1, -1)

    @torch.no_grad()
    def encode(self, actions, mask=None, source=None, context=None):
        """Actions in robot units -> indices int64, in float32 on the model's device.

        actions: (T, A) or (B, T, A), array or tensor, T up to the source's chunk. mask: (T,) or (B, T), False for
        padded steps at the end, whose content never matters. context: (B, R, A), the rows of CONTEXT; with condition
        `action` it is the chunk's own first action. Returns (N,) or (B, N) of the same kind.
        """
        own, array = self.coder_of(source), not torch.is_tensor(actions)
        name, device = own.source["name"], own.mean.device
        x = as_tensor(actions, "actions").float().to(device)
        single = x.ndim == 2
        x = x[None] if single else x
        if x.ndim != 3 or x.shape[2] != own.dims or not 1 <= x.shape[1] <= own.steps:
            expected = f"(B, T <= {own.steps}, {own.dims})"
            raise ValueError(f"actions of {name} have shape {tuple(x.shape)}, expected {expected}")
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
        mask = (mask[None] if single and mask.ndim == 1 else mask).to(device)
        if mask.shape != x.shape[:2] or not mask[:, 0].all() or (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError("mask must be (B, T), True for the first valid steps and False for the padding after them")
        x = torch.where(mask[..., None], x, 0.0)
        if not x.isfinite().all():
            raise ValueError(f"actions of {name} hold NaN or infinity")
        if context is None and self.config.condition == "action":
            context = x[:, :1]
        base, features = own.context(self.context_of(own, context, len(x)))
        missing = own.steps - x.shape[1]
        x = own.normalise(F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing)), base)
        if len(x) and x.abs().max() > 1e6:
            raise ValueError(f"actions of {name} lie a million times outside the range of its training data")
        with torch.autocast(device.type, enabled=False):
            indices = own.pack(own.quantize(x, features))
        indices = indices[0] if single else indices
        return indices.cpu().numpy() if array else indices

    @torch.no_grad()
    def decode(self, indices, source=None, context=None, closed_form=False):
        """Indices (N,) or (B, N), list, array or tensor of any integer type -> actions (T, A) or (B, T, A).

        Every tuple of indices below `codebook_size` decodes. context: as for `encode`; condition `action`: the action
        that the chunk starts from, (A,) or (B, A). Without it the chunk starts from the middle of the training data,
        and a warning says so. closed_form: leave the network out.
        """
        own, array = self.coder_of(source), not torch.is_tensor(indices)
        indices = as_tensor(indices, "indices")
        single, kind = indices.ndim == 1, indices.dtype
        indices = indices[None] if single else indices
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens or kind.is_floating_point or kind == torch.bool:
            expected = f"whole numbers (B, {self.num_tokens})"
            raise ValueError(f"indices are {kind} {tuple(indices.shape)}, expected {expected}")
        indices = indices.to(own.mean.device, torch.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.config.codebook_size:
            raise ValueError(f"indices must lie in [0, {self.config.codebook_size})")
        if context is None and own.rows:
            text = f"the chunk is decoded from the middle of the training data; give context=: {self.wanted()}"
            warnings.warn(text, stacklevel=3)
            context = own.center.expand(len(indices), own.rows, -1)
        values = own.values(own.unpack(indices))
        actions = self.decode_values(values, source, context, closed_form)
        actions = actions[0] if single else actions
        return actions.cpu().numpy() if array else actions

    @torch.no_grad()
    def decode_values(self, values, source=None, context=None, closed_form=False):
        """Coefficients (B, K), such as the means of a policy's digits, -> tensor (B, T, A). context: as in `decode`."""
        own = self.coder_of(source)
        values = as_tensor(values, "values").float().to(own.mean.device)
        base, features = own.context(self.context_of(own, context, len(values)))
        with torch.autocast(values.device.type, enabled=False):
            x = own.reconstruct(values, features)
            if own.use_network and not closed_form:
                training = self.training
                self.eval()
                x = x + own.leave(self.trunk(own.enter(torch.cat([values / own.deviation, features], 1)))) @ own.span
                self.train(training)
        return (rearrange(x, "b (t a) -> b t a", a=own.dims) + base[:, None]) * own.scale + own.center

    # --- files

    def save_pretrained(self, folder):
        """config.json (with the normalisation and the levels) and pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a checkpoint folder, in eval mode. Never runs code from the files."""
        path, weights = Path(folder) / "config.json", Path(folder) / "pytorch_model.bin"
        if not path.exists():
            raise DataError(f"{folder}: holds no config.json; expected a folder such as RUN/checkpoints/best")
        try:
            config = Config(**json.loads(path.read_text(encoding="utf-8")))
            with torch.device("meta"):  # sizes of a broken config take no memory
                model = cls(config)
        except Exception as error:  # for sizes that are none torch raises a dozen kinds
            raise DataError(f"{path}: not a configuration of FSQVQVAE ({type(error).__name__}: {error})") from None
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state, assign=True)
        except Exception as error:  # for a damaged file torch raises struct.error, IndexError and a dozen more
            reason = (str(error) or type(error).__name__).splitlines()[-1].strip()[:150]
            raise DataError(f"{weights}: cannot be loaded into the model of config.json ({reason})") from None
        return model.eval()

    def load_pretrained(self, folder):
        """Start from a trained tokenizer: the shared layers, and all of the sources that both know by name.

        A source that only this model has keeps the coder that was fitted to it: so a new robot joins. DataError if
        the two differ in what must be equal: condition, codebook, width, and a shared source's shape.
        """
        other = type(self).from_pretrained(folder)
        for name in ("codebook_size", "condition", "hidden_dim"):
            mine, theirs = getattr(self.config, name), getattr(other.config, name)
            if mine != theirs:
                raise DataError(f"{folder}: its {name} is {theirs}, this model's {mine}")
        if self.num_tokens != other.num_tokens:
            raise DataError(f"{folder}: its chunks are {other.num_tokens} tokens, this model's {self.num_tokens}")
        self.trunk.load_state_dict(other.trunk.state_dict())
        for s, name in enumerate(self.names):
            if name in other.names:
                theirs = other.coders[other.names.index(name)]
                for key in ("action_dim", "chunk"):
                    here, there = self.sources[s][key], theirs.source[key]
                    if here != there:
                        raise DataError(f"{folder}: {key} of {name} is {there}, here {here}")
                ends, known = np.array([self.sources[s]["low"], self.sources[s]["high"]]), theirs.source
                reach = np.abs((ends - known["center"]) / known["scale"]).max()
                if reach > 20:
                    raise DataError(f"{folder}: its {name} reaches 1/{reach:.3g} as far: another robot? write NAME=")
                self.coders[s] = theirs
                self.sources[s] = theirs.source
        return self
