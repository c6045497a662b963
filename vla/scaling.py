"""What large models need: weights and optimizer split over GPUs (FSDP2), and memory predicted before the start.

A checkpoint holds the whole weights as a plain Hugging Face folder. The optimizer state lies in resume.pt, or under
--fsdp in shards (torch.distributed.checkpoint, folder optimizer/), which any number of ranks can read.
"""

import inspect
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
from model import VLA, open_backbone
from sources import num_rows

import common


def build(start, config, device, amp, freeze):
    """The model of `start` (see VLA.from_pretrained), split over all ranks: a layer is a group, the rest is another.

    Rank 0 loads the weights, the others build the model on the meta device: the host holds the weights once, not once a
    rank. amp bf16: layers are gathered and computed in bfloat16, their gradients summed over ranks in float32.
    """
    if common.is_main():
        model = VLA.from_pretrained(start, config)
        weights = model.state_dict()
    else:
        model, weights = VLA(config, *open_backbone(start, "meta")), {}
    model.freeze(freeze)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = dict(mesh=mesh, mp_policy=low if amp == "bf16" else MixedPrecisionPolicy())
    for layer in layers_of(model):
        fully_shard(layer, **options)
        if amp == "bf16":
            layer.register_forward_pre_hook(to_bfloat16, with_kwargs=True)
    embeddings, output = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
    if output is not None and output.weight is not embeddings.weight:  # else both are in the root's group
        fully_shard(embeddings, **options)
        fully_shard(output, **options)  # never called, so never gathered
    fully_shard(model, mesh=mesh)
    if not weights:
        model.to_empty(device=device)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=whole)
    for buffer in model.buffers():  # rotary frequencies and statistics are in no state dict
        torch.distributed.broadcast(buffer, 0)
    return model


def to_bfloat16(layer, args, kwargs):
    """Inputs as FSDP hands them to a layer: it does so once, but not where --checkpointing computes the layer again."""
    return tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, (args, kwargs))


def layers_of(model):
    names = set(model.backbone._no_split_modules)
    return [module for module in model.backbone.modules() if type(module).__name__ in names]


def save(folder, model, opt, state, fsdp):
    """Fill a checkpoint folder, which is None but on rank 0. Every rank calls it."""
    if not fsdp:
        if folder:
            model.save_pretrained(folder)
            torch.save(state | dict(opt=get_optimizer_state_dict(model, opt)), folder / "resume.pt")
        return
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    optimizer = get_optimizer_state_dict(model, opt)  # after the weights: these put the root's shards back
    folder = common.broadcast(folder)
    dcp.save({"opt": optimizer}, checkpoint_id=folder / "optimizer")
    if common.is_main():
        model.save_pretrained(folder, weights)
        torch.save(state, folder / "resume.pt")
    common.broadcast()


def load_optimizer(folder, model, opt, state):
    """The optimizer's state, with or without --fsdp, whichever way it was saved. state: resume.pt."""
    if "opt" in state:
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, opt, state["opt"], options=whole)
    else:
        found = {"opt": get_optimizer_state_dict(model, opt)}
        dcp.load(found, checkpoint_id=folder / "optimizer")
        set_optimizer_state_dict(model, opt, found["opt"])


# --- what a run needs


