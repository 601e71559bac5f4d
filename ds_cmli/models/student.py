"""The student: an image and a text encoder, each cut to its first layers, under shared Transformer blocks.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H hidden size, D embedding dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import reason
from ds_cmli.config.schema import StudentConfig
from ds_cmli.models.image_encoder import PixelNorm, build_vit
from ds_cmli.models.text_encoder import build_text_encoder, most_positions


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

    def forward(self, image: Tensor, text: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1+N, H], [B, M, H], bool [B, M] (True = attend) -> the same shapes.

        Both in one call: under checkpointing that is one recomputation, so each parameter's gradient arrives once,
        which ZeRO requires.
        """
        return self.image(image), self.text(text, token_mask)

    def image(self, x: Tensor) -> Tensor:
        return self.block(x)

    def text(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.block(x, attn_mask=mask[:, None, None, :])


class Student(nn.Module):
    vit: Any  # timm's VisionTransformer
    text: Any  # transformers' BERT-like encoder

    def __init__(
        self, config: StudentConfig, image_size: int, vocab_size: int, positions: int = 8, pretrained: bool = True
    ):
        """`positions`: M, the longest text. `pretrained=False`: random weights, to be overwritten."""
        super().__init__()
        weights = config.image_weights if pretrained else "random"
        image = build_vit(
            "student.image_", config.image_model, weights, config.image_overrides, image_size, config.weights_partial
        )
        self.vit = image.vit
        if not isinstance(self.vit, VisionTransformer) or not isinstance(self.vit.blocks, nn.Sequential):
            raise UserError(f"student.image_model is {config.image_model!r}: choose a VisionTransformer of timm")
        self.vit.blocks = cut(self.vit.blocks, config.layers, f"student.image_model {config.image_model!r}")
        # The pretrained final norm belongs to the last block; head and pooling would drop the patches.
        self.vit.norm, self.vit.fc_norm = nn.Identity(), nn.Identity()
        self.vit.reset_classifier(0, "")
        self.vit.forward = self.vit.forward_features  # type: ignore[method-assign]
        image.account()
        self.pixels = PixelNorm(self.vit)
        self.text = build_text_encoder(config, vocab_size, pretrained)
        self.text.encoder.layer = cut(
            self.text.encoder.layer, config.layers, f"student.text_model {config.text_model!r}"
        )

        width = self.vit.embed_dim  # H
        text_width = self.text.config.hidden_size
        self.text_head: nn.Module = nn.Linear(text_width, width) if text_width != width else nn.Identity()
        # About 64 wide each.
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.shared = nn.ModuleList(SharedBlock(width, heads) for _ in range(config.shared_blocks))
        # Two scales enter the shared blocks, and two means leave them: norms of each modality's own bring both to
        # one size and let the gap between the modalities close.
        self.image_in, self.text_in = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_out, self.text_out = nn.LayerNorm(width), nn.LayerNorm(width)
        # g: one projection for patches and tokens (and the teacher's patches). Orthonormal rows keep cosines
        # approximately from the first step on.
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.orthogonal_(self.projection.weight)
        self.width = width
        self.try_out(config, image_size, positions)

    @torch.no_grad()
    def try_out(self, config: StudentConfig, image_size: int, positions: int) -> None:
        """One picture and one text through the encoders: what does not fit is one line now, and no traceback later."""
        self.eval()
        rows, columns = self.grid
        try:
            x = self.embed_image(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
            problem = (
                ""
                if x.shape == (1, self.vit.num_prefix_tokens + rows * columns, self.width)
                else f"gives {list(x.shape)}"
            )
        except Exception as error:
            problem = reason(error)
        if problem:
            raise UserError(
                f"student.image_model is {config.image_model!r}, which cannot encode {image_size} pixels square "
                f"with student.image_overrides {config.image_overrides}: {problem}"
            )
        most = most_positions(self.text)
        if most is not None and positions > most:
            raise UserError(
                f"data.context_length is {positions}: student.text_model {config.text_model!r} has only {most}"
            )
        # Two texts that differ in their padding alone.
        ids = torch.ones(2, positions, dtype=torch.int64)
        ids[1, -1] = 2
        mask = ids.new_ones(ids.shape, dtype=torch.bool)
        mask[:, -1] = False
        try:
            y = self.embed_text(ids, mask)
            problem = "" if y.shape == (2, positions, self.width) else f"gives {list(y.shape)}"
        except Exception as error:
            problem = reason(error)
        if not problem and not isinstance(y, FakeTensor) and not torch.allclose(y[0, :-1], y[1, :-1], atol=1e-3):
            problem = "it lets tokens see padding"
        if problem:
            raise UserError(
                f"student.text_model is {config.text_model!r}, which cannot encode {positions} positions with "
                f"student.text_overrides {config.text_overrides}: {problem}"
            )
        self.train()

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
        return self.image_in(self.vit(self.pixels(image, self.projection.weight.dtype)))  # [B, 1+N, H]

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
