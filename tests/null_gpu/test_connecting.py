"""Ranks that have met and do not reach each other over NCCL."""

import subprocess
import sys

import pytest

from tests.conftest import LAUNCHER_VARIABLES, ROOT, rank_environments

pytestmark = pytest.mark.null_gpu
SCRIPT = str(ROOT / "tests" / "distributed" / "connecting_rank.py")


@pytest.mark.parametrize("reached", [True, False])
def test_two_ranks_connect_or_end_with_one_line(null_gpu, reached):
    cards = null_gpu(count=2)
    if not reached:
        cards["NULLGPU_NCCL"] = "unreachable"
    launchers_variables = [{name: env[name] for name in LAUNCHER_VARIABLES} for env in rank_environments(2)]
    ranks = [
        subprocess.Popen([sys.executable, SCRIPT, "", "5"], env=cards | env, cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for env in launchers_variables
    ]  # fmt: skip
    said = [rank.communicate(timeout=90)[0] for rank in ranks]
    if reached:
        assert said == [f"rank {rank} on cuda: [True, False] by None\n" for rank in range(2)]
        return
    assert [rank.returncode for rank in ranks] == [2, 2] and said[1] == ""
    assert said[0].startswith("error: the 2 ranks met at 127.0.0.1:") and said[0].count("\n") == 1
    assert "their first collective over nccl did not end within 5 s; NCCL_SOCKET_IFNAME is not set: set it" in said[0]
    assert "NCCL_P2P_DISABLE=1" in said[0] and "NCCL_DEBUG=INFO" in said[0]
