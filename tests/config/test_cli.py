"""How commands end."""

import subprocess
import sys

from tests.ranks import ROOT


def test_a_thread_that_still_runs_changes_no_exit_code_and_loses_no_line():
    script = """
import atexit, sys, threading, time
from ds_cmli.common import leave
atexit.register(lambda: print("said goodbye"))
threading.Thread(target=time.sleep, args=(600,)).start()
sys.stdout.write("not flushed; ")
leave(85)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 85, done.stderr
    assert done.stdout == "not flushed; said goodbye\n"
    assert done.stderr == ""
