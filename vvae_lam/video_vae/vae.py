"""Video VAEs behind one interface: uint8 frames -> latents -> uint8 frames. From a local path; nothing is downloaded.

| kind | frames per latent | takes |
| AutoencoderKLCogVideoX | 4 | multiples of 8: 8 frames are 2 latents |
| AutoencoderKLWan | 4, but the first latent holds one frame | 4 k + 1; it would drop a shorter tail silently |
| AutoencoderKL, AutoencoderKLTemporalDecoder | 1 | any number |
| VideoVAE+ (arXiv 2412.17805, a checkout of its repository) | 4 | multiples of 4 |
"""

import importlib
import json
import site
from pathlib import Path

import numpy as np
import torch

from common import DataError

PART = 14  # frames that a per-frame VAE decodes together, as SVD's pipeline: 200 of 192x320 at once take 85 GB
# frames per latent, frames of the first latent where it differs, frames that must be encoded together
RULES = {
    "AutoencoderKLCogVideoX": dict(ratio=4, lead=0, unit=8),
    "AutoencoderKLWan": dict(ratio=4, lead=1, unit=4),
    "AutoencoderKL": dict(ratio=1, lead=0, unit=1),
    "AutoencoderKLTemporalDecoder": dict(ratio=1, lead=0, unit=1),
    "VideoVAE+": dict(ratio=4, lead=0, unit=4),
}


class VideoVAE:
    """name: class of the VAE. ratio, lead, unit: see RULES. mean, std: what latents are normalised with, (C, 1, 1).

    causal: whether it is causal inside a chunk, once is_causal() has measured it.
    """

    def __init__(self, name, module, device, mean, std):
        self.name, self.module, self.device = name, module.to(device).eval().requires_grad_(False), device
        self.causal = None
        self.ratio, self.lead, self.unit = (RULES[name][key] for key in ("ratio", "lead", "unit"))
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 1) for x in (mean, std))

    @torch.no_grad()
    def encode(self, frames):
        """(T, H, W, 3) uint8 -> latents (T', C, h, w) float32, normalised; the posterior's mode, so always the same.

        All T frames are encoded together. A Wan-type VAE's first latent, which holds one frame, is left out.
        """
        if (len(frames) - self.lead) % self.unit or len(frames) <= self.lead:
            raise DataError(f"{self.name} takes {self.unit} k + {self.lead} frames at a time, not {len(frames)}")
        x = torch.as_tensor(np.asarray(frames), device=self.device).permute(3, 0, 1, 2)[None] / 127.5 - 1  # B C T H W
        try:
            if self.name == "VideoVAE+":
                z = self.module.encode(x, sample_posterior=False)[0]
            elif self.ratio == 1:
                z = self.module.encode(x[0].transpose(0, 1)).latent_dist.mode().transpose(0, 1)[None]
            else:
                z = self.module.encode(x).latent_dist.mode()
        except (RuntimeError, ValueError) as error:  # a size that it does not take, or too long for the memory
            what = f"frames of shape {np.shape(frames)}: another --size? ({str(error).splitlines()[0][:150]})"
            raise DataError(f"{self.name} cannot encode {what}") from None
        return (z[0].transpose(0, 1).float() - self.mean)[self.lead :] / self.std

    @torch.no_grad()
    def decode(self, latents):
        """Latents (T', C, h, w), array or tensor -> (ratio * T', H, W, 3) uint8.

        A VAE that takes frames in larger units gets its last latent repeated, and what that adds is left out. A
        Wan-type VAE wants a first latent of one frame, which is not kept: the first of `latents` stands in for it.
        """
        z = torch.as_tensor(latents, dtype=torch.float32, device=self.device) * self.std + self.mean
        wanted, each = self.ratio * len(z), self.unit // self.ratio
        z = torch.cat([z[:1], z]) if self.lead else z
        z = torch.cat([z, z[-1:].expand(-(len(z) - (self.lead > 0)) % each, -1, -1, -1)])
        if self.name == "AutoencoderKLTemporalDecoder":
            x = torch.cat([self.module.decode(part, num_frames=len(part)).sample for part in z.split(PART)])
        elif self.ratio == 1:
            x = torch.cat([self.module.decode(part).sample for part in z.split(PART)])
        else:
            x = self.module.decode(z.transpose(0, 1)[None])
            x = (x if torch.is_tensor(x) else x.sample)[0].transpose(0, 1)  # T C H W
        x = ((x[self.lead :][:wanted].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def is_causal(self, frames):
        """Measured: whether a change of the last `ratio` of `frames` leaves all latents but the last as they were."""
        changed = np.concatenate([frames[: -self.ratio], 255 - frames[-self.ratio :]])
        before, after = self.encode(frames)[:-1], self.encode(changed)[:-1]
        return bool((before - after).abs().max() < 1e-4) if len(before) else True


def open_vae(path, device="cpu", checkout=None):
    """A VAE of diffusers (folder with config.json), or VideoVAE+ (its .ckpt, with the checkout of its repository)."""
    path = Path(path)
    if checkout is not None:
        return VideoVAE("VideoVAE+", open_videovae_plus(path, Path(checkout)), device, [0.0], [1.0])
    try:
        config = json.loads((path / "config.json").read_text())
        name = config["_class_name"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"--vae {path}: not the folder of a diffusers VAE (config.json: {error})") from None
    if name not in RULES:
        raise DataError(f"--vae {path}: {name} is not supported, only {', '.join(RULES)}")
    try:
        import diffusers
    except ImportError as error:
        raise DataError(f"--vae {path}: needs diffusers (pip install diffusers): {error}") from None
    try:
        module = getattr(diffusers, name).from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--vae {path}: cannot be loaded ({str(error).splitlines()[0][:150]})") from None
    if name == "AutoencoderKLWan":
        return VideoVAE(name, module, device, config["latents_mean"], config["latents_std"])
    scale, shift = module.config.scaling_factor, getattr(module.config, "shift_factor", None) or 0.0
    return VideoVAE(name, module, device, [shift], [1 / scale])


def open_videovae_plus(weights, checkout):
    """The module of a VideoVAE+ checkout, by its configs/inference/config_16z.yaml. Runs the checkout's code."""
    import yaml

    config_file = checkout / "configs" / "inference" / "config_16z.yaml"
    try:
        config = yaml.safe_load(config_file.read_text())["model"]
        params = {key: value for key, value in config["params"].items() if not key.startswith("ckpt_path")}
        params["lossconfig"] = dict(target="torch.nn.Identity")  # its own is for training: not in `own`, downloads VGG
        module_name, _, class_name = config["target"].rpartition(".")
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"--checkout {checkout}: no readable {config_file.name} of VideoVAE+ ({error})") from None
    site.addsitedir(str(checkout))
    try:
        module = getattr(importlib.import_module(module_name), class_name)(**params)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        own = {name: value for name, value in state.items() if not name.startswith("loss.")}  # of its discriminator
        module.load_state_dict(own)
    except Exception as error:  # another project's code, and torch's dozen errors for a corrupt file
        raise DataError(f"--vae {weights}: VideoVAE+ cannot be opened ({str(error).splitlines()[0][:150]})") from None
    return module
