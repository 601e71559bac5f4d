import json
import subprocess
import sys

from tests.conftest import ROOT, clean_environment


def test_a_table_of_two_exchanges(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "profiling" / "scale.py"), "--preset", "tiny", "--target", "cpu"]
    options = ["--ranks", "1,2", "--stages", "2", "--accumulation", "1", "--json", str(file)]
    done = subprocess.run([*command, *options], env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one, gathered, ring = json.loads(file.read_text())
    assert one["moved"] == {} or one["sent"] == 0
    assert gathered["exchange"] == "gather" and "text send" not in gathered["moved"]
    # Text and mask to the other rank, forward and backward, and the gradient in fp32 back: 8 texts of 32 positions and
    # 16 features.
    text = 8 * 32 * (16 * 2 + 1)
    assert ring["moved"]["text send"] == {"calls": 3, "bytes": 2 * text + 8 * 32 * 16 * 4}
    assert ring["seconds"]["step"] > 0 and "a ring takes less memory" in done.stdout


def test_wrong_ranks_are_one_line():
    command = [sys.executable, str(ROOT / "profiling" / "scale.py"), "--ranks", "1,many"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--ranks is '1,many'" in done.stderr
