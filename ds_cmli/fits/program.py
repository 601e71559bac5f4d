"""Runs a Python program unchanged on a GPU that is not there."""

import copy
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.data.dataloader import DataLoader, _SingleProcessDataLoaderIter

from ds_cmli.allocator.gpus import Gpu
from ds_cmli.common.errors import UserError, first_line
from ds_cmli.common.patches import PATCHES, patched, patched_each
from ds_cmli.fits import compiled, device, files, kernels, lines, modules, script
from ds_cmli.fits.kernels import CudaOperators
from ds_cmli.fits.stand_ins import on_host
from ds_cmli.fits.steps import StepRecorder
from ds_cmli.fits.values import Values
from ds_cmli.fits.world import World

WITHOUT_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)
OF_GPU = ("GPU", "GPU's memory", "GPU's random numbers", "GPU's own functions")
# Errors of torch's own, which tensors without data cause, and no mistake of the program.
OF_TORCH = re.compile("INTERNAL ASSERT|data is not allocated yet|associated to a python object")
PATIENCE = 2.0  # seconds for a task of a pool, which may wait for its first thread


@dataclass
class Ran:
    """What a program did until its end."""

    code: int = 0  # its exit code
    left_out: Counter[str] = field(default_factory=Counter)  # what it asked for and did not get


def run(
    command: Sequence[str], recorder: StepRecorder, values: Values, gpu: Gpu | None, world: World
) -> Ran:
    """Run `python COMMAND` in this process until its steps are done, or it ends.

    Args:
        command: a script and its arguments, or "-m", a module and its arguments.
        gpu: the GPU that it finds; None: it runs on the CPU.

    Raises:
        UserError: it does what tensors without data cannot do.
    """
    ran = Ran()
    # Before torch is changed, as this imports its compiler, which looks at every function.
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    # A copied tensor, such as a teacher's, stays in it: views of another mode's are not views.
    without_data.__deepcopy__ = lambda _: without_data  # type: ignore[attr-defined]
    without_data.create_symbolic_nested_int = _no_nested  # type: ignore[method-assign]
    with ExitStack() as stack:
        of_a_thread = partial(_entered, (without_data, recorder, values))
        stack.enter_context(_without_data(ran, recorder))
        reason = compiled.impossible()
        if gpu is not None:
            functions = stack.enter_context(_without_gpu(recorder, gpu, ran))
            follower = compiled.Compiler(recorder, gpu, of_a_thread, functions)
        if gpu is None or reason:
            as_eager = compiled.AsEager(recorder, reason or "there is no GPU")
            stack.enter_context(patched("torch: compiler", lambda _: as_eager))
        else:
            stack.enter_context(follower.following())
        stack.enter_context(world.entered(recorder))
        stack.enter_context(recorder.following())
        stack.callback(register_optimizer_step_post_hook(values.in_step.begin_step).remove)
        if gpu is not None:
            # Each thread numbers the nodes of its graphs: the program's own begins at 0.
            entering = Thread(target=_enter_backward)
            entering.start()
            entering.join()
        stack.enter_context(_threads_entered(of_a_thread))
        stack.enter_context(of_a_thread())

        def is_done(error: BaseException) -> bool:
            if recorder.progress.ends_with(error):
                return True
            if isinstance(error, RuntimeError) and OF_TORCH.search(str(error)):
                raise UserError(_needs_values(error)) from None
            return False

        try:
            ran.code = script.run(command, is_done, (script.NotFollowed, UserError, *WITHOUT_DATA))
        except script.NotFollowed as reason:
            if not is_done(reason):
                raise UserError(str(reason)) from None
        except WITHOUT_DATA as error:
            if not is_done(error):
                raise UserError(_needs_values(error)) from None
    return ran


@contextmanager
def _entered(modes: Sequence[TorchDispatchMode]) -> Iterator[None]:
    """Inside, this thread's tensors are in these modes."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        torch._C._set_only_lift_cpu_tensors(True)
        return gradient


def _enter_backward() -> None:
    """Prepare the thread in which a GPU's backward passes run, as on a machine that has one.

    autograd hands it the modes, but not what keeps `torch.tensor` from asking for the device. The
    graph of a gradient (`create_graph`) is numbered in that thread, which decides the order of
    the next pass over it, and so its peak.
    """
    with FakeTensorMode():
        x = torch.ones(1, device="cuda", requires_grad=True)
        _Entering.apply(x).backward()


@contextmanager
def _threads_entered(entered: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, a thread runs in the context that `entered` makes, as modes of torch are of a thread.

    A task of a pool ends before the next one begins, so that a program allocates in the same
    order each time, as those do that load weights by a pool.
    """

    def begun(begin: Callable[[Thread], None]) -> Callable[[Thread], None]:
        def run(thread: Thread) -> None:
            with entered():
                begin(thread)

        return run

    def submitted(submit: Callable[..., Future]) -> Callable[..., Future]:
        def run(pool: ThreadPoolExecutor, *args: object, **kwargs: object) -> Future:
            future = submit(pool, *args, **kwargs)
            wait([future], PATIENCE)
            return future

        return run

    with ExitStack() as stack:
        stack.enter_context(patched("python: threads", begun))
        stack.enter_context(patched("python: tasks of pools", submitted))
        yield


def _no_nested(**_: object) -> NoReturn:
    """Replaces what gives a jagged tensor the sign of its lengths, by which PyTorch compares."""
    raise script.NotFollowed(
        f"{lines.current()}: fits does not follow nested tensors: let this run pad them"
    )


