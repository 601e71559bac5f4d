"""Moves and casts modules whose parameters hold no data."""

from collections.abc import Callable
from types import GetSetDescriptorType as Descriptor

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Function = Callable[[Tensor], Tensor]


def apply(self: nn.Module, function: Function, recurse: bool = True) -> nn.Module:
    """Replace `nn.Module._apply`: each parameter stays the same object, as optimizers hold it."""
    for part in self.children() if recurse else ():
        part._apply(function)
    for parameter in self._parameters.values():
        if parameter is not None:
            _convert(parameter, function)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def data_of_any_device(known: Descriptor) -> property:
    """Replace `Tensor.data`, which is set to move parameters."""

    def assign(self: Tensor, new: Tensor) -> None:
        of_a_kind = isinstance(self, FakeTensor) == isinstance(new, FakeTensor)
        if of_a_kind and self.device == new.device:
            known.__set__(self, new)
        else:
            _convert(self, lambda _: new.detach())

    return property(known.__get__, assign)


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
    tensor.__class__ = type(new)
    vars(tensor).update(vars(new))
