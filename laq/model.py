"""LAQ: discrete latent actions of frame pairs (LAPA stage 1, arXiv 2410.11758), with the released code's faults mended.

    first, second frame -> spatial blocks -> temporal blocks (causal) -> difference of encodings -> N vectors -> N codes
    first frame + codes -> decoder: the first frame's tokens attend to the codes -> second frame

What differs from the publication: patches are embedded by a small convolution, and the second frame's also see what
changed and a coarse optical flow by block matching. The codes also get the flow directly and must predict it: that
carries over from a few recordings to new ones. Position comes from depthwise convolutions alone (PEG); tokens are
averaged before the codes, so that a motion means the same everywhere.

Letters: B batch, G grid (image_size / patch), T = G^2 tokens, D width, N code positions, K codes, A action dims.
"""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from quantizer import Quantizer
from torch import nn

from common import DataError, load

FLOW_SIDE, FLOW_REACH = 64, 5  # optical flow: found in pictures of at most so many pixels, up to so many of them
FLOW_GRID = 8  # of the flow that the codes predict, with `flow_weight`
MOVED = 0.05  # a pixel that changes by more, of 1, has moved: `motion_weight`, where no mask tells the robot's pixels
ACTION_WEIGHT = 0.01  # of the labelled pairs' loss: ten times as much drowns the pixels, and nothing is learned


@dataclasses.dataclass
class LAQConfig:
    image_size: int = 128  # pixels; frames are square
    patch: int = 16  # pixels per token, a multiple of 4
    dim: int = 384  # width of the transformers
    depth: int = 4  # blocks of each: spatial encoder, temporal encoder, decoder
    code_seq_len: int = 4  # N: codes per pair of frames
    codebook_size: int = 8  # K: codes to choose from, at each position
    code_dim: int = 32  # width of a position's vector before quantization
    motion_weight: float = 0.0  # w in the loss mean((1 + w [pixel moved, or the robot's]) error^2)
    flow_weight: float = 0.0  # w in the loss + w (flow that the codes predict - flow)^2; they then get it directly
    action_dim: int = 0  # A of the supervised head on labelled pairs (LAOM, arXiv 2502.00379); 0: none


