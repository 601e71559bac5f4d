"""Ranks that look for each other among other runs and programs on their ports. Processes of their own, over gloo."""

import multiprocessing
import os
import socket
import time
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch.distributed as dist

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import rendezvous
from tests.ranks import free_port

START = timedelta(seconds=60)
fork = multiprocessing.get_context("fork")


def one_rank(env: dict[str, str], results, held) -> None:
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        del os.environ[name]
    os.environ.update(env)
    if "LOCAL_SIZE" in env:  # as the launcher of one run, and not of another
        os.setpgid(0, int(env["GROUP"]))
    began = time.monotonic()
    try:
        store = rendezvous.meet(START)
        store.set(f"name of {env['RANK']}", env.get("NAME", ""))
        met = [store.get(f"name of {rank}").decode() for rank in range(int(env["WORLD_SIZE"]))]
        results.put((env["RANK"], env.get("NAME", ""), (met, int(os.environ["MASTER_PORT"])), 0.0))
        held.wait(60)
    except UserError as error:
        results.put((env["RANK"], env.get("NAME", ""), str(error), time.monotonic() - began))
    # Left at once: what the parent has imported must not be taken down in a forked process.
    results.close()
    results.join_thread()
    os._exit(0)


def given(port: int, rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def step_of(job: int, step: int, rank: int) -> dict[str, str]:
    slurm = {"JOB_ID": job, "STEP_ID": step, "PROCID": rank, "STEP_NUM_TASKS": 2}
    env = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    return env | given(12000 + (job + 1009 * step) % 20000, rank) | {"NAME": f"{job}.{step}"}


class Ranks:
    def __init__(self):
        self.results, self.held, self.processes = fork.Queue(), fork.Event(), []

    def start(self, *environments: dict[str, str]) -> "Ranks":
        for env in environments:
            self.processes.append(fork.Process(target=one_rank, args=(env, self.results, self.held), daemon=True))
            self.processes[-1].start()
        return self

    def told(self, count: int) -> list:
        return sorted(self.results.get(timeout=60) for _ in range(count))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        self.held.set()
        for process in self.processes:
            process.join(20)


@pytest.fixture
def ranks():
    with Ranks() as ranks:
        yield ranks


def silent(stack: ExitStack, port: int) -> None:
    """A program that listens and never answers."""
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", port))
    listener.listen()


def test_a_port_that_another_program_holds_is_passed_over(ranks):
    job = 4000 + free_port() % 1000
    with ExitStack() as stack:
        silent(stack, step_port := int(step_of(job, 1, 0)["MASTER_PORT"]))
        ranks.start(step_of(job, 1, 0), step_of(job, 1, 1))
        for _, _, (met, port), _ in ranks.told(2):
            assert met == [f"{job}.1"] * 2 and port == step_port + 2003


def test_two_steps_with_one_port_do_not_meet(ranks):
    job = 5000 + free_port() % 1000
    pairs = [(job + 1009, 0), (job, 1)]
    ranks.start(*(step_of(*pair, rank) for rank in (1, 0) for pair in pairs))
    result = ranks.told(4)
    assert all(met == [name] * 2 for _, name, (met, _), _ in result)
    assert len({port for _, _, (_, port), _ in result}) == 2


@pytest.mark.slow
def test_a_given_port_that_is_taken_ends_all_with_one_line(ranks, capfd):
    port = free_port()
    with ExitStack() as stack:
        silent(stack, port)
        ranks.start(given(port, 0), given(port, 1))
        for _, _, said, seconds in ranks.told(2):
            assert said.startswith(f"MASTER_PORT is {port}: ") and said.endswith("; set it to a free one")
            assert seconds < 30


@pytest.mark.slow
def test_another_runs_store_is_recognised_and_left_alone(ranks):
    port = free_port()
    with Ranks() as first:
        first.start(*(given(port, rank) | {"LOCAL_SIZE": "2", "GROUP": "0", "NAME": "first"} for rank in (0,)))
        group = first.processes[0].pid
        time.sleep(0.5)
        own = {"LOCAL_SIZE": "2", "NAME": "second"}
        ranks.start(*(given(port, rank) | own | {"GROUP": str(os.getpgid(0))} for rank in (0, 1)))
        (_, _, of_first, _), (_, _, of_second, _) = ranks.told(2)
        assert "in use on this machine" in of_first and "another program answers there" in of_second
        first.start(given(port, 1) | {"LOCAL_SIZE": "2", "GROUP": str(group), "NAME": "first"})
        assert [met for _, _, (met, _), _ in first.told(2)] == [["first", "first"]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_ends_where_nobody_comes(monkeypatch, rank):
    for name, value in given(free_port(), rank).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=["only 1 of 2 ranks met at", "rank 1 of 2 met no rank 0 at"][rank]):
        rendezvous.meet(timedelta(seconds=0.5))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", ["absent", "silent about rank 0", "before's rank 0 has ended", "another program"])
def test_waiting_beside_torchrun_ends_where_nobody_comes(monkeypatch, capfd, rank, launcher):
    monkeypatch.setattr(rendezvous, "ANSWER", 0.2)
    port = free_port()
    for name, value in (given(port, rank) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    stack = ExitStack()
    if launcher == "another program":
        silent(stack, port)
    elif launcher != "absent":
        agents = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    if launcher == "before's rank 0 has ended":
        agents.set(rendezvous.SHARED, f"127.0.0.1 {free_port()} its-token")
    message = ["only 1 of 2 ranks met at", "met no rank 0 at .* within 0.5 s: see why"][rank]
    if launcher in ("absent", "another program"):
        message = "did not reach the launcher at 127.0.0.1:"
    with pytest.raises(UserError, match=f"^(rank {rank} of 2 )?{message}[^\n]*$") as error:
        rendezvous.meet(timedelta(seconds=0.5))
    lines = capfd.readouterr().err.splitlines()
    assert {*lines} <= {f"error: {error.value}"} or launcher == "another program"  # which PyTorch tells of
    stack.close()


def test_ranks_that_torchrun_starts_again_do_not_meet_those_before(ranks):
    port, elastic = free_port(), {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    agents = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # stays, as torchrun does
    ranks.start(*(given(port, rank) | elastic | {"NAME": "first"} for rank in (0, 1)))
    assert [met for _, _, (met, _), _ in ranks.told(2)] == [["first"] * 2] * 2
    with Ranks() as again:
        again.start(given(port, 1) | elastic | {"NAME": "again"})
        time.sleep(0.5)  # it finds where the first ones met, who are still there
        again.start(given(port, 0) | elastic | {"NAME": "again"})
        assert [met for _, _, (met, _), _ in again.told(2)] == [["again"] * 2] * 2
    del agents
