"""Mistakes made by chance, and whether a quick test fails by each: `python tests/mutations.py --random 150 --seed 1`.

A mutant changes one place in the syntax tree of the package. Lines are drawn with equal chances, so that a room gets
its share by its lines. One run of the quick tests with coverage says which files of tests execute which line. A mutant
meets the files of its line in a copy of the repository. The result of the run with coverage is kept in --coverage.
"""

import ast
import copy
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from coverage import CoverageData
from coverage.exceptions import DataError

from tests import mutations

ROOT = mutations.ROOT
MAX_FILES = 8  # of a line that dozens of files execute
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
    "ds_cmli/cmli/cpu.py: argument: max(N, M) -> (max(M, N))": SYMMETRIC,
    "ds_cmli/cmli/op.py: argument: Sides(image, text, token_mask) -> (Sides(text, image, token_mask))": GPU,
    "ds_cmli/cmli/triton_forward.py: argument: tl.range(begin, end, num_stages=STAGES) -> (tl.range(begin, end))": GPU,
    'ds_cmli/cmli/op.py: constant: message = next((line for line in lines if "error" in line), " ".join(lines[:1]))'
    " -> 2": GPU,
    "ds_cmli/config/source.py: argument: max(context_length, text.max_position_embeddings)"
    " -> (max(text.max_position_embeddings, context_length))": SYMMETRIC,
    "ds_cmli/data/held_out.py: constant: numbers = x ^ (x >> np.uint64(31)) -> 32": "the lowest bits decide nothing",
    "ds_cmli/data/order.py: constant: num_ahead = 0 -> 1": "the full order announces epochs",
    "ds_cmli/data/order.py: constant: for source, turn in set(zip(sources.tolist(), turns.tolist(), strict=True)):"
    " -> False": "both are of one batch",
    "ds_cmli/data/scenes.py: constant: NO_PICTURE = -1 -> 2": "any negative number is none",
    "ds_cmli/data/shard_cache.py: argument: file.unlink(missing_ok=True) -> (file.unlink())": "a race of two processes",
    "ds_cmli/data/shard_cache.py: constant: FORGET_SECONDS = 60.0 -> 61.0": "a pause",
    "ds_cmli/data/shard_cache.py: constant: IN_USE_SECONDS = 60.0 -> 61.0": "a pause",
    "ds_cmli/data/sources/lists.py: constant: ITEMS_OF_BLOCK = 64 -> 65": "items that are packed together",
    "ds_cmli/distributed/mistakes.py: constant: MEETING_SECONDS = 5.0 -> 6.0": "a pause",
    "ds_cmli/distributed/process_group.py: comparison: moved is not values -> (moved is values)": GPU,
    "ds_cmli/distributed/process_group.py: condition: moved is not values -> not (moved is not values)": GPU,
    "ds_cmli/distributed/process_group.py: deleted: torch.cuda.set_device(device) -> pass": GPU,
    "ds_cmli/engine/ema.py: constant: CHUNK = 2**22 -> 23": "elements that are swapped at a time",
    "ds_cmli/engine/train_engine.py: constant: return 1.0 -> 2.0": "a loss scale is divided out again",
    "ds_cmli/evaluate/embed.py: deleted: one_attention_on_all_gpus() -> pass": GPU,
    "ds_cmli/evaluate/match_map.py: constant: GAP = 14 -> 15": "how wide a gap looks best",
    "ds_cmli/fake_cuda/kernels.py: deleted: warnings.filterwarnings("
    '"ignore", "Warning only once for all operators") -> pass': "a warning of CUDA builds",
    "ds_cmli/fake_cuda/recorder.py: constant: self.segment += 1 -> 2": "segments are told apart, not counted",
    "ds_cmli/faults/watchdog.py: constant: self.exit_code = 0 -> 1": "it is read beside an error alone",
    "ds_cmli/logs/meter.py: constant: x = torch.ones(4096, 4096, device=device, dtype=dtype) -> 4097": GPU,
    "ds_cmli/logs/meter.py: deleted: torch.cuda.empty_cache() -> pass": GPU,
    "ds_cmli/memory/out_of_memory.py: deleted: torch._C._cuda_attach_out_of_memory_observer(save) -> pass": GPU,
    "ds_cmli/memory/profile.py: constant: def record_history(max_actions: int = 100_000) -> None:"
    " -> 100001": "how many of its actions CUDA's allocator keeps",
    "ds_cmli/memory/report.py: constant: peaks[event.phase] = max(peaks.get(event.phase, 0), at_start, total)"
    " -> 1": "a step needs more bytes",
    'ds_cmli/memory/report.py: constant: requested = max(report.totals["requested"], 1)'
    " -> 2": "a step needs more bytes",
    "ds_cmli/memory_model/gpus.py: argument: dataclass(frozen=True) -> (dataclass())": "nothing changes a Gpu",
    "ds_cmli/memory_model/workspaces.py: constant: SCAN = 1279 -> 1280": "memory is given in blocks of 512 bytes",
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
    text: str  # of the line

    @property
    def name(self) -> str:
        """A name that stays when lines above it change; a constant's has the code of its line."""
        old = self.text.partition("  #")[0].strip() if self.kind == "constant" else " ".join(self.old.split())
        return f"{self.file}: {self.kind}: {old} -> {' '.join(self.new.split())}"

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
                other_keywords = node.keywords[:index] + node.keywords[index + 1 :]
                yield "argument", ast.Call(node.func, node.args, other_keywords)
        if len(node.args) > 1 and not any(isinstance(argument, ast.Starred) for argument in node.args):
            first, second, *others = node.args
            yield "argument", ast.Call(node.func, [second, first, *others], node.keywords)


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
    lines = text.splitlines()
    mutants: list[RandomMutant] = []

    def add(kind: str, node: Any, new: str) -> None:
        old = ast.get_source_segment(text, node) or ""
        place = node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
        line = lines[node.lineno - 1]
        mutants.append(RandomMutant(str(path.relative_to(ROOT)), *place, kind, old, new, line))

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
    return mutants


