"""What a run was made with, as its `run.json` records it."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

PACKAGES = ("ds-cmli", "torch", "deepspeed", "transformers", "timm")


def revision() -> str | None:
    """The git commit of the sources, with "-dirty" if they were changed; None if there is none."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.check_output([*git, "--exclude=*"], stderr=-3, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str = "ds-cmli") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


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
