"""Records a program's allocations by phase and category until its optimizer steps are done."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves

from ds_cmli.common.patches import patched
from ds_cmli.fake_cuda import kernels
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.fake_cuda.streams import Awaited, Stream
from ds_cmli.memory_model.cuda_layouts import TRANSFERS
from ds_cmli.memory_model.cuda_operators import CONVOLUTIONS
from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import Inside

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer states",
    "activations",
    "communication",  # what collectives send and receive, and is none of the above
    "data",
    "other",  # what was made before the first forward pass, and is none of the above
    "temporaries",
)


class StepsDone(BaseException):
    """Ends what runs. Like SystemExit it is no `Exception`, which programs catch."""


class Progress:
    """Counts until `asked` steps of each optimizer are done."""

    def __init__(self, asked: int):
        self.asked, self.done = asked, Counter[int]()
        self.backward = -1  # autograd's number of the last backward pass
        self.stepped_after: dict[int, int] = {}  # that number at each optimizer's last step

    def note_step(self, optimizer: Optimizer) -> None:
        key = _first_parameter(optimizer)
        # A step that follows no backward pass is the trial of a schedule, say.
        if key is not None and self.stepped_after.get(key, -1) != self.backward:
            self.stepped_after[key] = self.backward
            self.done[key] += 1

    def are_done(self) -> bool:
        return min(self.done.values(), default=0) >= self.asked


def _first_parameter(optimizer: Optimizer) -> int | None:
    """The one by which an optimizer and its wrapper are known; None if it has none now.

    ZeRO-3 gives its optimizer the parameters of one group at a time.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return id(parameter)
    return None


class StepRecorder(Recorder):
    """Records a program phase by phase until `steps` steps of each optimizer are done.

    Phases: "init" until the first forward pass, then "forward", "backward" and "optimizer"; at last
    "afterwards", what the program does after its steps and before the next one.

    Args:
        gpu: whose memory is recorded.
    """

    def __init__(self, gpu: Limits, steps: int):
        super().__init__("cuda", gpu)
        self.progress = Progress(steps)
        self.outer = "init"  # the phase outside backward
        self.in_step = False  # whether an optimizer's step is running
        self.copied: set[int] = set()  # blocks that are copies from the host
        self.exchanged: set[int] = set()  # blocks that went through a collective
        self.tried: set[tuple[object, ...]] = set()  # convolutions, with cudnn.benchmark
        self.awaited = Awaited()
        # The log's length at the first product of INTO_GIVEN, in backward or not, of each stream.
        self.given: dict[tuple[bool, int], int] = {}
        self._stack = ExitStack()  # of what is entered once libraries have been imported
        self._by_module = dict(OF_LIBRARIES)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, follow the modules and optimizers of this process."""
        with ExitStack() as stack:
            self._stack = stack
            stack.callback(register_module_forward_pre_hook(self._before_module).remove)
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            yield

    # --- recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "__tensor_flatten__") and t is not FakeTensor for t in types):
            return NotImplemented  # a wrapper, such as a DTensor: its parts come here
        phase = self.outer
        task = torch._C._current_graph_task_id()
        if task >= 0:
            phase, self.progress.backward = "backward", task
        elif self.phase == "backward" and self.in_step:
            phase = self.outer = "optimizer"  # a closure has run forward and backward
        if phase != self.phase:
            self.segment += 1
            self.phase, self.recomputing = phase, False
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _inside(
        self, func: OpOverload, args: tuple, kwargs: dict[str, object] | None
    ) -> tuple[str, Inside]:
        for leaf in tree_leaves(args):
            on_gpu = isinstance(leaf, Tensor) and leaf.device.type == self.device
            if on_gpu or func in TRANSFERS:
                return super()._inside(func, args, kwargs)
        return "temporaries", Inside()

    def _see_results(
        self, func: OpOverload, args: tuple, out: object, category: str | None = None
    ) -> None:
        first = len(self.blocks)
        super()._see_results(func, args, out, category)
        result = next((x for x in tree_leaves(out) if isinstance(x, Tensor)), None)
        is_view = isinstance(func, OpOverload) and func.is_view  # others run functions
        if result is not None and result.device.type == self.device and not is_view:
            Stream.current.work.launch()
        if func in kernels.INTO_GIVEN:
            self.given.setdefault((self.phase == "backward", self.stream), len(self.log))
        if func in CONVOLUTIONS and torch.backends.cudnn.benchmark:
            key = func, *map(_described, tree_leaves(args))
            if key not in self.tried:  # cuDNN tries its algorithms, and PyTorch empties the cache
                self.tried.add(key)
                self.record_emptied_cache()
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.copied.update(range(first, len(self.blocks)))

    def _begin(self, size: int, category: str | None, op: OpOverload | str) -> int:
        for ended, bytes_of_it in self.awaited.over():
            super()._end(ended, bytes_of_it)
        return super()._begin(size, category, op)

    def _end(self, block: int, size: int) -> None:
        if not self.awaited.keeps(block, size):
            super()._end(block, size)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Replaces `Tensor.record_stream`: what ends is free when that stream has come so far."""
        block = self.block_of(tensor)
        if block is not None:
            self.used(block, stream)

    def used(self, block: int, stream: Stream) -> None:
        """Note that a block is used by a stream, perhaps another one than its own."""
        if stream.stream_id != self.blocks[block].stream:
            self.awaited.use(block, stream)

    def see_exchanged(self, tensors: list[object]) -> None:
        """Note the tensors of a collective."""
        for tensor in _parts(tensors):
            block = self.block_of(tensor)
            if block is not None:
                self.exchanged.add(block)

    def claim(self, category: str, tensors: Iterable[object]) -> None:
        super().claim(category, _parts(tensors))

    # --- phases and categories

    def _before_module(self, module: nn.Module, inputs: tuple) -> None:
        if self.outer in ("init", "optimizer"):
            self.outer = "forward"
        for name in self._by_module.keys() & sys.modules.keys():
            patch, function = self._by_module.pop(name)
            with suppress(AttributeError):  # of a version without it
                self._stack.enter_context(patched(patch, partial(_instead, function)))
        if torch.is_grad_enabled() and module.training and self.progress.are_done():
            raise StepsDone
        self.claim("parameters", [*module._parameters.values(), *module._buffers.values()])

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        self.outer, self.in_step = "optimizer", True
        self._claim_parameters(optimizer)

    def _claim_parameters(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            self.claim("parameters", group["params"])
            self.claim("gradients", (parameter.grad for parameter in group["params"]))

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        self._claim_parameters(optimizer)  # a closure has made the gradients after the step began
        self.claim("optimizer states", tree_leaves(list(optimizer.state.values())))
        self.progress.note_step(optimizer)
        self.outer = "afterwards" if self.progress.are_done() else "forward"
        self.in_step = False

    def category(self, number: int) -> str:
        block = self.blocks[number]
        if block.category is not None:
            return block.category
        if number in self.exchanged:
            return "communication"
        if number in self.copied:
            return "data"
        if block.phase == "init":
            return "other"
        kept = block.ended is None or block.ended > block.segment
        if kept and (block.phase == "forward" or block.recomputed):
            return "activations"
        return "temporaries"


def _described(x: object) -> object:
    """What an algorithm of cuDNN depends on."""
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _parts(tensors: Iterable[object]) -> Iterator[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            yield tensor


def _instead(function: object, original: object) -> object:
    return function


def _no_tracing(tensor: Tensor | None = None) -> bool:
    return False


OF_LIBRARIES = {
    "transformers.masking_utils": ("transformers: mask", _no_tracing),
}
