"""Runs a function of this process on a GPU that is not there."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from threading import Thread

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data.dataloader import DataLoader, _SingleProcessDataLoaderIter

from ds_cmli.common.patches import PATCHES, patched, patched_each
from ds_cmli.fake_cuda import device, kernels, modules
from ds_cmli.fake_cuda.kernels import CudaOperators
from ds_cmli.fake_cuda.stand_ins import on_host
from ds_cmli.fake_cuda.steps import StepRecorder, StepsDone
from ds_cmli.fake_cuda.values import Values
from ds_cmli.fake_cuda.world import World
from ds_cmli.memory_model.gpus import Gpu

OF_GPU = ("GPU", "GPU's memory", "GPU's random numbers", "GPU's own functions")


def run(function: Callable[[], object], recorder: StepRecorder, gpu: Gpu, world: World) -> None:
    """Call `function` until its optimizer steps are done, or it ends.

    `guard.load` has to be called before torch is imported.
    """
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    # A copied tensor, such as a teacher's, stays in it: views of another mode's are not views.
    without_data.__deepcopy__ = lambda _: without_data  # type: ignore[attr-defined]
    values = Values()
    with ExitStack() as stack:
        of_a_thread = partial(_entered, (without_data, recorder, values))
        stack.enter_context(_without_data())
        stack.enter_context(_without_gpu(recorder, gpu))
        stack.enter_context(world.entered(recorder))
        stack.enter_context(recorder.following())
        # Each thread numbers the nodes of its graphs: the function's own begins at 0.
        entering = Thread(target=_enter_backward)
        entering.start()
        entering.join()
        stack.enter_context(_threads_entered(of_a_thread))
        stack.enter_context(of_a_thread())
        with suppress(StepsDone):
            function()


@contextmanager
def _entered(modes: tuple[TorchDispatchMode, ...]) -> Iterator[None]:
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

    autograd hands it the modes, but not what keeps `torch.tensor` from asking for the device.
    """
    with FakeTensorMode():
        x = torch.ones(1, device="cuda", requires_grad=True)
        _Entering.apply(x).backward()


@contextmanager
def _threads_entered(entered: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, a thread runs in the context that `entered` makes, as modes of torch are of a
    thread."""

    def begun(begin: Callable[[Thread], None]) -> Callable[[Thread], None]:
        def run(thread: Thread) -> None:
            with entered():
                begin(thread)

        return run

    with patched("python: threads", begun):
        yield


@contextmanager
def _without_data() -> Iterator[None]:
    """Inside, tensors have no data."""
    replacements: dict[str, Callable] = {
        "torch: module conversion": lambda _: modules.apply,
        "torch: data of a tensor": modules.data_of_any_device,
        "torch: address of a tensor": modules.address_of_tensor,
        "torch: copied parameter": modules.copied,
        "torch: address of a storage": modules.address_of_storage,
        "torch: formatted number": lambda _: _formatted,
        "torch: data of the host": on_host,
        "torch: loading processes": lambda _: InThisProcess,
        "torch: types for all parameters at once": lambda known: [*known, FakeTensor],
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(patched(name, replacement))
        yield


@contextmanager
def _without_gpu(recorder: StepRecorder, gpu: Gpu) -> Iterator[None]:
    """Inside, torch finds one GPU."""
    functions = device.functions(gpu, recorder)
    nothing = dict.fromkeys(PATCHES["torch: CUDA"].attributes.split(), lambda *_: 0)
    replacements: dict[str, Callable] = {
        "torch: pinned memory": lambda _: lambda self, *_, **__: self,
        "torch: other streams": lambda _: (
            lambda tensor, stream: recorder.record_stream(tensor, stream)
        ),
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
        kernels.leave_out_tritons(stack, lambda *_, **__: None)
        stack.enter_context(CudaOperators(gpu.limits, "cuda").chosen())
        yield


def _formatted(self: Tensor, specification: str) -> str:
    if self.dim() == 0 and not self.is_meta:
        return format(self.item(), specification)
    return object.__format__(self, specification)


class InThisProcess(_SingleProcessDataLoaderIter):
    """Replaces the iterator of a DataLoader with processes: tensors without data do not travel."""

    def __init__(self, loader: DataLoader):
        loader = copy.copy(loader)
        loader.num_workers, loader.timeout, loader.pin_memory = 0, 0, False
        super().__init__(loader)
