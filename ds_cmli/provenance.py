"""What a run's records say of its code: versions of packages, and the commit of the sources."""

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def version(package: str = "ds-cmli") -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "not installed"


def versions() -> dict[str, str]:
    packages = ("ds-cmli", "torch", "deepspeed", "transformers", "timm")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def revision() -> str | None:
    """Return the git commit of the sources, with "-dirty" if they were changed, or None."""
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    git = ["git", "-C", str(Path(__file__).parent), "describe", *options]
    try:
        return subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
