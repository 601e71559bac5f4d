"""Answers where training reads values, which tensors without data do not have.

Small tensors on the host have data. A copy of integers to the device remembers their values, and so
does a tensor computed from such tensors alone. Any other value that is read is made up.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    _BypassDispatchCache,
    _DispatchCacheKey,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ds_cmli.fake_cuda.streams import Stream

aten = torch.ops.aten
MAX_ELEMENTS = 1 << 16  # elements of the largest tensor that is created with data on the host
MADE_UP = 2.0  # instead of a loss or a norm: finite, and no divisor of 0
FACTORIES = {aten.empty.memory_format, aten.empty_strided.default}
FACTORIES |= {
    getattr(aten, name).default for name in ("zeros", "ones", "full", "rand", "randn", "randint")
}
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default}


def known_values(x: Tensor) -> Tensor | None:
    """Return the values of a tensor: its own on the host, or those that it remembers."""
    if not isinstance(x, FakeTensor):
        return x
    return x.constant if x.constant is not None else getattr(x, "remembered", None)


class WithoutData(FakeTensorMode):
    def __deepcopy__(self, memo: object) -> "WithoutData":
        """A copied tensor stays in the mode: views of another mode's are not views."""
        return self

    def _cache_key(self, state, func, args, kwargs):
        """PyTorch keeps the sizes of an operator's results for later calls with such arguments.

        This leaves out what never occurs here, such as symbols in sizes, which takes a fifth of a
        prediction's time.
        """
        key: list[object] = [func, torch.get_default_dtype()]
        _extend_key((args, *kwargs.items()), key)
        return _DispatchCacheKey(tuple(key))


def _extend_key(values: Iterable[object], key: list[object]) -> None:
    """Add all that an operator's results depend on to `key`."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None:  # so may the result have one
                raise _BypassDispatchCache("constant attribute")
            keys = torch._C._dispatch_keys(value).raw_repr()  # device, layout and the like
            key += value.dtype, value.shape, value.stride(), value.storage_offset(), keys
        elif isinstance(value, list | tuple):
            key.append(len(value))
            _extend_key(value, key)
        elif isinstance(value, Tensor):
            raise _BypassDispatchCache("non-fake tensor")
        else:
            key += type(value), value  # 1, 1.0 and True are equal


class KnownValues(TorchDispatchMode):
    """Runs operators of host tensors on their data, and gives a value wherever one is read."""

    def __init__(self, without_data: FakeTensorMode):
        super().__init__()
        self.without_data = without_data

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which wraps each call of the method below; nothing is compiled here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # autograd asks for it more often than for operators
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", None) is None and func is aten.is_pinned.default:
            return True  # the host's memory is not asked about
        leaves = tree_leaves((args, kwargs))
        if not any(map(_is_elsewhere, leaves)):
            return self._on_host(func, args, kwargs)
        if func in READS:
            Stream.current.synchronize()
            return self._value(args[0])
        if func.namespace == "c10d":
            with in_kernel_invocation_manager(self.without_data):
                return func(*args, **kwargs)  # all ranks have what this one has
        if func is aten._to_copy.default:
            source = args[0]
            if not isinstance(source, FakeTensor):
                args = (self.without_data.from_tensor(source),)
            return self._copied(source, func(*args, **kwargs))
        out = func(*args, **kwargs)
        self._remember(func, args, kwargs, leaves, out)
        return out

    def _on_host(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        if func in FACTORIES:
            shape = next(x for x in args if isinstance(x, list))
            if torch.Size(shape).numel() > MAX_ELEMENTS:
                return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _value(self, x: Tensor) -> float | int | bool:
        values = known_values(x)
        if values is not None:
            with _disable_current_modes():
                return values.item()
        if x.dtype.is_floating_point:
            return MADE_UP
        return getattr(x, "likely", False) if x.dtype == torch.bool else 0

    def _copied(self, source: Tensor, out: Tensor) -> Tensor:
        """Return the result of a copy, with data if it is a small one on the host."""
        values = known_values(source) if out.numel() <= MAX_ELEMENTS else None
        if out.device.type == "cpu" and source.device.type != "cpu":
            Stream.current.synchronize()
            if out.numel() <= MAX_ELEMENTS:
                with _disable_current_modes():
                    if values is not None:
                        return values.to(out.dtype, copy=True)
                    return torch.full(out.shape, self._value(source), dtype=out.dtype)
        if values is not None and not out.dtype.is_floating_point:
            with _disable_current_modes():
                vars(out)["remembered"] = values.to(out.dtype, copy=True)
        return out

    def _remember(self, func, args: tuple, kwargs: dict, leaves: list, out: object) -> None:
        """Remember the values of results whose operands are all known, and else the likely bool."""
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        small = bool(tensors) and all(x.numel() <= MAX_ELEMENTS for x in tensors)
        all_known = small and all(known_values(x) is not None for x in tensors)
        if func._schema.is_mutable and not all_known:
            for x in tensors:
                vars(x).pop("remembered", None)
        elif all_known:
            with _disable_current_modes():
                host = {"device": torch.device("cpu")} if "device" in kwargs else {}
                host_arguments = (args, kwargs | host)
                host_args, host_kwargs = tree_map_only(Tensor, known_values, host_arguments)
                values = func(*host_args, **host_kwargs)
            for x, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
                if isinstance(x, FakeTensor):
                    vars(x)["remembered"] = value
        elif isinstance(out, Tensor) and out.dtype == torch.bool:
            # All gradients are finite, and no loss is anything else.
            vars(out)["likely"] = func.overloadpacket in (aten.all, aten.isfinite)


def _is_elsewhere(value: object) -> bool:
    """Return True if an argument has no data, or names the device."""
    if isinstance(value, torch.device):
        return value.type != "cpu"
    return isinstance(value, Tensor) and (
        isinstance(value, FakeTensor) or value.device.type != "cpu"
    )