def plan(args, config, sources, world):
    """A text: parameters, memory per process by part, size of a checkpoint, steps per epoch. No weights are loaded."""
    with FakeTensorMode():
        model = VLA(config, *open_backbone(args.init or args.backbone, "cpu")).freeze(args.freeze)
    texts = [clip.meta["instruction"] for source in sources for clip in source.train[:1000]]
    blank = torch.zeros(config.image_size, config.image_size, 3, dtype=torch.uint8).numpy()
    batch = model.preprocess([blank], [max(texts, key=len)])
    samples, tokens, patches = (
        args.batch_size // (args.accum * world),
        batch["input_ids"].shape[1],
        len(batch["pixel_values"]),
    )
    shards = world if args.fsdp else 1
    parts = memory(model, samples, tokens, patches, args.amp, args.checkpointing, shards)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frames = sum(num_rows(clip, source.labels) for source in sources for clip in source.train)
    lines = [
        f"parameters       {total / 1e9:.3f} billion, {trained / 1e9:.3f} billion of them train",
        f"micro-batch      {samples} samples of {tokens} tokens on each of {world} process(es)",
        *(f"memory           {value / 1e9:7.2f} GB  {name}" for name, value in parts.items()),
        f"memory           {sum(parts.values()) / 1e9:7.2f} GB  in all, and 1 to 4 GB for CUDA and fragments",
        f"checkpoint       {(4 * total + 8 * trained) / 1e9:7.2f} GB; --keep {args.keep}, and the best one",
        f"epoch            {frames / args.batch_size:.1f} steps for {frames} frames",
        f"run              {args.steps} steps, {args.steps * args.batch_size / frames:.2f} epochs",
    ]
    return "\n".join(lines)


def memory(model, samples, tokens, patches, amp, checkpointing, shards=1):
    """{part: bytes} of one process in a training step. shards: processes that the weights are split over.

    model: built under FakeTensorMode, so that nothing is computed. tokens and patches: of one of the samples.
    """

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    total, trained = count(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {"weights": 4 * total / shards, "gradients": 4 * trained / shards, "AdamW": 8 * trained / shards}
    if shards > 1:  # two layers and the gradients of one; the embeddings and theirs; what is in no group, in float32
        layers, low = layers_of(model), 2 if amp == "bf16" else 4
        embeddings, output = model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()
        apart = [] if output is None or output.weight is embeddings.weight else [embeddings, output]
        rest = total - count(*layers, *apart)
        parts["gathered"] = (2 * low + 4) * max(map(count, layers)) + (low + 4) * count(*apart[:1]) + 8 * rest
    kept, layer = activations(model, samples, tokens, amp, checkpointing, shards > 1)
    parts["activations"] = kept
    blocks = getattr(model.vision_encoder(), "blocks", ())
    if blocks and any(p.requires_grad for p in blocks.parameters()):  # roughly: as much per patch and width as a layer
        width = (count(blocks[0]) / count(model.decoder_layers()[0])) ** 0.5
        parts["activations of the vision encoder"] = (
            layer * width * patches / tokens * (1 if checkpointing else len(blocks))
        )
    return parts


def activations(model, samples, tokens, amp, checkpointing, split):
    """Bytes that the language model's forward pass keeps for its backward pass, and what one of its layers keeps.

    Two layers are run without computing, and what autograd keeps is counted.
    """
    language = model.backbone.model.language_model
    if "inputs_embeds" not in inspect.signature(language.forward).parameters:
        raise common.DataError(f"--dry-run: it cannot predict the memory of a {type(model.backbone).__name__}")
    layers, depth = language.layers, len(language.layers)
    low = split and amp == "bf16"  # FSDP hands its layers bfloat16 weights and inputs
    x = torch.empty(samples, tokens, model.queries.shape[1], dtype=torch.bfloat16 if low else torch.float32)

    def kept(count):
        """Bytes kept by the first `count` layers and what is around them, weights of the model left out."""
        own = {p.untyped_storage()._cdata for p in language.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage  # held, so that no other storage gets its address
            return tensor

        language.layers = layers[:count]
        dtype = torch.bfloat16 if amp == "bf16" else torch.float16
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                with torch.autocast("cpu", dtype, enabled=amp != "off"):
                    language(inputs_embeds=x.requires_grad_(), use_cache=False)
        finally:
            language.layers = layers
        return sum(storage.nbytes() for storage in storages.values())

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x)
        for parameter in language.parameters():
            parameter.data = parameter.data.to(x.dtype)
        one, two = kept(1), kept(2)
    layer, around = two - one, 2 * one - two
    if not checkpointing:
        return around + depth * layer, layer
    copies = 0 if low or amp == "off" else 2 * sum(p.numel() for p in layers.parameters() if p.requires_grad)
    return around + layer + depth * x.numel() * x.element_size() + copies, layer
