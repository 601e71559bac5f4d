"""Two real processes over gloo, one of which stops in its own way: how the job ends, when, and what it says."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_cmli.faults.watchdog import Heartbeat, Watchdog
from tests.ranks import environments, start

pytestmark = pytest.mark.usefixtures("alone")
TIMEOUT = 3.0  # seconds
SLACK = 5.0  # seconds; a loaded machine takes its time to end a process
STEP = 0.1


def two_ranks(folder: Path, fate: str, victim: int = 1) -> tuple[list[int | None], str, float]:
    """Exit codes, all output, and the seconds from the fate of the victim to the end of the survivors."""
    command = ["tests/faults/stopping_rank.py", fate, TIMEOUT, STEP]
    logs, ended = [folder / f"{fate}-{victim}-{rank}.log" for rank in range(2)], [0.0, 0.0]
    ranks = [
        start(command, env | {"SLURMD_NODENAME": f"node-{rank}"}, logs[rank])
        for rank, env in enumerate(environments(2, VICTIM=str(victim)))
    ]

    def follow(rank: int) -> None:
        ranks[rank].wait()
        ended[rank] = time.time()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    threads[1 - victim].join(300)  # with what the processes import
    if fate.startswith("is stopped"):
        ranks[victim].kill()
    for process, thread in zip(ranks, threads, strict=True):
        thread.join(20)
        if thread.is_alive():
            process.kill()
    text = "".join(log.read_text() for log in logs)
    begin = [float(line.split()[1]) for line in text.splitlines() if line.startswith("FATE")]
    return [process.poll() for process in ranks], text, max(ended) - begin[0]


# fate: what the line says, after "error: rank R on node node-R", and the longest it may take
FATES = {
    "sleeps": ("hangs: no progress for 3 s, in stopping_rank.py:", 2 * TIMEOUT),
    "spins": ("hangs: no progress for 3 s, in stopping_rank.py:", 2 * TIMEOUT),
    "exits": ("is dead", TIMEOUT),
    "is killed": ("is dead", TIMEOUT),
    "is stopped": ("is dead: no ", 2 * TIMEOUT + 2),
    "is stopped after saving": ("is dead: no ", 2 * TIMEOUT + 2),
    "is stopped after the first step": ("is dead: no ", 2 * TIMEOUT + 2),
    "raises": ("failed: Poisoned: sample 17", TIMEOUT + 2),
}


STOPPED = {fate: -signal.SIGKILL for fate in FATES if fate.startswith("is stopped")}
# Rank 0 holds the store that all others read: where it stops they cannot ask about it.
STOPS = [*((fate, 1) for fate in FATES), *((fate, 0) for fate in FATES if fate not in ("spins", "exits"))]
GOES_ON = ("evaluates and compiles", "saves and pauses", "preempted", "agrees")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """The cases of the tests that run, some at a time: they mostly wait."""
    tests = [item.callspec.params for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(4) as pool:
        folder = tmp_path_factory.mktemp("ranks")
        cases = list({(test["fate"], test.get("victim", 1)): None for test in tests if "fate" in test})
        yield dict(zip(cases, pool.map(lambda case: two_ranks(folder, *case), cases), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("fate, victim", STOPS)
def test_one_rank_stops_and_the_job_ends(outcomes, fate, victim):
    words, seconds = FATES[fate]
    codes, output, took = outcomes[fate, victim]
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    print(f"rank {victim} {fate}: exit codes {codes}, {took:.1f} s", *said, sep="\n")
    assert codes[1 - victim] == 1, output
    assert codes[victim] == {"exits": 0, "is killed": -signal.SIGKILL, **STOPPED}.get(fate, 1)
    assert took < seconds + SLACK, output
    assert len(said) == 1, output
    assert said[0].startswith(f"error: rank {victim} on node node-{victim} {words}"), said
    last = 1 if fate.endswith("first step") else 5
    assert said[0].endswith(f"; last step {last}: all ranks end")
    # The rank that fails tells where; nobody else adds a traceback to it.
    assert output.count("Traceback") == (1 if fate == "raises" else 0), output


@pytest.mark.slow
@pytest.mark.parametrize("fate", GOES_ON[-1:])
def test_an_error_on_all_ranks_is_left_to_them(outcomes, fate):
    codes, output, took = outcomes[fate, 1]
    assert codes == [1, 1]
    assert output.count("UserError: too many broken images") == 2 and "error: rank" not in output
    assert took < SLACK


@pytest.mark.parametrize("fate", GOES_ON[:-1])
def test_a_rank_that_gets_on_is_left_alone(outcomes, fate):
    codes, output, _ = outcomes[fate, 1]
    assert codes == ([85, 85] if fate == "preempted" else [0, 0]), output
    assert "error" not in output
    assert output.count("finished False") == (0 if fate == "preempted" else 2)


def judged(heartbeats: list[Heartbeat], silent_s: float, old_s: float, after_s: float = 0.0) -> list[str]:
    """What a reader says now and `after_s` later of a rank 0 that was last heard of `silent_s` ago."""
    said = []
    watchdog = Watchdog(TIMEOUT, dist.HashStore())
    watchdog._end = lambda ranks, name: said.append(f"{ranks} {name}")
    now = time.monotonic()
    watchdog.heartbeats = heartbeats
    watchdog.progressed, watchdog.lived = [now - old_s, now], [now - silent_s, now]
    watchdog._judge(now)
    if after_s:
        watchdog.progressed[1] = now + after_s
        watchdog.lived = [now + after_s - silent_s, now + after_s]
        watchdog._judge(now + after_s)
    return said


def test_what_another_rank_published_before_the_end_of_a_slow_part_is_no_hang():
    """This rank has passed its first step a moment ago, and reads what rank 0 published in the middle of it."""
    beats = [Heartbeat("a", slow=True, passed=0), Heartbeat("b", count=1, slow=False, passed=1, waiting=True)]
    assert judged(beats, silent_s=0.1, old_s=3 * TIMEOUT) == []
    assert judged(beats, silent_s=0.1, old_s=3 * TIMEOUT, after_s=0.9 * TIMEOUT) == []
    (line,) = judged(beats, silent_s=0.1, old_s=3 * TIMEOUT, after_s=1.1 * TIMEOUT)
    assert line.startswith("[0] hangs: no progress for 3 s")


def test_a_rank_without_a_sign_of_life_is_dead_and_not_hung():
    beats = [Heartbeat("a", count=1, slow=False), Heartbeat("b", count=2, slow=False, waiting=True)]
    assert judged(beats, silent_s=0.9 * TIMEOUT, old_s=1.1 * TIMEOUT) == []
    assert judged(beats, silent_s=1.1 * TIMEOUT, old_s=1.2 * TIMEOUT)[0] == "[0] is dead: no sign of life for 3 s"
    assert judged(beats, silent_s=0.1, old_s=1.1 * TIMEOUT)[0].startswith("[0] hangs")


@pytest.mark.parametrize(("hung", "named"), [([1, 3], (1, 3)), (list(range(1, 11)), range(1, 9))])
def test_every_hung_rank_is_named_up_to_eight(hung, named, monkeypatch, capsys):
    monkeypatch.setattr(Watchdog, "_leave", lambda watchdog: None)
    monkeypatch.setenv("WORLD_SIZE", "12")
    watchdog = Watchdog(TIMEOUT, dist.HashStore())
    watchdog.heartbeats = [Heartbeat(f"node-{rank // 4}", step=4) for rank in range(12)]
    watchdog._end(hung, "hangs")
    names = [f"{rank} on node node-{rank // 4}" for rank in named] + ["..."] * (len(hung) > 8)
    assert capsys.readouterr().err == f"error: rank {', '.join(names)} hangs; last step 4: all ranks end\n"
