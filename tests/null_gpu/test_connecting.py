"""Ranks that have met and do not reach each other over NCCL."""

import pytest

from tests.conftest import LAUNCHER_VARIABLES, rank_environments
from tests.null_gpu.processes import start

pytestmark = pytest.mark.null_gpu
SCRIPT = "tests/distributed/connecting_rank.py"


@pytest.mark.parametrize("reached", [True, False])
def test_two_ranks_connect_or_end_with_one_line(null_gpu, reached, tmp_path):
    cards = null_gpu(count=2)
    if not reached:
        cards["NULLGPU_NCCL"] = "unreachable"
    launchers_variables = [{name: env[name] for name in LAUNCHER_VARIABLES} for env in rank_environments(2)]
    outputs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [
        start(cards | env, [SCRIPT, "", "5"], output) for env, output in zip(launchers_variables, outputs, strict=True)
    ]
    codes = [rank.wait(90) for rank in ranks]
    said = [output.read_text() for output in outputs]
    if reached:
        assert said == [f"rank {rank} on cuda: [True, False] by None\n" for rank in range(2)]
        return
    assert codes == [2, 2] and said[1] == ""
    assert said[0].startswith("error: the 2 ranks met at 127.0.0.1:") and said[0].count("\n") == 1
    assert "their first collective over nccl did not end within 5 s; NCCL_SOCKET_IFNAME is not set: set it" in said[0]
    assert "NCCL_P2P_DISABLE=1" in said[0] and "NCCL_DEBUG=INFO" in said[0]
