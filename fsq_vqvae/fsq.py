"""Finite scalar quantisation (FSQ) as published: Mentzer et al. 2023, arXiv 2309.15505. A module to lift out.

The tokenizer of this folder gives every coefficient its own levels and points instead (transform_coding.py); the plain
transformer that it is compared with (baselines.py) uses this one.
"""

import math

import torch
from torch import nn


class FSQ(nn.Module):
    """Rounds each of L bounded numbers to one of `levels[i]` values; their product is the codebook size.

    The bound is vector-quantize-pytorch's, which maps 0 to 0 exactly. Always float32: in bfloat16 2 % of the codes
    would change.
    """

    def __init__(self, levels, eps=1e-3):
        super().__init__()
        if min(levels) < 3:
            raise ValueError(f"levels {list(levels)}: each must be at least 3")
        self.size = math.prod(levels)
        if self.size >= 2**63:
            raise ValueError(f"levels {list(levels)}: more codes than a 64-bit index can tell apart")
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        levels = torch.tensor(levels, dtype=torch.int64)
        half_l = (levels - 1).double() * (1 + eps) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
        shift = torch.atanh(offset / half_l)
        for name, value in dict(half_l=half_l, offset=offset, shift=shift, half_width=levels // 2).items():
            self.register_buffer(name, value.float(), persistent=False)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z):
        """(..., L) any real -> within half a level of the outermost levels; unit steps."""
        return torch.tanh(z.float() + self.shift) * self.half_l - self.offset

    def forward(self, z):
        """z (..., L) -> codes (..., L) in [-1, 1] with a straight-through gradient, indices (...) int64."""
        bounded = self.bound(z)
        digits = bounded.detach().round()
        codes = (bounded + (digits - bounded.detach())) / self.half_width
        return codes, ((digits + self.half_width).long() * self.basis).sum(-1)  # float32 would lose indices above 2^24

    def codes(self, indices):
        """indices (...) int64 in [0, size) -> codes (..., L) float32."""
        digits = indices[..., None] // self.basis % self.levels
        return digits / self.half_width - 1
