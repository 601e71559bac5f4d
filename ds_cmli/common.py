"""What every room may use: mistakes as one line, how commands end, quiet libraries, files."""

import atexit
import difflib
import gc
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import click
from filelock import FileLock

JsonObject = dict[str, Any]
Section = Mapping[str, Any]  # a part of a JSON that is only read


class UserError(click.ClickException):
    """A mistake that the user can correct: the setting, the value found and what to do."""


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn a library's exception into a `UserError` of one line, unless DS_CMLI_TRACEBACK=1.

    A GPU without free memory is no mistake in what was given.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust, as tokenizers has, is no `Exception`
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch is not imported here
        if out_of_memory or os.environ.get("DS_CMLI_TRACEBACK") == "1":
            raise
        raise UserError(f"{what}: {type(error).__name__}: {one_line(error)[:500]}") from None


def one_line(error: BaseException) -> str:
    """An error's message, or its type's name where it has none, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        # PyTorch advises to run the code.
        text = "it holds more than tensors, and code in pickles is never run: give .safetensors"
    return text


def nearest(name: str, known: Iterable[object]) -> str:
    """Hint at what an unknown name may mean: `did you mean 'x'?`, or else all known names."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"


# --- commands

LONGEST = 1500  # characters of a mistake's line


def say(*lines: str | None) -> None:
    """Print on rank 0."""
    for line in lines:
        if line and prints():
            print(line, flush=True)


def prints() -> bool:
    """Whether this process prints for all ranks: rank 0, or one that is none of a run's."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    ranks = os.environ.get("WORLD_SIZE", "0" if "RANK" in os.environ else "")
    alone = not rank.isdecimal() or (ranks.isdecimal() and int(rank) >= int(ranks))
    return alone or int(rank) == 0


def check_writable(name: str) -> None:
    """Raise `UserError` if a file cannot be written, before the work whose result it will hold."""
    there = os.path.lexists(name)
    try:
        with open(name, "a"):
            pass
        if not there:
            os.remove(name)
    except OSError as error:
        raise UserError(f"cannot write {name!r}: {error.strerror}") from None


def run_command(command: click.Command) -> NoReturn:
    """Run a click command, which gets the option --version, and end the process."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # What cannot be written is an error at once, and not at the end, which hides it.
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    leave(exit_code(click.version_option(version(), prog_name="ds-cmli")(command)))


def exit_code(command: click.Command) -> int:
    """Run a command; a mistake is one line, which rank 0 prints, as all ranks meet the same one."""
    try:
        return command.main(standalone_mode=False) or 0
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        if error.filename is None:  # it is not the file that the user named
            raise
        message = f"{error.strerror}: {error.filename!r}"
    except click.Abort:
        message = "interrupted"
    line = " ".join(message.split())
    if len(line) > LONGEST:  # it repeats a long value
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    if prints():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """End the process with this exit code, even if threads of libraries are still running.

    During the interpreter's normal shutdown such a thread can abort the process, and a scheduler
    would count a run that has finished, or that has saved and is to go on, as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is closed
            stream.flush()
    os._exit(code)


# --- libraries: their lines, and what is imported


def silence() -> None:
    """Silence what libraries print at every start; to be called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning at each loading process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # socket traces around every lost rank
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler on missing GPUs
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # This is a filter and not a level, because DeepSpeed sets the level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries inside without trackers that they would import, which takes seconds.

    A sixth of a start would be spent on looking for garbage among a million imported objects.
    """
    before = {*sys.modules}
    hidden = {"mlflow", "wandb"} - before
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if sys.modules.keys() > before:
            gc.freeze()
            atexit.register(gc.unfreeze)  # triton would report what is left then as leaked
        if collects:
            gc.enable()


def version(package: str = "ds-cmli") -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "not installed"


def versions() -> dict[str, str]:
    packages = ("ds-cmli", "torch", "deepspeed", "transformers", "timm")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def revision() -> str | None:
    """The git commit of the sources, with "-dirty" if they were changed; None if there is none."""
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    git = ["git", "-C", str(Path(__file__).parent), "describe", *options]
    try:
        return subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file. Raises OSError, ValueError and RecursionError."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """$DS_CMLI_CACHE, or ds-cmli in $XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ds-cmli"
    return Path(os.environ.get("DS_CMLI_CACHE") or usual).expanduser().absolute()


@contextmanager
def locked(folder: Path, name: str, contents: str) -> Iterator[None]:
    """Hold a lock while `contents` is written to a folder of the cache; other processes wait."""
    with blame(f"{contents} cannot be written to {folder}: free some space, or set DS_CMLI_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / name):
            yield
