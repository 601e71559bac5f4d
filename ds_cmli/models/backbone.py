"""What the student and the teacher ask of an encoder; each file that a table in `models` names implements one of these.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of the encoder.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_cmli.common.errors import UserError
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.models.weights import Source

DEFAULT_LAYERS = 6  # kept of a plain stack where the configuration names no number


@dataclass(frozen=True)
class ImageRequest:
    """An image encoder as the configuration asks for it."""

    prefix: str  # of the settings' names: "student.image_" or "teacher."
    model: str
    weights: str  # "random", "hub", or a path
    overrides: dict[str, Any]
    image_size: int  # S
    partial: bool  # keys may be missing in the weights
    layers: int | None = None  # first ones to keep; None: `DEFAULT_LAYERS` of a plain stack, all of others
    block: int | None = None  # of a teacher: the block, or stage, after which its features are taken

    @property
    def source(self) -> Source:
        return Source(f"{self.prefix}weights", self.weights, self.partial)

    @property
    def name(self) -> str:
        return f"{self.prefix}model {self.model!r}"

    def unfit(self, problem: str) -> UserError:
        return UserError(f"{self.prefix}model is {self.model!r}: {problem}")


@dataclass(frozen=True)
class TextRequest:
    """A text encoder as the configuration asks for it."""

    model: str
    weights: str  # "random", "hub", or a path
    overrides: dict[str, Any]
    vocab_size: int  # of the tokenizer
    positions: int  # M, the longest text
    partial: bool
    layers: int | None
    dropout: float
    pretrained: bool = True  # False: random weights in the sizes of the configured ones, to be overwritten
    special: SpecialTokens = field(default_factory=SpecialTokens)

    @property
    def source(self) -> Source:
        return Source("student.text_weights", self.weights, self.partial)

    @property
    def name(self) -> str:
        if Path(self.weights).is_dir():  # whose config.json says what the model is
            return f"the text model of {self.source.setting} {self.weights!r}"
        return f"student.text_model {self.model!r}"

    def unfit(self, problem: str) -> UserError:
        return UserError(f"student.text_model is {self.model!r}: {problem}")


class ImageBackbone(nn.Module):
    """Pixels to one class token and N patches in the order of a grid, row by row.

    Attributes: `width` (H), `grid` (rows and columns of patches), `prefix` (tokens before the patches; the first is the
    class token), `mean` and `std` of the pixels that the encoder was trained with, from 0 to 1.
    """

    width: int
    grid: tuple[int, int]
    prefix: int
    mean: Iterable[float]
    std: Iterable[float]

    @classmethod
    def takes(cls, request: ImageRequest) -> bool:
        """Whether this backbone is the one for the model."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """What keeps only its inputs under activation checkpointing; each is called once in a forward pass."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised [B, 3, S, S] -> [B, prefix + N, H]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "ImageBackbone":
        """BatchNorm keeps its statistics.

        Those of a batch would differ between ranks, make a resumed run another one, and be taken twice under
        activation checkpointing.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class TextBackbone(nn.Module):
    """Token ids to M features, and which of them, or what of them, stands for the text.

    Attributes: `width` (H), `most_positions` (how long a text can be; None: any).
    """

    width: int
    most_positions: int | None

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        """Whether this backbone is the one for the model."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """What keeps only its inputs under activation checkpointing; each is called once in a forward pass."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, M], bool [B, M] (True = attend) -> [B, M, H]."""
        raise NotImplementedError

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, M, any width], bool [B, M] -> what stands for the text as its class token, [B, the same width]."""
        raise NotImplementedError


def cast_statistics(module: nn.Module, dtype: torch.dtype) -> None:
    """BatchNorm's statistics in the precision of its weights, which ZeRO-3 (DeepSpeed 0.19.8) casts without them."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(part, name, buffer.to(dtype))


def with_mean(patches: Tensor) -> Tensor:
    """[B, N, H] -> [B, 1 + N, H]: their mean stands for the class token that the model does not have."""
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)
