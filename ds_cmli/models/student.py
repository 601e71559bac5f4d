"""The student: an image and a text encoder, each cut to its first layers, under shared Transformer blocks.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H hidden size, D matching space.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import StudentConfig


def one_line(error: Exception) -> str:
    """A library's message without its line breaks, cut to what a terminal line holds."""
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


def build_vit(setting: str, model: str, weights: str, overrides: dict[str, Any], image_size: int) -> Any:
    """A timm ViT that returns all its tokens: uint8-normalisation constants in `pretrained_cfg`, no head.

    `weights`: "random", "hub", or the path of a file in the model's own layout; position embeddings of another
    image size are resampled by timm.
    """
    arguments: dict[str, Any] = {"num_classes": 0, "img_size": image_size, **overrides}
    if weights not in ("random", "hub") and not Path(weights).is_file():
        raise UserError(f"{setting} is {weights!r}: no such file; give 'hub', 'random' or a weights file of {model}")
    try:
        vit = timm.create_model(
            model,
            pretrained=weights != "random",
            pretrained_cfg_overlay={} if weights in ("random", "hub") else {"file": weights},
            **arguments,
        )
    except Exception as error:
        raise UserError(f"{setting} is {weights!r}, the model {model!r}: cannot build it: {one_line(error)}") from None
    if not getattr(vit, "num_prefix_tokens", 0) or getattr(vit, "cls_token", None) is None:
        raise UserError(f"the image model {model!r} has no class token: choose a timm ViT that has one")
    return vit


class PixelNorm(nn.Module):
    """uint8 pixels -> the mean and standard deviation the encoder was trained with, in the encoder's precision."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Any):
        super().__init__()
        for name in ("mean", "std"):
            # Integers, in 1/10000 of a pixel value: a float buffer would be rounded with the model's cast to 16 bit.
            value = torch.tensor(vit.pretrained_cfg[name])[:, None, None] * 255e4
            self.register_buffer(name, value.round().int(), persistent=False)

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        return ((image.float() * 1e4 - self.mean) / self.std).to(dtype)


def build_text_encoder(config: StudentConfig, vocab_size: int) -> Any:
    """A BERT-like encoder of the transformers library, its first `config.layers` layers, without pooler."""
    name, weights = config.text_model, config.text_weights
    # None in the attention: CPUs have no fused kernel with dropout.
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0}
    settings = {**dropout, **config.text_overrides}
    try:
        if weights == "random":
            settings["vocab_size"] = vocab_size
            # The family's default size ("bert-base-uncased" -> "bert"), so that no hub is needed.
            family = AutoConfig.for_model(name.split("-")[0], **settings)
            encoder = AutoModel.from_config(family, add_pooling_layer=False)
        else:
            source = name if weights == "hub" else weights
            settings["num_hidden_layers"] = config.layers
            encoder = AutoModel.from_pretrained(
                source, local_files_only=weights != "hub", add_pooling_layer=False, dtype=torch.float32, **settings
            )
    except Exception as error:
        raise UserError(
            f"student.text_weights is {weights!r}, the model {name!r}: cannot load it: {one_line(error)}"
        ) from None
    if not hasattr(getattr(encoder, "encoder", None), "layer"):
        raise UserError(f"student.text_model is {name!r}: choose a BERT-like encoder (encoder.layer)")
    if encoder.config.vocab_size < vocab_size:
        raise UserError(
            f"data.tokenizer has {vocab_size} tokens and student.text_model {name!r} only {encoder.config.vocab_size}: "
            "choose the tokenizer that belongs to the model"
        )
    return encoder.train()  # it comes in eval mode out of a file, with its dropout off


def cut(blocks: Any, layers: int, setting: str) -> Any:
    if len(blocks) < layers:
        raise UserError(f"student.layers is {layers}: {setting} has only {len(blocks)}")
    return blocks[:layers]


class SharedBlock(nn.Module):
    """One pre-norm Transformer block applied to both modalities."""

    block: Any

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.block = Block(width, heads, qkv_bias=True)
        # Identity at the start: random outputs of this size would drown what the pretrained encoders know.
        for last in (self.block.attn.proj, self.block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1+N, H], [B, M, H], bool [B, M] (True = attend) -> the same shapes.

        Both in one call: under checkpointing that is one recomputation, so each parameter's gradient arrives once,
        which ZeRO requires.
        """
        return self.image(image), self.text(text, text_mask)

    def image(self, x: Tensor) -> Tensor:
        return self.block(x)

    def text(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x, attn_mask=mask[:, None, None, :])


