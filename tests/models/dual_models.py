"""Small CLIP and SigLIP models with random weights, as transformers saves them, with their processors."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from ds_cmli.config.presets import load_preset
from ds_cmli.data.tokens import builtin_tokenizer, tokenizer_of
from ds_cmli.engine import build_models

SIZES = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"image_size": 56, "patch_size": 14}
SQUARE = {"height": 56, "width": 56}


def text(**more):
    ids = {"vocab_size": len(builtin_tokenizer()), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return {**SIZES, "hidden_size": 32, **ids, **more}


def clip(folder: Path, act: str = "quick_gelu", text_width: int = 48, **processor) -> Path:
    torch.manual_seed(0)
    vision = {**SIZES, **PIXELS, "hidden_size": 32, "hidden_act": act}
    words = text(hidden_size=text_width, max_position_embeddings=77, hidden_act=act)
    model = CLIPModel(CLIPConfig(projection_dim=24, vision_config=vision, text_config=words))
    torch.nn.init.constant_(model.logit_scale, 4.2)
    how = {"size": {"shortest_edge": 56}, "crop_size": SQUARE, **processor}
    return saved(folder, model, CLIPImageProcessor(**how))


def siglip(folder: Path, **processor) -> Path:
    torch.manual_seed(0)
    vision = {**SIZES, **PIXELS, "hidden_size": 32}
    words = text(max_position_embeddings=64, projection_size=32)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=words))
    torch.nn.init.constant_(model.logit_scale, 4.76)
    torch.nn.init.constant_(model.logit_bias, -12.9)
    for parameter in model.vision_model.head.parameters():  # whose biases are zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return saved(folder, model, SiglipImageProcessor(size=SQUARE, **processor))


def saved(folder: Path, model, processor) -> Path:
    for part in (model, processor, builtin_tokenizer()):
        part.save_pretrained(folder)
    return folder


def settings(source: Path, losses: dict[str, float], **student):
    given = {"student": {"source": str(source), **student}, "loss": {"weights": losses}}
    return load_preset("tiny", given)


def start(source: Path, losses: dict[str, float], **student):
    """The objective, the configuration and the tokenizer of a training that starts from the source."""
    config = settings(source, losses, **student)
    words = tokenizer_of(config.data)
    objective, _ = build_models(config, words.vocab_size, pad_id=words.pad_id)
    return objective.eval(), config, words
