"""A student in numpy, for a robot or a simulator without JAX: this file, config.json and weights.npz are all it takes.

policy = Policy("runs/x/policy")
mean, std = policy.prior(proprioception)  # (B P), raw: joints, velocities, forces, root, end effectors (config.json)
action = policy.decode(proprioception, mean + std * noise)  # (B A) in [-1, 1]
"""

import json
from pathlib import Path

import numpy as np


class Policy:
    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        with np.load(Path(folder) / "weights.npz", allow_pickle=False) as arrays:
            self.arrays = dict(arrays)

    def normalize(self, x):
        """A whole observation (B R + P), or its proprioception (B P)."""
        mean, std = (self.arrays[name][-x.shape[-1] :] for name in ("mean", "std"))
        return (x - mean) / std

    def dense(self, layer, x):
        return x @ self.arrays[f"{layer}.kernel"] + self.arrays[f"{layer}.bias"]

    def hidden(self, part, x):
        """Dense, SiLU, LayerNorm per hidden layer."""
        for i in range(len(self.config[f"{part}_hidden_sizes"])):
            x = self.dense(f"{part}.hidden_{i}", x)
            x = x / (1 + np.exp(-x))
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * self.arrays[f"{part}.LayerNorm_{i}.scale"] + self.arrays[f"{part}.LayerNorm_{i}.bias"]
        return x

    def latent(self, part, x):
        """Gaussian: mean and standard deviation (B Z). FSQ: values, or logits (B Z K) of the prior."""
        x, levels = self.hidden(part, self.normalize(x)), self.config["fsq_levels"]
        if levels and part == "prior":
            return self.dense("prior.logits", x).reshape(*x.shape[:-1], -1, levels)
        mean = self.dense(f"{part}.fc2_mean", x)
        if levels:
            half_l, offset = (levels - 1) * (1 + 1e-3) / 2, 0.5 * (levels % 2 == 0)
            return np.round(np.tanh(mean + np.arctanh(offset / half_l)) * half_l - offset) / (levels // 2)
        return mean, np.exp(0.5 * np.clip(self.dense(f"{part}.fc2_logvar", x), -5, 2))

    def posterior(self, obs):
        return self.latent("encoder", obs)

    def prior(self, proprioception):
        return self.latent("prior", proprioception)

    def decode(self, proprioception, z):
        x = np.concatenate([z, self.normalize(proprioception)], -1)
        if not np.isfinite(x).all():
            raise ValueError("proprioception or latent holds NaN or infinity")
        last = len(self.config["decoder_hidden_sizes"])
        return np.tanh(self.dense(f"decoder.hidden_{last}", self.hidden("decoder", x)))