def _needs_values(error: Exception) -> str:
    frames = traceback.extract_tb(script.of_program(error))
    users = [frame for frame in frames if lines.is_users(frame.filename)]
    at = f"{users[-1].filename}:{users[-1].lineno}: " if users else ""
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"{at}this needs values, which fits does not have: {reason}"


def _left_out(ran: Ran, what: str) -> Callable:
    """A function that does nothing but return its first argument."""

    def run(first: object = None, *_: object, **__: object) -> object:
        ran.left_out[what] += 1
        return first

    return run


@contextmanager
def _without_data(ran: Ran, recorder: StepRecorder) -> Iterator[None]:
    """Inside, tensors have no data."""

    def scripting(script_: Callable) -> Callable:
        keep = _left_out(ran, "torch.jit ran as eager mode, which may take more or less")

        def run(model: object, *args: object, **kwargs: object) -> object:
            if script_.__name__ == "script" and not isinstance(model, nn.Module):
                return script_(model, *args, **kwargs)  # functions run on tensors without data
            return keep(model)

        return run

    replacements: dict[str, Callable] = {
        "python: end of the process": _ending,
        "torch: module conversion": lambda _: modules.apply,
        "torch: data of a tensor": modules.data_of_any_device,
        "torch: subclasses of a tensor": _as_it_is,
        "torch: address of a tensor": modules.address_of_tensor,
        "torch: copied parameter": modules.copied,
        "torch: address of a storage": modules.address_of_storage,
        "torch: scripts": scripting,
        "torch: scaled step": lambda _: _step,
        "torch: formatted number": lambda _: _formatted,
        "torch: data of the host": on_host,
        "torch: loading processes": lambda _: InThisProcess,
        "torch: types for all parameters at once": lambda known: [*known, FakeTensor],
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(patched(name, replacement))
        stack.enter_context(files.without_values(ran.left_out, recorder))
        yield


@contextmanager
def _without_gpu(recorder: StepRecorder, gpu: Gpu, ran: Ran) -> Iterator[dict[str, object]]:
    """Inside, torch finds one GPU; yields the functions that answer for it."""
    functions = device.functions(gpu, recorder)
    nothing = dict.fromkeys(PATCHES["torch: CUDA"].attributes.split(), lambda *_: 0)
    replacements: dict[str, Callable] = {
        "torch: lengths for CTC": _with_lengths_of_host,
        "torch: resized storage": recorder.resizing,
        "torch: shapes of sharded results": _without_modes,
        "torch: pinned memory": lambda _: lambda self, *_, **__: self,
        "torch: other streams": lambda _: (
            lambda tensor, stream: recorder.record_stream(tensor, stream)
        ),
        "torch: scattered to GPUs": lambda _: lambda x, *_, **__: (x.to("cuda"),),
    }
    with ExitStack() as stack:
        names = [*OF_GPU]
        if hasattr(torch.accelerator, "memory"):  # PyTorch 2.9
            names.append("accelerator's memory")
        for name in names:
            stack.enter_context(patched_each(f"torch: {name}", functions))
        constants = {"cuda": torch.version.cuda or "13.0", "avoid_device_init": True}
        stack.enter_context(patched_each("torch: CUDA", nothing | constants))
        for name, replacement in replacements.items():
            stack.enter_context(patched(name, replacement))
        kernels.leave_out_tritons(stack, _left_out(ran, "a kernel of Triton did not run"))
        stack.enter_context(CudaOperators(gpu.limits, "cuda", recorder.inexact.add).chosen())
        yield functions


def _ending(leave: Callable[[int], NoReturn]) -> Callable[[int], NoReturn]:
    """Replaces `os._exit`, but in processes that the program forks."""
    own = os.getpid()

    def end(code: int) -> NoReturn:
        if os.getpid() != own:
            leave(code)
        raise SystemExit(code)

    return end


def _as_it_is(convert: Callable) -> Callable:
    """Replaces `as_subclass`: a tensor without data is of its own class already."""

    def run(tensor: Tensor, wanted: type) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else convert(tensor, wanted)

    return run


def _without_modes(function: Callable) -> Callable:
    """A function whose tensors take no memory on a GPU.

    PyTorch 2.8 and 2.9 give them a FakeTensorMode that takes no tensors with data.
    """

    def run(*args: object, **kwargs: object) -> object:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _step(self, optimizer, state, *args, **kwargs):
    """Replaces `GradScaler._maybe_opt_step`: no gradient has overflowed."""
    return optimizer.step(*args, **kwargs)


def _formatted(self: Tensor, specification: str) -> str:
    if self.dim() == 0 and not self.is_meta:
        return format(self.item(), specification)
    return object.__format__(self, specification)


def _with_lengths_of_host(ctc_loss: Callable) -> Callable:
    """Replaces `ctc_loss`: tensors of lengths on the host would call the operator of a CPU."""

    def listed(value: object) -> object:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            return value.tolist()
        return value

    def loss(scores: Tensor, targets: Tensor, *args: object, **kwargs: object) -> Tensor:
        return ctc_loss(scores, targets, *tree_map(listed, args), **tree_map(listed, kwargs))

    return loss


class InThisProcess(_SingleProcessDataLoaderIter):
    """Replaces the iterator of a DataLoader with processes: tensors without data do not travel."""

    def __init__(self, loader: DataLoader):
        loader = copy.copy(loader)
        loader.num_workers, loader.timeout, loader.pin_memory = 0, 0, False
        super().__init__(loader)

    def _shutdown_workers(self) -> None:
        """Do nothing: Lightning ends processes by it."""
