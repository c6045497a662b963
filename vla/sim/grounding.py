"""Grounding warm-up of a tiny backbone: regress where in a picture each named thing is, as web data taught a real one.

Run:
  python vla/sim/grounding.py --backbone runs/tiny --steps 1000

Still pictures of random tabletops, a text that names the things on it in any order, and at each name's token the
regression of its position. Nothing acts here, so a policy learns only how words and pixels belong together. Without it
a model of this size stays on a plateau for thousands of steps before it uses its instruction.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from model import open_backbone
from torch import nn

from sim import tabletop

NAMES = [*tabletop.COLOURS, "robot"]


def scenes(rng, count, pixels, body):
    """`count` random tables: pictures (count, P, P, 3) uint8, positions (count, 5, 2) in [0, 1], ordered as NAMES."""
    tables = tabletop.Tables(count, body, pixels)
    tables.blocks = rng.uniform(tabletop.BLOCK, 1 - tabletop.BLOCK, (count, 4, 2))
    tables.effector = rng.uniform(tabletop.EFFECTOR, 1 - tabletop.EFFECTOR, (count, 2))
    return tables.render(), np.concatenate([tables.blocks, tables.effector[:, None]], 1)


@torch.random.fork_rng(devices=[])  # the caller's own weights do not depend on the warm-up
def warm_up(folder, steps, pixels=32, batch_size=32, lr=1e-3, seed=0, say=print):
    """Train the model in `folder` in place; returns the last 100 steps' root mean square error, in pixels."""
    backbone, processor = open_backbone(folder)
    tokenizer, rng, errors = processor.tokenizer, np.random.default_rng([seed, 3]), []
    tokens = [tokenizer.encode(f" {name}") for name in NAMES]
    assert all(len(token) == 1 for token in tokens), "each name must be one token: put it into the tokenizer's texts"
    tokens = torch.tensor(tokens)[:, 0]
    torch.manual_seed(seed)
    head = nn.Linear(backbone.config.get_text_config().hidden_size, 2)
    opt = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    for step in range(steps):
        images, positions = scenes(rng, batch_size, pixels, list(tabletop.BODIES)[step % len(tabletop.BODIES)])
        texts = []
        for order in rng.permuted(np.tile(np.arange(len(NAMES)), (batch_size, 1)), axis=1):
            content = [dict(type="image"), dict(type="text", text="".join(f" {NAMES[i]}" for i in order))]
            texts.append(processor.apply_chat_template([dict(role="user", content=content)], tokenize=False))
        batch = processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
        predicted = head(backbone.model(**batch).last_hidden_state)  # B L 2
        named = batch["input_ids"][..., None] == tokens  # B L 5
        true = named.float() @ torch.from_numpy(positions).float()  # B L 2
        error = (predicted - true).square().sum(2)[named.any(2)].mean()
        opt.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        opt.step()
        schedule.step()
        errors.append(error.item())
        if (step + 1) % 100 == 0:
            say(f"grounding, step {step + 1}/{steps}: {pixels * np.mean(errors[-100:]) ** 0.5:.2f} pixels off")
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    backbone.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder)
    temporary.rename(folder)
    return pixels * float(np.mean(errors[-100:])) ** 0.5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, metavar="DIR", help="folder of tiny.py; trained in place")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="optimizer steps [1000]")
    parser.add_argument("--pixels", type=int, default=32, metavar="N", help="side of the pictures [32]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of tables and weights [0]")
    args = parser.parse_args(argv)
    warm_up(args.backbone, args.steps, args.pixels, seed=args.seed)


if __name__ == "__main__":
    main()
