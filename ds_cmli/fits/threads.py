"""Lets the threads of a program do what its first one does."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Thread

from ds_cmli.common.patches import patched

PATIENCE = 2.0  # seconds for a task of a pool, which may wait for its first thread


@contextmanager
def following(entered: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
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
