"""The student: an image and a text encoder, cut to their first layers, and shared blocks above.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H hidden size, D
embedding dimension; prefix is the number of tokens before the patches, the first of which is the
class token.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ds_cmli import models
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.op import upcast
from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import reason
from ds_cmli.config.registry import of_dual
from ds_cmli.config.schema import StudentConfig
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.models.backbone import (
    ImageBackbone,
    ImageRequest,
    PixelNorm,
    TextBackbone,
    TextRequest,
)
from ds_cmli.models.blocks import whole
from ds_cmli.models.dual import Start
from ds_cmli.models.weights import check_room, count


class SharedBlock(nn.Module):
    """One pre-norm Transformer block applied to both modalities."""

    block: Any

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.block = Block(width, heads, qkv_bias=True)
        # The block starts as the identity: random residual outputs would drown the pretrained
        # encoders' features.
        for last in (self.block.attn.proj, self.block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, image: Tensor, text: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, prefix+N, H], [B, M, H] and the text's mask, bool [B, M] (True = attend) -> both.

        One call takes both modalities, so that activation checkpointing recomputes the block once
        and each parameter's gradient arrives once, which ZeRO requires.
        """
        return self.image(image), self.text(text, token_mask)

    def image(self, x: Tensor) -> Tensor:
        return self.block(x)

    def text(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x, attn_mask=mask[:, None, None, :])


def shared_blocks(width: int, number: int) -> nn.ModuleList:
    """Raises `UserError` if memory has no room for them."""
    # The largest number of heads that divides the width with at least 64 channels per head, or
    # else one head.
    heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    with torch.device("meta"):
        one = count(SharedBlock(width, heads))
    check_room("student.shared_blocks", number, one * number)
    return nn.ModuleList(SharedBlock(width, heads) for _ in range(number))


