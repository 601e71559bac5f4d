"""A mistake is printed once for all ranks, by the lowest rank that has met it."""

import sys
from collections.abc import Iterator
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
CASES = {  # ranks with the mistake, whether the processes have met, and the line about it
    ((1,), False): BY_RANK_1,
    ((1, 2), False): BY_RANK_1,
    ((0, 1, 2), False): BY_RANK_0,
    ((1,), True): BY_RANK_1,
    ((0, 1, 2), True): BY_RANK_0,
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Iterator[dict]:
    """The log and the processes of each case's job. All run at once, because they mostly wait."""
    folder = tmp_path_factory.mktemp("jobs")
    started = {}
    for number, case in enumerate(CASES):
        log = folder / str(number)
        started[case] = (log, start_function(train, 3, log, *case, SLURMD_NODENAME="n7"))
    yield started
    for _, processes in started.values():
        for process in processes:
            process.kill()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lowest_rank_that_has_a_mistake_prints_it(jobs, case):
    log, processes = jobs[case]
    ranks_with_mistake, _ = case
    for rank in ranks_with_mistake:
        processes[rank].join(60)
    codes = [processes[rank].exitcode for rank in ranks_with_mistake]
    assert {*codes} == {2}, log.read_text()
    assert [text for text in log.read_text().splitlines() if text.startswith("error: ")] == [CASES[case]]
