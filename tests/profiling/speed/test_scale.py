import json

import pytest

from profiling.speed.scale import cells, computed_scores, draw, finding, row
from tests.conftest import run

SCRIPT = "profiling.speed.scale"


@pytest.mark.slow
def test_a_table_of_two_exchanges(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--preset", "tiny", "--target", "cpu", "--ranks", "1,2", "--stages", "2", "--accumulation", "1"]
    done = run(*options, "--json", str(file), script=SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    one, gathered, ring = json.loads(file.read_text())
    assert one["moved"] == {} or one["sent"] == 0
    assert gathered["exchange"] == "gather" and "text send" not in gathered["moved"]
    # Text and mask to the other rank, forward and backward, and the gradient in fp32 back: 8 texts of 32 positions and
    # 16 features.
    text = 8 * 32 * (16 * 2 + 1)
    assert ring["moved"]["text send"] == {"calls": 3, "bytes": 2 * text + 8 * 32 * 16 * 4}
    assert ring["seconds"]["step"] > 0 and "a ring takes less memory" in done.stdout


@pytest.mark.slow
def test_scores_computed_for_a_gpu():
    pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")
    from profiling.speed.scaling import Rates, StepCost

    rates = Rates(60e12, 25e9, 5e9, 1e-5, 8, computed_scores("cuda", "A100 80GB", 0.5))
    gathered, ring = (
        row(StepCost(2, 2, exchange, False, 4, 10**9, 1e12, (256, 512, 196, 64, 256), False, {}), rates)
        for exchange in ("gather", "ring")
    )
    seconds = gathered["seconds_kept"]
    assert seconds["0.03"] < seconds["0.1"] < seconds["0.3"] < gathered["seconds"]["step"]
    # Whatever is kept, the forward of all pairs runs: four times, of 1.1 TFLOP at 156 TFLOP/s.
    assert seconds["0.03"] > 4 * 1.1e12 / 156e12
    assert 1.2 < ring["seconds"]["scores"] / gathered["seconds"]["scores"] < 1.5  # the forward twice
    assert len(cells(gathered)) == len(cells(ring)) == 15
    assert computed_scores("cuda", "T4 16GB", 0.5) is None and computed_scores("cpu", "A100 80GB", 0.5) is None


def test_wrong_ranks_are_one_line():
    done = run("--ranks", "1,many", script=SCRIPT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--ranks is '1,many'" in done.stderr


def test_the_picture_says_what_a_ring_costs_and_saves(tmp_path):
    pytest.importorskip("matplotlib")

    def made(ranks: int, exchange: str, seconds: float, memory: float) -> dict:
        return {"zero_stage": 2, "cached": False, "ranks": ranks, "exchange": exchange,
                "seconds": {"step": seconds}, "memory": memory}  # fmt: skip

    rows = [made(1, "gather", 1, 5e9), made(8, "gather", 4, 8e9), made(8, "ring", 5, 6e9)]
    assert finding(rows, "") == "Computed: on 8 ranks a ring takes 75% of gathering's memory and 125% of its time"
    assert finding(rows[:1], "one rank") == "one rank"
    draw(rows, "", str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 1000
