"""Builds models of other libraries, and turns their exceptions into one line."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ds_cmli.common.errors import UserError, check_regular
from ds_cmli.common.pretrained import loading, reason


@contextmanager
def building(what: str, weights: str = "random") -> Iterator[None]:
    """Inside a library builds a model with `weights`; its exception becomes a line after `what`."""
    check_regular(what, Path(weights))
    with loading(hub=weights == "hub"):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{what}: {reason(error)}") from None


def not_finite(value: object, name: str = "") -> str | None:
    """The name of the first tensor in nested containers that has NaN or inf. CPU-GPU sync."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel():
            return None
        # Both are NaN if any value is; this needs no mask of the tensor's size.
        least, most = value.detach().aminmax()
        return None if least.isfinite() and most.isfinite() else name
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, inner in items:
        bad = not_finite(inner, f"{name}.{key}".lstrip("."))
        if bad:
            return bad
    return None


def say(line: str, model: nn.Module | None = None) -> None:
    """Print on the first rank, unless the parameters of `model` are fake tensors."""
    fake = model is not None and isinstance(next(model.parameters(), None), FakeTensor)
    if os.environ.get("RANK", "0") == "0" and not fake:
        print(line, flush=True)
