"""The student: an image and a text encoder, cut to their first layers, and shared blocks above; and
its image-only teacher.

Shapes: B pairs, S image side in pixels, N image patches of the student's grid, M text positions, H
hidden size, H_t the teacher's, D embedding dimension.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_cmli.cmli.normalize import l2_normalize
from ds_cmli.cmli.sides import upcast
from ds_cmli.config.registry import IMAGE, TEXT
from ds_cmli.config.schema import StudentConfig, TeacherConfig
from ds_cmli.config.source import DUAL
from ds_cmli.errors import UserError, blame
from ds_cmli.models.dual import PairLossStart
from ds_cmli.models.encoders import PixelNorm
from ds_cmli.pretrained import loading


class SharedBlock(nn.Module):
    """A pre-norm Transformer block that both modalities pass, at first the identity.

    Random residual outputs would drown the pretrained encoders' features.
    """

    block: Any

    def __init__(self, width: int):
        super().__init__()
        # The most heads that divide the width with at least 64 channels each, or else one.
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.block = Block(width, heads, qkv_bias=True)
        for last in (self.block.attn.proj, self.block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, M, H] and bool [B, M] (True = attend) -> [B, M, H]."""
        return self.block(x, attn_mask=None if mask is None else mask[:, None, None])


class Student(nn.Module):
    """Two encoders and the layers that bring their features into one space.

    Attributes: `grid` (rows and columns of patches; N is their product), `width` (H), `start` (the
    initial temperature of the losses over pairs; None: their own).
    """

    image: Any
    text: Any
    lora_scale = 0.0  # alpha / rank of the adapters, if there are any

    def __init__(
        self,
        config: StudentConfig,
        image_size: int,
        vocab_size: int,
        positions: int = 8,
        pretrained: bool = True,
        pad_id: int = 0,
    ):
        """Build the encoders with their weights, and the layers above. Raises `UserError`.

        `vocab_size`, `pad_id`: the tokenizer's; `positions`: M of the longest text; `pretrained`:
        False: the weights of a `student.source` are not loaded.
        """
        super().__init__()
        self.start: PairLossStart | None = None
        self.embed_dim = config.embed_dim
        has_source = bool(config.source_config)
        if has_source:
            module = DUAL[config.source_config["model_type"]]
            build = resolve_name(f"ds_cmli.models.{module}:build_towers")
            self.image, self.text, self.start = build(config, image_size, pretrained)
            check_source(config, self.image, self.text, vocab_size)
            self.width = config.embed_dim  # the source's joint space
        else:
            self.image = build_image(config, image_size)
            self.text = build_text(config, vocab_size, positions, pad_id)
            self.width = self.image.width
        self.normalize_pixels = PixelNorm(self.image.mean, self.image.std)
        self.grid: tuple[int, int] = self.image.grid
        self.text_head: nn.Module = nn.Identity()
        if not has_source and self.text.width != self.width:
            self.text_head = nn.Linear(self.text.width, self.width)
        # With a source, `width` is that of its joint space, which lies above these blocks.
        block_width = self.image.width
        self.shared = nn.ModuleList(SharedBlock(block_width) for _ in range(config.shared_blocks))
        # The encoders' outputs differ in scale before the shared blocks and in mean after them: a
        # norm for each modality lets the gap between them close.
        norm: Any = nn.Identity if has_source else nn.LayerNorm
        self.image_in = norm(self.width)
        self.text_in = norm(self.width)
        self.image_out = norm(self.width)
        self.text_out = norm(self.width)
        self.projection: nn.Module = nn.Identity()
        if not has_source:
            # g: one projection for patches and tokens (and the teacher's patches). Orthonormal rows
            # keep cosine similarities approximately, from the first step on.
            self.projection = nn.Linear(self.width, config.embed_dim, bias=False)
            nn.init.orthogonal_(self.projection.weight)
        self.train()

    def train(self, mode: bool = True) -> "Student":
        """Keep BatchNorm's statistics: those of a batch would differ between ranks."""
        super().train(mode)
        for module in self.image.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that activation checkpointing recomputes."""
        return [*self.image.blocks, *self.text.blocks, *self.shared]

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, padded: bool | None = None
    ) -> tuple[Tensor, ...]:
        """Encode a batch: uint8 [B, 3, S, S], int64 [B, M], bool [B, M] (True = attend).

        `padded`: True if a text of the batch is padded; None: unknown.

        Returns image class tokens [B, H], patches [B, N, H], text class tokens [B, H] and tokens
        [B, M, H] (padding and special tokens included), not normalised, in the model's precision,
        in a plain tuple because ZeRO-3's hooks do not find tensors inside other objects.
        """
        return *self.encode_image(image), *self.encode_text(input_ids, attention_mask, padded)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> class tokens [B, H] and patches [B, N, H], as in `forward`."""
        pixels = self.normalize_pixels(image, next(self.image.parameters()).dtype)
        x = self.image_in(self.image(pixels))  # [B, 1 + N, H]
        for block in self.shared:
            x = block(x)
        x = self.image_out(x)
        cls = x[:, 0]
        patches = x[:, 1:]
        return self.image.joint(cls, patches) if hasattr(self.image, "joint") else (cls, patches)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, padded: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """int64 [B, M], bool [B, M] -> class tokens [B, H] and tokens [B, M, H]."""
        x = self.text_in(self.text_head(self.text(input_ids, attention_mask, padded)))
        num_tokens = attention_mask.shape[1]
        # After the tokens there may be a class token, which open_clip's towers give.
        attended = F.pad(attention_mask, (0, x.shape[1] - num_tokens), value=True)
        for block in self.shared:
            x = block(x, attended)
        x = self.text_out(x)
        cls = self.text.pool(x, attention_mask)
        tokens = x[:, :num_tokens]
        return self.text.joint(cls, tokens) if hasattr(self.text, "joint") else (cls, tokens)

    def image_embeddings(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as class tokens in fp32 and patches [B, N, D], all of unit length."""
        cls, patches = self.encode_image(image)
        return upcast(l2_normalize(cls)), l2_normalize(self.projection(patches))

    def text_embeddings(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode texts as class tokens in fp32 and tokens [B, M, D], all of unit length."""
        cls, tokens = self.encode_text(input_ids, attention_mask)
        return upcast(l2_normalize(cls)), l2_normalize(self.projection(tokens))


def check_source(config: StudentConfig, image: Any, text: Any, vocab_size: int) -> None:
    if vocab_size > text.vocab_size:
        raise UserError(
            f"student.source is {config.source!r}: its tokenizer has {vocab_size} tokens, "
            f"and its text encoder only {text.vocab_size}"
        )
    if config.shared_blocks and image.width != text.width:
        raise UserError(
            f"student.shared_blocks is {config.shared_blocks}, and the towers of "
            f"student.source are {image.width} and {text.width} wide: give 0"
        )


def build_image(config: StudentConfig, image_size: int) -> Any:
    weights = config.image_weights
    setting = f"student.image_model is {config.image_model!r}, its weights {weights!r}"
    options = {"layers": config.layers, "overrides": config.image_overrides}
    with loading(hub=weights == "hub", name=setting), blame(setting):
        encoder = resolve_name(IMAGE[config.image_backbone])
        return encoder(config.image_model, image_size, weights, **options)


def build_text(config: StudentConfig, vocab_size: int, positions: int, pad_id: int) -> Any:
    weights = config.text_weights
    setting = f"student.text_model is {config.text_model!r}, its weights {weights!r}"
    options = {
        "layers": config.layers,
        "dropout": config.dropout,
        "pad_id": pad_id,
        "overrides": config.text_overrides,
    }
    with loading(hub=weights == "hub", name=setting), blame(setting):
        encoder = resolve_name(TEXT[config.text_backbone])
        return encoder(config.text_model, vocab_size, positions, weights, **options)


@dataclass
class Targets:
    """The teacher's features: layer-normalised without affine parameters, and without gradient."""

    cls: Tensor  # [B, H_t]
    patches: Tensor  # [B, N, H_t]


class Teacher(nn.Module):
    """A frozen image encoder, whose features are the targets of distillation.

    It is no part of DeepSpeed's engine nor of checkpoints.
    """

    def __init__(self, config: TeacherConfig, image_size: int, grid: tuple[int, int]):
        """`grid`: the student's patch grid, to which the teacher's patches are resampled."""
        super().__init__()
        setting = f"teacher.model is {config.model!r}, its weights {config.weights!r}"
        with loading(hub=config.weights == "hub", name=setting), blame(setting):
            encoder = resolve_name(IMAGE["timm"])
            options = {"block": config.block, "overrides": config.overrides}
            self.image: Any = encoder(config.model, image_size, config.weights, **options)
        self.normalize_pixels = PixelNorm(self.image.mean, self.image.std)
        self.grid = grid
        self.width = self.image.width
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Targets:
        """uint8 [B, 3, S, S] -> `Targets` in the teacher's precision."""
        dtype = next(self.image.parameters()).dtype
        x = self.image(self.normalize_pixels(image, dtype))  # [B, 1 + N of its own grid, H_t]
        cls = x[:, 0]
        patches = x[:, 1:]
        if self.image.grid != self.grid:
            square = patches.mT.unflatten(2, self.image.grid)  # [B, H_t, rows, columns]
            square = F.interpolate(square.float(), self.grid, mode="bilinear", align_corners=False)
            patches = square.flatten(2).transpose(1, 2).to(dtype)
        return Targets(self._normalised(cls), self._normalised(patches))

    def _normalised(self, features: Tensor) -> Tensor:
        # Without the final norm a block's raw output is unbounded. The student's features come out
        # of a LayerNorm, so they can match targets that are normalised too, without a learned
        # scale.
        return F.layer_norm(features.float(), (self.width,)).to(features.dtype)
