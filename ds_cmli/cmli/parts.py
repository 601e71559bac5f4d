"""Gradient caching for any encoder: a batch that does not fit is encoded a part at a time."""

import functools
import types
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Model = TypeVar("Model", bound=nn.Module)


def in_parts(model: Model, size: int) -> Model:
    """The same model, which encodes `size` rows of a batch at a time from now on.

    Forward keeps the embeddings alone; backward encodes each part again with its random state, and
    adds up the gradients of the whole batch, as gradient caching does (arXiv 2101.06983). Memory is
    that of one part and of all embeddings, for a second forward. It is for losses that compare the
    rows of a batch, whose embeddings are then all there.

    Args:
        model: returns a tensor [B, ...] for tensors [B, ...], by position or by name; what is no
            tensor goes to every part. Give it before it is wrapped, as by DistributedDataParallel.
        size: rows of a part; the last may have fewer.

    Raises:
        TypeError, ValueError: `size` is no positive int; in a call, tensors of other lengths or no
            tensor as the result.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"size={size!r} must be a positive int: the rows that are encoded together"
        )
    before = model.forward
    # A method gets the model it is called on, which may be a copy.
    function = getattr(before, "__func__", lambda _, *given, **named: before(*given, **named))

    @functools.wraps(function)
    def forward(self, *given, **named):
        values = *given, *named.values()
        tensors = [place for place, x in enumerate(values) if isinstance(x, Tensor) and x.ndim]
        sizes = {len(values[place]) for place in tensors}
        if len(sizes) > 1:
            raise ValueError(f"in_parts needs tensors of one batch, found {sorted(sizes)} rows")

        # By position: checkpointing keeps the random state of devices of these alone.
        def encode(*values):
            by_name = dict(zip(named, values[len(given) :], strict=True))
            out = function(self, *values[: len(given)], **by_name)
            if not isinstance(out, Tensor):
                raise TypeError(
                    "in_parts needs a model that returns its embeddings as one tensor, not "
                    f"{type(out).__name__}"
                )
            return out

        outputs = []
        for first in range(0, max([1, *sizes]), size):
            part = list(values)
            for place in tensors:
                part[place] = values[place][first : first + size]
            if torch.is_grad_enabled():
                outputs.append(checkpoint(encode, *part, use_reentrant=False))
            else:
                outputs.append(encode(*part))
        return torch.cat(outputs)

    model.forward = types.MethodType(forward, model)
    return model
