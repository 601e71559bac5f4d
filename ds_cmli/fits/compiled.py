"""`torch.compile` for a GPU that is not there.

Dynamo and Inductor compile as they do for one, and what they generate runs with kernels that do
nothing: its buffers, their reuse and their ends are Inductor's own. What they allocate to measure
kernels counts too. Needs Triton, which generates nothing.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ds_cmli.allocator.cuda_layouts import suggested
from ds_cmli.allocator.gpus import Gpu
from ds_cmli.common.patches import PATCHES, patched, patched_each
from ds_cmli.fits import lines
from ds_cmli.fits.steps import StepRecorder

# Of its L2 cache, by a GPU's capability: Inductor fills it between measurements.
L2_MIB = {(7, 5): 4, (8, 0): 40, (8, 6): 6, (8, 9): 72, (9, 0): 50, (10, 0): 126, (12, 0): 96}
OLDEST = "2.13"  # of torch: earlier ones do not compile for tensors without data
UNDIVIDED = "torch.compile divided no graph by DDP's buckets, which may take more or less"
GRAPHS = 1 << 30  # a stream, as CUDA graphs have memory of their own


def impossible() -> str:
    """Return why Inductor cannot be followed here, or ""."""
    if torch.__version__ < OLDEST:  # compared as versions
        return f"torch is {torch.__version__}, and {OLDEST} or a later one is needed to follow it"
    return "" if find_spec("triton") else "install triton to follow it"


class AsEager:
    """Replaces `torch.compile` where Inductor cannot be followed."""

    def __init__(self, recorder: StepRecorder, reason: str):
        self.recorder, self.reason = recorder, reason

    def note(self, *_: object) -> None:
        """Note that compiled code has run as eager mode."""
        ran = "torch.compile ran as eager mode, which may take more or less"
        self.recorder.compiled = True
        self.recorder.inexact.add(f"{ran}: {self.reason}")

    def __call__(self, model: Callable | None = None, **_: object) -> Callable:
        if model is None:
            return self
        if isinstance(model, nn.Module):
            model.register_forward_pre_hook(self.note)
            return model

        @wraps(model)
        def run(*args: object, **kwargs: object) -> object:
            self.note()
            return model(*args, **kwargs)

        return run


class Launcher:
    """A kernel of one configuration, which does nothing."""

    n_regs = 255  # the most, with which Inductor measures most kernels
    n_spills = shared = 0
    store_cubin = False

    def __init__(self, config: object):
        self.config, self.cache_hash, self.kernel = config, str(id(self)), self

    def __call__(self, *_: object, **__: object) -> None:
        pass


class Driver:
    """Replaces Triton's driver."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        major, minor = self.gpu.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def __getattr__(self, _: str) -> Callable[..., int]:
        return lambda *_, **__: 0


