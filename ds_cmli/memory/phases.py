"""Reports when the phases of a training step begin, and its heartbeats, by hooks on the engine and the student."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ds_cmli.common.patches import replaced
from ds_cmli.data.batch import Batch
from ds_cmli.engine import TrainEngine


@contextmanager
def phases(train_engine: TrainEngine, enter: Callable[[str], None]) -> Iterator[None]:
    """Inside, call `enter` with "forward", "loss", "backward" or "optimizer" whenever that phase of a step begins."""
    engine, student = train_engine.engine, train_engine.objective.student

    now = ""

    def begin(phase: str) -> None:
        nonlocal now
        now = phase
        enter(phase)

    def before_student(*_) -> None:
        if (
            now != "forward"
        ):  # gradient caching runs several forward passes with no `step` between them
            begin("forward")

    def around(method: Callable, phase: str, after: str) -> Callable:
        def run(*args, **kwargs):
            begin(phase)
            try:
                return method(*args, **kwargs)
            finally:
                begin(after)

        return run

    begin("forward")
    with ExitStack() as stack:
        stack.enter_context(
            replaced(engine, "backward", around(engine.backward, "backward", "optimizer"))
        )
        stack.enter_context(replaced(engine, "step", around(engine.step, "optimizer", "forward")))
        stack.callback(student.register_forward_pre_hook(before_student).remove)
        stack.callback(student.register_forward_hook(lambda *_: begin("loss")).remove)
        yield


def heartbeats(train_engine: TrainEngine, beat: Callable[[], None]) -> AbstractContextManager[None]:
    """Inside, also call `beat` at each heartbeat of a step, of which only one with gradient caching has any."""
    step = train_engine.step

    def run(micro_batches: Sequence[Batch], heartbeat: Callable[[], None] = lambda: None) -> Any:
        def both() -> None:
            heartbeat()
            beat()

        return step(micro_batches, both)

    return replaced(train_engine, "step", run)
