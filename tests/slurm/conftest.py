import os

import pytest

from tests.slurm.cluster import Cluster, NoSlurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Slurm of three nodes. Without one the tests skip; with DS_CMLI_REQUIRE_SLURM=1 they fail."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        try:
            cluster.start()
        except NoSlurm as reason:
            if os.environ.get("DS_CMLI_REQUIRE_SLURM") == "1":
                pytest.fail(f"DS_CMLI_REQUIRE_SLURM is 1, but no Slurm can be started: {reason}")
            pytest.skip(f"no Slurm can be started: {reason}")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def stand_in(tmp_path):
    """A function that makes a program in Python's place: `check` and `train` are what it does as one and the other."""

    def make(train: str, check: str = "exit 0", name: str = "stand-in") -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "#!/bin/bash\nscript=$1; shift; run=$2\n"
            f"case $script in\n*check.py) {check} ;;\n*train.py) {train} ;;\nesac\n"
        )
        file.chmod(0o755)
        return str(file)

    return make
