"""Runs the real training step on fake tensors, which have shapes and storages but no data.

The tensors' device is "cpu", which stands for the predicted device: on a build of torch without
CUDA, backward runs on no other device. The process group is torch's `fake` one: any number of
ranks, whose collectives move nothing.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    _BypassDispatchCache,
    _DispatchCacheKey,
    in_kernel_invocation_manager,
)
from torch.overrides import TorchFunctionMode

from ds_cmli.cmli import distributed as cmli_distributed
from ds_cmli.common.patches import environment as replaced_environment
from ds_cmli.common.patches import patched, replaced
from ds_cmli.distributed import process_group as distributed
from ds_cmli.fake_cuda.kernels import CudaOperators
from ds_cmli.memory_model.gpus import Limits

aten = torch.ops.aten
Another = Callable[[Tensor], Callable[[], None]]
# More tensors than this are not concatenated by `SharesOfRanks`: it only makes a result of their
# size.
MANY = 8


class Answers(FakeTensorMode):
    """Makes tensors without data, and gives a value whenever the program reads one from them."""

    # While models are built, numbers are rates and bounds of their parts, all of which are off at
    # 0.
    WHILE_BUILDING = 0.0
    # Later they are divisors that must not be 0: norms, an optimizer's step count, and 1 minus a
    # product that NAdam keeps.
    LATER = 2.0
    INTEGER = 0  # no gradient has overflowed

    phase = "models"  # the models are being built
    positions = 0  # padded text length of the other ranks, if it is longer than this rank's
    full = False  # whether no text of this rank's batch is padded

    def enter(self, phase: str) -> None:
        self.phase = phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].dtype.is_floating_point:
                if self.phase == "models":
                    return self.WHILE_BUILDING
                return self.LATER
            return getattr(args[0], "fake_truth_value", self.INTEGER)
        if func.namespace == "c10d":  # its results are the tensors that it is given
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        if func is aten._unsafe_view.default:  # whose results are never kept for another call
            func = aten.view.default
        out = self.dispatch(func, types, args, kwargs)
        if func is aten.all.default:
            # All gradients are finite, and all texts of a batch are full if `full` says so.
            out.fake_truth_value = self.phase in ("init", "optimizer") or self.full
        return out

    # PyTorch keeps the sizes of an operator's results for later calls with such arguments. This
    # does what its own method does but for what never occurs here, such as symbols in sizes, which
    # takes a fifth of a prediction's time.

    def _cache_key(self, state, func, args, kwargs):
        key: list[object] = [func, torch.get_default_dtype()]
        _describe((args, *kwargs.items()), key)
        return _DispatchCacheKey(tuple(key))

    @contextmanager
    def texts(self, full: bool) -> Iterator[None]:
        """Inside, if `full`, no text of this rank's batch counts as padded, so text encoders
        leave out their mask."""
        self.full = full
        unmasked: AbstractContextManager[object] = nullcontext()
        if full:
            unmasked = patched("transformers: mask", lambda _: lambda tensor=None: False)
        with unmasked:
            yield
        self.full = False


def _describe(values: Iterable[object], key: list[object]) -> None:
    """Add all that an operator's results depend on to `key`."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None:  # so may the result have one
                raise _BypassDispatchCache("constant attribute")
            keys = torch._C._dispatch_keys(value).raw_repr()  # device, layout and the like
            key += value.dtype, value.shape, value.stride(), value.storage_offset(), keys
        elif isinstance(value, list | tuple):
            key.append(len(value))
            _describe(value, key)
        elif isinstance(value, Tensor):
            raise _BypassDispatchCache("non-fake tensor")
        else:
            key += type(value), value  # 1, 1.0 and True are equal


class SharesOfRanks(TorchFunctionMode):
    """Makes once what ZeRO-3 makes for each rank in a loop: views of one buffer that differ only in
    their offset.

    Without data the views are alike, so one stands for all. Concatenating many of them still gives
    one new tensor.

    Args:
        another: given a tensor, records one more block like its own, until the returned function is
            called. If it is given, empty tensors of equal size are made once too, and all are freed
            when the mode ends.
    """

    def __init__(self, another: Another | None = None) -> None:
        super().__init__()
        # The last view: its buffer, its length, and itself, both tensors only weakly.
        self.last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None
        self.another = another
        self.empty: dict[tuple, Tensor] = {}
        # Each frees an empty tensor, or the block that stands for one.
        self.ends: list[Callable[[], object]] = []

    def __exit__(self, *error):
        super().__exit__(*error)
        while self.ends:
            self.ends.pop()()  # the last one first, as a list frees its items

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # none of the operators below needs an override
            if func is torch.empty and self.another is not None:
                return self._empty(args, kwargs or {})
            if func is Tensor.narrow and args[0].dim() == 1:
                return self._view(args[0], args[3])
            if func is Tensor.__getitem__ and isinstance(args[1], slice) and args[0].dim() == 1:
                return self._view(args[0], len(range(*args[1].indices(len(args[0])))))
            if func is torch.cat and not kwargs and len(args[0]) > MANY:
                times = Counter(map(id, args[0]))
                parts = {id(part): part for part in args[0]}
                if {(part.dtype, part.dim()) for part in parts.values()} == {(args[0][0].dtype, 1)}:
                    size = sum(n * parts[key].numel() for key, n in times.items())
                    first = max(parts.values(), key=Tensor.numel)
                    return torch.cat([first[:1].expand(size)])
        return func(*args, **(kwargs or {}))

    def _empty(self, args: tuple, options: dict[str, object]) -> Tensor:
        key = (args, *options.items())
        if key in self.empty:
            assert self.another is not None
            self.ends.append(self.another(self.empty[key]))
        else:
            self.empty[key] = torch.empty(*args, **options)  # type: ignore[call-overload]
            self.ends.append(lambda: self.empty.pop(key))
        return self.empty[key]

    def _view(self, buffer: Tensor, length: int) -> Tensor:
        if self.last is not None and self.last[0]() is buffer and self.last[1] == length:
            view = self.last[2]()
            if view is not None:
                return view
        view = buffer.narrow(0, 0, length)
        self.last = weakref.ref(buffer), length, weakref.ref(view)
        return view


