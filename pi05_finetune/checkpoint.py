"""Policy folders: weights under LeRobot's names, strict loading, what a resumed run needs, a golden prediction.

| file | holds |
| --- | --- |
| config.json, policy_*processor.json | what LeRobot opens |
| model.safetensors | the weights for prediction: averaged, adapters merged |
| pi05_finetune.json, tokenizer/ | what Pi05.from_pretrained opens |
| golden.json | the prediction for an artificial observation; it is compared when the folder is opened |
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot_patch import TINY_TAG
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from common import DataError, broadcast, is_main, load, read_json

EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"  # the same tensor
GOLDEN_TOLERANCE = 0.1  # of half an action's range: bfloat16 and other kernels stay below


def export_state_dict(model):
    """The policy's weights as LeRobot names them: averaged, adapters merged, the tied embedding once."""
    state = {}
    with model.use_ema():
        for name, value in model.policy.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value  # every rank gives its part
            if is_main():
                state[name] = value.to("cpu", copy=True)
    for name in [name for name in state if name.endswith(".lora_a")]:
        stem = name.removesuffix("lora_a")
        change = state.pop(stem + "lora_b").float() @ state.pop(name).float()
        state[stem + "weight"] = state[stem + "weight"].float() + change  # bfloat16 would round it away
    state.pop(EMBEDDING, None)  # safetensors refuses two names for one tensor
    return {name: value.contiguous() for name, value in state.items()}


def save(model, folder):
    """Fill a policy folder. Of a split model every rank calls it, with a folder on rank 0 and None on the others."""
    weights = export_state_dict(model)
    with model.use_ema():
        golden = golden_prediction(model)
    if folder is None:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.policy.config.save_pretrained(folder)
    fields = read_json(folder / "config.json")
    default = json.loads(json.dumps(vars(PI05Config(device="cpu")), default=str))
    kept = ("type", "input_features", "output_features", "normalization_mapping", "device", "tags")
    fields = {k: v for k, v in fields.items() if k in kept or k not in default or default[k] != v}
    (folder / "config.json").write_text(json.dumps(fields, indent=1))  # an older LeRobot lacks the newest fields
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    model.processor.save_pretrained(folder, model.config.size)
    (folder / "pi05_finetune.json").write_text(json.dumps(vars(model.config), indent=1))
    (folder / "golden.json").write_text(json.dumps(golden.tolist()))


# --- what a resumed run needs: resume.pt, and of a split model shards/, which any number of processes can read


def save_run(folder, model, opt, state, data):
    """Fill a checkpoint of train.py. Every rank calls it; folder is None but on rank 0. data: of data.json."""
    if folder or model.is_split:
        save(model, folder)
    if model.is_split:
        parts = dict(opt=get_optimizer_state_dict(model, opt), weights=training_state(model))
        dcp.save(parts, checkpoint_id=broadcast(folder) / "shards")
    else:
        state |= dict(opt=opt.state_dict(), weights=training_state(model))
    if folder:
        torch.save(state, folder / "resume.pt")
        (folder / "data.json").write_text(json.dumps(data, indent=1))


def load_run(folder, model, opt):
    """Set a model that holds the exported weights, and its optimizer, to what save_run kept; returns resume.pt."""
    state = load(folder / "resume.pt")
    if ("opt" in state) == model.is_split:
        raise DataError("--resume: --fsdp as before, please: a split run keeps its optimizer in parts")
    if model.is_split:
        parts = dict(opt=get_optimizer_state_dict(model, opt), weights=training_state(model))
        dcp.load(parts, checkpoint_id=folder / "shards")
        set_optimizer_state_dict(model, opt, parts["opt"])
    else:
        opt.load_state_dict(state["opt"])
        load_training_state(model, state["weights"])
    return state


def training_state(model):
    """What a resumed run needs beside the exported weights: weights in training, bases of the adapters."""
    if not model.ema and model.config.train != "lora":
        return {}
    wanted = {name for name, p in model.policy.named_parameters() if p.requires_grad}
    wanted |= {name.replace("lora_a", "weight") for name in wanted if name.endswith("lora_a")}
    state = {name: p.detach() for name, p in model.policy.named_parameters() if name in wanted}
    return state | {f"ema.{name}": value for name, value in model.ema.items() if "lora_" in name}


@torch.no_grad()
def load_training_state(model, state):
    """Continue with the weights of training_state; the average began at the exported weights, adapters apart."""
    parameters = dict(model.policy.named_parameters())
    for name, value in state.items():
        (model.ema[name[4:]] if name.startswith("ema.") else parameters[name]).copy_(value)


def read_config(folder):
    """The fields of pi05_finetune.json; of a folder that LeRobot itself has written, the same from its own files."""
    path = Path(folder) / "pi05_finetune.json"
    if not path.exists() and (Path(folder) / "policy_preprocessor.json").exists():
        return read_lerobot_config(Path(folder))
    if not path.exists():
        raise DataError(f"{folder}: holds no {path.name}; expected a folder such as RUN/checkpoints/best")
    fields = read_json(path)
    if not isinstance(fields, dict) or not {"cameras", "stats", "state_index"} <= set(fields):
        raise DataError(f"{path}: not a configuration of Pi05")
    return fields