class OnHost(TorchDispatchMode):
    """Makes on the host what is made on the device: constants of one element that are folded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def here(x: object) -> object:
            return torch.device("cpu") if isinstance(x, torch.device) else x

        return func(*tree_map(here, args), **tree_map(here, kwargs or {}))


class Compiler:
    """Follows Inductor.

    Args:
        entered: enters the modes in which the program's tensors have no data.
        functions: of `torch.cuda`, by name.
    """

    def __init__(
        self,
        recorder: StepRecorder,
        gpu: Gpu,
        entered: Callable[[], AbstractContextManager[None]],
        functions: dict[str, object],
    ):
        self.recorder, self.gpu, self.entered = recorder, gpu, entered
        self.functions = functions
        self.stack: ExitStack | None = None  # until Inductor has been changed

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, `torch.compile` compiles for the GPU. To be entered before any mode."""
        names = PATCHES["inductor: device"].attributes.split()
        of_device = {name: self.functions.get(name, _zero) for name in names}
        with ExitStack() as self.stack, warnings.catch_warnings():
            # Those by which the program's modules are followed.
            warnings.filterwarnings("ignore", ".* global hooks on modules")
            self.stack.enter_context(patched_each("inductor: device", of_device))
            whole = classmethod(lambda _: True)  # type: ignore[var-annotated]
            self.stack.enter_context(patched("inductor: modes", lambda _: whole))
            self.stack.enter_context(patched("inductor: optimizers", self._in_modes))
            self.stack.enter_context(patched("inductor: beginning", self._beginning))
            self.stack.enter_context(patched("inductor: buckets", self._undivided))
            yield

    def _in_modes(self, function: Callable) -> Callable:
        def run(*args: object, **options: object) -> object:
            if torch._C._len_torch_dispatch_stack():  # it is not compiled now
                return function(*args, **options)
            with self.entered():
                return function(*args, **options)

        return run

    def _beginning(self, compile: Callable) -> Callable:
        """Change Inductor at its first use, as its import takes seconds."""

        def run(*args: object, **options: object) -> Callable:
            if self.stack is not None:
                stack, self.stack = self.stack, None
                self._change_inductor(stack)
            return compile(*args, **options)

        return run

    def _change_inductor(self, stack: ExitStack) -> None:
        from torch._dynamo import trace_rules
        from torch._functorch import config
        from torch._inductor.utils import fresh_cache

        # What follows the program may run where Dynamo compiles all that is called.
        for package in ("ds_cmli.fits", "ds_cmli.allocator"):
            trace_rules.add(package)
        replacements: dict[str, object] = {
            "_empty_strided_cuda": _empty_strided,
            "_reinterpret_tensor": _reinterpreted,
            "assert_alignment": _nothing,
            "assert_size_stride": _nothing,
            "set_driver_to_gpu": _nothing,
            "_active": Driver(self.gpu),
            "precompile": _prepare,
            "triton": _loaded,
            "cpp_pybinding": lambda *_, **__: _nothing,
            "benchmark_gpu": self._measure,
            "no_dispatch": self.entered,
            "_ALGORITHM_SELECTOR_CACHE": self._choose,
            "cudagraphify_impl": self._graphed,
        }
        folder = tempfile.TemporaryDirectory(prefix=lines.GENERATED)
        stack.enter_context(fresh_cache(dir=stack.enter_context(folder)))
        # An error in it is then one of the forward pass, which can run as eager mode.
        stack.enter_context(config.patch(force_non_lazy_backward_lowering=True))
        for name in ("buffers", "kernels", "trials", "Triton's driver", "CUDA graphs"):
            stack.enter_context(patched_each(f"inductor: {name}", replacements))
        stack.enter_context(patched("inductor: constants", _folded_on_host))
        stack.enter_context(patched("inductor: constants of a graph", _computed_on_host))
        stack.enter_context(patched("inductor: layouts", _as_of_cudnn))
        stack.enter_context(patched("inductor: graph", self._compiling))

    def _compiling(self, compile_fx: Callable) -> Callable:
        """Run as eager mode what cannot be compiled here."""
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        def run(graph: torch.fx.GraphModule, *args: object, **options: object) -> Callable:
            self.recorder.compiled = True
            try:
                return compile_fx(graph, *args, **options)
            except Exception as error:
                # Dynamo goes on otherwise after its own.
                if isinstance(error, TorchDynamoException) and not isinstance(error, InductorError):
                    raise
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                AsEager(self.recorder, f"{type(error).__name__}: {first}").note()
                return graph.forward

        return run

    def _undivided(self, _: Callable) -> Callable:
        """Compile as one graph what DDP would divide by its buckets of gradients."""

        def run(buckets, graph: torch.fx.GraphModule, inputs: list) -> Callable:
            self.recorder.inexact.add(UNDIVIDED)
            return buckets.backend_compile_fn(graph, inputs)

        return run

    def _measure(self, kernel: Callable[[], object], *_: object, **__: object) -> float:
        """Allocate what measuring a kernel does; all take 1 ms."""
        kernel()
        size = L2_MIB.get(self.gpu.capability, max(L2_MIB.values())) << 20
        cache = torch.empty(size // 4, dtype=torch.int, device="cuda")
        kernel()
        del cache
        return 1.0

    def _choose(
        self, name: str, choices: list, inputs: list, layout: object, *rest: object, **more: object
    ) -> object:
        """Choose the library's kernel; what measuring all of them allocates counts."""
        from torch._inductor.select_algorithm import AlgorithmSelectorCache, ExternKernelCaller

        if len(choices) > 1:
            example = AlgorithmSelectorCache.benchmark_example_value
            with self.entered():
                tensors = list(map(example, (*inputs, layout)))
                self._measure(_nothing)
                del tensors
            of_library = filter(lambda x: isinstance(x, ExternKernelCaller), choices)
            choices = [next(of_library, choices[0])]
        choose: Callable[..., object] = AlgorithmSelectorCache()
        return choose(name, choices, inputs, layout, *rest, **more)

    def _graphed(
        self, model: Callable, _: list, fixed: Sequence[int] = (), *__: object, **___: object
    ) -> Callable:
        """Let a CUDA graph allocate in a pool of its own, where it copies changing inputs to."""
        places = frozenset(fixed)

        def run(inputs: list) -> object:
            before, self.recorder.stream = self.recorder.stream, GRAPHS
            try:
                copies = list[object]()
                for number, x in enumerate(inputs):
                    moved = isinstance(x, Tensor) and x.device.type == "cuda"
                    copies.append(x.clone() if moved and number not in places else x)
                inputs.clear()
                return model(copies)
            finally:
                self.recorder.stream = before

        return run


def _nothing(*_: object, **__: object) -> None:
    pass


def _zero(*_: object) -> int:
    return 0


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _reinterpreted(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0
) -> Tensor:
    return torch.as_strided(x, size, stride, int(x.storage_offset()) + offset)


def _loaded(_: object, name: str, source: str, *__: object, **___: object) -> object:
    """Replaces `AsyncCompile.triton`, which may compile in other processes."""
    from torch._inductor.codecache import _load_triton_kernel_from_source

    return _load_triton_kernel_from_source(name, source)


def _prepare(self, *_: object, **__: object) -> None:
    """Replaces `CachingAutotuner.precompile`: it then measures kernels that do nothing."""
    self.launchers = list(map(Launcher, self.configs or [None]))
    self.configs = None
    if self._could_rblock_scale:  # a kernel that is measured since it takes many registers
        self.compile_results = [*self.launchers]
        self.launchers += map(Launcher, self._iter_rblock_scale_candidates())
        self.compile_results = []


def _computed_on_host(unset: Callable[[], AbstractContextManager]) -> Callable:
    @contextmanager
    def run() -> Iterator[None]:
        with unset(), OnHost():
            yield

    return run


def _as_of_cudnn(determine: Callable) -> Callable:
    """The layout of a convolution's result, as of `returned` in `allocator/cuda_operators.py`."""

    def run(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
        depthwise = backend is torch._C._ConvBackend.CudaDepthwise2d  # type: ignore[attr-defined]
        last = suggested(x, weight) is torch.channels_last and not depthwise
        return torch.channels_last if last else determine(x, weight, backend)

    return run


def _folded_on_host(fold: Callable) -> Callable:
    def run(self, node: torch.fx.Node) -> object:
        with OnHost():
            return fold(self, node)

    return run
