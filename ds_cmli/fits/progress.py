"""How far a program's training has come: its backward passes, and the steps of each optimizer."""

import gc
import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ds_cmli.common.errors import one_line

PASSES = 16  # backward passes after which a program ends that has no optimizer of torch.optim
MORE = 20  # steps of one optimizer beyond those asked for, in which the others can do one
RUNS = 4  # of a module in a step; more, as over a text's length, are as many
# Seconds of CPU time of what follows the steps, such as an evaluation of many batches.
AFTER_S = 20.0

StepKind = tuple[int, frozenset[tuple[int, int]]]  # the optimizer, and each module's runs


class Progress:
    """Counts until `asked` steps of each optimizer are done, or one has done MORE than those.

    Each kind of step comes twice by then: which modules run with gradients, and whether once or
    more often, makes the kind, as a penalty every few steps needs one more run. What follows the
    last step, such as an evaluation, runs until the next step begins.
    """

    def __init__(self, asked: int):
        self.asked, self.done = asked, Counter[int]()
        self.backward = -1  # autograd's number of the last backward pass
        self.stepped_after: dict[int, int] = {}  # that number at each optimizer's last step
        self.passes, self.passed = 0, -1  # backward passes before a forward one, the last's number
        self.over = False  # whether the program need not go on
        self.waited_for: list[str] = []  # optimizers that have done no step until then
        self.modules = Counter[int]()  # runs with gradients since an optimizer's last step
        self.kinds = Counter[StepKind]()
        self.elements = 0  # of the largest input of these runs
        self.sizes: dict[StepKind, set[int]] = {}  # those of the steps of a kind
        self.done_at: float | None = None  # the CPU time at which all steps were done
        self.trained: set[int] = set()  # modules that have run with gradients
        self.evaluated = False  # whether a trained module has run without them
        self.too_long = False  # whether what follows the steps was left after `AFTER_S`
        self.error = ""  # with which the program ended after its steps

    @property
    def steps(self) -> int:
        """The steps of each optimizer; if none of torch.optim did one, the backward passes."""
        if self.done:
            return min(self.done.values())
        return self.passes + (self.backward != self.passed)

    def ends_before_forward(self) -> bool:
        """Whether a program without an optimizer of torch.optim has done all its passes."""
        if self.backward == self.passed:
            return False
        self.passes, self.passed = self.passes + 1, self.backward
        self.over = self.passes == PASSES and not _optimizers()
        return self.over

    def ends_before(self, module: nn.Module, inputs: tuple[object, ...] = ()) -> bool:
        """Whether a module's forward pass is not to be run, as all steps are done before it."""
        key = id(module)
        if torch.is_grad_enabled():
            if module._parameters:  # others may be made anew in each step
                self.modules[key] = min(self.modules[key] + 1, RUNS)
                self.trained.add(key)
                sizes = [x.numel() for x in inputs if isinstance(x, Tensor)]
                self.elements = max(self.elements, *sizes, 0)
            self.over = self.done_at is not None and module.training
            return self.over or self.ends_before_forward()
        self.evaluated |= key in self.trained
        if self.done_at is not None and time.process_time() - self.done_at > AFTER_S:
            self.over = self.too_long = True
        return self.over

    def ends_after_step(self, optimizer: Optimizer) -> bool:
        """Whether all steps were done before this one."""
        key = _first_parameter(optimizer)
        if key is None or self.stepped_after.get(key, -1) == self.backward:
            return False  # the trial of a schedule, say: nothing has been trained
        # DeepSpeed's optimizer does a step for each group of parameters, after one backward pass.
        if self.done_at is not None and self.backward not in self.stepped_after.values():
            self.over = True
            return True
        self.stepped_after[key] = self.backward
        self.done[key] += 1
        kind = key, frozenset(self.modules.items())
        self.kinds[kind] += 1
        self.sizes.setdefault(kind, set()).add(self.elements)
        self.modules.clear()
        self.elements = 0
        last = max(self.done.values()) >= self.asked + MORE
        if not last and (min(self.done.values()) < self.asked or self.once):
            return False
        without = sorted(self._without_a_step())
        if last or not without:
            self.done_at, self.waited_for = time.process_time(), without
        return False

    def ends_with(self, error: BaseException) -> bool:
        """Whether all steps were done before the program's error, or its exit."""
        if self.done_at is None and not (self.done and self.steps >= self.asked):
            return False
        if not isinstance(error, SystemExit) or error.code:
            self.error = f"{type(error).__name__}: {one_line(error)}"
        return True

    def ending(self, saved: bool = True) -> Iterator[str]:
        """Yield lines on what was not counted: the steps are not all that a program does.

        Args:
            saved: whether it has saved tensors, if that is known.
        """
        differ = any(len(sizes) > 1 for sizes in self.sizes.values())
        if self.over:
            seen = {
                "an evaluation": self.evaluated,
                "saving": saved,
                "inputs of another size": differ,
                "steps of another kind": False,
            }
            missing = ", ".join(name for name, was in seen.items() if not was)
            yield f"not seen until then: {missing}; give more --steps if one may need more"
        elif self.steps < self.asked:
            yield f"the program ended after {self.steps} of {self.asked} optimizer steps"
        if self.once:
            kinds = "kinds of steps" if self.once > 1 else "kind of step"
            yield f"{self.once} {kinds} came once, by the modules that ran: give more --steps"
        if differ:
            yield "steps had inputs of different sizes: if larger ones follow, give more --steps"
        if self.too_long:
            yield f"not counted: what follows the steps, after {AFTER_S:.0f} s of it"
        if self.error:
            yield f"not counted: what follows the steps, which ended in {self.error}"

    @property
    def once(self) -> int:
        """The number of kinds of steps that have come once, 0 if one step is enough."""
        if self.asked == 1:
            return 0
        return list(self.kinds.values()).count(1)

    def _without_a_step(self) -> Iterator[str]:
        """Yield the optimizers that have done no step, so that their states are missing."""
        for optimizer in _optimizers():
            key = _first_parameter(optimizer)  # a wrapper of an optimizer has its parameters
            if key is not None and key not in self.done:
                yield type(optimizer).__name__


def _optimizers() -> list[Optimizer]:
    """Return those of torch.optim that this process has.

    A generator would be one of the objects that it goes through: such a cycle keeps all tensors
    alive until Python's collector runs.
    """
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]


def _first_parameter(optimizer: Optimizer) -> int | None:
    """The one by which an optimizer and its wrapper are known; None if it has none now.

    ZeRO-3 gives its optimizer the parameters of one group at a time.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return id(parameter)
    return None
