"""Variables that are replaced for a while."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock


@contextmanager
def environment(values: Mapping[str, str], *others: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, values):
        yield
