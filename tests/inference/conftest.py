"""A run's folder as a training leaves it, with random weights, and pictures to embed."""

import numpy as np
import pytest
from PIL import Image

from tests.run_folder import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(12):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        small = noise.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((80, 60)).save(folder / str(i % 2) / f"{i:02}.png")
    return folder
