"""The CSV file of runs, merged from one line a run."""

import json
from dataclasses import replace

import pytest

from ds_cmli.common.errors import UserError
from profiling.learning import records
from profiling.learning.plan import Arm, Plan, Run

ENDPOINT = "eval/seen/combined/mean_recall"
PLAN = Plan("tiny", {"exact": Arm("exact", {}, [0, 1])}, [ENDPOINT], [])


def line(seed: int, value: str = "0.5", **more: str) -> records.Record:
    return {"arm": "exact", "seed": str(seed), ENDPOINT: value, "settings": "tiny", **more}


@pytest.fixture
def out(tmp_path):
    """A folder of two runs' folders, of which one has its line."""
    for seed in (0, 1):
        (tmp_path / "out" / f"exact-{seed}").mkdir(parents=True)
    records.write(tmp_path / "out" / "exact-1" / records.FILE, [line(1, cpu="a, b")])
    return tmp_path / "out"


def test_lines_of_folders_and_of_other_machines_are_one_file(out, tmp_path):
    file = tmp_path / "runs.csv"
    records.write(file, [line(7)])
    lines = records.merge(PLAN, file, out)
    assert list(lines) == [("exact", 7), ("exact", 1)]
    assert records.load(file) == {key: dict.fromkeys(records.BESIDE, "") | lines[key]
                                  for key in (("exact", 1), ("exact", 7))}  # fmt: skip
    assert file.read_text().splitlines()[1].startswith('exact,1,0.5,,,,"a, b",tiny')
    assert [path.name for path in tmp_path.glob("runs*")] == ["runs.csv"]  # nothing half written is left
    before = file.stat().st_mtime_ns
    records.merge(PLAN, file, out)
    assert file.stat().st_mtime_ns == before


def test_what_was_measured_afterwards_is_in_the_line_with_the_hits_of_scenes(tmp_path):
    (tmp_path / "config.json").write_text('{"revision": "abc", "config": {}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "eval/seen/combined/mean_recall": 0.5}\n')
    (tmp_path / "tensorboard").mkdir()
    measured = {"unseen/mean_recall": 0.25, "unseen/hits": "0060", "probe/accuracy": 0.75}
    (tmp_path / records.MEASURED).write_text(json.dumps(measured))
    run = Run("exact", 3, "tiny", {})
    records.record(replace(PLAN, endpoints=[ENDPOINT, "unseen/mean_recall"]), run, tmp_path)
    lines = records.load(tmp_path / records.FILE)
    assert lines["exact", 3]["unseen/hits"] == "0060" and "probe/accuracy" not in lines["exact", 3]
    assert records.hits(lines, "exact", 3, "unseen/mean_recall") == [0, 0, 6, 0]
    assert records.hits(lines, "exact", 3, ENDPOINT) == []
    with pytest.raises(UserError, match="swap/captions"):
        records.record(replace(PLAN, endpoints=["swap/captions"]), run, tmp_path)


def test_what_is_missing(out, tmp_path):
    lines = records.merge(PLAN, tmp_path / "runs.csv", out)
    assert [run.name for run in records.missing(PLAN, PLAN.runs(), lines)] == ["exact-0"]
    # A line from before an endpoint was named does not count.
    lines["exact", 1][ENDPOINT] = ""
    assert len(records.missing(PLAN, PLAN.runs(), lines)) == 2
    assert records.values(lines, "exact", [0, 1], ENDPOINT) == {}


def test_a_line_of_other_settings_is_refused(out, tmp_path):
    lines = records.merge(PLAN, tmp_path / "runs.csv", out)
    lines["exact", 1]["settings"] = "tiny optim.lr=1"
    with pytest.raises(UserError, match=r"run exact-1 is there with other settings \(tiny optim.lr=1\)"):
        records.missing(PLAN, PLAN.runs(), lines)


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no CSV of an ablation's runs"):
        records.merge(PLAN, file, tmp_path)
    assert file.read_text() == "a,b\n1,2\n"