def read_lerobot_config(folder):
    """Sizes and cameras of config.json, and the statistics that lie beside policy_preprocessor.json."""
    config = {**vars(PI05Config(device="cpu")), **read_json(folder / "config.json")}
    steps = read_json(folder / "policy_preprocessor.json")["steps"]
    own = next((step for step in steps if step.get("registry_name") == "normalizer_processor"), {})
    kinds = {name: str(config["normalization_mapping"].get(name)) for name in ("STATE", "ACTION")}
    file = folder / own.get("state_file", "no statistics")  # pi05_base has none
    if config["type"] != "pi05" or not file.is_file() or set(kinds.values()) != {"QUANTILES"}:
        found = f"{config['type']}, {kinds}" + ("" if file.is_file() else f", and {file.name} is not there")
        raise DataError(f"{folder}: expected a pi05 policy with QUANTILES statistics, found {found}")
    on = [step.get("registry_name", "") for step in steps if step.get("config", {}).get("enabled", True)]
    if relative := [name for name in on if "relative" in name]:  # LeRobot >= 0.5.1 writes the step, on or off
        raise DataError(f"{folder}: its actions pass through {relative[0]}, which is not read here")
    stats, inputs = {"observation.state": {}, "action": {}}, config["input_features"]
    for name, value in load_file(file).items():
        key, _, stat = name.rpartition(".")
        if key in stats:
            stats[key][stat] = value.flatten().tolist()
    cameras = [name.removeprefix("observation.images.") for name in inputs if name.startswith("observation.images.")]
    return dict(
        cameras=[name for name in cameras if not name.startswith("empty_camera")],
        state_dim=len(stats["observation.state"]["q01"]),  # config.json: pi05_base's 32 under --policy.path
        action_dim=config["output_features"]["action"]["shape"][0],
        stats=stats,
        size="tiny" if TINY_TAG in (config["tags"] or []) else "full",
        chunk=config["chunk_size"],
        image_size=config["image_resolution"][0],
        prompt_tokens=config["tokenizer_max_length"],
        denoise_steps=config["num_inference_steps"],
        state_index=None,
    )


def load_weights(model, folder):
    """Weights of model.safetensors under LeRobot's or openpi's names, strictly."""
    folder = Path(folder)
    file = folder / "model.safetensors"
    if not file.exists():
        raise DataError(f"{folder}: no {file.name} in it; expected the folder of a Pi05 policy")
    own = folder / "pi05_finetune.json"
    before = read_json(own) if own.exists() else {}
    for name in ("size", "image_size", "cameras", "state_dim", "action_dim"):
        here = getattr(model.config, name)
        if before.get(name, here) != here:
            cure = f"; without {own.name} in that folder the weights are loaded all the same"
            raise DataError(f"{folder}: has {name} {before[name]}, but this run {here}{cure}")
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({str(error)[:150]}); fetch or copy it again") from None
    if not any(name.startswith("model.") for name in state):  # openpi's own names
        state = model.policy._fix_pytorch_state_dict_keys(state, model.policy.config)
        state = {f"model.{name}": value for name, value in state.items()}
    state.setdefault(EMBEDDING, state.get(HEAD))
    state.setdefault(HEAD, state[EMBEDDING])
    wanted = model.policy.state_dict()
    adapters = {name for name in wanted if ".lora_" in name}
    missing, unknown = sorted(set(wanted) - set(state) - adapters), sorted(set(state) - set(wanted))
    if missing or unknown or state[HEAD] is None:
        raise DataError(
            f"{file}: {len(missing)} tensors are missing ({', '.join(missing[:2]) or '-'}) and {len(unknown)} are "
            f"unknown ({', '.join(unknown[:2]) or '-'}): not the weights of this policy"
        )
    wrong = [name for name in state if state[name].shape != wanted[name].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, expected {tuple(wanted[wrong[0]].shape)}"
        raise DataError(f"{file}: {wrong[0]} has shape {shapes} ({len(wrong)} such): another size of the model")
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise DataError(f"{file}: {bad[0]} holds NaN or infinity ({len(bad)} such)")
    model.policy.load_state_dict(state, strict=not adapters)


# --- the golden prediction


@torch.no_grad()
def golden_prediction(model):
    """Actions (T, A), as shares of half their normalised range, for an observation that formulas make."""
    config = model.config
    q01, q99 = (torch.tensor(config.stats["action"][name]) for name in ("q01", "q99"))
    low, high = (torch.tensor(config.stats["observation.state"][name]) for name in ("q01", "q99"))
    ramp = torch.linspace(0, 1, config.image_size)
    batch = {f"observation.images.{name}": ramp.expand(1, 3, config.image_size, -1) for name in config.cameras}
    batch |= {"observation.state": ((low + high) / 2)[None], "task": ["do it"]}
    batch["noise"] = torch.sin(torch.arange(config.chunk * 32.0)).reshape(1, config.chunk, 32)
    return (model.predict(batch)[0] / ((q99 - q01) / 2)).numpy()


def verify(model, folder):
    """Raise where the model of a checkpoint no longer gives the prediction that was stored with it."""
    path = Path(folder) / "golden.json"
    if path.exists():
        error = float(np.abs(golden_prediction(model) - np.asarray(read_json(path))).max())
        if not error < GOLDEN_TOLERANCE:
            cure = "another version of lerobot, transformers or of these files?"
            raise DataError(f"{folder}: its golden prediction comes out {error:.2g} of the range away: {cure}")
