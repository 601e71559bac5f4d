"""The command itself, as users start it, on the preset `tiny`."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from itertools import product
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_cmli import train
from ds_cmli.commands import exit_code
from ds_cmli.evaluate import __main__ as evaluate
from ds_cmli.faults.watchdog import Watchdog
from tests import make
from tests.checkpoint.runs import assert_same
from tests.make import lines, small, weights
from tests.ranks import ROOT, launcher, python

TINY = small({"--steps": 4}, {"run.match_maps": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, and what it has printed."""
    folder = tmp_path_factory.mktemp("run")
    with redirect_stdout(io.StringIO()) as out, mock.patch.object(Watchdog, "heartbeat", autospec=True) as heartbeat:
        assert make.train(*TINY, "--output-dir", str(folder)) == 0
    steps_done = [call.args[1] for call in heartbeat.call_args_list if len(call.args) > 1]
    assert steps_done == [0, 1, 2, 3]  # as the watchdog reports of a rank that hangs
    return folder, out.getvalue()


def evaluated(folder) -> dict[str, float]:
    return {name: x for line in lines(folder, "step") for name, x in line.items() if name.startswith("eval/")}


def test_what_a_run_leaves(finished):
    folder, out = finished
    steps = lines(folder)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    expected = {"loss", "loss/global", "loss/cmli", "loss/target_cmli", "lr", "grad_norm", "temperature/cmli"}
    assert expected <= steps[0].keys()
    page = (ROOT / "docs" / "train.md").read_text()
    assert all(f"`{re.sub('/(global|cmli|target_cmli)$', '/NAME', column)}`" in page for column in steps[0])
    assert steps[0]["loss"] == pytest.approx(sum(v for k, v in steps[0].items() if k.startswith("loss/")), rel=1e-5)
    assert steps[0]["temperature/global"] == pytest.approx(0.07, rel=0.01)
    assert steps[0]["temperature/cmli"] == pytest.approx(0.02, rel=0.01)
    evals = evaluated(folder)
    for split, score, way in product(("seen", "unseen"), ("global", "cmli", "combined"), ("i2t", "t2i")):
        r1, r5, r10 = (evals[f"eval/{split}/{score}/{way}_r{k}"] for k in (1, 5, 10))
        assert 0 <= r1 <= r5 <= r10 <= 1 and 0 <= evals[f"eval/{split}/pointing_game"] <= 1
    config = json.loads((folder / "run.json").read_text())
    assert config["config"]["run"]["preset"] == "tiny"
    assert config["deepspeed"]["train_batch_size"] == 8
    assert {"torch", "deepspeed", "python"} <= config["versions"].keys()
    assert {f"losses.{n}.temperature.logit_scale" for n in ("global", "cmli")} <= weights(folder).keys()
    assert weights(folder)["student.projection.weight"].shape == (16, 32)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "run.json").stat().st_mode
    assert (folder / "checkpoint" / "latest").read_text() == "step4"
    assert "checkpoint step4: " in out and "best seen combined R@1 " in out
    assert "(mean of both ways; " in out
    for room in ("visualize", "evaluate", "export"):
        assert f" python -m ds_cmli.{room} {folder}" in out
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    drawn = {"loss/total", "loss/cmli", "train/lr", "train/grad_norm", "temperature/global"}
    drawn |= {"train/pairs_per_s", "train/peak_memory_bytes", "eval/seen/combined/i2t_r1", "eval/seen/pointing_game"}
    assert drawn <= set(events.Tags()["scalars"])
    maps = {f"match-maps/{split}/{i}" for split in ("seen", "unseen") for i in range(2)}
    assert set(events.Tags()["images"]) == maps
    assert {event.step for tag in maps for event in events.Images(tag)} == {4}
    (text,) = events.Tensors("configuration/text_summary")
    assert b'"preset": "tiny"' in text.tensor_proto.string_val[0]
    assert f"written to {folder}" in out


FROM_PYTHON = """
import sys
import ds_cmli
from ds_cmli import train
given = {"run": {"preset": "tiny", "output_dir": sys.argv[2], "match_maps": 2}, "optim": {"steps": 4}}
given |= {"student": {"layers": 1, "shared_blocks": 1}, "teacher": {"block": 0}, "data": {"workers": 0}}
ds_cmli.fit(given, deepspeed_config=sys.argv[1])
train.command.main(["--deepspeed_config", *sys.argv[1:2], *sys.argv[4:], "--output-dir", sys.argv[3]])
"""


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_with_a_launcher_and_without_one_and_from_python(tmp_path):
    """All are new processes, because sums of many elements differ by what a process has done before."""
    json = "ds_configs/zero2.json"
    words = "ds_cmli/train.py", "--deepspeed_config", json, *TINY, "--output-dir", tmp_path / "deepspeed"
    for done in (
        python(*words, launcher=launcher("deepspeed", 1)),
        python("-c", FROM_PYTHON, json, tmp_path / "fit", tmp_path / "command", *TINY),
    ):
        assert done.returncode == 0, done.stdout + done.stderr
    # Without the launcher, whose own lines nobody can turn off, only ours are left.
    for noise in ("warning", "report", "traceback", "extension"):
        assert noise not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    for name in ("fit", "command"):
        assert_same(tmp_path / name, tmp_path / "deepspeed")


def test_evaluate_command_repeats_the_last_evaluation(finished, tmp_path, monkeypatch):
    folder, _ = finished
    file = tmp_path / "metrics.json"
    monkeypatch.setattr(sys, "argv", ["ds-cmli-evaluate", "--checkpoint", str(folder), "--json", str(file)])
    assert exit_code(evaluate.command) == 0
    content = json.loads(file.read_text())
    assert content == pytest.approx(evaluated(folder), abs=1e-9)  # in the precision of the training


def test_a_dry_run_prints_the_resolved_configuration_and_ends(tmp_path, alone, capsys):
    words = ["--preset", "paper", "--dry-run", "--set", "student.layers=1", "--output-dir", str(tmp_path / "run")]
    assert train.command.main(words, standalone_mode=False) == 0
    out = capsys.readouterr().out
    printed = json.loads(out[out.index("{\n") :])
    assert printed["config"]["student"]["layers"] == 1 and printed["config"]["run"]["preset"] == "paper"
    assert printed["deepspeed"]["zero_optimization"]["stage"] == 2
    assert not (tmp_path / "run").exists()


def test_help_has_options_with_the_meaning_of_their_settings():
    done = python("ds_cmli/train.py", "--help", timeout=5)
    assert done.returncode == 0 and "--losses" in done.stdout
    assert "--workers INTEGER Data loading processes per rank." in " ".join(done.stdout.split())
