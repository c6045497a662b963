"""What the model is made of: attention within a frame and in time, and the optical flow between two frames.

Letters as in model.py.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

CELL = 8  # latent pixels per side of a cell; all of a cell moves alike
UNIT = 0.25  # latent pixels: from one frame to the next the flow is a fraction of a pixel
FARTHEST = 3.0  # latent pixels; what the equations give beyond is no motion
NOISE = 0.05  # added to the squared gradients: where nothing has an edge, nothing moves


def rotate(x, position):
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) of x (..., T, d) at `position` (T,) or (B, 1, T)."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** -(torch.arange(half, device=x.device) / half)  # 100: clips are tens of frames
    angle = position[..., None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class SpaceAttention(nn.Module):
    """Full attention among the tokens of one frame. x (B, T, N, D) -> (B, T, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv_proj(x), "b t n (three h d) -> three (b t) h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(y, "(b t) h n d -> b t n (h d)", b=len(x)))


class TimeAttention(SpaceAttention):
    """Each token attends to itself in its own and the `context - 1` frames before. x (B, T, N, D) -> the same, (k, v).

    position (B, T): frame numbers. cache: ((k, v), their positions): k, v (B, N, heads, L, d), positions (B, L).
    """

    def __init__(self, dim, heads, context):
        super().__init__(dim, heads)
        self.context = context

    def forward(self, x, position, cache=None):
        q, k, v = rearrange(self.qkv_proj(x), "b t n (three h d) -> three b n h t d", three=3, h=self.heads)
        q, k = rotate(q, position[:, None, None]), rotate(k, position[:, None, None])
        mask, causal, key_position = None, cache is None and x.shape[1] <= self.context, position
        if cache is not None:
            (old_k, old_v), old_position = cache
            k, v = torch.cat([old_k, k], 3), torch.cat([old_v, v], 3)
            key_position = torch.cat([old_position, position], 1)
        if not causal:
            age = position[:, :, None] - key_position[:, None]  # B T L
            mask = ((age >= 0) & (age < self.context))[:, None, None].expand(-1, x.shape[2], -1, -1, -1).flatten(0, 1)
        y = F.scaled_dot_product_attention(*(part.flatten(0, 1) for part in (q, k, v)), mask, is_causal=causal)
        return self.out_proj(rearrange(y, "(b n) h t d -> b t n (h d)", b=len(x))), (k, v)


class Block(nn.Module):
    """Pre-norm transformer block; with `context` it has attention in time too."""

    def __init__(self, dim, heads, context=0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3 if context else 2))
        self.space = SpaceAttention(dim, heads)
        self.time = TimeAttention(dim, heads, context) if context else None
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, position=None, cache=None):
        """x (B, T, N, D) -> the same and, with attention in time, its keys and values."""
        kv = None
        x = x + self.space(self.norms[0](x))
        if self.time is not None:
            y, kv = self.time(self.norms[2](x), position, cache)
            x = x + y
        return x + self.mlp(self.norms[1](x)), kv


def cells(height, width):
    """(rows, columns) of cells in a latent frame."""
    return -(-height // CELL), -(-width // CELL)


def optical_flow(before, after):
    """Normalised latents (B, T, C, H, W), twice -> flow (B, T, 2 * cells): across, then down, in UNIT.

    Least squares (Lucas & Kanade 1981), no learning: in every cell the motion (u, v) that fits dx u + dy v + dt = 0
    best, over its pixels and all channels.
    """
    middle = (before + after) / 2
    dx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    dy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    dt = (after - before)[..., 1:-1, 1:-1]

    def mean(x):
        return F.adaptive_avg_pool2d(x.sum(2), cells(*before.shape[-2:]))

    xx, xy, yy, xt, yt = mean(dx * dx) + NOISE, mean(dx * dy), mean(dy * dy) + NOISE, mean(dx * dt), mean(dy * dt)
    u, v = xy * yt - yy * xt, xy * xt - xx * yt
    flow = torch.stack([u, v], 2) / (xx * yy - xy * xy)[:, :, None]
    return flow.clamp(-FARTHEST, FARTHEST).flatten(2) / UNIT
