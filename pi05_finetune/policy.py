"""A trained Pi05 as a robot's policy: one instruction, then images and state in, one action out per control step.

vla/server.py serves it to openpi's client:
  python vla/server.py --checkpoint CKPT --policy pi05_finetune/policy.py --image-key front=observation/image
"""

import numpy as np
import torch
from data import shrink
from model import Pi05


class Policy:
    """policy = Policy.from_pretrained(dir); policy.reset("push the red block"); action = policy.act(images, state).

    images: {camera: (H, W, 3) uint8} by the checkpoint's names, or the array itself where there is one camera.
    n_action_steps: control steps between two predictions; None carries out whole chunks. Several episodes can run side
    by side: reset with a list of B instructions, predict for lists of B. ValueError for what the model cannot act on.
    """

    def __init__(self, model, n_action_steps=None, seed=0):
        self.model, self.cameras, self.state_dim = model.eval(), model.config.cameras, model.config.state_dim
        self.n_action_steps = min(n_action_steps or model.config.chunk, model.config.chunk)
        self.random, self.instructions = torch.Generator().manual_seed(seed), None

    @classmethod
    def from_pretrained(cls, folder, device="cpu", tokenizer=None, **options):
        return cls(Pi05.from_pretrained(folder, torch.device(device), tokenizer), **options)

    def reset(self, instruction):
        """Begin an episode: one text, or one for each of B episodes."""
        self.instructions, self.time = [instruction] if isinstance(instruction, str) else list(instruction), 0

    def act(self, images, state):
        """Images and state (S,) -> action (A,) float32 in robot units."""
        if self.instructions is None:
            raise ValueError("reset(instruction) comes before act")
        if self.time % self.n_action_steps == 0:
            self.chunk = self.predict([images], [state])[0]
        self.time += 1
        return self.chunk[(self.time - 1) % self.n_action_steps]

    def run(self, worlds, seed=0):
        """Act in simulated worlds side by side, each by its own instruction, until all have ended.

        A world has `task`, observe() -> ({camera: (H, W, 3) uint8}, state (S,)), step(action), `ended`, `success`.
        """
        self.random.manual_seed(seed)
        while running := [world for world in worlds if not world.ended]:
            self.reset([world.task for world in running])
            chunks = self.predict(*zip(*(world.observe() for world in running), strict=True))
            for world, chunk in zip(running, chunks, strict=True):
                for action in chunk[: self.n_action_steps]:
                    if not world.ended:
                        world.step(action)

    def predict(self, images, states):
        """Chunks (B, T, A) float32 for B images (or dicts of images) and states."""
        states = np.asarray(states, np.float32)
        if len(images) != len(self.instructions) or states.shape != (len(images), self.state_dim):
            expected = f"({len(self.instructions)}, {self.state_dim})"
            raise ValueError(f"{len(images)} images and states {states.shape}, expected states of {expected}")
        images = [image if isinstance(image, dict) else {self.cameras[0]: image} for image in images]
        batch = {"task": self.instructions, "observation.state": torch.from_numpy(states)}
        for name in self.cameras:
            frames = [np.asarray(image[name]) if name in image else None for image in images]
            for frame in frames:
                if frame is None or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
                    found = "missing" if frame is None else f"{frame.dtype} {frame.shape}"
                    raise ValueError(f"image of camera {name}: {found}, expected uint8 (H, W, 3)")
            small = [torch.from_numpy(shrink(frame, self.model.config.image_size)) for frame in frames]
            batch[f"observation.images.{name}"] = torch.stack(small).movedim(-1, 1)
        batch["noise"] = torch.randn(len(images), self.model.config.chunk, 32, generator=self.random)
        chunk = self.model.predict(batch).numpy()
        if not np.isfinite(chunk).all():
            raise ValueError("the model predicts NaN or infinity: nothing is sent to the robot")
        return chunk
