import pytest

from ds_cmli.evaluate.model import EvaluatedModel
from tests.run_folder import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("suites")))


@pytest.fixture(scope="session")
def model(run):
    return EvaluatedModel.load(run, 16, 0)
