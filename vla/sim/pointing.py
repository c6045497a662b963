"""Teach a tiny backbone to see, as web data taught the real one: where in a picture is what the text names?

Run:
  python vla/sim/pointing.py --backbone runs/tiny --steps 1000

Still pictures of random tables, a text that names the things on it in any order, and at each name the regression of its
place. Nothing moves and nobody acts, so a policy learns nothing here but what words and pictures have to do with one
another. Without it so small a model sits on a plateau for thousands of steps before it reads its instruction at all.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from model import open_backbone
from torch import nn

from sim import world

NAMES = [*world.COLOURS, "robot"]


def scenes(rng, count, pixels, body):
    """`count` random tables: pictures (count, P, P, 3) uint8, places (count, 5, 2) in [0, 1], ordered as NAMES."""
    tables = world.Tables(count, body, pixels)
    tables.blocks = rng.uniform(world.BLOCK, 1 - world.BLOCK, (count, 4, 2))
    tables.effector = rng.uniform(world.EFFECTOR, 1 - world.EFFECTOR, (count, 2))
    return tables.render(), np.concatenate([tables.blocks, tables.effector[:, None]], 1)


@torch.random.fork_rng(devices=[])  # train.py's own weights do not depend on who wrote the demo
def teach(folder, steps, pixels=32, batch_size=32, lr=1e-3, seed=0, say=print):
    """Train the model in `folder` in place; returns the last 100 steps' root mean square error, in pixels."""
    backbone, processor = open_backbone(folder)
    tokenizer, rng, errors = processor.tokenizer, np.random.default_rng([seed, 3]), []
    tokens = [tokenizer.encode(f" {name}") for name in NAMES]
    assert all(len(token) == 1 for token in tokens), "each name must be one token: put it into the tokenizer's texts"
    tokens = torch.tensor(tokens)[:, 0]
    torch.manual_seed(seed)
    place = nn.Linear(backbone.config.get_text_config().hidden_size, 2)
    opt = torch.optim.AdamW([*backbone.parameters(), *place.parameters()], lr, betas=(0.9, 0.95), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    for step in range(steps):
        images, places = scenes(rng, batch_size, pixels, list(world.BODIES)[step % len(world.BODIES)])
        texts = []
        for order in rng.permuted(np.tile(np.arange(len(NAMES)), (batch_size, 1)), axis=1):
            talk = [dict(type="image"), dict(type="text", text="".join(f" {NAMES[i]}" for i in order))]
            texts.append(processor.apply_chat_template([dict(role="user", content=talk)], tokenize=False))
        batch = processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
        said = place(backbone.model(**batch).last_hidden_state)  # B L 2
        named = batch["input_ids"][..., None] == tokens  # B L 5
        true = named.float() @ torch.from_numpy(places).float()  # B L 2
        error = (said - true).square().sum(2)[named.any(2)].mean()
        opt.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        opt.step()
        rate.step()
        errors.append(error.item())
        if (step + 1) % 100 == 0:
            say(f"pointing, step {step + 1}/{steps}: {pixels * np.mean(errors[-100:]) ** 0.5:.2f} pixels off")
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
    teach(args.backbone, args.steps, args.pixels, seed=args.seed)


if __name__ == "__main__":
    main()
