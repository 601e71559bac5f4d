"""How far a program's training has come: its backward passes, and the steps of each optimizer."""

import gc
from collections import Counter
from collections.abc import Iterator

from torch.optim.optimizer import Optimizer

PASSES = 16  # backward passes after which a program ends that has no optimizer of torch.optim
MORE = 16  # steps of one optimizer beyond those asked for, in which the others can do one


class Progress:
    """Counts until `asked` steps of each optimizer are done, or one has done MORE than those."""

    def __init__(self, asked: int):
        self.asked, self.done = asked, Counter[int]()
        self.backward = -1  # autograd's number of the last backward pass
        self.stepped_after: dict[int, int] = {}  # that number at each optimizer's last step
        self.passes, self.passed = 0, -1  # backward passes before a forward one, the last's number
        self.over = False  # whether the program need not go on
        self.waited_for: list[str] = []  # optimizers that have done no step until then

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

    def ends_after_step(self, optimizer: Optimizer) -> bool:
        """Whether all steps are done with this one."""
        key = _first_parameter(optimizer)
        if key is None or self.stepped_after.get(key, -1) == self.backward:
            return False  # the trial of a schedule, say: nothing has been trained
        self.stepped_after[key] = self.backward
        self.done[key] += 1
        last = max(self.done.values()) >= self.asked + MORE
        if not last and min(self.done.values()) < self.asked:
            return False
        without = sorted(self._without_a_step())
        self.over = last or not without
        self.waited_for = without if self.over else []
        return self.over

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
