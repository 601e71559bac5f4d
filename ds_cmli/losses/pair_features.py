"""The features that gradient caching keeps, of a micro-batch and of a step, on device or host.

Shapes: A micro-batches of B images with W texts each, C = B * W, P ranks, G = A * C * P texts, N
patches, M text positions, H student width, D embedding dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import Own, upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.ring import Score, Scorer
from ds_cmli.cmli.token_keep import Selection
from ds_cmli.common.probe import probe
from ds_cmli.common.trees import tensors
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.own_texts import ids_of_texts
from ds_cmli.losses.tiles import TileSide


@dataclass
class PairFeatures:
    """The features of one micro-batch that losses over pairs need, or their gradients.

    `features` has "image_cls", [B, H], "text_cls", [C, H], "patches", [B, N, D], and "tokens",
    [C, M, D], as far as a loss compares them. They are not normalised, in the model's precision,
    and without a graph, except in `Objective.replay`.
    """

    features: dict[str, Tensor]
    token_mask: Tensor  # bool [C, M], True = valid
    pair_id: Tensor  # int64 [B, 1 + W], hashes: equal for equal pictures or captions
    patch_mask: Tensor | None = None  # bool [B, N], the patches that there are; None: all
    selection: Selection | None = None  # which patches and tokens were kept, if only a share is
    wrong: int = 0  # J, how many of an image's texts are wrong captions

    def __len__(self) -> int:
        return len(self.pair_id)

    def tensors(self) -> list[Tensor]:
        """All tensors except those of the batch (the masks and `pair_id`)."""
        return tensors([self.features, self.selection])


@dataclass(frozen=True)
class CachedStep:
    """The features of this rank's micro-batches, on the device or on the host."""

    features: list[PairFeatures]
    device: torch.device
    on_host: bool = False
    scale: float = 1.0  # multiplies the gradients in the cache, so that they do not vanish in fp16
    heartbeat: Callable[[], None] = lambda: None  # called after each tile

    def __len__(self) -> int:
        """The number of this rank's images, A * B."""
        return sum(map(len, self.features))

    @property
    def own(self) -> Own:
        """Where the texts of this rank's images are among those of all ranks."""
        one = self.features[0]
        texts = one.pair_id.shape[1] - 1
        return Own(distributed.rank() * len(self) * texts, texts, one.wrong)

    def fetch(self, x: Tensor) -> Tensor:
        """A cached tensor on the device: a copy if it is on the host of a GPU."""
        return probe.to_device(x, self.device, non_blocking=True) if self.on_host else x

    def image_blocks(self) -> Iterator[tuple[PairFeatures, TileSide]]:
        """Yields each micro-batch's features with its normalised images."""
        firsts = accumulate(map(len, self.features), initial=0)
        for f, first in probe.turns(list(zip(self.features, firsts, strict=False))):
            yield f, self._images(f, first)

    @torch.no_grad()
    def _images(self, f: PairFeatures, first: int) -> TileSide:
        images = dict(self._normalised(f, "image_cls", "patches"))
        mask = None if f.patch_mask is None else self.fetch(f.patch_mask)
        return TileSide(first, self.fetch(f.pair_id), images, mask)

    def _normalised(self, f: PairFeatures, *names: str) -> Iterator[tuple[str, Tensor]]:
        """Yields those of these features that there are, normalised; class tokens in fp32."""
        for name in names:
            if name in f.features:
                x = l2_normalize(self.fetch(f.features[name]))
                yield name, upcast(x) if x.dim() == 2 else x

    @torch.no_grad()
    def gather_texts(self, score: Score) -> tuple[TileSide, TileSide | None]:
        """All ranks' normalised texts; without tokens, and this rank's tokens, for a ring.

        The texts are ordered by rank, and for each rank by micro-batch. Collective.
        """
        longest = max(f.token_mask.shape[1] for f in self.features)
        ids = torch.cat([self.fetch(f.pair_id) for f in self.features])
        count = len(self) * self.own.texts
        mask = torch.zeros(count, longest, dtype=torch.bool, device=self.device)
        own: dict[str, Tensor] = {}
        first = 0
        for f in self.features:
            part = slice(first, first + len(f.token_mask))
            mask[part, : f.token_mask.shape[1]] = self.fetch(f.token_mask)
            for name, x in self._normalised(f, "text_cls", "tokens"):
                if name not in own:
                    size = longest if name == "tokens" else x.shape[1]
                    own[name] = x.new_zeros(count, size, *x.shape[2:])
                own[name][part, : x.shape[1]] = x
            first = part.stop
        all_masks, go_round = None, False
        if "tokens" in own:
            own["tokens"], mask = collectives.pad_text(own["tokens"], mask)  # collective
            go_round = isinstance(score, Scorer) and score.goes_round(own["tokens"])
            if not go_round:
                # Collective.
                own["tokens"], all_masks = collectives.gather_text(own["tokens"], mask)
        if "text_cls" in own:
            own["text_cls"] = collectives.gather_with_gradient(own["text_cls"])  # collective
        of_all = ids_of_texts(collectives.gather(ids), self.own.wrong)  # collective
        texts = TileSide(0, of_all, own, all_masks)
        if not go_round:
            return texts, None
        tokens = {"tokens": own.pop("tokens")}
        of_rank = texts.part(slice(self.own.first, self.own.first + count))
        return texts, replace(of_rank, features=tokens, mask=mask)

    def set_gradient(self, f: PairFeatures, name: str, grad: Tensor) -> None:
        """Replace a feature by its gradient, given that of the normalised feature.

        `grad` may have more positions.
        """
        x = self.fetch(f.features[name]).detach().requires_grad_()
        y = l2_normalize(x)
        (back,) = torch.autograd.grad(y, x, grad[:, : x.shape[1]].to(y.dtype))
        if self.on_host:
            probe.overwrite_on_host(f.features[name], back)
        else:
            f.features[name].copy_(back)

    def set_text_gradients(self, name: str, grad: Tensor) -> None:
        """Replace a feature of this rank's texts by its gradient, [A * C, ...] as above."""
        first = 0
        for f in self.features:
            end = first + len(f.token_mask)
            self.set_gradient(f, name, grad[first:end])
            first = end


class KnownGradient(torch.autograd.Function):
    """Returns zero; its backward gives `gradient` times `factor` as the gradient of `x`."""

    @staticmethod
    def forward(ctx, x, gradient, factor):
        ctx.save_for_backward(gradient)
        ctx.factor, ctx.dtype = factor, x.dtype
        return torch.zeros((), dtype=upcast(x[:0]).dtype, device=x.device)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad * ctx.factor).to(gradient.dtype)).to(ctx.dtype), None, None
