"""What a run was made with, as its `run.json` records it."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGES = ("ds-cmli", "torch", "deepspeed", "transformers", "timm")


def revision() -> str | None:
    """The source tree's git commit, with "+" if sources were changed; None if there is none.

    Untracked files inside the package count as changes.
    """
    package = Path(__file__).parent.parent
    git = ["git", "-C", str(package)]
    try:
        head = _output(*git, "rev-parse", "HEAD")
        changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
        new = _output(*git, "ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changed or new else head


def _output(*command: str) -> str:
    return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()


def version() -> str:
    """The version of this package, as it was installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("ds-cmli")
    return "from its sources"


def versions() -> dict[str, str]:
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def of(config: Mapping[str, object], ds_config: Mapping[str, object]) -> bytes:
    """The content of a run's `run.json`."""
    content = {
        "config": config,
        "deepspeed": dict(ds_config),
        "versions": versions(),
        "revision": revision(),
        "command": sys.argv,
    }
    return (json.dumps(content, indent=2) + "\n").encode()
