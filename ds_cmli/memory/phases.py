"""When the phases of a training step begin, told by the engine and the student as it happens."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ds_cmli.common.patches import replaced
from ds_cmli.engine import TrainEngine


@contextmanager
def phases(train_engine: TrainEngine, enter: Callable[[str], None]) -> Iterator[None]:
    """Call `enter` with "forward", "loss", "backward" and "optimizer" whenever that phase of a step begins."""
    engine, student = train_engine.engine, train_engine.objective.student

    def around(method: Callable, phase: str, after: str) -> Callable:
        def run(*args, **kwargs):
            enter(phase)
            try:
                return method(*args, **kwargs)
            finally:
                enter(after)

        return run

    enter("forward")
    with ExitStack() as stack:
        stack.enter_context(replaced(engine, "backward", around(engine.backward, "backward", "optimizer")))
        stack.enter_context(replaced(engine, "step", around(engine.step, "optimizer", "forward")))
        hook = student.register_forward_hook(lambda *_: enter("loss"))
        stack.callback(hook.remove)
        yield
