"""How long NCCL waits before it ends a rank."""

import os

import pytest

from ds_cmli.faults.watchdog import hold_back_nccl


@pytest.mark.parametrize("timeout", [10, 120, 1000])
def test_nccl_ends_a_rank_after_the_watchdog_has_named_the_one_to_blame(monkeypatch, timeout):
    monkeypatch.setattr(os, "environ", {})
    hold_back_nccl(timeout)
    sleep = 4 * int(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000
    assert sleep > timeout + 20
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > sleep
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ  # torch's own default: on
