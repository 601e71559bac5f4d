"""Mistakes made by chance, and whether a quick test fails by each: `python tests/mutations.py --random 150 --seed 1`.

A mutant changes one place in the syntax tree of the package. Lines are drawn with equal chances, so that a room gets
its share by its lines. One run of the quick tests with coverage says which tests execute which line; a mutant meets the
tests of its line, the quickest first, in a copy of the repository. The result of that run is kept beside --coverage.
"""

import ast
import copy
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import mutations

ROOT = mutations.ROOT
MAX_TESTS = 80  # of a line that hundreds of tests execute: the quickest ones
MAX_WHOLE_FILES = 2  # whose other tests are run too
MIN_SECONDS = 90  # of a mutant's tests; more if they take long without the mistake
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip

# Mutants that no behaviour can show, by name, with the reason.
GPU = "acts on a GPU alone"
SYMMETRIC = "a maximum has no order"
EQUIVALENT = {
    "ds_cmli/checkpoint/lock.py: comparison: age < LEASE_SECONDS -> (age <= LEASE_SECONDS)": "no age is just the limit",
    'ds_cmli/checkpoint/state.py: argument: torch.load(file, map_location="cpu", weights_only=True)'
    " -> (torch.load(file, map_location='cpu'))": "PyTorch's default",
    "ds_cmli/cmli/cpu.py: argument: max(N, M) -> (max(M, N))": SYMMETRIC,
    "ds_cmli/config/source.py: argument: max(context_length, text.max_position_embeddings)"
    " -> (max(text.max_position_embeddings, context_length))": SYMMETRIC,
    "ds_cmli/data/shard_cache.py: constant: 16.0 -> 17.0": "the longest pause between two tries",
    "ds_cmli/distributed/mistakes.py: constant: 5.0 -> 6.0": "seconds in which other ranks' lines are waited for",
    "ds_cmli/distributed/process_group.py: condition: moved is not values -> not (moved is not values)": GPU,
    "ds_cmli/engine/ema.py: constant: 22 -> 23": "elements that are swapped at a time",
    "ds_cmli/evaluate/embed.py: deleted: one_attention_on_all_gpus() -> pass": GPU,
    "ds_cmli/memory/profile.py: constant: 100_000 -> 100001": "how many of its actions CUDA's allocator keeps",
    "ds_cmli/memory_model/gpus.py: argument: dataclass(frozen=True) -> (dataclass())": "nothing changes a Gpu",
    "ds_cmli/models/encoders.py: comparison: padded is not None -> (padded is None)": GPU,
}


class RandomMutant(NamedTuple):
    """The source segment `old` at a place of `file` becomes `new`."""

    file: str  # below the repository
    line: int
    end_line: int
    column: int  # in bytes, as ast counts
    end_column: int
    kind: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """A name that stays when lines above it change."""
        return f"{self.file}: {self.kind}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"

    def source(self) -> str:
        """Return the file with the mistake."""
        lines = (ROOT / self.file).read_bytes().splitlines(keepends=True)
        before = b"".join(lines[: self.line - 1]) + lines[self.line - 1][: self.column]
        after = lines[self.end_line - 1][self.end_column :] + b"".join(lines[self.end_line :])
        return (before + self.new.encode() + after).decode()


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
    """Yield the kind and the replacement of each mistake that can be made at this node."""
    if isinstance(node, ast.Compare):
        changed = copy.deepcopy(node)
        changed.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield "comparison", changed
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not isinstance(node.left, ast.JoinedStr):
        yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield "operator", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "condition", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Slice) and node.lower is not None:
        yield "slice", ast.Slice(None, node.upper, node.step)
    elif isinstance(node, ast.Slice) and node.upper is not None:
        yield "slice", ast.Slice(node.lower, None, node.step)
    elif isinstance(node, ast.IfExp):
        yield "condition", ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Call):
        for index in range(len(node.keywords)):
            if node.keywords[index].arg:
                rest = node.keywords[:index] + node.keywords[index + 1 :]
                yield "argument", ast.Call(node.func, node.args, rest)
        if len(node.args) > 1 and not any(isinstance(argument, ast.Starred) for argument in node.args):
            first, second, *rest_of_arguments = node.args
            yield "argument", ast.Call(node.func, [second, first, *rest_of_arguments], node.keywords)


