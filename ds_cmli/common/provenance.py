"""What a run was made with, as its `run.json` records it."""

import platform
import subprocess
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
