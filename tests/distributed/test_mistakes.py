"""A mistake is printed once for all ranks, by the lowest rank that has met it."""

import sys
from pathlib import Path
from unittest import mock

import click
import pytest
import torch.distributed as dist

from ds_cmli.commands import exit_code
from ds_cmli.distributed import mistakes, process_group
from ds_cmli.errors import UserError
from tests.ranks import start_function


def train(rank: int, ranks_with_mistake: tuple[int, ...], has_group: bool) -> None:
    """Meet a mistake before or after the processes meet; the other ranks wait in a collective."""

    @click.command()
    def command() -> None:
        if has_group:
            process_group.init()
        if rank in ranks_with_mistake:
            raise UserError("the lr is -1")
        if not has_group:
            process_group.init()
        dist.barrier()

    with mock.patch.object(sys, "argv", ["train"]), mock.patch.object(mistakes, "MEETING_SECONDS", 2.0):
        sys.exit(exit_code(command))


BY_RANK_1 = "error: rank 1 on node n7: the lr is -1"
BY_RANK_0 = "error: the lr is -1"
CASES = [
    ((1,), False, BY_RANK_1), ((1, 2), False, BY_RANK_1), ((0, 1, 2), False, BY_RANK_0), ((1,), True, BY_RANK_1),
    ((0, 1, 2), True, BY_RANK_0),
]  # fmt: skip


@pytest.mark.parametrize("ranks_with_mistake, has_group, line", CASES)
def test_the_lowest_rank_that_has_a_mistake_prints_it(tmp_path: Path, ranks_with_mistake, has_group, line):
    log = tmp_path / "log"
    processes = start_function(train, 3, log, ranks_with_mistake, has_group, SLURMD_NODENAME="n7")
    for rank in ranks_with_mistake:
        processes[rank].join(60)
    codes = [processes[rank].exitcode for rank in ranks_with_mistake]
    for process in processes:
        process.kill()
        process.join()
    assert {*codes} == {2}, log.read_text()
    assert [text for text in log.read_text().splitlines() if text.startswith("error: ")] == [line]
