"""The command: a plan that is killed in the middle and gone on with."""

import json
import time

import pytest

from profiling.learning import records
from tests.conftest import ROOT, clean_environment, run
from tests.processes import Program

SCRIPT = "../profiling/ablate.py"
PLAN = """\
preset = "tiny"
seeds = [0, 1]
endpoints = ["eval/seen/combined/mean_recall", "unseen/mean_recall"]
settings = { optim = { steps = 30 }, run = { eval_batch = 300, match_maps = 0 } }

[arms.exact]

[arms.cut]
loss.cmli_cut = 0.01

[[contrasts]]
arm = "cut"
against = "exact"
planned = true
equivalence = 0.05
"""


def steps(folder) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    content = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line["step"] for line in content if "loss" in line]


def waited_for(true, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_plan_that_is_killed_goes_on(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.replace("[0, 1]", "[0]"))
    out, file = tmp_path / "out", tmp_path / "plan.csv"
    command = [str(ROOT / "profiling" / "ablate.py"), str(tmp_path / "plan.toml"), "--out", str(out)]
    killed = Program(command, clean_environment(), tmp_path, tmp_path / "output")
    waited_for(lambda: killed.returncode is not None or steps(out / "cut-0"))
    killed.kill()
    # The run in progress gets a signal, saves and ends.
    waited_for(lambda: "to go on" in (out / "cut-0" / "output.log").read_text())
    assert list(records.load(file)) == [("exact", 0)]
    saved = len(steps(out / "cut-0"))
    assert 0 < saved < 30

    markdown, pictures = tmp_path / "plan.md", [tmp_path / "differences.png", tmp_path / "curve.png"]
    output = ["--markdown", str(markdown), "--plot", str(pictures[0]), "--curve", "cut/kept", str(pictures[1])]
    done = run(*command[1:], *output, script=SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 runs are done" in done.stdout
    resumed = (out / "cut-0" / "output.log").read_text()
    assert f"resuming from {out}/cut-0/checkpoint/step{saved}" in resumed
    assert all(steps(out / name) == [*range(1, 31)] for name in ("exact-0", "cut-0"))
    lines = records.load(file)
    assert set(lines) == {("exact", 0), ("cut", 0)}
    for line in lines.values():
        assert line.pop("in_plan") == "unknown" and line.pop("planned") == ""  # no repository there
        assert all(line.values()) and 0 <= float(line["eval/seen/combined/mean_recall"]) <= 1
        assert line["unseen/mean_recall"] == repr(sum(map(int, line["unseen/hits"])) / 3600)
        assert float(line["seconds"]) > 1 and int(line["peak_memory_bytes"]) > 10**8
    assert lines["cut", 0]["settings"].startswith("tiny loss.cmli_cut=0.01 optim.steps=30")
    assert "| cut - exact | eval/seen/combined/mean_recall | 1 |" in markdown.read_text()
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_runs_that_fail_are_told_and_the_others_have_their_turn(tmp_path):
    plan = PLAN.replace("[0, 1]", "[0]").replace("match_maps = 0 }", 'match_maps = 0 }, data = { source = "away" }')
    (tmp_path / "plan.toml").write_text(plan.replace(', "unseen/mean_recall"', ""))
    done = run(str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out"), script=SCRIPT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "error: 2 runs failed, the first: run exact-0 ended with exit code 2: error: data.source is 'away'"
        in done.stderr
    )
    assert "run cut-0 ended with exit code 2" in done.stdout and "0 of 2" in done.stdout
    assert not (tmp_path / "plan.csv").exists()


def test_a_plan_that_is_done_trains_nothing(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    endpoint = "eval/seen/combined/mean_recall"
    settings = "loss.cmli_cut=0.01 optim.steps=30 run.eval_batch=300 run.match_maps=0"
    for seed, arm in ((0, "exact"), (1, "exact"), (0, "cut"), (1, "cut")):
        own = settings if arm == "cut" else settings.partition(" ")[2]
        line = {"arm": arm, "seed": str(seed), endpoint: "0.5", "unseen/mean_recall": "0.5", "settings": f"tiny {own}"}
        (tmp_path / f"{arm}-{seed}").mkdir()
        records.write(tmp_path / f"{arm}-{seed}" / records.FILE, [line])
    done = run(str(tmp_path / "plan.toml"), "--out", str(tmp_path), script=SCRIPT, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 runs are done" in done.stdout and "equivalent within 0.05" in done.stdout.replace("\n", " ")


def test_a_task_that_the_array_does_not_have(tmp_path):
    done = run(str(tmp_path / "plan.toml"), "--task", "2", "--tasks", "2", script=SCRIPT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--task is 2 and --tasks is 2" in done.stderr
