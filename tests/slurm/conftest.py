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
