"""Moves and casts modules whose parameters hold no data."""

import copyreg
from collections.abc import Callable
from types import GetSetDescriptorType as Descriptor

import torch
from torch import Tensor, nn
from torch import UntypedStorage as Storage
from torch._subclasses.fake_tensor import FakeTensor

Function = Callable[[Tensor], Tensor]


def apply(self: nn.Module, function: Function, recurse: bool = True) -> nn.Module:
    """Replace `nn.Module._apply`: each parameter stays the same object, as optimizers hold it."""
    if recurse:
        for part in self.children():
            part._apply(function)
    for parameter in self._parameters.values():
        if parameter is not None:
            gradient = parameter.grad  # which a converted parameter has no more
            _convert(parameter, function)
            if gradient is not None:
                _convert(gradient, function)
                parameter.grad = gradient
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def copied(copy: Callable[[Tensor, dict], Tensor]) -> Callable[[Tensor, dict], Tensor]:
    """Replace `Tensor.__deepcopy__`: a parameter's copy has no gradient, as one with data."""

    def run(self: Tensor, memo: dict[int, object]) -> Tensor:
        if not (isinstance(self, FakeTensor) and isinstance(self, nn.Parameter)):
            return copy(self, memo)
        if id(self) not in memo:
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(data, self.requires_grad)
        return memo[id(self)]  # type: ignore[return-value]

    return run


def data_of_any_device(known: Descriptor) -> property:
    """Replace `Tensor.data`, which is set to move parameters."""

    def assign(self: Tensor, new: Tensor) -> None:
        of_a_kind = isinstance(self, FakeTensor) == isinstance(new, FakeTensor)
        if of_a_kind and self.device == new.device:
            known.__set__(self, new)
        else:
            _convert(self, lambda _: new.detach())

    return property(known.__get__, assign)


def address_of_storage(known: Callable[[Storage], int]) -> Callable[[Storage], int]:
    """Replace `UntypedStorage.data_ptr`: a storage without data has one of its own, aligned."""

    def address(self: Storage) -> int:
        if self.device.type != "meta":
            return known(self)
        return self._cdata << 9 if self.nbytes() else 0

    return address


def address_of_tensor(known: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
    """Replace `Tensor.data_ptr`, after that of storages."""

    def address(self: Tensor) -> int:
        if not isinstance(self, FakeTensor) or not self.numel():
            return known(self)
        return self.untyped_storage().data_ptr() + int(self.storage_offset()) * self.itemsize

    return address


def _convert(tensor: Tensor, function: Function) -> None:
    with torch.no_grad():
        new = function(tensor)
    if new is tensor:
        return
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    # As `torch.utils.swap_tensors`, which refuses tensors that are referred to weakly, as those of
    # FakeTensorMode always are.
    torch._C._swap_tensor_impl(tensor, new)
    before = type(tensor), dict(vars(tensor))
    for name in copyreg._slotnames(type(tensor)):  # type: ignore[attr-defined]
        if hasattr(tensor, name):  # the parts of a DTensor
            ours, theirs = getattr(tensor, name), getattr(new, name)
            setattr(tensor, name, theirs)
            setattr(new, name, ours)
    tensor.__class__ = type(new)
    _replace(vars(tensor), vars(new))
    new.__class__ = before[0]
    _replace(vars(new), before[1])


def _replace(attributes: dict[str, object], by: dict[str, object]) -> None:
    by = dict(by)
    attributes.clear()
    attributes.update(by)
