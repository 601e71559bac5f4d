import json
import subprocess
import sys

from tests.conftest import ROOT, clean_environment


def test_the_tables_are_printed_as_one_object():
    few = ["--preset", "tiny", "--batches", "2", "--train-steps", "1"]
    command = [sys.executable, "profiling/benchmark_data.py", *few]
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert len(found["decoders_ms"]) >= 3 and found["loader_1_per_s"] > 0
    assert 0 < found["waiting_0"] < 1 and 0 < found["waiting_1"] < 1
    assert "of it waiting for its batch" in done.stderr
