"""Predicted against measured memory on a GPU, for every setting of `settings.py`."""

import pytest

from tests.gpu.figures import judge, prediction_figures
from tests.gpu.settings import SETTINGS


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_predicted_against_measured(setting, measured, record_property):
    judge(prediction_figures(measured(setting)), record_property)