def draw(count: int, seed: int, room: str) -> list[RandomMutant]:
    """Return `count` mutants, of lines that are drawn with equal chances, without two of one line."""
    mutants_by_line = defaultdict(list)
    for path in sorted((ROOT / "ds_cmli").rglob("*.py")):
        if str(path.relative_to(ROOT / "ds_cmli")).startswith(room):
            for mutant in mutants_of(path):
                mutants_by_line[mutant.file, mutant.line].append(mutant)
    chance = random.Random(seed)
    lines = chance.sample(sorted(mutants_by_line), min(count, len(mutants_by_line)))
    return [chance.choice(mutants_by_line[line]) for line in lines]


SETTINGS = """[run]
source = {folder}/ds_cmli
data_file = {folder}/.coverage
parallel = true
concurrency = multiprocessing,thread
patch = subprocess,_exit
sigterm = true
context = {file}
"""  # in a file, because multiprocessing's processes read it anew


class Executed(NamedTuple):
    tests: dict[str, dict[str, list[str]]]  # file of the package -> line -> files of tests
    seconds: dict[str, float]  # of the quick tests of a file


def record(folder: Path, file: str) -> float:
    """Run the quick tests of a file in the copy `folder` with coverage, and return how many seconds they take."""
    start = time.monotonic()
    settings = folder / f"{file.replace('/', '.')}.ini"
    settings.write_text(SETTINGS.format(folder=folder, file=file))
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    command = [sys.executable, "-m", "coverage", "run", "--rcfile", str(settings), *pytest]
    env = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    if done.returncode not in (0, 5):  # 5: each test of the file is slow
        print(f"without a mistake, with coverage, {file} fails: {done.stdout[-1000:]}")
    return time.monotonic() - start


def executed(kept: Path, jobs: int) -> Executed:
    """Return which files of tests execute which lines, from the file `kept` if it is there; else it is made."""
    if not kept.exists():
        tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as threads:
            folder = Path(name)
            mutations.copy_of_repository(folder)
            files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
            seconds = dict(zip(files, threads.map(partial(record, folder), files), strict=True))
            for path in folder.glob(".coverage.*"):
                recorded = CoverageData(str(path))
                try:
                    recorded.read()
                except DataError:  # of a process that a test has killed while it wrote
                    continue
                for file in recorded.measured_files():
                    for line, contexts in recorded.contexts_by_lineno(file).items():
                        tests[str(Path(file).relative_to(folder))][line] |= set(contexts) - {""}
        as_lists = {file: {line: sorted(names) for line, names in lines.items()} for file, lines in tests.items()}
        kept.write_text(json.dumps([as_lists, seconds]))
    return Executed(*json.loads(kept.read_text()))


def tests_of(mutant: RandomMutant, recorded: Executed) -> list[str]:
    """Return the files of tests that execute the mutant's first line: its module's, its room's, the quickest first."""
    room = "tests/" + mutant.file.removeprefix("ds_cmli/").partition("/")[0].removesuffix(".py")
    module = f"{room}/test_{Path(mutant.file).stem}.py"
    files = recorded.tests.get(mutant.file, {}).get(str(mutant.line), [])
    files = sorted(files, key=lambda file: (file != module, not file.startswith(room), recorded.seconds[file]))
    return files[:MAX_FILES]


def outcome(recorded: Executed, mutant: RandomMutant) -> str:
    """Return "killed", "killed by time", "SURVIVED" or "no test"; "equivalent" without a run."""
    tests = tests_of(mutant, recorded)
    if mutant.name in EQUIVALENT or not tests:
        return "equivalent" if mutant.name in EQUIVALENT else "no test"
    seconds = MIN_SECONDS + 4 * sum(recorded.seconds[file] for file in tests)
    exit_code, _ = mutations.run_tests(mutant.file, mutant.source(), tests, seconds)
    if exit_code == -signal.SIGKILL:
        return "killed by time"
    return "SURVIVED" if exit_code == 0 else "killed"


def main(count: int, seed: int, room: str, kept: Path, jobs: int) -> int:
    """Print the outcome of each mutant and their numbers. Return 1 if fewer than 90% of those not equivalent die."""
    mutations.import_libraries()
    recorded = executed(kept, jobs)
    mutants = draw(count, seed, room)
    outcomes: Counter[str] = Counter()
    with ThreadPoolExecutor(jobs) as threads:
        for mutant, result in zip(mutants, threads.map(partial(outcome, recorded), mutants), strict=True):
            outcomes[result] += 1
            print(f"{result:14} {mutant.file}:{mutant.line} {mutant.name.partition(': ')[2]}", flush=True)
    killed = outcomes["killed"] + outcomes["killed by time"]
    num_asked = len(mutants) - outcomes["equivalent"]
    share = f"{killed / max(num_asked, 1):.0%} of {num_asked} killed"
    print(f"{len(mutants)} mutants of seed {seed}: {dict(outcomes)}; {share}")
    return int(killed < 0.9 * num_asked)
