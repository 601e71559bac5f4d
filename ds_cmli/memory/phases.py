"""Reports when the phases of a training step begin."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ds_cmli.common.probe import Probe, probe
from ds_cmli.engine import TrainEngine

AFTER = {"backward": "optimizer", "optimizer": "forward"}  # the phase that begins at a phase's end


class _Phases(Probe):
    def __init__(self, enter: Callable[[str], None]):
        self.enter, self.now = enter, ""

    def begin(self, phase: str) -> None:
        self.now = phase
        self.enter(phase)

    @contextmanager
    def step_phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            with super().step_phase(name):
                yield
        finally:
            self.begin(AFTER[name])

    def before_student(self, *_: object) -> None:
        # Gradient caching runs several forward passes with no update between them.
        if self.now != "forward":
            self.begin("forward")

    def after_student(self, *_: object) -> None:
        self.begin("loss")


@contextmanager
def phases(train_engine: TrainEngine, enter: Callable[[str], None]) -> Iterator[None]:
    """Inside, call `enter` with "forward", "loss", "backward" or "optimizer" as that phase
    begins."""
    student, reported = train_engine.objective.student, _Phases(enter)
    reported.begin("forward")
    with ExitStack() as stack:
        stack.enter_context(probe.subscribed(reported))
        stack.callback(student.register_forward_pre_hook(reported.before_student).remove)
        stack.callback(student.register_forward_hook(reported.after_student).remove)
        yield
