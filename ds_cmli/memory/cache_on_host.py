"""Gradient caching whose cached features lie on the host, in a prediction for a GPU.

All tensors of a prediction have the same device, so what lies on the host must be left out of the record.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ds_cmli.common.patches import replaced
from ds_cmli.engine import gradient_caching
from ds_cmli.losses import cached
from ds_cmli.memory.tracker import Tracker


@contextmanager
def kept_on_host(tracker: Tracker) -> Iterator[None]:
    """Inside, cached features take no device memory; what is fetched from them is recorded as a copy on the device."""

    def on_host(features: cached.PairFeatures) -> cached.PairFeatures:
        with tracker.paused():
            return features.to("cpu")

    def fetched(x: Tensor, device: torch.device | str) -> Tensor:
        with tracker.paused():
            view = x.detach()
        return view.clone()

    def stored(value: Tensor, place: Tensor) -> None:
        with tracker.paused():
            place.copy_(value)

    with ExitStack() as stack:
        stack.enter_context(replaced(gradient_caching, "on_host", on_host))
        stack.enter_context(replaced(cached, "fetched", fetched))
        stack.enter_context(replaced(cached, "stored", stored))
        yield
