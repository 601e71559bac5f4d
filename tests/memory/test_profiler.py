"""The trace of `--profile`, opened by TensorBoard with the plugin torch-tb-profiler."""

import gzip
import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.memory.profile import Profiles, parse_steps, profiling
from tests.ranks import free_port, python


def train(steps: int, done=lambda: None) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.ones(256, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        done()


def test_the_steps_asked_for_and_no_others(tmp_path):
    with profiling((3, 4), tmp_path, rank=5) as done:
        train(6, done)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("rank5.")
    events = json.loads(path.read_text())["traceEvents"]
    # The profiler counts from 0.
    assert {e["name"] for e in events if e["name"].startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3"}
    memory = [e["args"]["Bytes"] for e in events if e["name"] == "[memory]"]
    assert max(memory) == 256 * 64 * 4  # the activations
    product = next(e for e in events if e["name"] == "aten::addmm")
    assert product["args"]["Input Dims"][1] == [256, 64]
    assert any("test_profiler.py" in e["name"] and "train" in e["name"] for e in events)  # stacks


def test_the_first_step_has_no_warm_up(tmp_path):
    with profiling((1, 1), tmp_path) as done:
        train(2, done)
    events = json.loads(next(tmp_path.iterdir()).read_text())["traceEvents"]
    assert {e["name"] for e in events if e["name"].startswith("ProfilerStep")} == {"ProfilerStep#0"}


@pytest.mark.parametrize("text", ["", "3", "3:", ":5", "0:2", "5:3", "-1:2", "a:b", "1:2:3", "1.5:2"])
def test_mistakes_are_named(text):
    with pytest.raises(UserError, match=r"^--profile is .*: give the first and the last step"):
        parse_steps(text, 20)


def test_steps_that_are_not_taken_are_named():
    assert parse_steps("3:20", 20) == (3, 20)
    assert parse_steps("11:20", 20, done=10) == (11, 20)
    with pytest.raises(UserError, match="--profile is '3:21': give some of the steps 1 to 20"):
        parse_steps("3:21", 20)
    with pytest.raises(UserError, match="--profile is '10:12': give some of the steps 11 to 20"):
        parse_steps("10:12", 20, done=10)


def test_what_a_start_before_this_one_was_to_record_is_left_out():
    said = []
    trace, memory = Profiles(trace="5:8"), Profiles(memory=2)
    assert trace.left(20, 4, said.append) == trace and memory.left(20, 18, said.append) == memory and not said
    assert trace.left(20, 5, said.append) == memory.left(20, 19, said.append) == Profiles()
    assert said == [
        "--profile 5:8 is left out: the training goes on at step 6",
        "--profile-memory 2 is left out: 1 steps are left of the training",
    ]
    with pytest.raises(UserError, match="--profile-memory is 21: give 1 to 20 steps"):
        Profiles(memory=21).left(20, 0, said.append)


def test_steps_count_on_after_resuming(tmp_path):
    with profiling((13, 14), tmp_path, done=10) as done:
        train(5, done)
    events = json.loads(next(tmp_path.iterdir()).read_text())["traceEvents"]
    assert {e["name"] for e in events if e["name"].startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3"}


def answer(port: int, route: str, **query):
    """The plugin's answer, asked for until it is one: it reads the trace in another process."""
    url = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/{route}?{urllib.parse.urlencode(query)}"
    end = time.monotonic() + 90
    while True:
        try:
            body = urllib.request.urlopen(url, timeout=10).read()
            content = json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
            if content["runs"] if route == "runs" else content:
                return content
        except (urllib.error.URLError, TimeoutError, ConnectionError, json.JSONDecodeError):
            pass
        assert time.monotonic() < end, f"no answer to {url}"
        time.sleep(0.5)


@pytest.mark.slow
def test_tensorboard_shows_the_run_and_its_memory(tmp_path):
    options = ("--preset", "tiny", "--steps", "3", "--profile", "2:3", "--output-dir", tmp_path)
    done = python("ds_cmli/train.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profiler_start" not in done.stdout + done.stderr or torch.cuda.is_available()
    port = free_port()
    # As the command `tensorboard` does, but of this interpreter.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)]
    with open(tmp_path / "tensorboard.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as board:
        try:
            (entry,) = (r for r in answer(port, "runs")["runs"] if r == "profile")
            views = answer(port, "views", run=entry)
            assert "Memory" in views
            workers = answer(port, "workers", run=entry, view="Memory")
            (span,) = answer(port, "spans", run=entry, worker=workers[0])
            memory = answer(port, "memory", run=entry, worker=workers[0], span=span)
            rows = memory["rows"]["CPU"]
            assert {"aten::addmm", "aten::empty"} <= {row[0] for row in rows}
            curve = answer(port, "memory_curve", run=entry, worker=workers[0], span=span)
            assert curve["metadata"]["peaks"]["CPU"]
        finally:
            board.terminate()
            board.wait(30)
