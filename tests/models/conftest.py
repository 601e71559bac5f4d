from functools import cache

import pytest

from tests.models.sources import write_source


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function from a kind of model to its folder, which the first call writes."""
    root = tmp_path_factory.mktemp("sources")
    return cache(lambda kind: write_source(root / kind, kind))
