"""The image tower of SigLIP 2's NaFlex models: pictures of any aspect (Tschannen et al., 2025).

Shapes: B pairs, S image side in pixels, p of a patch, N = (S / p)^2 patches, H width of the tower.
"""

from collections.abc import Iterator

import torch
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_cmli.common.json_text import JsonObject
from ds_cmli.data.aspect import patch_mask
from ds_cmli.models.backbone import attended_to
from ds_cmli.models.dual import DualImage
from ds_cmli.models.timm_naflex import at_patches


class DualNaFlex(DualImage):
    """`Siglip2VisionModel`, up to its last norm; its pooled features are the class token."""

    def __init__(self, dual: PreTrainedModel, own: JsonObject, image_size: int):
        """Takes what `DualImage` takes; `image_size`: S."""
        super().__init__(dual, own, image_size)
        self.aspect_patch: int = self.model.config.patch_size

    def read_outside(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        yield from super().read_outside()
        yield self, self.model.embeddings.position_embedding.weight
        yield self, self.model.head.probe

    def forward(self, pixels: Tensor, grid: Tensor | None = None) -> Tensor:
        """Encode normalised pixels [B, 3, S, S], as `data.aspect.packed` has laid them out.

        `grid`: int64 [B, 2]; None: all are square. Returns [B, 1 + N, H].
        """
        # What `Siglip2VisionModel.forward` does. Its own positions check grids by their values,
        # which waits for the GPU.
        embeddings, sides = self.model.embeddings, (self.aspect_patch, self.aspect_patch)
        patches, _ = batch_patchify(pixels, sides, channels_last=True)
        x = embeddings.patch_embedding(patches)
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.unflatten(0, (side, side))
        x = x + at_patches(table, self.grid, grid, antialias=True).to(x.dtype)
        attended = attended_to(grid, patches.shape[1], 0)
        for block in self.blocks:
            x = block(x, attended)
        x = self.model.post_layernorm(x)
        return torch.cat([self._pooled(x, patch_mask(grid, patches.shape[1])), x], 1)

    def _pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, H], bool [B, N] -> [B, 1, H]. Which masks the head takes, its version decides."""
        head = self.model.head
        unused = None if mask is None else ~mask
        pooled = head.attention(head.probe.expand(len(x), -1, -1), x, x, key_padding_mask=unused)[0]
        return pooled + head.mlp(head.layernorm(pooled))