def statement_changes(node: ast.stmt) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield the kind, the node to replace and its replacement of each mistake that can be made of a statement."""
    if isinstance(node, ast.If | ast.While):
        yield "condition", node.test, f"not ({ast.unparse(node.test)})"
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Delete | ast.Raise) and not is_docstring:
        yield "deleted", node, "pass"
    if isinstance(node, ast.Return) and node.value is not None:
        yield "deleted", node, "return None"


def mutants_of(path: Path) -> list[RandomMutant]:
    """Return each mistake that can be made in a file, outside of annotations and docstrings."""
    text = path.read_text("utf-8")
    found: list[RandomMutant] = []

    def add(kind: str, node: Any, new: str) -> None:
        old = ast.get_source_segment(text, node) or ""
        place = node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
        found.append(RandomMutant(str(path.relative_to(ROOT)), *place, kind, old, new))

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                visit(default)
            children: list[ast.AST] = [*node.decorator_list, *node.body]
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        elif isinstance(node, ast.JoinedStr):
            children = []  # words of a message
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.stmt):
            for kind, target, new in statement_changes(node):
                add(kind, target, new)
        elif hasattr(node, "end_col_offset"):
            for kind, replacement in changes(node):
                new = ast.unparse(ast.fix_missing_locations(ast.Expression(replacement)))  # type: ignore[arg-type]
                add(kind, node, new if isinstance(node, ast.Slice | ast.Constant) else f"({new})")
        for child in children:
            visit(child)

    visit(ast.parse(text))
    return found


def draw(count: int, seed: int, room: str) -> list[RandomMutant]:
    """Return `count` mutants, of lines that are drawn with equal chances, without two of one line."""
    by_line = defaultdict(list)
    for path in sorted((ROOT / "ds_cmli").rglob("*.py")):
        if str(path.relative_to(ROOT / "ds_cmli")).startswith(room):
            for mutant in mutants_of(path):
                by_line[mutant.file, mutant.line].append(mutant)
    chance = random.Random(seed)
    lines = chance.sample(sorted(by_line), min(count, len(by_line)))
    return [chance.choice(by_line[line]) for line in lines]


# ----- which tests execute which line

PROCESS_STARTS_COVERAGE = "import coverage\ncoverage.process_startup()\n"  # sitecustomize.py of the copy
SETTINGS = """[run]
source = {folder}/ds_cmli
data_file = {data}
parallel = true
concurrency = multiprocessing,thread
patch = _exit
sigterm = true
context = ${{PYTEST_CURRENT_TEST-}}
"""


class Contexts:
    """A plugin of pytest that names the test whose lines are being recorded, in this process and in those of ranks."""

    def __init__(self, settings: Path, file: str):
        from coverage import Coverage

        from tests import ranks

        self.coverage = Coverage(config_file=str(settings), context=file)
        self.durations: dict[str, float] = {}
        self.failed: list[str] = []
        os.environ["COVERAGE_PROCESS_START"] = str(settings)
        ranks._rank = rank_in_context

    def pytest_sessionstart(self):
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report):
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        self.coverage.stop()
        self.coverage.save()


def rank_in_context(env: dict[str, str], *arguments: Any) -> Any:
    """What `tests.ranks` runs in a rank's process, recorded for the test that has asked for it."""
    from coverage import Coverage

    from tests import ranks

    os.environ["PYTEST_CURRENT_TEST"] = env["PYTEST_CURRENT_TEST"]
    recording = Coverage(config_file=env["COVERAGE_PROCESS_START"])
    recording.start()
    try:
        return ranks._rank(env, *arguments)
    finally:
        recording.stop()
        recording.save()


def record(folder: Path, data: Path, file: str) -> None:
    """Run the quick tests of a file in this process, in the copy `folder`; write what they execute beside `data`."""
    enter(folder, data.with_suffix(".log"))
    settings = folder / "coverage.ini"
    (folder / "sitecustomize.py").write_text(PROCESS_STARTS_COVERAGE)
    settings.write_text(SETTINGS.format(folder=folder, data=data))
    plugin = Contexts(settings, file)
    pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", file], plugins=[plugin])
    summary = {"durations": plugin.durations, "failed": plugin.failed}
    Path(f"{data}.{file.replace('/', '.')}.json").write_text(json.dumps(summary))
    os._exit(0)


class Executed(NamedTuple):
    tests: dict[str, dict[int, list[str]]]  # file of the package -> line -> tests
    durations: dict[str, float]