@torch.no_grad()
def block_flow(first, second, grid):
    """Optical flow by block matching: two frames (B 3 S S) -> (B 2 grid grid), down and right, 1 is FLOW_REACH pixels.

    Of all shifts up to FLOW_REACH each block takes the one under which the second frame differs least from the first.
    Of equals the smallest, so that nothing moves where nothing can be seen.
    """
    cell = max(1, min(FLOW_SIDE, first.shape[-1]) // grid)
    side, margin = cell * grid, max(1, round((cell * grid / 6 - cell) / 2))  # blocks of a cell and what is around it
    first, second = (F.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), side) for x in (first, second))
    reach = torch.arange(-FLOW_REACH, FLOW_REACH + 1.0, device=first.device)
    padded, costs = F.pad(second[:, 0], (FLOW_REACH,) * 4, mode="replicate"), []
    for down in range(len(reach)):
        shifted = padded[:, down : down + side].unfold(2, side, 1).transpose(1, 2)  # B, shifts right, side, side
        off = F.avg_pool2d((shifted - first).abs(), cell + 2 * margin, cell, margin, count_include_pad=False)
        costs.append(off + 1e-3 * torch.hypot(reach, reach[down])[:, None, None])
    best = torch.cat(costs, 1).argmin(1)  # B grid grid
    return torch.stack([reach[best // len(reach)], reach[best % len(reach)]], 1) / FLOW_REACH


class Stem(nn.Module):
    """Images (B C S S) -> fine features (B W 4G 4G) and one token per patch (B T D)."""

    def __init__(self, channels, patch, width, dim):
        super().__init__()
        self.fine = patch // 4
        self.first = nn.Conv2d(channels * self.fine**2, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, dim, 3, stride=2, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(1, width), nn.GroupNorm(1, 2 * width), nn.LayerNorm(dim)])

    def forward(self, images):
        fine = F.gelu(self.norms[0](self.first(F.pixel_unshuffle(images, self.fine))))
        coarse = self.third(F.gelu(self.norms[1](self.second(fine))))
        return fine, self.norms[2](rearrange(coarse, "b d i j -> b (i j) d"))


class Attention(nn.Module):
    """Multi-head attention of x (B T D) over context (B T' D); D / 64 heads, or fewer where D is no multiple of 64."""

    def __init__(self, dim):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, context=None):
        x = self.norm(x)
        q = rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.heads)
        kv = self.kv_proj(x if context is None else context)
        k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.heads)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class PairAttention(Attention):
    """Each token of the second frame attends to the first frame's token at its place and to itself.

    Causal: the first frame sees nothing of the second, so it is read and never rewritten. Two keys make the softmax a
    sigmoid of the difference of two scores.
    """

    def forward(self, second, first):
        x = self.norm(second)
        q = rearrange(self.q_proj(x), "b t (h d) -> b t h d", h=self.heads)
        (k1, v1), (k2, v2) = (
            rearrange(self.kv_proj(y), "b t (two h d) -> two b t h d", two=2, h=self.heads) for y in (first, x)
        )
        score = (q * (k2 - k1)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        return self.out_proj(rearrange(v1.lerp(v2, score.sigmoid().type_as(v1)), "b t h d -> b t (h d)"))


class PEG(nn.Module):
    """Position by a depthwise 3 x 3 convolution over one frame's tokens (arXiv 2102.10882)."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        return x + rearrange(self.conv(rearrange(x, "b (i j) d -> b d i j", i=side)), "b d i j -> b (i j) d")


def feed_forward(dim):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class SpatialBlock(nn.Module):
    """Pre-norm: the tokens of one frame attend to one another, then (cross=True) to the codes."""

    def __init__(self, dim, cross=False):
        super().__init__()
        self.peg, self.attention, self.mlp = PEG(dim), Attention(dim), feed_forward(dim)
        self.cross = Attention(dim) if cross else None

    def forward(self, x, codes=None):
        x = self.peg(x)
        x = x + self.attention(x)
        if self.cross is not None:
            x = x + self.cross(x, codes)
        return x + self.mlp(x)


class TemporalBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.peg, self.attention, self.mlp = PEG(dim), PairAttention(dim), feed_forward(dim)

    def forward(self, second, first):
        second = self.peg(second)
        second = second + self.attention(second, first)
        return second + self.mlp(second)


class PixelHead(nn.Module):
    """Decoder tokens (B T D), the first frame's fine features and the codes (B N*code_dim) -> change of the image.

    Two convolutions on the fine grid, scaled and shifted by the codes (FiLM, arXiv 1709.07871). The last layer begins
    at zero: the first prediction is the first frame itself.
    """

    def __init__(self, dim, patch, width, code_width):
        super().__init__()
        self.fine = patch // 4
        self.up = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 16 * width))
        self.convs = nn.ModuleList([nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.film = nn.Linear(code_width, 4 * width)
        self.out = nn.Conv2d(width, 3 * self.fine**2, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens, fine, codes):
        side = round(tokens.shape[1] ** 0.5)
        up = rearrange(self.up(tokens), "b (i j) (p q w) -> b w (i p) (j q)", i=side, p=4, q=4)
        scale1, shift1, scale2, shift2 = self.film(codes)[..., None, None].chunk(4, 1)
        x = F.gelu(self.convs[0](torch.cat([fine, up], 1)) * (1 + scale1) + shift1)
        x = x + F.gelu(self.convs[1](x) * (1 + scale2) + shift2)
        return F.pixel_shuffle(self.out(x), self.fine)


class LAQ(nn.Module):
    """Latent action quantizer: model(batch) -> (loss, metrics); encode, encode_clip, decode once it is trained."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.image_size % c.patch or c.patch % 4:
            raise DataError(f"image_size {c.image_size} must be a multiple of patch {c.patch}, and that of 4")
        width = min(64, max(32, c.dim // 8))  # of the convolutions
        code_width = c.code_seq_len * c.code_dim
        self.stem = Stem(3, c.patch, width, c.dim)
        self.change_stem = Stem(8, c.patch, width, c.dim)
        self.spatial = nn.ModuleList(SpatialBlock(c.dim) for _ in range(c.depth))
        self.temporal = nn.ModuleList(TemporalBlock(c.dim) for _ in range(c.depth))
        self.squeeze = nn.Sequential(nn.LayerNorm(c.dim), nn.Linear(c.dim, 128), nn.GELU())
        self.to_codes = nn.Linear(128, code_width, bias=False)
        self.flow_grid, flow = 4 * c.image_size // c.patch, 2 * FLOW_GRID**2
        self.from_flow = nn.Linear(flow, code_width, bias=False) if c.flow_weight else None
        self.to_flow = nn.Linear(code_width, flow) if c.flow_weight else None
        self.quantizer = Quantizer(c.code_seq_len, c.codebook_size, c.code_dim)
        self.decoder_stem = Stem(3, c.patch, width, c.dim)
        self.from_codes = nn.Linear(c.code_dim, c.dim)
        self.code_embed = nn.Parameter(torch.randn(c.code_seq_len, c.dim) * 0.02)
        self.decoder = nn.ModuleList(SpatialBlock(c.dim, cross=True) for _ in range(c.depth))
        self.head = PixelHead(c.dim, c.patch, width, code_width)
        self.action_head = nn.Linear(code_width, c.action_dim) if c.action_dim else None
        self.register_buffer("action_mean", torch.zeros(c.action_dim))
        self.register_buffer("action_std", torch.ones(c.action_dim))

    # --- encoder

    def encode_frame(self, frames):
        """One frame by itself: (B 3 S S) in [0, 1] -> tokens (B T D)."""
        x = self.stem(frames)[1]
        for block in self.spatial:
            x = block(x)
        return x

    def encode_pair(self, first, second, tokens1, tokens2, flow=None):
        """Two frames (B 3 S S) and their tokens -> vectors d (B N code_dim), float32, as the quantizer takes them."""
        flow = block_flow(first, second, self.flow_grid) if flow is None else flow
        change = torch.cat([first, 2 * (second - first), F.interpolate(flow, first.shape[2:])], 1)
        x = tokens2 + self.change_stem(change)[1]
        for block in self.temporal:
            x = block(x, tokens1)
        change = self.squeeze(x) - self.squeeze(tokens1)
        d = self.to_codes(change.mean(1))
        if self.from_flow is not None:
            d = d + self.from_flow(F.adaptive_avg_pool2d(flow, FLOW_GRID).flatten(1))
        return rearrange(d, "b (n d) -> b n d", n=self.config.code_seq_len).float()

    # --- decoder

    def decode_frame(self, first, z):
        """First frames (B 3 S S) and z (B N code_dim) -> second frames, not clamped."""
        fine, x = self.decoder_stem(first)
        codes = self.from_codes(z) + self.code_embed
        for block in self.decoder:
            x = block(x, codes)
        return first + self.head(x, fine, z.flatten(1)).float()

    # --- training

    def forward(self, batch):
        """frames (B 2 3 S S) in [0, 1] -> (loss, metrics).

        With an action head also actions (B A), has_actions (B,); where masks are known (MaskLAM, arXiv 2602.02259) mask
        (B 2 1 S S), 1 where the robot is, has_mask (B,).
        """
        first, second = batch["frames"].unbind(1)
        tokens = self.encode_frame(torch.cat([first, second])).chunk(2)
        flow = block_flow(first, second, self.flow_grid)
        z, _ = self.quantizer(self.encode_pair(first, second, *tokens, flow))
        error = (self.decode_frame(first, z) - second).square()
        moved = (first - second).abs().amax(1, keepdim=True) > MOVED
        if "mask" in batch:
            moved = torch.where(batch["has_mask"][:, None, None, None], batch["mask"].amax(1), moved)
        loss = ((1 + self.config.motion_weight * moved) * error).mean()
        metrics = dict(mse=error.mean(), mse_copy=(first - second).square().mean())
        if self.to_flow is not None:
            flow = F.adaptive_avg_pool2d(flow, FLOW_GRID).flatten(1)
            metrics["flow_mse"] = (self.to_flow(z.flatten(1)).float() - flow).square().mean()
            loss = loss + self.config.flow_weight * metrics["flow_mse"]
        if self.action_head is not None:
            target = (batch["actions"] - self.action_mean) / self.action_std
            off = (self.action_head(z.flatten(1)).float() - target).square().mean(1)
            metrics["action_mse"] = (off * batch["has_actions"]).mean()
            loss = loss + ACTION_WEIGHT * metrics["action_mse"]
        return loss, dict(loss=loss, **metrics)

    @torch.no_grad()
    def reconstruct(self, first, second):
        """Pairs -> second frames in [0, 1] decoded from their codes, and from the next pair's codes; codes (B N).

        Before quantization starts the vectors themselves are decoded, as in training.
        """
        d = self.encode_pair(first, second, self.encode_frame(first), self.encode_frame(second))
        z, codes = self.quantizer(d)
        decoded, shuffled = (self.decode_frame(first, x).clamp(0, 1) for x in (z, z.roll(1, 0)))
        return decoded, shuffled, codes

    # --- latent actions

    @torch.no_grad()
    def encode(self, first, second):
        """Frames (B 3 S S) in [0, 1] -> codes (B N) int64, vectors (B N code_dim) before quantization, float32."""
        d = self.encode_pair(first, second, self.encode_frame(first), self.encode_frame(second))
        return self.quantizer.encode(d)

    @torch.no_grad()
    def encode_clip(self, parts, gap):
        """All pairs (t, t + gap) of a clip -> codes (T - gap, N), vectors (T - gap, N, code_dim); frames are seen once.

        parts: the clip in pieces, one after another, each (n S S 3) uint8; memory depends on a piece and the gap alone.
        """
        codes, vectors, frames, tokens = [], [], None, None
        for part in parts:
            part = part.to(self.code_embed.device).movedim(-1, 1).float() / 255
            new = self.encode_frame(part)
            frames, tokens = (part, new) if frames is None else (torch.cat([frames, part]), torch.cat([tokens, new]))
            n = max(0, len(frames) - gap)
            if n:
                d = self.encode_pair(frames[:n], frames[gap:], tokens[:n], tokens[gap:])
                for some, found in zip((codes, vectors), self.quantizer.encode(d), strict=True):
                    some.append(found.cpu())
            frames, tokens = frames[n:], tokens[n:]
        N, _, D = self.quantizer.shape
        return torch.cat([torch.zeros(0, N, dtype=torch.int64), *codes]), torch.cat([torch.zeros(0, N, D), *vectors])

    @torch.no_grad()
    def decode(self, first, codes):
        """Frames (B 3 S S) and codes (B N) -> the frames that they lead to, in [0, 1]."""
        return self.decode_frame(first, self.quantizer.lookup(codes)).clamp(0, 1)

    # --- files

    def save_pretrained(self, folder):
        """config.json and pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    def load_pretrained(self, folder, assign=False):
        """Weights of a checkpoint folder, whose configuration must be this model's. assign: see load_state_dict."""
        theirs = dataclasses.asdict(read_config(folder))
        for name, ours in dataclasses.asdict(self.config).items():
            if name != "motion_weight" and theirs[name] != ours:
                raise DataError(f"{folder}: its {name} is {theirs[name]}, this model's {ours}")
        try:
            self.load_state_dict(load(Path(folder) / "pytorch_model.bin"), assign=assign)
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            text = (str(error) or type(error).__name__).splitlines()[0][:150]
            raise DataError(f"{folder}/pytorch_model.bin: not the weights of its config.json ({text})") from None
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a checkpoint folder, in eval mode. Never runs code from the files."""
        config = read_config(folder)
        try:
            with torch.device("meta"):  # sizes of a broken config take no memory
                model = cls(config)
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # sizes that are none
            raise DataError(f"{folder}/config.json: no model can be built from it ({error})") from None
        return model.load_pretrained(folder, assign=True).eval()


def read_config(folder):
    """The LAQConfig of a checkpoint folder."""
    path = Path(folder) / "config.json"
    try:
        config = LAQConfig(**json.loads(path.read_text()))
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            least, most = int(field.name != "action_dim"), 1000 if field.name == "depth" else 65536
            whole = type(value) is int and least <= value <= most
            if not whole and not (field.type is float and type(value) in (int, float)):
                raise ValueError(f"{field.name} is {value!r}")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a configuration of LAQ ({error})") from None
