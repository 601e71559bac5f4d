import os
import socketserver
import sys
import threading

import pytest

from tests.slurm import forked
from tests.slurm.cluster import Cluster, NoSlurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Slurm of two nodes. Without one the tests skip; with DS_CMLI_REQUIRE_SLURM=1 they fail."""
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


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory):
    """A command that stands for Python in jobs (forked.py); others start a real one."""
    address = str(tmp_path_factory.mktemp("forks") / "socket")
    with socketserver.ThreadingUnixStreamServer(address, forked.Forks) as server:
        server.daemon_threads = True  # none is waited for at the end, where a test has left its job
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{sys.executable} -IS {forked.__file__} {address}"
        server.shutdown()