@contextmanager
def shares_made_once(another: Another | None = None) -> Iterator[None]:
    """Inside, those functions of ZeRO-3 that loop over all ranks run under `SharesOfRanks`."""

    def within(function: Callable, another: Another | None = None) -> Callable:
        def run(*args, **kwargs):
            with SharesOfRanks(another):
                return function(*args, **kwargs)

        return run

    with (
        patched("deepspeed: gathered parameters", within),
        # Its only empty tensors fill up each rank's share of each gradient.
        patched("deepspeed: scattered gradients", partial(within, another=another)),
    ):
        yield


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and all modules in it, in the order in which `nn.Module._apply` visits them:
    children first."""
    for part in module.children():
        yield from _inner_first(part)
    yield module


def convert_parameters(module: nn.Module | None, function: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter by `function` of it if that is another tensor.

    The old tensor is freed at once. The order is that of `Module.parameters`, in which DeepSpeed's
    engine casts them.
    """
    if module is not None:
        _convert(list(module.modules()), function, buffers=False)


def _convert(parts: list[nn.Module], function: Callable[[Tensor], Tensor], buffers: bool) -> None:
    """Replace the parameters of `parts`, and their buffers if asked for; a parameter of several
    parts stays one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in parts:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, name))
    converted = {of_one[0]: of_one for of_one in places.values()}
    for part in parts:
        for name in part._parameters:
            if (part, name) in converted:
                _convert_one(converted[part, name], function)
        for name, buffer in part._buffers.items() if buffers else ():
            if buffer is not None:
                part._buffers[name] = function(buffer)


def _convert_one(places: list[tuple[nn.Module, str]], function: Callable[[Tensor], Tensor]) -> None:
    parameter = places[0][0]._parameters[places[0][1]]
    assert parameter is not None
    with torch.no_grad():
        new = function(parameter)
    if new is not parameter:
        replacement = nn.Parameter(new, parameter.requires_grad)
        for part, name in places:
            part._parameters[name] = replacement


def _apply(
    self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Replaces `nn.Module._apply`, which swaps a fake parameter even if nothing changes, and
    then fails."""
    _convert(list(_inner_first(self)), function, buffers=True)
    return self


def _delivering(exchange: Callable[[list[dist.P2POp]], list[dist.Work]]) -> Callable:
    """Replaces `batch_isend_irecv` by one that gives this rank what it sends to another one."""

    def run(operations: list[dist.P2POp]) -> list[dist.Work]:
        works = exchange(operations)
        send, receive = operations
        receive.tensor.copy_(send.tensor)
        return works

    return run


@contextmanager
def process_group(world_size: int, rank: int = 0) -> Iterator[None]:
    """Inside, this is one rank of a process group of `world_size` equal ranks, for fake and for
    real tensors.

    Nothing is moved: what this rank receives from another one is what it sends itself.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError(
            "a process group is up: a prediction needs a process, or a time, without one"
        )
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    with replaced_environment(environment), ExitStack() as stack:
        # The process group installs another one.
        stack.enter_context(replaced(sys, "excepthook", sys.excepthook))
        stack.enter_context(patched("torch: linear", lambda _: torch._C._nn.linear))
        stack.enter_context(patched("torch: messages", _delivering))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(distributed.shutdown)
        yield


@contextmanager
def fake_world(
    world_size: int, gpu: Limits | None, another: Another | None = None, rank: int = 0
) -> Iterator[Answers]:
    """Inside, everything runs on fake tensors, as rank `rank` of `world_size`.

    All changes are undone afterwards.

    Args:
        gpu: run the operators that this GPU would choose; None: those of this CPU.
        another: see `SharesOfRanks`.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        raise RuntimeError("a prediction needs a process that started with DS_ACCELERATOR=cpu")
    with process_group(world_size, rank), ExitStack() as stack:
        # Ranks exchange some values about themselves. Here the values of all ranks are those of
        # this rank.
        answers = Answers(allow_non_fake_inputs=True)
        read = cmli_distributed.longest_text

        def longest(text: Tensor) -> int:
            read(text)
            return max(text.shape[1], answers.positions)

        stack.enter_context(replaced(cmli_distributed, "longest_text", longest))

        def compared(values: list[int]) -> None:
            dist.broadcast(torch.tensor(len(values)), src=0)

        def copied(values: list[int]) -> list[int]:
            dist.broadcast(torch.tensor(values), src=0)
            return values

        stack.enter_context(patched("deepspeed: ranks compared", lambda _: compared))
        stack.enter_context(patched("deepspeed: rank 0 copied", lambda _: copied))
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        stack.enter_context(patched("torch: module conversion", lambda _: _apply))
        stack.enter_context(shares_made_once(another))
        stack.enter_context(answers)
        if gpu is not None:
            stack.enter_context(CudaOperators(gpu, "cpu").chosen())
        yield answers
