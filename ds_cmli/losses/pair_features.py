"""The features that gradient caching keeps, of a micro-batch and of a step, on device or host.

Shapes: K micro-batches of B pairs, N patches, M text positions, H student width, D embedding
dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.ring import Score, Scorer
from ds_cmli.cmli.token_keep import Selection
from ds_cmli.common.probe import probe
from ds_cmli.losses.tiles import Images, TextChunk, Texts, present


@dataclass
class PairFeatures:
    """The features of one micro-batch that losses over pairs need.

    They are not normalised, in the model's precision, and without a graph, except in
    `Objective.replay`.
    """

    image_cls: Tensor | None  # [B, H]; None if no loss compares class tokens
    text_cls: Tensor | None  # [B, H]
    patches: Tensor | None  # [B, N, D]; None if no loss compares patches and tokens
    tokens: Tensor | None  # [B, M, D]
    token_mask: Tensor  # bool [B, M], True = valid
    pair_id: Tensor  # int64 [B, 2], hashes: equal for equal pictures or captions
    patch_mask: Tensor | None = None  # bool [B, N], the patches that there are; None: all
    selection: Selection | None = None  # which patches and tokens were kept, if only a share is
    on_host: bool = False  # whether all of them wait in the memory of the host

    def to_host(self) -> "PairFeatures":
        """Move everything to the host, as `probe.to_host` does."""
        return replace(self._mapped(probe.to_host), on_host=True)

    def on(self, device: torch.device) -> "PairFeatures":
        return replace(self._mapped(lambda x: self.fetch(x, device)), on_host=False)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "PairFeatures":
        changed: dict[str, object] = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                changed[name] = function(x)
            elif isinstance(x, Selection):
                changed[name] = Selection(
                    function(x.patches), function(x.tokens), function(x.token_mask)
                )
        return replace(self, **changed)  # type: ignore[arg-type]

    def fetch(self, x: Tensor, device: torch.device) -> Tensor:
        """One of these tensors on the device: a copy if they are on the host of a GPU."""
        return probe.to_device(x, device, non_blocking=True) if self.on_host else x

    def copied(self) -> "PairFeatures":
        """These features without the memory around them; class tokens are views of sequences."""
        own: dict[str, Tensor] = {}
        for name in ("image_cls", "text_cls", "patches", "tokens"):
            x = getattr(self, name)
            if x is not None and x.untyped_storage().nbytes() > x.nbytes:
                own[name] = x.clone()
        return replace(self, **own)  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor]:
        """All tensors except those of the batch (the masks and `pair_id`)."""
        found = [self.image_cls, self.text_cls, self.patches, self.tokens]
        if self.selection is not None:
            found += vars(self.selection).values()
        return present(*found)

    def set_gradient(self, name: str, grad: Tensor, device: torch.device) -> None:
        """Replace a feature by its gradient, given that of the normalised feature.

        `grad` may have more positions.
        """
        place = getattr(self, name)
        x = self.fetch(place, device).detach().requires_grad_()
        y = l2_normalize(x)
        if x.dim() == 3:
            grad = grad[:, : x.shape[1]]
        (back,) = torch.autograd.grad(y, x, grad.to(y.dtype))
        if self.on_host:
            probe.overwrite_on_host(place, back)
        else:
            place.copy_(back)


@dataclass(frozen=True)
class CachedStep:
    """The features of this rank's micro-batches, on the device or on the host."""

    features: list[PairFeatures]
    device: torch.device
    scale: float = 1.0  # multiplies the gradients in the cache, so that they do not vanish in fp16
    heartbeat: Callable[[], None] = lambda: None  # called after each tile

    def __len__(self) -> int:
        """The number of this rank's pairs, K * B."""
        return sum(len(f.pair_id) for f in self.features)

    def image_blocks(self) -> Iterator[tuple[PairFeatures, Images]]:
        """Yields each micro-batch's features with its normalised images."""
        firsts, first = [], 0
        for f in self.features:
            firsts.append((f, first))
            first += len(f.pair_id)
        for f, first in probe.turns(firsts):
            yield f, self._images(f, first)

    @torch.no_grad()
    def _images(self, f: PairFeatures, first: int) -> Images:
        cls = patches = None
        if f.image_cls is not None:
            cls = l2_normalize(f.fetch(f.image_cls, self.device))
        if f.patches is not None:
            patches = l2_normalize(f.fetch(f.patches, self.device))
        pair_id = f.fetch(f.pair_id, self.device)
        mask = f.patch_mask
        if mask is not None:
            mask = f.fetch(mask, self.device)
        return Images(first, pair_id, None if cls is None else upcast(cls), patches, mask)

    def parts(
        self, images: Images, chunk: TextChunk, argmax_bytes: int, larger: int = 1
    ) -> Iterator[slice]:
        """Yields which texts of a chunk each tile has."""
        count, positions = chunk.mask.shape
        size = images.texts_of_a_tile(positions, argmax_bytes, larger)
        for start in probe.turns(range(0, count, size)):
            yield slice(start, min(start + size, count))
            self.heartbeat()

    @torch.no_grad()
    def gather_texts(self, score: Score) -> Texts:
        """Gather all ranks' texts, except the tokens if they pass round a ring. Collective."""
        device, longest = self.device, max(f.token_mask.shape[1] for f in self.features)
        ids = torch.cat([f.fetch(f.pair_id, device) for f in self.features])
        mask = torch.zeros(len(self), longest, dtype=torch.bool, device=device)
        cls = tokens = None
        first = 0
        for f in self.features:
            part = slice(first, first + len(f.pair_id))
            length = f.token_mask.shape[1]
            mask[part, :length] = f.fetch(f.token_mask, device)
            if f.text_cls is not None:
                x = upcast(l2_normalize(f.fetch(f.text_cls, device)))
                cls = x.new_empty(len(self), x.shape[1]) if cls is None else cls
                cls[part] = x
            if f.tokens is not None:
                x = l2_normalize(f.fetch(f.tokens, device))
                tokens = x.new_zeros(len(self), longest, x.shape[2]) if tokens is None else tokens
                tokens[part, :length] = x
            first = part.stop
        go_round = False
        if tokens is not None:
            tokens, mask = collectives.pad_text(tokens, mask)  # collective
            go_round = isinstance(score, Scorer) and score.goes_round(tokens)
        if tokens is not None and not go_round:
            tokens, mask = collectives.gather_text(tokens, mask)  # collective
        if cls is not None:
            cls = collectives.gather_with_gradient(cls)  # collective
        return Texts(collectives.gather(ids), mask, cls, tokens, go_round)  # collective

    def back_to_texts(self, name: str, grad: Tensor) -> None:
        """Replace text features by their gradients, given those of the normalised ones.

        `grad`: [K * B, ...], of this rank's texts.
        """
        first = 0
        for features in self.features:
            stop = first + len(features.pair_id)
            features.set_gradient(name, grad[first:stop], self.device)
            first = stop
