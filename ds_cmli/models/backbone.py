"""The interface of image and text encoders, which the classes that the registry names implement.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of the encoder.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import StudentConfig
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.models.weights import WeightsSource

# Layers kept of a plain stack (equal layers, one after the other) if the configuration sets none.
DEFAULT_LAYERS = 6


@dataclass(frozen=True)
class ImageRequest:
    """The image encoder that the configuration asks for."""

    prefix: str  # of the names of its settings: "student.image_" or "teacher."
    model: str
    weights: str  # "random", "hub", or a path
    overrides: dict[str, Any]
    image_size: int  # S
    partial: bool  # whether keys may be missing in the weights
    # How many first layers are kept; None: `DEFAULT_LAYERS` of a plain stack, else all.
    layers: int | None = None
    block: int | None = None  # for a teacher: the block (or stage) whose output is its features
    average: int = 1  # for a teacher: how many blocks, up to that one, the features are the mean of

    @classmethod
    def of_student(cls, config: StudentConfig, image_size: int, pretrained: bool) -> "ImageRequest":
        return cls(
            prefix="student.image_",
            model=config.image_model,
            weights=config.image_weights if pretrained else "random",
            overrides=config.image_overrides,
            image_size=image_size,
            partial=config.weights_partial,
            layers=config.layers,
        )

    @property
    def source(self) -> WeightsSource:
        return WeightsSource(f"{self.prefix}weights", self.weights, self.partial)

    @property
    def name(self) -> str:
        return f"{self.prefix}model {self.model!r}"

    def unfit(self, problem: str) -> UserError:
        return UserError(f"{self.prefix}model is {self.model!r}: {problem}")


@dataclass(frozen=True)
class TextRequest:
    """The text encoder that the configuration asks for."""

    model: str
    weights: str  # "random", "hub", or a path
    overrides: dict[str, Any]
    vocab_size: int  # of the tokenizer
    positions: int  # M, the length of the longest text
    partial: bool  # whether keys may be missing in the weights
    layers: int | None  # as in `ImageRequest`
    dropout: float
    # False: random weights of the configured model's shapes, to be overwritten later.
    pretrained: bool = True
    special: SpecialTokens = field(default_factory=SpecialTokens)

    @classmethod
    def of_student(cls, config: StudentConfig, vocab_size: int, positions: int) -> "TextRequest":
        return cls(
            model=config.text_model,
            weights=config.text_weights,
            overrides=config.text_overrides,
            vocab_size=vocab_size,
            positions=positions,
            partial=config.weights_partial,
            layers=config.layers,
            dropout=config.dropout,
        )

    @property
    def source(self) -> WeightsSource:
        return WeightsSource("student.text_weights", self.weights, self.partial)

    @property
    def name(self) -> str:
        if Path(self.weights).is_dir():  # its config.json, and not `model`, says which model it is
            return f"the text model of {self.source.setting} {self.weights!r}"
        return f"student.text_model {self.model!r}"

    def unfit(self, problem: str) -> UserError:
        return UserError(f"student.text_model is {self.model!r}: {problem}")


class ImageBackbone(nn.Module):
    """An encoder from pixels to a class token and N patch tokens, row by row over a grid.

    Attributes: `width` (H), `grid` (numbers of rows and columns of patches), `prefix` (number of
    tokens before the patches; the first is the class token), `mean` and `std` (the normalisation of
    each colour that the encoder was trained with, for pixel values from 0 to 1).
    """

    width: int
    grid: tuple[int, int]
    prefix: int
    mean: Iterable[float]
    std: Iterable[float]
    depth: int | None = None  # how many blocks the model has, before it was cut; None: unknown

    @classmethod
    def takes(cls, request: ImageRequest) -> bool:
        """Whether this backbone supports the model."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that activation checkpointing recomputes; a forward pass calls each once."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels: [B, 3, S, S] -> [B, prefix + N, H]."""
        raise NotImplementedError

    def joint(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Map class tokens [B, H] and patches [B, N, H] into a space that texts share, if any."""
        return cls, patches

    def read_outside(self) -> Iterable[tuple[nn.Module, nn.Parameter]]:
        """Modules, each with a parameter of another module that it reads by itself."""
        return ()

    def train(self, mode: bool = True) -> "ImageBackbone":
        """Set the training mode, but leave BatchNorm layers in eval mode, with their statistics.

        Batch statistics would differ between ranks, would make a resumed run differ from an
        uninterrupted one, and would be updated twice under activation checkpointing.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class TextBackbone(nn.Module):
    """An encoder from token ids to M features, with the pooling to one of the whole text.

    Attributes: `width` (H), `most_positions` (the greatest length of a text; None: any length).
    """

    # The number of tokens after those of the text. A model that has one pools its texts by itself.
    suffix = 0

    width: int
    most_positions: int | None
    depth: int | None = None  # as of an image encoder
    padded: bool | None = None  # whether a text of the batch is padded; None: unknown

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        """Whether this backbone supports the model."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that activation checkpointing recomputes; a forward pass calls each once."""
        raise NotImplementedError

    def read_outside(self) -> Iterable[tuple[nn.Module, nn.Parameter]]:
        """Modules, each with a parameter of another module that it reads by itself."""
        return ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids: int64 [B, M] and a mask, bool [B, M] (True = attend).

        Returns:
            [B, M + suffix, H].
        """
        raise NotImplementedError

    @contextmanager
    def knowing(self, padded: bool) -> Iterator[None]:
        """Inside, the batch's texts are known to be padded or not, without a CPU-GPU sync."""
        self.padded = padded
        try:
            yield
        finally:
            self.padded = None

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool the tokens into the text's class token: [B, M, *], bool [B, M] -> [B, *]."""
        raise NotImplementedError

    def joint(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map class tokens [B, H] and tokens [B, M, H] into a space shared with images, if any."""
        return cls, tokens


class PixelNorm(nn.Module):
    """Normalises uint8 pixels by the mean and deviation of the encoder's training."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]):
        """`mean` and `std` of each of the three colours, for pixel values from 0 to 1."""
        super().__init__()
        for name, given in (("mean", mean), ("std", std)):
            # Integers in units of 1/10000 of a pixel value: the model's cast to 16 bits would round
            # a float buffer.
            value = torch.tensor(list(given))[:, None, None] * 255e4
            self.register_buffer(name, value.round().int(), persistent=False)

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [B, 3, S, S] -> `dtype` [B, 3, S, S]."""
        return ((image.float() * 1e4 - self.mean) / self.std).to(dtype)


def cast_buffers(image: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point buffers of a module, left in fp32 by DeepSpeed (0.19.8).

    timm's models expect their masks, position biases and BatchNorm's statistics in the dtype of
    their weights. Rotary embeddings stay in fp32, because angles need its precision.
    """
    for part in image.modules():
        if not type(part).__name__.startswith("Rotary"):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(part, name, buffer.to(dtype))


def with_mean(patches: Tensor) -> Tensor:
    """[B, N, H] -> [B, 1 + N, H]: prepend the mean of the patches as class token."""
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)