class Student(nn.Module):
    image: ImageBackbone
    text: TextBackbone
    lora_scale = 0.0  # of the adapters, if there are any

    def __init__(
        self,
        config: StudentConfig,
        image_size: int,
        vocab_size: int,
        positions: int = 8,
        pretrained: bool = True,
        special: SpecialTokens | None = None,
    ):
        """Build both encoders and the layers above them.

        Args:
            vocab_size: the tokenizer's vocabulary size.
            positions: M, the length of the longest text.
            pretrained: whether to load pretrained weights; if not, they are random and meant to be
                overwritten.
            special: the special tokens that the tokenizer adds; None: those of the built-in
                tokenizer.
        """
        super().__init__()
        # What the losses over pairs start with; None: their own.
        self.start: Start | None = None
        text: TextBackbone | None = None
        if config.source_config:
            towers = of_dual("models", config.source_config)
            if vocab_size > towers.vocab_size(config):
                raise UserError(
                    f"student.source is {config.source!r}: its tokenizer has {vocab_size} tokens, "
                    f"and its text encoder only {towers.vocab_size(config)}"
                )
            self.image, text, self.start = towers.build(config, image_size, pretrained)
        else:
            image = ImageRequest.of_student(config, image_size, pretrained)
            self.image = models.build(models.IMAGE, config.image_backbone, image)
        self.pixels = PixelNorm(self.image.mean, self.image.std)
        if text is None:
            request = replace(
                TextRequest.of_student(config, vocab_size, positions),
                pretrained=pretrained,
                special=special or SpecialTokens(),
            )
            text = models.build(models.TEXT, config.text_backbone, request)
        self.text = text
        self.embed_dim = config.embed_dim
        if config.source_config:
            self._keep_joint_space(config)
        else:
            self._align(config)
        self.try_out(config, image_size, positions)

    def _align(self, config: StudentConfig) -> None:
        """Make what brings two encoders into one space, H wide as the image encoder."""
        width = self.width = self.image.width
        self.text_head: nn.Module = nn.Identity()
        if self.text.width != width:
            self.text_head = nn.Linear(self.text.width, width)
        self.shared = shared_blocks(width, config.shared_blocks)
        # The encoders' outputs differ in scale before the shared blocks, and in mean after them. A
        # separate norm for each modality brings both to one scale and lets the modality gap close.
        self.image_in: nn.Module = nn.LayerNorm(width)
        self.text_in: nn.Module = nn.LayerNorm(width)
        self.image_out: nn.Module = nn.LayerNorm(width)
        self.text_out: nn.Module = nn.LayerNorm(width)
        # g: one projection for patches and tokens (and the teacher's patches). Its rows start
        # orthonormal, which approximately keeps cosine similarities from the first step on.
        self.projection: nn.Module = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.orthogonal_(self.projection.weight)

    def _keep_joint_space(self, config: StudentConfig) -> None:
        """Add nothing to the source's space, E = D wide, but the configuration's shared blocks."""
        if config.shared_blocks and self.image.width != self.text.width:
            raise UserError(
                f"student.shared_blocks is {config.shared_blocks}, and the towers of "
                f"student.source are {self.image.width} and {self.text.width} wide: give 0"
            )
        self.width = config.embed_dim
        self.text_head, self.projection = nn.Identity(), nn.Identity()
        self.shared = shared_blocks(self.image.width, config.shared_blocks)
        self.image_in, self.text_in = nn.Identity(), nn.Identity()
        self.image_out, self.text_out = nn.Identity(), nn.Identity()

    @torch.no_grad()
    def try_out(self, config: StudentConfig, image_size: int, positions: int) -> None:
        """Encode one image and three texts, so that a model that does not fit is refused here."""
        self.eval()
        problem = self._problem_of_image(image_size)
        if problem:
            raise UserError(
                f"student.image_model is {config.image_model!r}, which cannot encode {image_size} "
                f"pixels square with student.image_overrides {config.image_overrides}: {problem}"
            )
        most = self.text.most_positions
        if most is not None and positions > most:
            raise UserError(
                f"data.context_length is {positions}: student.text_model {config.text_model!r} has "
                f"only {most}"
            )
        problem = self._problem_of_text(positions)
        if problem:
            raise UserError(
                f"student.text_model is {config.text_model!r}, which cannot encode {positions} "
                f"positions with student.text_overrides {config.text_overrides}: {problem}"
            )
        self.train()

    def _problem_of_image(self, side: int) -> str:
        rows, columns = self.grid
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        try:
            x = self.embed_image(image)
        except Exception as error:
            return reason(error)
        fits = x.shape == (1, self.image.prefix + rows * columns, self.image.width)
        return "" if fits else f"gives {list(x.shape)}"

    def _problem_of_text(self, positions: int) -> str:
        # The second text differs from the first only in its padding, the third only in its last
        # token.
        ids = torch.ones(3, positions, dtype=torch.int64)
        ids[1, -1] = 2
        ids[2, -2] = 2
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, -1] = False
        try:
            y = self.embed_text(ids, mask)
        except Exception as error:
            return reason(error)
        width = self.text.width if isinstance(self.text_head, nn.Identity) else self.width
        if y.shape != (3, positions + self.text.suffix, width):
            return f"gives {list(y.shape)}"
        if isinstance(y, FakeTensor) or self.text.suffix:
            return ""
        if not torch.allclose(y[0, :-1], y[1, :-1], atol=1e-3):
            return "it lets tokens see padding"
        pooled = self.text.pool(y, mask)
        if torch.equal(pooled[0], pooled[2]):
            return (
                "the text's pooled position does not see its last token: give "
                "student.text_backbone=causal"
            )
        return ""

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that activation checkpointing recomputes."""
        return [*self.image.blocks, *self.text.blocks, *self.shared]

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of rows and columns of patches; N is their product."""
        return self.image.grid

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Encode a batch: uint8 [B, 3, S, S], int64 [B, M], bool [B, M] (True = attend).

        Returns:
            Image class tokens [B, H], patches [B, N, H], text class tokens [B, H] and tokens [B, M,
            H] (padding and special tokens included), not normalised, in the model's precision. They
            are a plain tuple because ZeRO-3's hooks do not find tensors inside other objects.
        """
        x = self.embed_image(image)
        y = self.embed_text(input_ids, attention_mask)
        to_text = self._with_suffix(attention_mask)
        for block in self.shared:
            x, y = block(x, y, to_text)
        return *self.split_image(x), *self.split_text(y, attention_mask)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> class tokens [B, H] and patches [B, N, H], as in `forward`."""
        x = self.embed_image(image)
        for block in self.shared:
            with whole(block):  # collective under ZeRO-3
                x = block.image(x)  # type: ignore[operator]
        return self.split_image(x)

    def _with_suffix(self, attention_mask: Tensor) -> Tensor:
        if not self.text.suffix:
            return attention_mask
        return F.pad(attention_mask, (0, self.text.suffix), value=True)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, M], bool [B, M] -> class tokens [B, H] and tokens [B, M, H]."""
        y, attended = self.embed_text(input_ids, attention_mask), self._with_suffix(attention_mask)
        for block in self.shared:
            with whole(block):  # collective under ZeRO-3
                y = block.text(y, attended)  # type: ignore[operator]
        return self.split_text(y, attention_mask)

    def image_embeddings(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as class tokens in fp32 and patches [B, N, D], all of unit length."""
        cls, patches = self.encode_image(image)
        return upcast(l2_normalize(cls)), l2_normalize(self.projection(patches))

    def text_embeddings(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode texts as class tokens in fp32 and tokens [B, M, D], all of unit length."""
        cls, tokens = self.encode_text(input_ids, attention_mask)
        return upcast(l2_normalize(cls)), l2_normalize(self.projection(tokens))

    def embed_image(self, image: Tensor) -> Tensor:
        pixels = self.pixels(image, next(self.image.parameters()).dtype)
        return self.image_in(self.image(pixels))  # [B, prefix+N, H]

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text_in(self.text_head(self.text(input_ids, attention_mask)))  # [B, M, H]

    def split_image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.image_out(x)
        return self.image.joint(x[:, 0], x[:, self.image.prefix :])

    def split_text(self, y: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        y = self.text_out(y)
        return self.text.joint(self.text.pool(y, attention_mask), y)
