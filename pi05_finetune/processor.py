"""What Pi05 reads and writes: the tokenizer, LeRobot's processors around it, relative actions.

The prompt holds the task and the normalised state, each number as one of 256 bins: `Task: pick up the cup, State: 12
200 ...;` and a line `Action: `. Values beyond the bins become -1 or 255, as in openpi.
"""

import json
from pathlib import Path

import torch
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
    TransitionKey,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot_patch import TINY_VOCABULARY

from common import DataError

PALIGEMMA = "google/paligemma-3b-pt-224"


def write_toy_tokenizer(folder, tasks=()):
    """A tokenizer for random weights: words of the tasks, whole numbers to 255, characters, bytes for the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), "\n"]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(str(n), normalized=False) for n in range(256)])
    words = sorted({word for task in tasks for word in task.replace("_", " ").split() if word.isalpha()})
    room = TINY_VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words[:room]])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def check_tokenizer(folder, size):
    """Raise unless the local folder holds a tokenizer that a model of `size` can use; nothing is downloaded.

    The tiny size may do without (None): then write_toy_tokenizer makes one.
    """
    from transformers import AutoTokenizer

    if folder is None and size == "tiny":
        return
    if folder is None:
        raise DataError(
            f"--tokenizer is needed with --size {size}: a local folder with the tokenizer of {PALIGEMMA}; the toy "
            "tokenizer means nothing to pretrained weights"
        )
    if not Path(folder).is_dir():
        raise DataError(
            f"tokenizer {folder}: no such folder; expected PaliGemma's tokenizer.json and tokenizer_config.json in it "
            f"(accept the licence at huggingface.co/{PALIGEMMA}, then: hf download {PALIGEMMA} --include 'token*')"
        )
    try:
        count = len(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except Exception as error:  # transformers raises half a dozen kinds for a folder without a tokenizer
        raise DataError(f"tokenizer {folder}: cannot be read ({str(error).splitlines()[0][:150]})") from None
    if size == "tiny" and count > TINY_VOCABULARY:
        raise DataError(f"tokenizer {folder}: {count} tokens; the tiny model knows {TINY_VOCABULARY}")
    if size == "full" and not 250_000 < count <= 257_216:
        raise DataError(f"tokenizer {folder}: {count} tokens; that of {PALIGEMMA} has about 257,000")


# --- relative actions


def register(name):
    """Register a processor step under a name of ours, also when this module is imported a second time."""
    ProcessorStepRegistry.unregister(name)
    return ProcessorStepRegistry.register(name)


@register("pi05_finetune_to_relative")
class ToRelative(ProcessorStep):
    """Subtract the state from the actions of a training batch, and keep the state for ToAbsolute.

    state_index: for each action dim the dim of the state that it is relative to, or -1 where it stays absolute.
    """

    unpaired = None  # the one that the next ToAbsolute belongs to: LeRobot builds the two in this order, apart

    def __init__(self, state_index):
        self.state_index, self.offset = list(state_index), None
        ToRelative.unpaired = self

    def __call__(self, transition):
        state = transition[TransitionKey.OBSERVATION]["observation.state"]  # B S
        index = torch.tensor(self.state_index, device=state.device)
        self.offset = torch.where(index < 0, 0.0, state.float()[:, index.clamp(min=0)])[:, None]  # B 1 A
        action = transition.get(TransitionKey.ACTION)
        if action is None:
            return transition
        return {**transition, TransitionKey.ACTION: action - self.offset.to(action.device)}

    def get_config(self):
        return dict(state_index=self.state_index)

    def transform_features(self, features):
        return features


@register("pi05_finetune_to_absolute")
class ToAbsolute(ProcessorStep):
    """Add the state that the chunk was predicted from. Without ToRelative, or for a part of a chunk, it refuses."""

    def __init__(self):
        self.relative, ToRelative.unpaired = ToRelative.unpaired, None
        if self.relative is None:
            raise DataError("the post-processor of relative actions needs its pre-processor, loaded just before it")

    def __call__(self, transition):
        action, offset = transition[TransitionKey.ACTION], self.relative.offset
        if action.ndim != 3 or offset is None or len(offset) != len(action):
            raise DataError(
                "relative actions become absolute by whole chunks (B, T, A) of the observations just pre-processed: "
                "use predict_action_chunk, not select_action, which gives actions of an older state"
            )
        self.relative.offset = None  # once for each observation
        return {**transition, TransitionKey.ACTION: action + offset.to(action.device)}

    def transform_features(self, features):
        return features


# --- the processors


class Processor:
    """LeRobot's processors on the tokenizer of a local folder. It holds no weights: loader processes have a copy.

    config: PI05Config. stats: {"observation.state": {q01, q99, ...}, "action": {...}}, lists of S and A numbers.
    state_index: see ToRelative; None where all actions are absolute.
    """

    def __init__(self, config, stats, tokenizer, state_index=None):
        self.tokenizer, self.action_dim = str(tokenizer), config.output_features["action"].shape[0]
        # a resumed run takes it from a checkpoint, which --keep removes while the run goes on
        files = (file for file in Path(tokenizer).iterdir() if file.suffix in (".json", ".model", ".txt", ".jinja"))
        self.files = {file.name: file.read_bytes() for file in files}  # not weights that lie beside it
        self.state_dim = config.input_features["observation.state"].shape[0]
        stats = {key: {name: torch.tensor(row) for name, row in rows.items()} for key, rows in stats.items()}
        features, mapping = {**config.input_features, **config.output_features}, config.normalization_mapping
        length = config.tokenizer_max_length
        self.preprocessor = PolicyProcessorPipeline(
            steps=[
                RenameObservationsProcessorStep(rename_map={}),
                AddBatchDimensionProcessorStep(),
                *([] if state_index is None else [ToRelative(state_index)]),
                NormalizerProcessorStep(features=features, norm_map=mapping, stats=stats),
                Pi05PrepareStateTokenizerProcessorStep(max_state_dim=self.state_dim),
                TokenizerProcessorStep(tokenizer_name=self.tokenizer, max_length=length, padding_side="right"),
                DeviceProcessorStep(device="cpu"),
            ],
            name="policy_preprocessor",
        )
        self.postprocessor = PolicyProcessorPipeline(
            steps=[
                UnnormalizerProcessorStep(features=config.output_features, norm_map=mapping, stats=stats),
                *([] if state_index is None else [ToAbsolute()]),
                DeviceProcessorStep(device="cpu"),
            ],
            name="policy_postprocessor",
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        )

    def __call__(self, batch):
        """Robot units -> what Pi05's forward and predict read. Runs on the CPU, also in a loader's process.

        batch: observation.images.NAME (B, 3, H, W) in [0, 1], observation.state (B, S), task: B texts; and for the loss
        action (B, T, A), mask (B, T), noise (B, T, 32), time (B,).
        """
        names = ("task", "action")
        done = self.preprocessor({k: v for k, v in batch.items() if k.startswith("observation.") or k in names})
        tokens, seen = done["observation.language.tokens"], done["observation.language.attention_mask"]
        if seen[:, -1].any():
            longest = batch["task"][int(seen.sum(1).argmax())]
            raise DataError(
                f"the prompt of task {longest[:60]!r} fills all {tokens.shape[1]} tokens: raise --prompt-tokens"
            )
        ready = {key: value for key, value in done.items() if key.startswith("observation.images.")}
        ready |= {"observation.language.tokens": tokens, "observation.language.attention_mask": seen}
        ready |= dict(action=done["action"]) if "action" in batch else {}
        return ready | {key: batch[key] for key in ("mask", "noise", "time") if key in batch}

    def check_prompts(self, tasks, stats):
        """Raise for a task whose prompt may not fit, with a state beyond its range on one side or the other."""
        low, high = (torch.tensor(stats["observation.state"][name]) for name in ("q01", "q99"))
        for task in sorted(set(tasks)):
            for end in (low - (high - low), high + (high - low)):  # bins -1 and 255
                self({"observation.state": end[None], "task": [task]})

    def undo(self, actions):
        """Normalised actions (B, T, A) of the batch that was processed last -> robot units, float32, on the CPU."""
        return self.postprocessor(actions.float().cpu())

    def save_pretrained(self, folder, size):
        """LeRobot's processor files and the tokenizer. The files name PaliGemma's tokenizer by its name on the hub."""
        folder = Path(folder)
        self.preprocessor.save_pretrained(folder)
        self.postprocessor.save_pretrained(folder)
        path, name = folder / "policy_preprocessor.json", PALIGEMMA if size == "full" else "tokenizer"
        path.write_text(path.read_text().replace(json.dumps(self.tokenizer), json.dumps(name)))
        (folder / "tokenizer").mkdir(exist_ok=True)
        for name, data in self.files.items():
            (folder / "tokenizer" / name).write_bytes(data)
