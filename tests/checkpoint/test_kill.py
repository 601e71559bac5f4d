"""kill -9 at any moment: the next start goes on from the last checkpoint, and ends as if nothing had happened."""

import random
import re
import time

import pytest

from tests.checkpoint.runs import Ranks, assert_same
from tests.make import pairs


def series(tmp_path, world_size: int, moments: list[str], seed: int) -> None:
    """Kill a run at each of the moments, "write" or "any", resume it, and compare with one that was left alone."""
    draw = random.Random(seed)
    steps = 40 + 12 * len(moments)
    ds_config = tmp_path / "ds.json"  # with negatives from both micro-batches of a step
    ds_config.write_text('{"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}')
    arguments = ["--preset", "tiny", "--steps", str(steps), "--log-every", "2", "--save-every", "3",
                 "--deepspeed_config", str(ds_config), "--micro-batch", "2",
                 "--set", "student.dropout=0.1", "--set", "data.image_size=28", "--set", "run.match_maps=0",
                 "--data", pairs(tmp_path / "pairs", count=63), "--output-dir"]  # fmt: skip
    assert Ranks(tmp_path, world_size, [*arguments, str(tmp_path / "straight")]).wait() == [0] * world_size
    run = tmp_path / "killed"
    pointer = run / "checkpoint" / "latest"
    writes = 0
    for number, moment in enumerate(moments):
        before = pointer.read_text() if pointer.is_file() else None
        started = Ranks(tmp_path, world_size, [*arguments, str(run)])
        trained = started.wait_until(lambda: "step " in started.output.split("steps; negatives")[-1])  # noqa: B023
        assert trained, started.output
        time.sleep(draw.uniform(0, 0.8))
        if moment == "write":
            started.wait_until(lambda: any((run / "checkpoint").glob("*.writing")))
            time.sleep(draw.uniform(0, 0.02))
        started.kill(draw.choice([[0], [world_size - 1], list(range(world_size))]))
        assert f"resuming from {run / 'checkpoint' / before}\n" in started.output if before else True, started.output
        wrote = any((run / "checkpoint").glob("*.writing"))
        writes += wrote
        now = pointer.read_text() if pointer.is_file() else None
        assert before is None or int(re.findall(r"\d+", now)[0]) >= int(re.findall(r"\d+", before)[0])
        print(f"kill {number + 1} ({'in a write' if wrote else 'outside one'}): {before} -> {now}", flush=True)
    last = Ranks(tmp_path, world_size, [*arguments, str(run)])
    assert last.wait() == [0] * world_size, last.output
    assert "is damaged" not in last.output
    assert_same(tmp_path / "straight", run)
    assert not list(run.rglob("*.writing"))
    print(f"{len(moments)} kills on {world_size} ranks, {writes} of them during a write: nothing lost")
    assert writes >= moments.count("write") // 2


@pytest.mark.slow
def test_killed_at_two_moments(tmp_path):
    series(tmp_path, 1, ["any", "write"], seed=1)
