"""DeepSpeed's engines that tests build in their own process: what they hold ends with the test.

An engine's hooks keep it and its group's threads and, with ZeRO-3, buckets of gigabytes that nobody has touched. Enough
of them in one piece are more than the machine has, and then the system refuses to fork the process.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from deepspeed import comm
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_cmli.engine import release


@contextmanager
def released() -> Iterator[None]:
    """At the end, those that were built inside are released."""
    built: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()
    make = DeepSpeedEngine.__init__

    @functools.wraps(make)
    def made(engine, /, *arguments, **more):
        make(engine, *arguments, **more)
        built.add(engine)

    with mock.patch.object(DeepSpeedEngine, "__init__", made):
        yield
    while built:
        engine = built.pop()
        if vars(engine):  # one inside may have ended it
            # It only asks which rank prints. The process group may have ended.
            with mock.patch.object(comm, "get_rank", return_value=0):
                release(engine)
