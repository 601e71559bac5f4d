"""The code that a run's records name: versions of packages, and the commit of the sources."""

import platform
import subprocess
from contextlib import suppress
from functools import partial
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
    """Return the git commit of the sources, with "-dirty" if they were changed, or None.

    None also for an installed package, whose environment may lie in a repository of the user's.
    """
    package = Path(__file__).parent
    output_of = partial(subprocess.check_output, cwd=package, stderr=subprocess.DEVNULL, text=True)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        top = output_of(["git", "rev-parse", "--show-toplevel"]).strip()
        is_installed = Path(top).resolve() != package.parent.resolve()
        return None if is_installed else output_of(describe).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
