"""Known values of tensors without data, and stand-ins for unknown ones.

A tensor remembers its values as an attribute, or, of whole numbers and truth values, the likely
one of all its elements.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

aten = torch.ops.aten
SMALL = 1 << 16  # elements of the largest tensor that is created with data on the host
NUMBER = 2.0  # the stand-in of a loss or a norm: finite, and no divisor of 0
ALL, ANY = (aten.all, aten._is_all_true), (aten.any, aten._is_any_true)  # right, and wrong
# Whole numbers that are not known equal no other.
EQUAL, EXTREME = (aten.eq, aten.ne, aten.isin), (aten.max, aten.amax, aten.min, aten.amin)
FILLED = {
    *(aten.ones, aten.ones_like, aten.new_ones, aten.zeros, aten.zeros_like, aten.new_zeros),
    *(aten.full, aten.full_like, aten.new_full, aten.fill_, aten.zero_),
}
RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}


def known_values(tensor: Tensor) -> Tensor | None:
    """The values of a tensor: its own on the host, or those that it remembers."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    if tensor.constant is not None:
        return tensor.constant
    return getattr(tensor, "fits_values", None)


def likely(tensor: Tensor) -> int | None:
    """The one value that all elements likely have; None if nothing is known of them."""
    known = known_values(tensor)
    if known is None or tensor.dtype.is_floating_point:
        return getattr(tensor, "fits_likely", None)
    with _disable_current_modes():
        first = known.flatten()[:1]
        return int(first) if len(first) and bool((known == first).all()) else None


def stand_in(tensor: Tensor) -> float | int | bool:
    if tensor.dtype.is_floating_point:
        return NUMBER
    value = likely(tensor) or 0
    return bool(value) if tensor.dtype == torch.bool else value


def known_or_stand_ins(tensor: Tensor) -> Tensor:
    known = known_values(tensor)
    if known is not None:
        return known
    return torch.full(tensor.shape, stand_in(tensor), dtype=tensor.dtype)


def one(tensor: Tensor) -> Tensor:
    """A tensor of one element, the stand-in."""
    return torch.full((1,) * tensor.dim(), stand_in(tensor), dtype=tensor.dtype)


def all_known(leaves: list[object]) -> bool:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return bool(tensors) and all(
        t.numel() <= SMALL and known_values(t) is not None for t in tensors
    )


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the device that remembers these values."""
    out = torch.zeros(values.shape, dtype=values.dtype, device=device)
    out.fits_values = values  # type: ignore[attr-defined]
    return out


def copy_values(into: Tensor, source: Tensor) -> None:
    """Give a tensor the values of another one, repeated, as far as those are known."""
    known = known_values(source)
    if known is None or not known.numel() or into.numel() % known.numel():
        return
    with _disable_current_modes():
        times = into.numel() // known.numel()
        values = known.detach().to(into.dtype).flatten().repeat(times).reshape(into.shape)
        if isinstance(into, FakeTensor):
            into.fits_values = values  # type: ignore[attr-defined]
        else:
            into.detach().copy_(values)


def on_host(read: Callable) -> Callable:
    """A method in place of one that reads a whole tensor of the host, as `Tensor.numpy` does."""

    def run(self: FakeTensor, *args: object, **kwargs: object) -> object:
        if self.device.type != "cpu":
            return read(self, *args, **kwargs)
        with _disable_current_modes():
            return getattr(known_or_stand_ins(self), read.__name__)(*args, **kwargs)

    return run


def remember(
    func: OpOverload, args: tuple, kwargs: dict[str, object], leaves: list[object], out: object
) -> None:
    """Compute the result's values if all operands are known, and else a result's likely truth."""
    known = all_known(leaves)
    base = getattr(args[0], "_base", None) if args and func._schema.is_mutable else None
    if base is not None:  # a part of it has been written
        base.fits_likely, base.fits_filled = None, False
    if not known:
        _remember_likely(func, args, kwargs, leaves, out)
    if func._schema.is_mutable and not known:
        for leaf in leaves:
            if getattr(leaf, "fits_values", None) is not None:
                del leaf.fits_values  # type: ignore[attr-defined]
        return
    if known and isinstance(out, list):  # `unbind`, or a split
        values = computed(func, args, kwargs, known_values)
        for part, value in zip(out, values if isinstance(values, list) else (), strict=False):
            part.fits_values = value
        return
    if not isinstance(out, FakeTensor) or torch.Tag.nondeterministic_seeded in func.tags:
        return
    known = known or (func in RANGES and not out.dtype.is_floating_point)
    if known and out.numel() <= SMALL:
        out.fits_values = computed(func, args, kwargs, known_values)  # type: ignore[attr-defined]


def _remember_likely(
    func: OpOverload, args: tuple, kwargs: dict[str, object], leaves: list[object], out: object
) -> None:
    if not isinstance(out, FakeTensor) or out.dtype.is_floating_point or out.dtype.is_complex:
        return
    packet, tensors = func.overloadpacket, [x for x in leaves if isinstance(x, Tensor)]
    # Inference mode does not know of which tensor another one is a part.
    filled = packet in FILLED and not torch.is_inference_mode_enabled()
    truths = [x for x in tensors if x.dtype == torch.bool]
    guessed = all(likely(x) is not None for x in tensors if not x.dtype.is_floating_point)
    guessed |= packet is aten.remainder and args[1] == 1  # 0: torch's test for a whole number
    unequal = any(getattr(x, "fits_unequal", False) for x in truths)
    value: object = None
    if torch.Tag.nondeterministic_seeded in func.tags:
        unequal = False
    elif out.dtype != torch.bool:
        of_each = torch.Tag.pointwise in func.tags or packet in EXTREME
        if (filled and out.numel() <= SMALL) or (of_each and guessed and tensors):
            value = computed(func, args, kwargs, one)
    elif packet in ALL + ANY:
        decided = unequal or getattr(args[0], "fits_filled", False)
        value = stand_in(args[0]) if decided else packet in ALL
    elif packet in EQUAL and not guessed:
        value, unequal = packet is aten.ne, True
    else:
        value = computed(func, args, kwargs, one)
        if value is None:  # the sizes that it is given are not those of one element
            value = bool(truths) and all(map(stand_in, truths))
    out.fits_likely = _of_one(value)  # type: ignore[attr-defined]
    out.fits_unequal = unequal  # type: ignore[attr-defined]
    out.fits_filled = filled  # type: ignore[attr-defined]


def _of_one(value: object) -> int | None:
    """The number that a result of tensors of one element holds."""
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, bool | int) else None
    with _disable_current_modes():
        return int(value.all() if value.dtype == torch.bool else value.flatten()[0])


def computed(func: OpOverload, args: tuple, kwargs: dict[str, object], value) -> object:
    """What an operator returns for other values of its tensors; None if it fails on them."""
    with _disable_current_modes():
        try:
            given = tree_map(lambda x: value(x) if isinstance(x, Tensor) else x, (args, kwargs))
            if "device" in kwargs:
                given[1]["device"] = torch.device("cpu")
            out = func(*given[0], **given[1])
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None
    return out
