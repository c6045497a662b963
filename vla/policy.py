"""A trained VLA as a robot's policy: one instruction, then image (and state) in, one command out per control step."""

import numpy as np
import torch
from model import VLA
from shards import resize


class Policy:
    """policy = Policy.from_pretrained(dir); policy.reset("push the red block left"); action = policy.act(image, state).

    replan: control steps between two forward passes; the commands of a chunk in between are carried out as predicted.
    ensemble: None carries out the newest chunk. A number m >= 0 averages what all chunks that reach the present
    say, with
      weights exp(-m i), i = 0 for the oldest (temporal ensembling, ACT, Zhao et al. 2023, arXiv 2304.13705).
    Several episodes can run side by side: reset with a list of B instructions, act on B images.
    """

    def __init__(self, model, replan=1, ensemble=None):
        chunk = (model.action or {}).get("chunk", 0)
        if not chunk:
            raise ValueError("this checkpoint predicts latent actions only: make it a policy with finetune.py")
        if not 1 <= replan <= chunk:
            raise ValueError(f"replan {replan}: the model predicts {chunk} commands at once, so 1 to {chunk}")
        self.model, self.replan, self.ensemble = model.eval(), replan, ensemble
        self.instructions = None

    @classmethod
    def from_pretrained(cls, folder, device="cpu", **options):
        """The policy of a checkpoint of finetune.py; `options`: replan, ensemble."""
        return cls(VLA.from_pretrained(folder).to(device), **options)

    def reset(self, instruction):
        """Begin an episode: one text, or one for each of B episodes."""
        self.single = isinstance(instruction, str)
        self.instructions = [instruction] if self.single else list(instruction)
        self.time, self.plans = 0, []

    def act(self, image, state=None):
        """image (H, W, 3) uint8, state (S,) -> command (A,) float32 in robot units; one more axis with B episodes."""
        if self.instructions is None:
            raise ValueError("reset(instruction) comes before act")
        if self.time % self.replan == 0:
            images, states = ([image], [state]) if self.single else (image, state)
            self.plans.append((self.time, self.predict(images, states)))
        chunk = self.model.action["chunk"]
        self.plans = [(start, plan) for start, plan in self.plans if self.time - start < chunk]
        now = np.stack([plan[:, self.time - start] for start, plan in self.plans])  # plans B A, oldest first
        weights = np.exp(-(self.ensemble or 0.0) * np.arange(len(now)))
        action = now[-1] if self.ensemble is None else np.tensordot(weights / weights.sum(), now, 1)
        self.time += 1
        return np.float32(action[0] if self.single else action)

    def predict(self, images, states):
        """Chunks (B, H, A) for B images (and states)."""
        size, device = self.model.config["image_size"], self.model.queries.device
        images = [np.asarray(image) for image in images]
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"image {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
        batch = self.model.inputs([resize(image[None], size)[0] for image in images], self.instructions)
        dims = self.model.action["state"]
        if dims:
            if states is None or np.shape(states) != (len(images), dims):
                raise ValueError(f"state has shape {np.shape(states)[1:]}, the policy reads {dims} numbers")
            batch["state"] = torch.from_numpy(np.asarray(states, np.float32))
        batch = {name: value.to(device) for name, value in batch.items()}
        return self.model.predict_actions(batch).cpu().numpy()
