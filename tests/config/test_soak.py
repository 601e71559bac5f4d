"""`pytest -m soak -s tests/config`: how many mistakes are refused, told, effective, silent or a traceback."""

import pytest

from tests.config.soak import Counts
from tests.config.soak_environments import soak_environments
from tests.config.soak_json import soak_json
from tests.config.soak_settings import soak_settings

pytestmark = pytest.mark.soak


def test_changes_of_the_json(device):
    shown(soak_json(300, seed=1))


def test_settings_beside_others(tmp_path):
    shown(soak_settings(tmp_path / "soak"))


def test_variables_of_launchers():
    shown(soak_environments())


def shown(result: Counts) -> None:
    print("\n".join(["", result.line(), *result.wrong]))
    assert sum(result.ended.values()) >= 40
    assert not result.wrong
