"""A small image-text model for the simulated worlds: a convolutional network that the instruction modulates.

FiLM (Perez et al. 2018, arXiv 1709.07871) as a model of transformers: once this file is imported,
AutoModelForImageTextToText and AutoProcessor know it, and every script of this folder takes it as a backbone. 1.2 M
parameters. A transformer of that size with random weights needs several times the steps before it uses the
instruction.

Letters: B batch, L text tokens, D width, C channels, P side of the square images.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    ViTImageProcessorFast,
)
from transformers.modeling_outputs import BaseModelOutput

from common import DataError

GRID = 16  # the first convolution sees the image as GRID x GRID patches, whatever its size


class FilmConfig(PretrainedConfig):
    """hidden_size: D; channels: C; pixels: P, a multiple of 16."""

    model_type = "film"

    def __init__(self, vocab_size=600, hidden_size=256, channels=48, pixels=32, dropout=0.2, **more):
        self.vocab_size, self.hidden_size, self.channels = vocab_size, hidden_size, channels
        self.pixels, self.dropout, self.patch_size = pixels, dropout, pixels // GRID
        super().__init__(**more)


class TextEncoder(nn.Module):
    """Token embeddings (B, L, D) and mask (B, L) -> one vector (B, D). Word order counts, left padding does not."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.positions = nn.Embedding(64, D)
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def forward(self, embedded, mask):
        L = embedded.shape[1]
        from_end = torch.arange(L - 1, -1, -1, device=mask.device).clamp(max=63)
        x = F.relu(self.layers[0](embedded + self.positions(from_end))) * mask[..., None]
        return F.relu(self.layers[1](x.sum(1) / mask.sum(1, keepdim=True)))


class ImageEncoder(nn.Module):
    """Images (B, 3, P, P), text (B, D) -> (B, D): two residual blocks at 8 x 8, scaled and shifted by the text."""

    def __init__(self, config):
        super().__init__()
        D, C, self.patch, self.pixels = config.hidden_size, config.channels, config.patch_size, config.pixels
        self.first = nn.Conv2d(3 * self.patch**2, C, 3, padding=1)
        self.second = nn.Conv2d(C + 2, C, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(C, C, 3, padding=1) for _ in range(4)])
        self.modulate = nn.ModuleList([nn.Linear(D, 2 * C) for _ in range(2)])
        self.out = nn.Linear(C * (GRID // 2) ** 2, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, images, text):
        if images.shape[-1] != self.pixels:
            raise DataError(f"--image-size {images.shape[-1]}: this backbone sees {self.pixels} pixels")
        x = F.relu(self.first(F.pixel_unshuffle(images, self.patch)))  # B C 16 16
        line = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)
        coordinates = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        x = F.relu(self.second(torch.cat([x, coordinates], 1)))  # B C 8 8
        for i, modulate in enumerate(self.modulate):
            scale, shift = modulate(text)[..., None, None].chunk(2, 1)
            y = self.blocks[2 * i](x) * (1 + scale) + shift
            x = x + self.blocks[2 * i + 1](F.relu(y))
        return F.relu(self.out(self.dropout(F.relu(x).flatten(1))))


class FilmPreTrainedModel(PreTrainedModel):
    config_class = FilmConfig
    base_model_prefix = "model"
    _no_split_modules = []
    _supports_sdpa = True  # it has no attention at all

    def _init_weights(self, module):
        pass  # torch's own


class FilmModel(FilmPreTrainedModel):
    """input_ids (B, L), attention_mask (B, L), pixel_values (B, 3, P, P) -> last_hidden_state (B, L, D)."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.visual, self.language_model = ImageEncoder(config), TextEncoder(config)
        self.join = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, inputs_embeds=None, use_cache=False):
        embedded = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        seen = self.visual(pixel_values, self.language_model(embedded, attention_mask.to(embedded.dtype)))
        return BaseModelOutput(last_hidden_state=F.relu(seen[:, None] + self.join(embedded)))


class FilmForImageTextToText(FilmPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = FilmModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return None


class FilmProcessor(ProcessorMixin):
    """Texts and one image each -> input_ids, attention_mask, pixel_values."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

    def __init__(self, image_processor, tokenizer, chat_template=None, **more):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, text, images, padding=True, return_tensors="pt"):
        images = [image for (image,) in images]
        tensors = self.tokenizer(text, padding=padding, return_tensors=return_tensors)
        return {**tensors, **self.image_processor(images, return_tensors=return_tensors)}


def build(folder, tokenizer, template, pixels=32, seed=0):
    """Write a model with random weights and its processor; returns its number of parameters."""
    image = ViTImageProcessorFast(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FilmForImageTextToText(FilmConfig(vocab_size=len(tokenizer), pixels=pixels))
    model.save_pretrained(folder)
    FilmProcessor(image, tokenizer, chat_template=template).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


AutoConfig.register("film", FilmConfig)
AutoModelForImageTextToText.register(FilmConfig, FilmForImageTextToText)
AutoProcessor.register(FilmConfig, FilmProcessor)
