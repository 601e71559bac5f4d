import sys

import pytest

from ds_cmli.config import plugins
from ds_cmli.config.registry import LOSSES
from profiling.learning.plan import PLUGIN


@pytest.fixture(scope="module", autouse=True)
def losses_of_the_experiment_alone():
    """Leave the package's table of losses as it was: other tests run in this process."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)
    plugins._given.pop(PLUGIN, None)  # the next module imports it again
    sys.modules.pop(PLUGIN, None)
