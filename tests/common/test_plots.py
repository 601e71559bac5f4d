"""Charts: matplotlib that is missing, labels, and colours that all readers tell apart."""

import sys
from itertools import combinations

import numpy as np
import pytest

from ds_cmli.common import plots
from ds_cmli.common.errors import UserError
from ds_cmli.common.plots import COLOURS
from ds_cmli.memory.report import CATEGORIES
from ds_cmli.memory.report import COLOURS as OF_CATEGORIES


def test_charts_name_what_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plots.installed()
    with pytest.raises(UserError, match="a picture needs matplotlib: pip install matplotlib"):
        plots.matplotlib("a picture")


# Colours that readers with deuteranopia and protanopia tell apart too, on light and on dark paper.
SEEN = {  # of linear RGB: Machado, Oliveira and Fernandes, 2009, at full severity
    "all cones": np.eye(3),
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}
LMS = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]  # OKLab, 2020
LAB = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_no_two_colours_look_alike():
    for eye, matrix in SEEN.items():
        lab = [LAB @ np.cbrt(LMS @ np.clip(matrix @ linear(colour), 0, 1)) for colour in COLOURS]
        assert min(np.linalg.norm(a - b) for a, b in combinations(lab, 2)) > 0.07, eye


def test_each_category_of_memory_has_its_own():
    assert set(OF_CATEGORIES) == set(CATEGORIES) and len(set(OF_CATEGORIES.values())) == len(CATEGORIES)
