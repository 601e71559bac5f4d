"""Messages, settings, files, options and numbers of the pages, compared with the code.

A number that a page takes from the code has a comment behind it on its line: `1,000 <!-- ds_cmli.data.build.MAX -->`,
or any expression of names that are imported by their path.
"""

import ast
import dataclasses
import errno
import importlib.util
import os
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ds_cmli
from ds_cmli import export, train, visualize
from ds_cmli.config.comparison import FREE_DATA
from ds_cmli.config.presets import PRESETS, load_preset
from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import SECTIONS
from ds_cmli.data import assets
from ds_cmli.evaluate import __main__ as evaluate
from ds_cmli.memory import command as memory
from tests.ranks import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, ROOT / "slurm" / "README.md"]
CODE = [*(ROOT / "ds_cmli").rglob("*.py"), *(ROOT / "profiling").rglob("*.py"), ROOT / "slurm" / "train.sh"]
FOLDERS = "ds_cmli|ds_configs|profiling|slurm|tests|docs"  # of paths of the repository
# Messages of libraries and of the system, which pages explain, and where they come from.
LIBRARY_MESSAGES = {
    "..., which cannot be loaded: OSError: We couldn't connect to ...": "the reason is transformers'",
    "Bus error": "the system's, for SIGBUS",
    "unable to write to file </torch_...>": "PyTorch's shared memory",
    "rank 0 of 4 cannot start: DistStoreError: ...": "the exception's name is PyTorch's",
    "... cannot start: DistNetworkError: ... EADDRINUSE": "the exception's name is PyTorch's",
    "rank 2 of 4 cannot start: ... invalid device ordinal": "CUDA's reason",
    "DataLoader worker (pid ...) is killed by signal: Killed": "PyTorch's",
    "Too many open files": os.strerror(errno.EMFILE),
}


@cache
def texts_of_the_code() -> str:
    """Return all strings of the code, a NUL where an f-string has a value."""
    texts = []
    for path in CODE:
        if path.suffix == ".sh":
            texts.append(path.read_text("utf-8"))
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n\n".join(texts)


def fixed_parts(message: str) -> list[str]:
    """Return what a message has in each of its occurrences: the parts between "...", numbers, CAPITALS and 'values'.

    A part ends at a colon or semicolon too, where messages are put together.
    """
    message = message.removeprefix("error: ")
    parts = re.split(r"\.\.\.|\b[\d.,]*\d\b|\b[A-Z][A-Z_]{2,}\b|'[^' ]*'|[:;]", message)
    parts = [part.strip(" ,;:()'\"/") for part in parts]
    return [part for part in parts if len(re.findall(r"[a-z]{2,}", part)) > 1]


def tables(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield the header and the rows of each table of a page."""
    for block in re.findall(r"(?m)(?:^\|.*\|\n)+", page.read_text("utf-8") + "\n"):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.strip().splitlines()]
        header, _, *body = rows
        yield [cell.strip("| ") for cell in header], [[cell.strip("| ") for cell in row] for row in body]


def printed() -> list[tuple[str, str]]:
    """Return the pages' messages: what stands under "printed" in a table, and what begins with "error: "."""
    stated = []
    for page in PAGES:
        for header, rows in tables(page):
            if header[0] in ("printed", "printed or seen"):
                for row in rows:
                    messages = re.findall(r"`([^`]+)`", row[0])
                    if not messages and header[0] == "printed":
                        messages = [row[0]]
                    stated += [(page.name, message) for message in messages]
        stated += [(page.name, message) for message in re.findall(r"`(error: [^`]{4,})`", page.read_text("utf-8"))]
    return list(dict.fromkeys(stated))


@pytest.mark.parametrize(("page", "message"), printed())
def test_a_message_of_a_page_is_printed_by_the_code(page, message):
    if message in LIBRARY_MESSAGES:
        return
    parts = fixed_parts(message)
    assert parts, f"{page}: {message!r} has no part that could be looked up"
    missing = [part for part in parts if part not in texts_of_the_code()]
    assert not missing, f"{page} says {message!r} is printed, and no string of the code has {missing}"


def test_settings_that_pages_name_exist():
    names = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8")):
            for name in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_0-9]+\b(?![/(*])", code):
                is_file = re.search(r"\.(py|md|json|sh|cpp|jsonl|lock|safetensors)$", name)
                is_module = (ROOT / "ds_cmli" / name.replace(".", "/")).exists()
                assert name in names or is_file or is_module, f"{page.name} names the setting {name}"


# Options of pip, torchrun, sbatch, open_clip and tests/mutations.py.
OPTIONS_OF_OTHERS = (
    "--dependency", "--mem", "--mem-per-gpu", "--no-compile", "--random", "--resize_mode",
    "--shutdown-timeout", "--signals-to-handle",
)  # fmt: skip


def test_options_that_pages_name_exist():
    ours = {"--help", "--version"}
    for module in (train, evaluate, export, visualize, memory):
        for parameter in module.command.params:
            ours |= {*parameter.opts, *parameter.secondary_opts}
    scripts = "".join(path.read_text("utf-8") for path in CODE if path.parts[-2] in ("profiling", "speed", "slurm"))
    for page in PAGES:
        for code in re.findall(r"`(--[a-z][\w-]+)", page.read_text("utf-8")):
            exists = code in ours or code in scripts or code in OPTIONS_OF_OTHERS
            assert exists, f"{page.name} names the option {code}"


def test_files_and_modules_that_pages_name_exist():
    for page in PAGES:
        text = page.read_text("utf-8")
        for name in re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)`", text):
            at_a_revision = re.search(r"\b[0-9a-f]{8}\b[^|]{,40}" + re.escape(name), text.replace("\n", " "))
            assert (ROOT / name).exists() or at_a_revision, f"{page.name} names the file {name}"
        for name in re.findall(r"\b(?:from|import|-m) (ds_cmli[\w.]*)", text):
            assert importlib.util.find_spec(name), f"{page.name} names the module {name}"


def test_names_of_the_api_page_exist():
    entries = (ROOT / "docs" / "api.md").read_text("utf-8").split("\n::: ")[1:]
    for entry in entries:
        name = entry.split()[0]
        documented = evaluated(name)
        for members in re.findall(r"members: \[(.*)\]", entry):
            for member in members.split(", "):
                assert hasattr(documented, member), f"{name} has no {member}"


def rows_below(title: str, page: str) -> list[list[str]]:
    """Return the rows of a page's table whose first column has that title, each cell without its backticks."""
    (rows,) = [rows for header, rows in tables(ROOT / "docs" / page) if header[0] == title]
    return [[cell.strip("`") for cell in row] for row in rows]


