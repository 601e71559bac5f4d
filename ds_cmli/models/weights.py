"""Builds models of other libraries, and turns their exceptions into one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from ds_cmli.common.errors import blame
from ds_cmli.common.pretrained import loading


@contextmanager
def building(what: str, weights: str = "random") -> Iterator[None]:
    """Inside a library builds a model with `weights`; its exception becomes a line after `what`."""
    with loading(hub=weights == "hub"), blame(what):
        yield


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that has NaN or inf. CPU-GPU sync."""
    for name, x in tensors.items():
        if x.is_floating_point() and x.numel():
            # Both are NaN if any value is; this needs no mask of the tensor's size.
            least, most = x.detach().aminmax()
            if not (least.isfinite() and most.isfinite()):
                return name
    return None
