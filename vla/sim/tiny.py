"""Build a small, randomly initialised vision-language model of the real one's family, without any download.

The folder holds what a real one holds (config, weights, tokenizer trained on --text, image processor), so
AutoModelForImageTextToText and AutoProcessor load it as they load Qwen/Qwen2.5-VL-7B-Instruct.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorFast,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from sim.film import build as build_film

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (  # shorter than a chat: tokens are what a small model spends its time on
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}"
)
FAMILIES = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
}


def build(
    folder, texts, family="qwen3_vl", width=128, depth=3, vision_width=64, vision_depth=1, patch=4, pixels=32, seed=0
):
    """Write a model for square images of `pixels`, cut into patches of `patch`, merged 2 x 2; returns its parameters.

    texts: what the tokenizer learns its words from. Weights are drawn wider than a large model's (standard deviation
    1 / sqrt(width), not 0.02): so small a model else attends evenly to everything for hundreds of steps.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, **options))
    marks = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:])
    tokenizer = Qwen2TokenizerFast(tokenizer_object=words, padding_side="left", **marks)
    if family == "film":
        return build_film(
            folder, tokenizer, "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}", pixels, seed
        )
    Config, Model, Processor, Video = FAMILIES[family]
    area = dict(shortest_edge=pixels**2, longest_edge=pixels**2)
    image = Qwen2VLImageProcessorFast(patch_size=patch, merge_size=2, size=area)
    video = Video(patch_size=patch, merge_size=2, size=area)
    processor = Processor(image, tokenizer, video, chat_template=TEMPLATE)
    heads, ids = max(1, width // 32), tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=100.0,  # positions are few
        rope_scaling=dict(rope_type="default", mrope_section=[4, 6, 6], mrope_interleaved=True),
        bos_token_id=ids("<|endoftext|>"),
        eos_token_id=ids("<|im_end|>"),
        initializer_range=width**-0.5,
    )
    vision = dict(
        depth=vision_depth,
        hidden_size=vision_width,
        out_hidden_size=width,
        intermediate_size=2 * vision_width,
        num_heads=max(1, vision_width // 32),
        patch_size=patch,
        spatial_merge_size=2,
        temporal_patch_size=2,
        initializer_range=vision_width**-0.5,
    )
    if family == "qwen3_vl":
        vision |= dict(num_position_embeddings=(pixels // patch) ** 2, deepstack_visual_indexes=[0])
    else:
        vision |= dict(window_size=pixels, fullatt_block_indexes=list(range(vision_depth)))
    config = Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())
