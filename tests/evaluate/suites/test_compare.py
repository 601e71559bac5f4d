"""The command on suites: what it prints, writes and refuses, and its intervals."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.__main__ import command
from ds_cmli.evaluate.suites import compare
from ds_cmli.evaluate.suites.task import Measure, Measured
from tests.evaluate.suites import lists
from tests.run_folder import write_run


def evaluate(*arguments):
    done = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=True)
    if done.exception:
        raise done.exception
    return done.output


def test_two_models_side_by_side(tmp_path, run):
    (tmp_path / "other").mkdir()
    other = write_run(tmp_path / "other", losses=("global",))
    weights = load_file(other / "student.safetensors")
    noise = torch.Generator().manual_seed(1)
    for value in weights.values():
        value += torch.randn(value.shape, generator=noise) * 0.1
    save_file(weights, other / "student.safetensors")
    suite = lists.write_suite(tmp_path, crepe=lists.sugarcrepe(tmp_path), long=lists.docci(tmp_path))
    files = "--json", tmp_path / "x.json", "--page", tmp_path / "x.html"
    printed = evaluate(run, other, "--suite", suite, "--batch-size", 16, *files)
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["models"] == [run, str(other)]
    crepe, long = result["tasks"]["crepe"], result["tasks"]["long"]
    assert (crepe["kind"], crepe["samples"], long["samples"]) == ("SugarCrepe", 15, 8)
    values = crepe["metrics"]["global/mean"]["values"]
    difference = crepe["metrics"]["global/mean"]["differences"][0]
    assert difference == pytest.approx(values[1] - values[0])
    low, high = crepe["metrics"]["global/mean"]["difference_intervals"][0]
    assert low <= difference <= high
    cmli = crepe["metrics"]["cmli/mean"]
    assert cmli["values"][1] is None and cmli["differences"] == [None] and cmli["intervals"][1] is None
    assert long["figures"]["chance/i2t_r1"] == [1 / 8, 1 / 8] and list(long["notes"]) == [run, str(other)]
    page = (tmp_path / "x.html").read_text()
    for text in (f"{values[0]:.3f}", f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]", "crepe: SugarCrepe, 15 samples"):
        assert text in printed
    assert "<h2>crepe</h2>" in page and f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]" in page
    assert max(map(len, printed.split("  crepe: ")[1].split("  long: ")[0].splitlines())) < 80


def test_one_model_has_intervals_of_its_own(tmp_path, run):
    printed = evaluate("--checkpoint", run, "--suite", lists.write_suite(tmp_path, a=lists.colorswap(tmp_path)))
    assert "a: ColorSwap, 6 samples" in printed and printed.count("[") == 9


def test_intervals_are_those_of_a_paired_bootstrap():
    rng = np.random.default_rng(1)
    first, second = (torch.from_numpy(rng.random(300) < share) for share in (0.5, 0.6))
    both = [Measured(300, {"a": Measure.accuracy(right)}) for right in (first, second)]
    tasks = {"task": SimpleNamespace(run=lambda model: both[model])}
    results, problems = compare.run_suite(tasks, ["0", "1"], int)
    metric = results["task"].metrics["a"]
    assert not problems
    x = second.double() - first.double()
    assert metric.differences == [pytest.approx(float(x.mean()))]
    # The normal approximation: 1.96 standard errors of the paired differences.
    half = 1.96 * float(x.std()) / math.sqrt(300)
    low, high = metric.difference_intervals[0]
    assert low == pytest.approx(float(x.mean()) - half, abs=0.01)
    assert high == pytest.approx(float(x.mean()) + half, abs=0.01)
    half = 1.96 * float(first.double().std()) / math.sqrt(300)
    assert metric.intervals[0][1] - metric.intervals[0][0] == pytest.approx(2 * half, rel=0.08)


def test_equal_models_differ_by_nothing(tmp_path, run):
    suite = lists.write_suite(tmp_path, a=lists.winoground(tmp_path))
    evaluate(run, run, "--suite", suite, "--json", tmp_path / "x.json")
    for metric in json.loads((tmp_path / "x.json").read_text())["tasks"]["a"]["metrics"].values():
        assert metric["differences"] == [0] and metric["difference_intervals"] == [[0, 0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "RUN"], "MODEL or --checkpoint: 2 are given: give one"),
        (["RUN", "--checkpoint", "RUN"], "MODEL or --checkpoint: 2 are given: give one"),
        (["--suite", "x"], "MODEL or --checkpoint: none is given"),
        (["RUN", "--suite", ""], "--suite is empty: give a value"),
        (["RUN", "--suite", "x", "--page", ""], "--page is empty: give a value"),
        (["RUN", "--suite", "none.toml"], "--suite is 'none.toml': cannot read it: No such file"),
        (["RUN", "--page", "x.html", "--data", "demo"], "--page has no effect without --suite: leave it out"),
        (["RUN", "--suite", "x", "--data", "demo"], "--data has no effect with --suite: leave it out"),
        (["RUN", "--suite", "x", "--boxes", "."], "--boxes has no effect with --suite"),
        (["RUN", "--suite", "x", "--zero-shot", "."], "--zero-shot has no effect with --suite"),
        (["RUN", "--suite", "x", "--fold-size", "2"], "--fold-size has no effect with --suite"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, run, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        evaluate(*(run if word == "RUN" else word for word in arguments))
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_loaded(tmp_path, run):
    suite = lists.write_suite(tmp_path, a=lists.winoground(tmp_path))
    with pytest.raises(UserError, match=r"is '.*nothing': no such file or folder"):
        evaluate(tmp_path / "a" / "b" / "nothing", "--suite", suite)
    with pytest.raises(UserError, match=r"student_ema|averag"):
        evaluate(run, "--ema", "--suite", suite)
