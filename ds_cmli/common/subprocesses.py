"""Starts a Python process for one piece of work and reads the last JSON object that it prints."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# Variables that launchers set for a rank. The processes started here are not ranks, so these are removed.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """This process's environment variables without those that a launcher set, and with `more`."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | more


def ask(
    arguments: list[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Run `python *arguments` for at most `timeout_s` seconds.

    Returns:
        The last JSON object that it printed, or None, and the reason why it failed, or "". A process that was ended by
        the time limit has an answer too, if it printed one before.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
            last = (errors.strip().splitlines() or ["no message"])[-1][:300]
            reason = f"exit code {process.returncode}: {last}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            reason = f"took more than {timeout_s:.0f} s"
    answers = [line for line in printed.splitlines() if line.startswith("{")]
    return (json.loads(answers[-1]) if answers else None), reason
