"""Answers where a program reads values, which tensors without data do not have.

Small tensors on the host have data: masks, indices, what a DataLoader makes. Copies of whole
numbers and truth values to the device remember theirs, and so does what is computed of them alone.
All others are stood in for, and each reading of a stand-in is counted.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ds_cmli.fits import kernels, lines
from ds_cmli.fits.streams import Stream

aten = torch.ops.aten
SMALL = 1 << 16  # elements of the largest tensor that is created with data on the host
NUMBER = 2.0  # the stand-in of a loss or a norm: finite, and no divisor of 0
MADE = ("zeros", "ones", "full", "rand", "randn", "randint")
FACTORIES = {aten.empty.memory_format, aten.empty_strided.default, aten.randint.low}
FACTORIES |= {getattr(aten, name).default for name in MADE}
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default}
COMPARISONS = {aten.equal.default, aten.allclose.default}
OF_LENGTHS = {aten._ctc_loss.Tensor, aten._ctc_loss.default, aten._pack_padded_sequence.default}
RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Values(TorchDispatchMode):
    """Runs operators of host tensors on their data, and gives a value wherever one is read."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()  # stand-ins by the line that read them
        self.by_cpu: Counter[str] = Counter()  # operators that know no sizes without data
        self.bounded: Counter[str] = Counter()  # sizes that depend on data, by line

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "__tensor_flatten__") and t is not FakeTensor for t in types):
            return NotImplemented  # a wrapper, such as a DTensor: its parts come here
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # the host's memory is not asked about
        if isinstance(func, HigherOrderOperator):
            if func.name() == "run_dtensor_rng_op":  # moves the generator around an operator
                return args[2](*args[3:], **kwargs)
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:  # elsewhere autograd has done so
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if not any(map(_is_elsewhere, leaves)):
            return self._on_host(func, args, kwargs)
        if any(map(_is_named, leaves)):
            args, kwargs = tree_map(_unnamed, (args, kwargs))
        if func in READS or func in COMPARISONS or torch.Tag.dynamic_output_shape in func.tags:
            Stream.current.synchronize()
        if func in READS:
            return self._value(args[0])
        if func is aten.nonzero.default:
            return self._places(args[0])
        if func in INDEXING:
            args = (args[0], [*self._indices(args[1])], *args[2:])
        if torch.Tag.dynamic_output_shape in func.tags and _all_known(leaves):
            values = _computed(func, args, kwargs, _known)
            if values is not None:
                return tree_map(lambda value: _on_device(value, args[0].device), values)
        if func in COMPARISONS:
            self.read[lines.current()] += 1
            return _computed(func, args, kwargs, _known if _all_known(leaves) else _one)
        if func is aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            return _grouped_product(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except DynamicOutputShapeException:
            if func in OF_LENGTHS:
                return self._as_on_a_cpu(func, args, kwargs)
            largest = largest_results(func.name(), *args, **kwargs)
            if largest is None:
                raise
            self.bounded[lines.current()] += 1
            return largest
        except NotImplementedError:
            return self._as_on_a_cpu(func, args, kwargs)
        if func is aten._to_copy.default:
            return self._copied(args[0], out)
        _remember(func, args, kwargs, leaves, out)
        return out

    def _on_host(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        if func is aten.is_pinned.default:
            return True  # as DDP with `find_unused_parameters` asks of what it has pinned
        if func in FACTORIES:
            elements = 1
            for size in next((x for x in args if isinstance(x, list | tuple)), ()):
                elements *= size
            if elements > SMALL:
                return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _as_on_a_cpu(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        """The results, as a CPU computes them, of an operator that knows no sizes without data."""
        if not func._schema.returns:
            return None  # it works in place
        out: object = kernels.unknown_results(func.name(), *args)
        if out is None:
            out = _computed(func, args, kwargs, _known_or_stand_ins)
            if out is None and str(func._schema.returns[0].type) == "bool":
                return False  # whether a library's kernel is taken
            if out is None:
                raise UnsupportedOperatorException(func)
            self.by_cpu[str(func)] += 1
            # Sizes of the parts of a packed sequence stay on the host.
            moved = torch.Tensor.is_floating_point if func in OF_LENGTHS else torch.is_tensor
            out = tree_map(lambda x: _like(x, args[0].device) if moved(x) else x, out)
        return out

    def _value(self, tensor: Tensor) -> float | int | bool:
        known = _known(tensor)
        if known is not None:
            with _disable_current_modes():
                return known.item()
        self.read[lines.current()] += 1
        return _stand_in(tensor)

    def _copied(self, source: Tensor, out: Tensor) -> Tensor:
        """The result of a copy, with data if it is a small one on the host."""
        to_host = out.device.type == "cpu" and source.device.type != "cpu"
        if to_host:
            Stream.current.synchronize()
        if to_host and out.numel() <= SMALL:
            self.read[lines.current()] += 1
            known = _known(source)
            with _disable_current_modes():
                if known is not None:
                    return known.to(out.dtype, copy=True)
                return torch.full(out.shape, _stand_in(source), dtype=out.dtype)
        known = _known(source)
        if known is not None and out.numel() <= SMALL and not out.dtype.is_floating_point:
            with _disable_current_modes():
                out.fits_values = known.to(out.dtype, copy=True)  # type: ignore[attr-defined]
        return out

    def _places(self, tensor: Tensor) -> Tensor:
        """The result of `nonzero`; of unknown values the largest possible one."""
        known = _known(tensor)
        if known is None:
            self.bounded[lines.current()] += 1
            shape = tensor.numel(), tensor.dim()
            return torch.zeros(shape, dtype=torch.int64, device=tensor.device)
        with _disable_current_modes():
            places = known.nonzero()
        return _on_device(places, tensor.device)

    def _indices(self, indices: list[Tensor | None]):
        """Indices by number in place of masks."""
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                yield index
            else:
                yield from self._places(index).unbind(1)


def largest_results(operator: str, first: Tensor, *rest: object, **options: object) -> object:
    """The results of an operator for the data that make them largest; None if that is not known."""

    def places(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=first.device)

    most = first.numel()
    if operator == "aten::bincount":
        least = rest[1] if len(rest) > 1 else options.get("minlength", 0)
        return places(least or most)  # type: ignore[arg-type]
    if operator == "torchvision::nms":
        return places(len(first))
    if operator == "aten::masked_select" and isinstance(rest[0], Tensor):
        return first.new_zeros(torch.broadcast_shapes(first.shape, rest[0].shape)).flatten()
    if operator in ("aten::_unique2", "aten::unique_consecutive"):
        return first.new_zeros(most), places(*first.shape), places(most)
    if operator in ("aten::unique_dim", "aten::unique_dim_consecutive"):
        rows = first.shape[rest[0]]  # type: ignore[call-overload]
        return torch.zeros_like(first), places(rows), places(rows)
    return None


def _like(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def _known_or_stand_ins(tensor: Tensor) -> Tensor:
    known = _known(tensor)
    if known is not None:
        return known
    return torch.full(tensor.shape, _stand_in(tensor), dtype=tensor.dtype)


def _grouped_product(a: Tensor, b: Tensor, *rest: Tensor, **options: Tensor | None) -> Tensor:
    """A GPU takes other types than bf16 too, of which the operator without data knows nothing."""
    bf16 = [_like(x, torch.device("meta")).to(torch.bfloat16) for x in (a, b)]
    offsets = {name: None if x is None else x.to("meta") for name, x in options.items()}
    out = aten._grouped_mm.default(*bf16, *(x.to("meta") for x in rest), **offsets)
    return a.new_empty_strided(out.shape, out.stride())


def on_host(read: Callable) -> Callable:
    """A method in place of one that reads a whole tensor of the host, as `Tensor.numpy` does."""

    def run(self: FakeTensor, *args: object, **kwargs: object) -> object:
        if self.device.type != "cpu":
            return read(self, *args, **kwargs)
        with _disable_current_modes():
            return getattr(_known_or_stand_ins(self), read.__name__)(*args, **kwargs)

    return run


def _is_elsewhere(value: object) -> bool:
    """Whether an argument has no data, or names the device."""
    if isinstance(value, torch.device):
        return value.type != "cpu"
    return isinstance(value, FakeTensor) or (
        isinstance(value, Tensor) and value.device.type != "cpu"
    )


def _is_named(value: object) -> bool:
    """Whether a tensor is of a class, such as fastai's, that only names what it holds."""
    if type(value) in (Tensor, FakeTensor, Parameter) or not isinstance(value, Tensor):
        return False
    return type(value).__torch_dispatch__ is Tensor.__torch_dispatch__


def _unnamed(value: object) -> object:
    """The tensor itself in place of one of a class that FakeTensorMode refuses."""
    if not _is_named(value):
        return value
    with _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)  # type: ignore[attr-defined]


def _known(tensor: Tensor) -> Tensor | None:
    """The values of a tensor: its own on the host, or those that it remembers."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    if tensor.constant is not None:
        return tensor.constant
    return getattr(tensor, "fits_values", None)


def copy_values(into: Tensor, source: Tensor) -> None:
    """Give a tensor the values of another one, repeated, as far as those are known."""
    known = _known(source)
    if known is None or not known.numel() or into.numel() % known.numel():
        return
    with _disable_current_modes():
        times = into.numel() // known.numel()
        values = known.detach().to(into.dtype).flatten().repeat(times).reshape(into.shape)
        if isinstance(into, FakeTensor):
            into.fits_values = values  # type: ignore[attr-defined]
        else:
            into.detach().copy_(values)


def _all_known(leaves: list[object]) -> bool:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return bool(tensors) and all(t.numel() <= SMALL and _known(t) is not None for t in tensors)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the device that remembers these values."""
    out = torch.zeros(values.shape, dtype=values.dtype, device=device)
    out.fits_values = values  # type: ignore[attr-defined]
    return out


def _stand_in(tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return getattr(tensor, "fits_truth", False)
    return NUMBER if tensor.dtype.is_floating_point else 0


def _remember(
    func: OpOverload, args: tuple, kwargs: dict[str, object], leaves: list[object], out: object
) -> None:
    """Compute the result's values if all operands are known, and else a result's likely truth."""
    known = _all_known(leaves)
    if func._schema.is_mutable and not known:
        for leaf in leaves:
            if getattr(leaf, "fits_values", None) is not None:
                del leaf.fits_values  # type: ignore[attr-defined]
        return
    if known and isinstance(out, list):  # `unbind`, or a split
        values = _computed(func, args, kwargs, _known)
        for part, value in zip(out, values if isinstance(values, list) else (), strict=False):
            part.fits_values = value
        return
    if not isinstance(out, FakeTensor) or torch.Tag.nondeterministic_seeded in func.tags:
        return
    known = known or (func in RANGES and not out.dtype.is_floating_point)
    if known and out.numel() <= SMALL:
        out.fits_values = _computed(func, args, kwargs, _known)  # type: ignore[attr-defined]
    elif out.dtype == torch.bool:
        if func.overloadpacket in (aten.any, aten.all):  # nothing is wrong, and all is right
            out.fits_truth = func.overloadpacket is aten.all  # type: ignore[attr-defined]
            return
        truth = _computed(func, args, kwargs, _one)
        with _disable_current_modes():
            if isinstance(truth, Tensor):
                likely = bool(truth.all())
            else:  # the sizes that it is given are not those of one element
                told = [x for x in leaves if isinstance(x, Tensor) and x.dtype == torch.bool]
                likely = bool(told) and all(map(_stand_in, told))
        out.fits_truth = likely  # type: ignore[attr-defined]


def _computed(func: OpOverload, args: tuple, kwargs: dict[str, object], value) -> object:
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


def _one(tensor: Tensor) -> Tensor:
    """A tensor of one element, the stand-in."""
    return torch.full((1,) * tensor.dim(), _stand_in(tensor), dtype=tensor.dtype)
