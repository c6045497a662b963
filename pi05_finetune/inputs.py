"""What Pi05 reads and writes: the tokenizer, LeRobot's processors around it, relative actions.

The prompt holds the task and the normalised state, each number as one of 256 bins: `Task: pick up the cup, State: 12
200 ...;` and a line `Action: `. Values beyond the bins become -1 or 255, as in openpi.
"""

import json
import shutil
from pathlib import Path

import compat
import torch

PALIGEMMA = "google/paligemma-3b-pt-224"


def write_toy_tokenizer(folder):
    """A tokenizer for random weights, written in an instant: whole numbers to 255, characters, bytes for the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), "\n"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.add_tokens([AddedToken(str(n), normalized=False) for n in range(256)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def check_dims(cameras, state_dim, action_dim):
    if not cameras:
        raise ValueError("Pi05 reads at least one camera: name it in the spec's required_obs_keys")
    if max(action_dim, state_dim) > 32:
        raise ValueError(
            f"{action_dim} action dims and {state_dim} state dims: Pi05 has room for 32 of each; convert.py --dims "
            "selects some"
        )


def check_tokenizer(folder, size):
    """The tokenizer of a local folder, if a model of `size` can use it; nothing is downloaded."""
    from transformers import AutoTokenizer

    if folder is None:
        raise ValueError(
            f"--tokenizer is needed with --size {size}: a local folder with the tokenizer of {PALIGEMMA}; the toy "
            "tokenizer means nothing to pretrained weights"
        )
    if not Path(folder).is_dir():
        raise ValueError(
            f"tokenizer {folder}: no such folder; expected PaliGemma's tokenizer.json and tokenizer_config.json in it "
            f"(accept the licence at huggingface.co/{PALIGEMMA}, then: hf download {PALIGEMMA} --include 'token*')"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises half a dozen kinds for a folder without a tokenizer
        raise ValueError(f"tokenizer {folder}: cannot be read ({str(error).splitlines()[0][:150]})") from None
    if size == "tiny" and len(tokenizer) > compat.TINY_VOCABULARY:
        raise ValueError(f"tokenizer {folder}: {len(tokenizer)} tokens; the tiny model knows {compat.TINY_VOCABULARY}")
    if size == "full" and not 250_000 < len(tokenizer) <= 257_152:
        raise ValueError(f"tokenizer {folder}: {len(tokenizer)} tokens; that of {PALIGEMMA} has about 257,000")
    return tokenizer


class Inputs:
    """LeRobot's processors on the tokenizer of a local folder. Holds no weights, so loader processes can have a copy.

    config: PI05Config. stats: {"observation.state": {q01, q99, ...}, "action": {...}}, lists of S and A numbers.
    absolute: for relative actions, the action dims (a list) that stay absolute; None: all actions are absolute.
    """

    def __init__(self, config, stats, tokenizer, absolute=None, old_inputs=False):
        from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep as PrepareState
        from lerobot.processor import (
            AddBatchDimensionProcessorStep,
            DeviceProcessorStep,
            NormalizerProcessorStep,
            PolicyProcessorPipeline,
            RenameObservationsProcessorStep,
            TokenizerProcessorStep,
            UnnormalizerProcessorStep,
        )
        from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

        self.tokenizer, self.absolute = str(tokenizer), absolute
        self.state_dim = config.input_features["observation.state"].shape[0]
        self.action_dim = config.output_features["action"].shape[0]
        stats = {key: {name: torch.tensor(row) for name, row in rows.items()} for key, rows in stats.items()}
        features, mapping = {**config.input_features, **config.output_features}, config.normalization_mapping
        steps = [
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            NormalizerProcessorStep(features=features, norm_map=mapping, stats=stats),
            PrepareState(max_state_dim=32 if old_inputs else self.state_dim),
            TokenizerProcessorStep(
                tokenizer_name=self.tokenizer, max_length=config.tokenizer_max_length, padding_side="right"
            ),
            DeviceProcessorStep(device="cpu"),
        ]
        self.preprocessor = PolicyProcessorPipeline(steps=steps, name="policy_preprocessor")
        undo = UnnormalizerProcessorStep(features=config.output_features, norm_map=mapping, stats=stats)
        self.postprocessor = PolicyProcessorPipeline(
            steps=[undo, DeviceProcessorStep(device="cpu")],
            name="policy_postprocessor",
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        )

    def offset(self, state):
        """What relative actions are relative to: state (B, S) -> (B, 1, A), zero in absolute dims."""
        offset = torch.zeros(len(state), 1, self.action_dim)
        if self.absolute is not None:
            offset[:, 0] = state[:, : self.action_dim]
            offset[..., self.absolute] = 0
        return offset

    def __call__(self, batch):
        """Robot units -> what Pi05's forward and predict read. Runs on the CPU, also in a loader's process.

        batch: observation.images.NAME (B, 3, H, W) in [0, 1], observation.state (B, S), task: B texts; and for the loss
        action (B, T, A), mask (B, T), noise (B, T, 32), time (B,).
        """
        inputs = {key: value for key, value in batch.items() if key.startswith("observation.") or key == "task"}
        if "action" in batch:
            inputs["action"] = batch["action"] - self.offset(batch["observation.state"])
        done = self.preprocessor(inputs)
        tokens, seen = done["observation.language.tokens"], done["observation.language.attention_mask"]
        if seen[:, -1].any():
            longest = batch["task"][int(seen.sum(1).argmax())]
            raise ValueError(
                f"the prompt of task {longest[:60]!r} fills all {tokens.shape[1]} tokens: raise --prompt-tokens"
            )
        ready = {key: value for key, value in done.items() if key.startswith("observation.images.")}
        ready |= {"observation.language.tokens": tokens, "observation.language.attention_mask": seen}
        ready |= dict(action=done["action"]) if "action" in batch else {}
        return ready | {key: batch[key] for key in ("mask", "noise", "time") if key in batch}

    def undo(self, actions, state):
        """Normalised actions (B, T, A) and the state (B, S) in robot units -> actions in robot units, float32."""
        return self.postprocessor(actions.float().cpu()) + self.offset(state)

    def save_pretrained(self, folder, size):
        """LeRobot's processor files and the tokenizer. The files name PaliGemma's tokenizer by its name on the hub."""
        folder = Path(folder)
        self.preprocessor.save_pretrained(folder)
        self.postprocessor.save_pretrained(folder)
        path, name = folder / "policy_preprocessor.json", PALIGEMMA if size == "full" else "tokenizer"
        path.write_text(path.read_text().replace(json.dumps(self.tokenizer), json.dumps(name)))
        shutil.copytree(self.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
