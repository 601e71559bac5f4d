"""The features of a micro-batch that gradient caching keeps, on the device or on the host.

Shapes: B pairs, N patches, M text positions, H student width, D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.token_keep import Selection
from ds_cmli.common.probe import probe


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


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
        """Move everything to the host. CPU-GPU sync."""
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
        return probe.to_device(x, device) if self.on_host else x

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

        `grad` may have more positions. CPU-GPU sync if the features are on the host.
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
