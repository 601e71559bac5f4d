"""Signals to the launchers themselves, cells of signal_table.py: what was trained is saved, and nobody trains on.

The ordinary run has a rank that learns of its launcher's end (test_launcher.py), and ranks that are told to stop
(test_preemption.py).
"""

import os
import signal

import pytest

from ds_cmli.faults.watchdog import hold_back_nccl
from tests.faults.signal_table import Table


class GoesOnForked(Table):
    """The next start is that of two forked ranks: what it finds does not depend on who starts it."""

    def start_again(self, way, run):
        return self.forked(run, 2)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return GoesOnForked(tmp_path_factory.mktemp("signals"))


@pytest.mark.soak
@pytest.mark.parametrize("way, number", [("torchrun", signal.SIGUSR1), ("deepspeed", signal.SIGTERM)])
def test_the_end_of_a_launcher_costs_no_step(table, way, number):
    row = table.row(way, "the launcher", number)
    print(row)
    saved, done = row.checkpoint.split(" of ")
    assert int(row.code) == 128 + number and saved == f"step{done}"
    assert row.left == 0 and row.resumed == "bit-identical"


@pytest.mark.parametrize("timeout", [10, 120, 1000])
def test_nccl_ends_a_rank_after_the_watchdog_has_named_the_one_to_blame(monkeypatch, timeout):
    monkeypatch.setattr(os, "environ", {})
    hold_back_nccl(timeout)
    sleep = 4 * int(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000
    assert sleep > timeout + 20
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > sleep
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ  # torch's own default: on