class Student(nn.Module):
    vit: Any  # timm's VisionTransformer
    text: Any  # transformers' BERT-like encoder

    def __init__(self, config: StudentConfig, image_size: int, vocab_size: int):
        super().__init__()
        self.vit = build_vit(
            "student.image_weights", config.image_model, config.image_weights, config.image_overrides, image_size
        )
        if not isinstance(getattr(self.vit, "blocks", None), nn.Sequential):
            raise UserError(f"student.image_model is {config.image_model!r}: choose a VisionTransformer of timm")
        self.vit.blocks = cut(self.vit.blocks, config.layers, f"student.image_model {config.image_model!r}")
        # The pretrained final norm belongs to the last block, and pooling would drop the patches.
        self.vit.norm, self.vit.fc_norm, self.vit.global_pool = nn.Identity(), nn.Identity(), ""
        self.pixels = PixelNorm(self.vit)
        self.text = build_text_encoder(config, vocab_size)
        self.text.encoder.layer = cut(
            self.text.encoder.layer, config.layers, f"student.text_model {config.text_model!r}"
        )

        width = self.vit.embed_dim  # H
        text_width = self.text.config.hidden_size
        self.text_head: nn.Module = nn.Linear(text_width, width) if text_width != width else nn.Identity()
        heads = max(1, width // 64)
        self.shared = nn.ModuleList(SharedBlock(width, heads) for _ in range(config.shared_blocks))
        # Two scales enter the shared blocks, and two means leave them: norms of each modality's own bring both to
        # one size and let the gap between the modalities close.
        self.image_in, self.text_in = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_out, self.text_out = nn.LayerNorm(width), nn.LayerNorm(width)
        # g: one projection for patches and tokens (and the teacher's patches). Orthonormal rows keep cosines
        # approximately from the first step on.
        self.g = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.orthogonal_(self.g.weight)
        self.width = width

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.vit.blocks, *self.text.encoder.layer, *self.shared]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row; N is their product."""
        return self.vit.patch_embed.grid_size

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, 3, S, S], int64 [B, M], bool [B, M] (True = attend) -> what the losses need of a batch.

        Returns:
            image class tokens [B, H], patches [B, N, H], text class tokens [B, H], tokens [B, M, H] (padding and
            special tokens included): not normalised, in the model's precision. A plain tuple: ZeRO-3's hooks look
            for tensors in nothing else.
        """
        x, y = self.embed_image(image), self.embed_text(input_ids, attention_mask)
        for block in self.shared:
            x, y = block(x, y, attention_mask)
        return *self.split_image(x), *self.split_text(y)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> class tokens [B, H], patches [B, N, H]; as `forward` gives them."""
        x = self.embed_image(image)
        for block in self.shared:
            x = block.image(x)  # type: ignore[operator]
        return self.split_image(x)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, M], bool [B, M] -> class tokens [B, H], tokens [B, M, H]; as `forward` gives them."""
        y = self.embed_text(input_ids, attention_mask)
        for block in self.shared:
            y = block.text(y, attention_mask)  # type: ignore[operator]
        return self.split_text(y)

    def embed_image(self, image: Tensor) -> Tensor:
        return self.image_in(self.vit(self.pixels(image, self.g.weight.dtype)))  # [B, 1+N, H]

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The mask as integers: that is what BERT-like encoders of every transformers version take.
        encoded = self.text(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        return self.text_in(self.text_head(encoded))  # [B, M, H]

    def split_image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.image_out(x)
        return x[:, 0], x[:, self.vit.num_prefix_tokens :]

    def split_text(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.text_out(y)
        return y[:, 0], y


def checkpoint_blocks(blocks: list[nn.Module], checkpoint: Callable) -> None:
    """Make each block keep only its inputs for backward, through `checkpoint(function, *tensors)`.

    The forward method is replaced and not the module, so that parameter names stay as they are.
    """
    for block in blocks:
        block.forward = _checkpointed(block.forward, checkpoint)  # type: ignore[method-assign]


def _checkpointed(forward: Callable, checkpoint: Callable) -> Callable:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Only floating-point tensors can need a gradient; masks and flags pass by closure.
        inputs = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]

        def call(*tensors):
            remaining = iter(tensors)
            filled = [next(remaining) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            return forward(*filled, **kwargs)

        return checkpoint(call, *inputs)

    return run
