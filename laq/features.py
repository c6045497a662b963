"""Tokens of a frozen vision backbone (DINO-type) as the target of LAQ instead of pixels (UniVLA, arXiv 2505.06111)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, which DINOv2 and DINOv3 expect


class Backbone(nn.Module):
    """A Hugging Face vision transformer, by folder or name; frozen, and never part of a checkpoint.

    grid: G; images are resized so that the backbone makes G x G tokens. `dim`: their width.
    """

    def __init__(self, name, grid):
        super().__init__()
        try:
            self.model = AutoModel.from_pretrained(name).requires_grad_(False).eval()
            self.side, self.dim = grid * self.model.config.patch_size, self.model.config.hidden_size
        except (AttributeError, OSError, ValueError) as error:
            raise ValueError(f"--backbone {name}: not a vision transformer ({str(error).splitlines()[0]})") from None
        self.grid = grid
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, frames):
        """Frames (B, 2, 3, S, S) in [0, 1] -> normalised tokens (B, 2, G^2, F)."""
        images = F.interpolate(frames.flatten(0, 1), (self.side, self.side), mode="bilinear", antialias=True)
        tokens = self.model(pixel_values=(images - self.mean) / self.std).last_hidden_state
        tokens = tokens[:, -(self.grid**2) :].float()  # class and register tokens come first
        return F.layer_norm(tokens, tokens.shape[-1:]).unflatten(0, (len(frames), 2))
