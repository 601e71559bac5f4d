"""Trainings from a hub, started by their commands: ranks, signals, and going on without the server."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, clean_environment
from tests.data.sources.samples import members, tar
from tests.data.sources.servers import OWNER_NAME, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path):
    """A server of two shards, their name, and the environment of a process that uses it."""
    with serving() as server:
        files = {}
        for n in range(2):
            files[f"{n:05}.tar"] = tar(tmp_path / "t.tar", members(range(20 * n, 20 * n + 20))).read_bytes()
        server.commit(files)
        name = f"hf://datasets/{OWNER_NAME}"
        folders = {"DS_CMLI_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
        yield server, name, {**clean_environment(), **folders, "HF_ENDPOINT": server.url}


def start(data, output, *launcher, steps=2, **more):
    command = [*(launcher or [sys.executable]), str(ROOT / "ds_cmli" / "train.py"), "--preset", "tiny", "--set"]
    command += ["data.tokenizer=builtin", "--steps", str(steps), "--data", data[1], "--output-dir", str(output)]
    return subprocess.Popen(command, env=data[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def full(server):
    """The shards whose first byte was sent, with each time it was."""
    return sorted(path for path, first in server.fetched() if first == 0 and path.endswith(".tar"))


def test_ranks_share_one_fetch_and_the_run_goes_on_without_the_server(data, tmp_path):
    server = data[0]
    process = start(data, tmp_path / "run", "torchrun", "--nproc_per_node", "2", steps=2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "step 2/2" in out and out.count("fetching 2 files of") == 1
    assert full(server) == ["00000.tar", "00001.tar"]
    server.shutdown()
    server.server_close()
    process = start(data, tmp_path / "run", "torchrun", "--nproc_per_node", "2", steps=2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "is finished, 2 steps" in out and out.count("cannot be reached") == 1
    evaluation = [sys.executable, "-m", "ds_cmli.evaluate", "--checkpoint", str(tmp_path / "run"), "--data", data[1]]
    done = subprocess.run(evaluation, env=data[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "held out of training to evaluate on" in done.stdout


def test_an_error_of_the_server_ends_all_ranks_by_one_line(data, tmp_path):
    server = data[0]
    server.faults["00001.tar"] = [403] * 99
    process = start(data, tmp_path / "run", "torchrun", "--nproc_per_node", "2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode and out.count("cannot be fetched (HTTP 403)") == 1, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_fetch_and_the_next_start_goes_on(data, tmp_path, number):
    server = data[0]
    server.faults["00001.tar"] = [("wait", 60)]
    process = start(data, tmp_path / "run")
    for line in process.stdout:
        if line.startswith("fetching 2 files of"):
            break
    deadline = time.monotonic() + 30
    while len(full(server)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert time.monotonic() - began < (5 if number == signal.SIGTERM else 60)
    assert process.returncode == (85 if number == signal.SIGTERM else -number)
    process = start(data, tmp_path / "run")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "fetching 1 files of" in out
    assert full(server) == ["00000.tar", "00001.tar", "00001.tar"]
