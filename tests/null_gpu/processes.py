"""Python programs with null GPUs."""

import subprocess

from tests import ranks


def run(env: dict[str, str], *command: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """`python COMMAND`, with an environment of the fixture `null_gpu`."""
    return ranks.python(*command, env=env, timeout=timeout)
