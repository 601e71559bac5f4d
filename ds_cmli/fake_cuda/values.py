"""Answers where a program reads values, which tensors without data do not have.

Small tensors on the host have data: masks, indices, what a DataLoader makes. Copies of whole
numbers and truth values to the device remember theirs, and so does what is computed of them alone.
All others are stood in for.
"""

from threading import RLock

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ds_cmli.fake_cuda.stand_ins import (
    SMALL,
    all_known,
    computed,
    known_values,
    on_device,
    one,
    remember,
    stand_in,
)
from ds_cmli.fake_cuda.streams import Stream

aten = torch.ops.aten
MADE = ("zeros", "ones", "full", "rand", "randn", "randint")
FACTORIES = {aten.empty.memory_format, aten.empty_strided.default, aten.randint.low}
FACTORIES |= {getattr(aten, name).default for name in MADE}
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default}
COMPARISONS = {aten.equal.default, aten.allclose.default}
OF_STORAGE = {aten.set_.source_Storage, aten.set_.source_Storage_storage_offset}
FILLING = {
    aten.index_put.default: aten.masked_fill.Tensor,
    aten.index_put_.default: aten.masked_fill_.Tensor,
}
INDEXING = {aten.index.Tensor, *FILLING}


class Values(TorchDispatchMode):
    """Runs operators of host tensors on their data, and gives a value wherever one is read."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.turn = RLock()  # of a thread, for one operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self.turn:
            return self._answer(func, types, args, kwargs)

    def _answer(self, func, types, args, kwargs):
        if any(hasattr(t, "__tensor_flatten__") and t is not FakeTensor for t in types):
            return NotImplemented  # a wrapper, such as a DTensor: its parts come here
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # the host's memory is not asked about
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:  # elsewhere autograd has done so
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if not any(map(_is_elsewhere, leaves)):
            return self._on_host(func, args, kwargs)
        if func in READS or func in COMPARISONS or torch.Tag.dynamic_output_shape in func.tags:
            Stream.current.synchronize()
        if func in READS:
            return self._value(args[0])
        if func is aten.nonzero.default:
            return self._places(args[0])
        if func in FILLING and _is_filling(*args):
            func, args = FILLING[func], (args[0], args[1][0], args[2])
        if func in INDEXING:
            args = (args[0], [*self._indices(args[1])], *args[2:])
        if torch.Tag.dynamic_output_shape in func.tags and all_known(leaves):
            values = computed(func, args, kwargs, known_values)
            if values is not None:
                return tree_map(lambda value: on_device(value, args[0].device), values)
        if func in COMPARISONS:
            return computed(func, args, kwargs, known_values if all_known(leaves) else one)
        if func in OF_STORAGE:
            out = _uncached(func, args)
        elif func is aten._to_copy.default:
            out = func(_without_data(args[0]), **kwargs)
        else:
            out = func(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._copied(args[0], out)
        remember(func, args, kwargs, leaves, out)
        return out

    def _on_host(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        if func in FACTORIES:
            elements = 1
            for size in next((x for x in args if isinstance(x, list | tuple)), ()):
                elements *= size
            if elements > SMALL:
                return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _value(self, tensor: Tensor) -> float | int | bool:
        known = known_values(tensor)
        if known is not None:
            with _disable_current_modes():
                return known.item()
        return stand_in(tensor)

    def _copied(self, source: Tensor, out: Tensor) -> Tensor:
        """The result of a copy, with data if it is a small one on the host."""
        to_host = out.device.type == "cpu" and source.device.type != "cpu"
        if to_host:
            Stream.current.synchronize()
        if to_host and out.numel() <= SMALL:
            known = known_values(source)
            with _disable_current_modes():
                if known is not None:
                    return known.to(out.dtype, copy=True)
                return torch.full(out.shape, stand_in(source), dtype=out.dtype)
        known = known_values(source)
        if known is not None and out.numel() <= SMALL and not out.dtype.is_floating_point:
            with _disable_current_modes():
                out.fits_values = known.to(out.dtype, copy=True)  # type: ignore[attr-defined]
        return out

    def _places(self, tensor: Tensor) -> Tensor:
        """The result of `nonzero`; of unknown values the largest possible one."""
        known = known_values(tensor)
        if known is None:
            shape = tensor.numel(), tensor.dim()
            return torch.zeros(shape, dtype=torch.int64, device=tensor.device)
        with _disable_current_modes():
            places = known.nonzero()
        return on_device(places, tensor.device)

    def _indices(self, indices: list[Tensor | None]):
        """Indices by number in place of masks."""
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                yield index
            else:
                yield from self._places(index).unbind(1)


def _is_filling(x: Tensor, indices: list[Tensor | None], value: Tensor, add: bool = False) -> bool:
    """Whether PyTorch fills `x[mask] = number` by the mask itself (`canDispatchToMaskedFill`)."""
    mask = indices[0]
    if mask is None or len(indices) > 1 or add or mask.dtype is not torch.bool:
        return False
    return mask.shape == x.shape and value.numel() == 1 and value.device.type == "cpu"


def _uncached(func: OpOverload, args: tuple) -> Tensor:
    """The result of an operator whose storage the cache of FakeTensorMode would keep for good."""
    mode = active_fake_mode()
    if mode is None:
        return func(*args)
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        return func(*args)
    finally:
        mode.cache_enabled = before


def _without_data(tensor: Tensor) -> Tensor:
    """A tensor of the host without its data, which PyTorch before 2.9 would copy to the device."""
    mode = active_fake_mode()
    if mode is None or isinstance(tensor, FakeTensor):
        return tensor
    return mode.from_tensor(tensor)


def _is_elsewhere(value: object) -> bool:
    """Whether an argument has no data, or names the device."""
    if isinstance(value, torch.device):
        return value.type != "cpu"
    return isinstance(value, FakeTensor) or (
        isinstance(value, Tensor) and value.device.type != "cpu"
    )
