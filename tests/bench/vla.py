"""Speed and memory of vla: stage 2 against the transformers Trainer, the world, the policy's latency.

Run:
  python tests/bench/vla.py --width 128 --depth 3 --vocabulary 32000 --threads 1

The Trainer fine-tunes the same backbone on the same batch in the usual way: the latent codes are words of the
vocabulary at the end of the text, and the loss is the softmax over the vocabulary at every position. Times are
medians of this process's CPU time, the sides taking turns, so a busy machine disturbs the ratios little. Memory:
bytes that autograd keeps for the backward pass (on a GPU also the allocator's peak).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, load

vla = load("vla", "demo", "policy", "sim.tabletop", "sim.tiny")
vla.tabletop, vla.tiny = vars(vla)["sim.tabletop"], vars(vla)["sim.tiny"]


def kept(function):
    """Bytes that autograd keeps for the backward pass of what `function` computes, each storage counted once."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = function()
    loss.backward()
    return sum(storages.values())


def backbone_of(folder, vocabulary):
    backbone, processor = vla.model.open_backbone(folder)
    if vocabulary > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(vocabulary, mean_resizing=False)
    return backbone, processor


def ours(folder, args, images, texts):
    """One optimizer step of stage 2 with cross-entropy on the codes, as train.py does it; and its loss alone."""
    statistics = dict(mean=[[0.0] * 2] * 4, std=[[1.0] * 2] * 4, weight=[[0.5] * 2] * 4)
    latent = vla.model.LatentConfig(8, 4, 2, [[[0.0] * 2] * 8] * 4, **statistics, target="codes")
    config = vla.model.VLAConfig("{instruction}", 4, 32, latent=latent)
    model = vla.model.VLA(config, *backbone_of(folder, args.vocabulary)).train()
    batch = model.preprocess(images, texts)
    batch |= dict(codes=torch.randint(8, (len(images), 4)))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step():
        model(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

    return step, lambda: model(batch)[0], batch["input_ids"].shape


def trainers(folder, args, images, texts, scratch):
    """The same with transformers.Trainer: its training_step and its optimizer, clipping as it clips."""
    from transformers import Trainer, TrainingArguments

    backbone, processor = backbone_of(folder, args.vocabulary)
    words = [f"<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>" for text in texts]
    batch = dict(processor(text=words, images=[[image] for image in images], padding=True, return_tensors="pt"))
    ids, n = batch["input_ids"], len(images)
    codes = torch.randint(10, 18, (n, 4))  # eight words of the vocabulary stand for the codes
    batch["input_ids"] = torch.cat([ids, codes], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(n, 4, dtype=torch.int64)], 1)
    batch["labels"] = torch.cat([torch.full_like(ids, -100), codes], 1)
    options = TrainingArguments(scratch, per_device_train_batch_size=n, learning_rate=1e-4, report_to=[], use_cpu=True)
    trainer = Trainer(backbone, options)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # its train() would set this
    trainer.model.train()

    def step():
        trainer.training_step(trainer.model, dict(batch))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return step, lambda: trainer.compute_loss(trainer.model, dict(batch)), batch["input_ids"].shape


def bench_training(args, folder, rows):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 255, (args.batch_size, 32, 32, 3)).astype(np.uint8))
    texts = ["robot, push the red block to the left"] * args.batch_size
    with tempfile.TemporaryDirectory() as scratch:
        mine, theirs = ours(folder, args, images, texts), trainers(folder, args, images, texts, scratch)
        assert mine[2] == theirs[2], f"not the same sequences: {mine[2]}, {theirs[2]}"
        seconds = interleaved(dict(ours=mine[0], trainer=theirs[0]), args.repeats)
        memory = dict(ours=kept(mine[1]), trainer=kept(theirs[1]))
    tokens = mine[2][0] * mine[2][1]
    for name in ("ours", "trainer"):
        speed = f"{1e3 * seconds[name]:.0f} ms, {tokens / seconds[name]:.0f} tokens/s"
        rows.append((f"stage-2 step, {name}", speed, f"{seconds[name] / seconds['trainer']:.2f} x"))
    for name in ("ours", "trainer"):
        size = f"{memory[name] / 2**20:.0f} MiB kept"
        rows.append((f"activations, {name}", size, f"{memory[name] / memory['trainer']:.2f} x"))


def bench_world(args, rows):
    for n in (1, 64):
        tables = vla.tabletop.Tables(n)
        tables.reset(range(n))
        actions = np.full((n, 2), 0.01)
        seconds = interleaved(dict(step=lambda: [tables.step(actions) for _ in range(20)]), args.repeats)["step"]  # noqa: B023
        rows.append((f"tabletop, {n} table(s), rendered", f"{20 * n / seconds:.0f} steps/s", ""))


def bench_policy(args, folder, rows):
    config = vla.model.VLAConfig("robot, {instruction}", action=vla.model.ActionConfig(2, 8, [0.0] * 2, [1.0] * 2))
    model = vla.model.VLA(config, *vla.model.open_backbone(folder))
    image = np.zeros((32, 32, 3), np.uint8)
    for every in (1, 8):
        policy = vla.policy.Policy(model, every)
        policy.reset("push the red block to the left")
        seconds = interleaved(dict(act=lambda: [policy.act(image) for _ in range(16)]), args.repeats)["act"]  # noqa: B023
        rows.append((f"policy.act, mean of 16, n_action_steps {every}", f"{1e3 * seconds / 16:.1f} ms", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="of the language model")
    parser.add_argument("--depth", type=int, default=3, help="its layers")
    parser.add_argument(
        "--vocabulary", type=int, default=32000, help="words of the softmax that the Trainer's loss takes"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "backbone"
        vla.tiny.build(folder, ["robot, push the red block to the left"], width=args.width, depth=args.depth)
        bench_training(args, folder, rows)
        bench_policy(args, folder, rows)
    bench_world(args, rows)
    print("| what | measured | ratio |\n| --- | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
