"""Charts: matplotlib that is missing, and colours."""

import sys

import pytest

from ds_cmli.common import plots
from ds_cmli.common.errors import UserError
from ds_cmli.memory.report import CATEGORIES
from ds_cmli.memory.report import COLOURS as OF_CATEGORIES


def test_charts_name_what_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plots.installed()
    with pytest.raises(UserError, match="a picture needs matplotlib: pip install matplotlib"):
        plots.matplotlib("a picture")


def test_each_category_of_memory_has_its_own():
    assert set(OF_CATEGORIES) == set(CATEGORIES) and len(set(OF_CATEGORIES.values())) == len(CATEGORIES)