def test_losses_and_presets_of_the_pages_are_the_codes():
    assert {name for name, *_ in rows_below("loss", "train.md")} == set(LOSSES)
    presets = rows_below("preset", "train.md")
    assert {name for name, *_ in presets} == set(PRESETS)
    for name, image, *_, batch in presets:
        assert batch == str(PRESETS[name]["optim"]["micro_batch"]), name
        if name == "finetune":
            continue  # its models are those of --start-from
        config = load_preset(name, {})
        sizes = re.findall(r"(\d+) px", image)
        assert sizes in ([], [str(config.data.image_size)]), name
        for layers in re.findall(r"first (\d+) blocks", image):
            assert layers == str(config.student.layers or 6), name
    numbers = rows_below("number", "finetune.md")
    stated = {match[1]: value for name, value, _ in numbers if (match := re.match(r"optim\.(\w+)", name))}
    optim = PRESETS["finetune"]["optim"]
    assert stated == {name: str(value) for name, value in optim.items() if value is not None}


def test_modules_of_the_package_are_in_the_table_of_contributors():
    table = re.search(r"(?ms)^\| folder.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert table
    for path in (ROOT / "ds_cmli").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if not name.startswith("__") and path.suffix in ("", ".py"):
            assert re.search(rf"[`/]{re.escape(name)}`", table[0]), f"CONTRIBUTING.md does not say what {name} holds"


def test_settings_that_may_change_are_those_of_the_code():
    text = " ".join((ROOT / "docs" / "checkpoints.md").read_text("utf-8").split())
    sentence = re.search(r"all settings of `data` except ([^.]*(?:\.\w[^.]*)*)\. ", text)
    assert sentence and set(re.findall(r"`data\.(\w+)`", sentence[1])) == FREE_DATA


def test_packages_of_the_demos_assets():
    source = Path(assets.__file__).read_text("utf-8")
    for asset, package, _ in rows_below("asset", "install.md"):
        assert f'"{package}' in source, f"no demo asset comes from {package} ({asset})"


def evaluated(expression: str) -> object:
    """Return the value of an expression in which names are paths such as `ds_cmli.data.build.MAX`."""
    for path in re.findall(r"ds_cmli(?:\.\w+)+", expression):
        pkgutil.resolve_name(path)  # imports the path's modules
    return eval(expression, {"ds_cmli": ds_cmli})


def test_numbers_of_the_pages_are_the_codes():
    num_compared = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(r"<!-- (ds_cmli\.[^>\n]+?) -->", text):
            _, _, before = text[: match.start()].rpartition("\n")
            value = evaluated(match[1])
            spellings = {str(value)}
            if isinstance(value, int | float):
                spellings |= {f"{value:,}", f"{value:,g}", f"{value:.0%}", f"{value:.1%}", f"{value:g}"}
            last = re.findall(r"[\d.,]*\d%?", before)
            assert last and last[-1] in spellings, f"{page.name}: {before[-40:]!r} and {match[1]} is {value!r}"
            num_compared += 1
    assert num_compared, "no number of a page names its place in the code"