def executed(kept: Path, jobs: int) -> Executed:
    """Return which tests execute which lines, from the file `kept` if it is there; else it is made."""
    if not kept.exists():
        from coverage import CoverageData

        with tempfile.TemporaryDirectory() as name:
            folder, data = Path(name, "copy"), Path(name, "data")
            mutations.copy_of_repository(folder)
            files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
            in_processes([(record, (folder, data, file)) for file in files], jobs, seconds=1800)
            tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
            durations: dict[str, float] = {}
            for path in Path(name).glob("data.*"):
                if path.suffix == ".json":
                    summary = json.loads(path.read_text())
                    durations |= summary["durations"]
                    for test in summary["failed"]:
                        print(f"without a mistake, with coverage, {test} fails")
                elif path.suffix != ".log":
                    recorded = CoverageData(str(path))
                    recorded.read()
                    for file in recorded.measured_files():
                        for line, contexts in recorded.contexts_by_lineno(file).items():
                            # "FILE|TEST", a rank's "TEST (call)", or "FILE" for what is executed at an import
                            names = {re.sub(r"^.*\||( \(\w+\))$", "", context) for context in contexts}
                            tests[str(Path(file).relative_to(folder))][line] |= names - {""}
        as_lists = {file: {line: sorted(names) for line, names in lines.items()} for file, lines in tests.items()}
        kept.write_text(json.dumps({"tests": as_lists, "durations": durations}))
    stored = json.loads(kept.read_text())
    by_line = {file: {int(line): names for line, names in lines.items()} for file, lines in stored["tests"].items()}
    return Executed(by_line, stored["durations"])


def tests_of(mutant: RandomMutant, recorded: Executed) -> list[str]:
    """Return the tests that execute the mutant's first line, those of its module, of its room and the quickest first.

    The others of their files follow. A value that several tests look at may be computed once, in the first of them.
    """
    executing = set(recorded.tests.get(mutant.file, {}).get(mutant.line, []))
    names = [name for name in recorded.durations if name in executing]
    if not names:  # a line that is executed at an import
        names = [name for name in recorded.durations if name.partition("::")[0] in executing]
    room = "tests/" + mutant.file.removeprefix("ds_cmli/").partition("/")[0].removesuffix(".py")
    of_module = f"{room}/test_{Path(mutant.file).stem}.py"
    names.sort(key=lambda n: (not n.startswith(of_module), not n.startswith(room), recorded.durations[n]))
    names = names[:MAX_TESTS]
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))[:MAX_WHOLE_FILES]
    others = [name for name in recorded.durations if name.partition("::")[0] in files and name not in names]
    return names + others


# ----- processes


def enter(folder: Path, log: Path) -> None:
    """Make `folder` the repository that this process and its children import, and `log` their output."""
    os.setsid()
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "ds_cmli") and name != __name__]:
        del sys.modules[name]


def in_processes(calls: list[tuple[Any, tuple]], jobs: int, seconds: float) -> None:
    """Call each function in a fork of this process, `jobs` at a time; what takes longer than `seconds` is ended."""
    waiting = list(calls)
    running: list[tuple[Any, float]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            function, arguments = waiting.pop(0)
            process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
            process.start()
            running.append((process, time.monotonic() + seconds))
        for process, end in list(running):
            if process.exitcode is not None or time.monotonic() > end:
                end_group(process)
                running.remove((process, end))
        time.sleep(0.1)


def end_group(process: Any) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def run_tests(folder: Path, tests: list[str]) -> None:
    enter(folder, folder / "printed")
    os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]))


def outcome(mutant: RandomMutant, recorded: Executed) -> str:
    """Return "killed", "killed by time", "SURVIVED" or "no test"; "equivalent" without a run."""
    if mutant.name in EQUIVALENT:
        return "equivalent"
    tests = tests_of(mutant, recorded)
    if not tests:
        return "no test"
    seconds = MIN_SECONDS + 4 * sum(recorded.durations[name] for name in tests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "copy")
        mutations.copy_of_repository(folder)
        (folder / mutant.file).write_text(mutant.source())
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
        process.start()
        process.join(seconds)
        late = process.exitcode is None
        end_group(process)
    if late:
        return "killed by time"
    return "SURVIVED" if process.exitcode == 0 else "killed"


def run_and_print(mutant: RandomMutant, recorded: Executed, results: Any) -> None:
    start = time.monotonic()
    result = outcome(mutant, recorded)
    results.put(result)
    print(f"{result:14} {mutant.file}:{mutant.line} {mutant.name.partition(': ')[2]}  {time.monotonic() - start:.0f} s")
    sys.stdout.flush()


def main(count: int, seed: int, room: str, kept: Path, jobs: int) -> int:
    """Print the outcome of each mutant and their numbers. Return 1 if fewer than 90% of those not equivalent die."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    for library in mutations.LIBRARIES:
        importlib.import_module(library)
    recorded = executed(kept, jobs)
    results: Any = multiprocessing.get_context("fork").Queue()
    mutants = draw(count, seed, room)
    in_processes([(run_and_print, (mutant, recorded, results)) for mutant in mutants], jobs, seconds=3600)
    numbers = Counter(results.get() for _ in mutants)
    killed = numbers["killed"] + numbers["killed by time"]
    asked = len(mutants) - numbers["equivalent"]
    print(f"{len(mutants)} mutants of seed {seed}: {dict(numbers)}; {killed / max(asked, 1):.0%} of {asked} killed")
    return int(killed < 0.9 * asked)
