"""How far a program's training has come: its backward passes, and the steps of each optimizer."""

import gc
from collections import Counter
from collections.abc import Iterator

from torch.optim.optimizer import Optimizer

PASSES = 16  # backward passes after which a program ends that has no optimizer of torch.optim


class Progress:
    """Counts until `asked` steps of each optimizer are done."""

    def __init__(self, asked: int):
        self.asked, self.done = asked, Counter[int]()
        self.backward = -1  # autograd's number of the last backward pass
        self.stepped_after: dict[int, int] = {}  # that number at each optimizer's last step
        self.passes, self.passed = 0, -1  # backward passes before a forward one, the last's number

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
        return self.passes == PASSES and not any(_optimizers())

    def ends_after_step(self, optimizer: Optimizer) -> bool:
        """Whether all steps are done with this one."""
        key = _first_parameter(optimizer)
        if key is None or self.stepped_after.get(key, -1) == self.backward:
            return False  # the trial of a schedule, say: nothing has been trained
        self.stepped_after[key] = self.backward
        self.done[key] += 1
        return min(self.done.values()) >= self.asked

    def lacks_an_optimizer(self) -> bool:
        """Whether an optimizer has not done a step, so that its states are missing."""
        keys = map(_first_parameter, _optimizers())  # a wrapper of an optimizer has its parameters
        return any(key is not None and key not in self.done for key in keys)


def _optimizers() -> Iterator[Optimizer]:
    """Yield those of torch.optim that this process has."""
    for each in gc.get_objects():
        if issubclass(type(each), Optimizer):
            yield each


def _first_parameter(optimizer: Optimizer) -> int | None:
    """The one by which an optimizer and its wrapper are known; None if it has none now.

    ZeRO-3 gives its optimizer the parameters of one group at a time.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return id(parameter)
    return None
