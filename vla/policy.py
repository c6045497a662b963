"""A trained VLA as a robot's policy: one instruction, then image (and state) in, one command out per control step."""

import numpy as np
import torch
from model import VLA
from shards import to_rgb

from common import DataError


class Refused(DataError, ValueError):
    """What the policy cannot act on: a ValueError for a robot's program, one line of a script."""


class Policy:
    """policy = Policy.from_pretrained(dir); policy.reset("push the red block left"); action = policy.act(image, state).

    n_action_steps: control steps between two forward passes; the commands of a chunk in between are carried out as
      predicted.
    temporal_ensemble_coeff: None carries out the newest chunk. A number m >= 0 averages the chunks that reach the
      present with weights exp(-m i), i = 0 for the oldest (ACT, Zhao et al. 2023, arXiv 2304.13705).
    Several episodes can run side by side: reset with a list of B instructions, act on B images.
    Both names are those of LeRobot's policies. Raises ValueError for what the model cannot act on.
    """

    def __init__(self, model, n_action_steps=1, temporal_ensemble_coeff=None):
        if model.config.action is None:
            raise Refused("this checkpoint predicts latent actions only: make it a policy with finetune.py")
        self.chunk_size, self.state_dim = model.config.action.chunk_size, model.config.action.state_dim
        if not 1 <= n_action_steps <= self.chunk_size:
            raise Refused(f"n_action_steps {n_action_steps}: the model predicts {self.chunk_size} commands at once")
        self.model, self.n_action_steps = model.eval(), n_action_steps
        self.temporal_ensemble_coeff, self.instructions = temporal_ensemble_coeff, None

    @classmethod
    def from_pretrained(cls, folder, device="cpu", **options):
        """The policy of a checkpoint of finetune.py; `options`: n_action_steps, temporal_ensemble_coeff."""
        return cls(VLA.from_pretrained(folder).to(device), **options)

    def reset(self, instruction):
        """Begin an episode: one text, or one for each of B episodes."""
        self.single = isinstance(instruction, str)
        self.instructions = [instruction] if self.single else list(instruction)
        self.time, self.chunks = 0, []  # chunks: (time of its first command, (B, H, A))

    def act(self, image, state=None):
        """image (H, W, 3) uint8, state (S,) -> command (A,) float32 in robot units; one more axis with B episodes."""
        if self.instructions is None:
            raise Refused("reset(instruction) comes before act")
        if self.time % self.n_action_steps == 0:
            images, states = ([image], [state]) if self.single else (image, state)
            self.chunks.append((self.time, self.predict(images, states)))
        self.chunks = [(start, chunk) for start, chunk in self.chunks if self.time - start < self.chunk_size]
        now = np.stack([chunk[:, self.time - start] for start, chunk in self.chunks])  # chunks B A, oldest first
        if self.temporal_ensemble_coeff is None:
            action = now[-1]
        else:
            weights = np.exp(-self.temporal_ensemble_coeff * np.arange(len(now)))
            action = np.tensordot(weights / weights.sum(), now, 1)
        self.time += 1
        return np.float32(action[0] if self.single else action)

    def predict(self, images, states=None):
        """Chunks (B, H, A) for B images (and states)."""
        images = [np.asarray(image) for image in images]
        if len(images) != len(self.instructions):
            raise Refused(f"{len(images)} images for {len(self.instructions)} instructions")
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise Refused(f"image {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
        square, device = to_rgb(self.model.config.image_size), self.model.queries.device
        batch = self.model.preprocess([*map(square, images)], self.instructions)
        if self.state_dim:
            if states is None or np.shape(states) != (len(images), self.state_dim):
                raise Refused(f"state has shape {np.shape(states)[1:]}, the policy reads {self.state_dim} numbers")
            batch["state"] = torch.from_numpy(np.asarray(states, np.float32))
            if not batch["state"].isfinite().all():
                raise Refused("state holds NaN or infinity")
        batch = {name: value.to(device) for name, value in batch.items()}
        chunk = self.model.predict_actions(batch).cpu().numpy()
        if not np.isfinite(chunk).all():
            raise Refused("the model predicts NaN or infinity: nothing is sent to the robot")
        return chunk
