"""The figures of the house, held as ratchets: `python tests/house.py` prints them and fails where one got worse.

A figure that got better is written down here by whoever made it better, so that it stays.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ds_cmli"
COLUMNS, PARAMETERS = 100, 7
MANY_PARAMETERS_ALLOWED = ("cmli/triton/", "cmli/op.py")  # kernels, and the schema of the custom op
PATCHES = "common/patches.py"  # the one file that may replace functions by name: those of libraries
DEEPSPEED = ("optimizer", "inner")  # and the names of DeepSpeed's own objects, in memory/tracker.py
FIRST_WORDS = ("of", "those", "as", "for", "in", "whose", "or", "not", "and")  # no docstring begins with one of these

# figure: (unit, aim, the most that is allowed now)
LIMITS = {
    "lines of the package": (20_000, 52_859),
    "files of the package": (140, 312),
    "lines of memory/": (3_300, 4_046),
    "files of memory/": (20, 21),
    "rooms in a cycle of imports": (0, 0),
    "own functions patched by name": (0, 0),
    "signatures with Any": (60, 51),
    "lines over 100 columns": (0, 0),
    "comprehensions in 1,000 lines of code": (20, 18.4),
    "comprehensions inside another": (0, 0),
    "conditional expressions in 1,000 lines of code": (14, 12.9),
    "functions of more than 7 parameters": (0, 1),
    "formatting switched off": (0, 9),
    "docstrings without a verb or noun at the start": (0, 0),
}

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All parameters of a function but `self` and `cls`."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def names_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation)
    )


def signatures_with_any(tree: ast.AST) -> int:
    """How many annotations of parameters and results name `Any`."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            count += sum(names_any(argument.annotation) for argument in parameters(node))
            count += names_any(node.returns)
    return count


def is_patch(node: ast.AST, libraries: set[str]) -> bool:
    """Whether a call replaces an attribute, named by a string, of what does not come from a library."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "replaced":
        return False
    target = node.args[0]
    while isinstance(target, ast.Attribute):
        target = target.value
    return not (isinstance(target, ast.Name) and target.id in (*libraries, *DEEPSPEED))


def libraries(tree: ast.AST) -> set[str]:
    """The names in a file that were imported from other packages than ours."""
    names: set[str] = set()
    for node in ast.walk(tree):
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not ours:
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def rooms_imported(tree: ast.AST) -> set[str]:
    """The rooms that a file imports from, inside functions and for types too."""
    rooms: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            parts = (node.module or "").split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return rooms


def rooms_in_cycles(edges: dict[str, set[str]]) -> list[str]:
    """The rooms from which a way of imports leads back to themselves through another room."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for room in edges.get(waiting.pop(), set()) - seen:
                seen.add(room)
                waiting.append(room)
        return seen

    return sorted(room for room in edges if any(room in reached(other) for other in reached(room) - {room}))


def starts_badly(node: ast.AST) -> bool:
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
        return False
    words = (ast.get_docstring(node) or "").split()
    return bool(words) and words[0].lower() in FIRST_WORDS


def measure() -> tuple[dict[str, float], list[str]]:
    """Every figure of `LIMITS`, and the rooms in cycles."""
    figures: dict[str, float] = dict.fromkeys(LIMITS, 0)
    edges: dict[str, set[str]] = defaultdict(set)
    code = 0
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        text, place = file.read_text(encoding="utf-8"), file.relative_to(ROOT / PACKAGE)
        lines, tree = text.splitlines(), ast.parse(text)
        room = place.parts[0].removesuffix(".py")
        edges[room] |= rooms_imported(tree) - {room}
        of_libraries = libraries(tree)
        code += sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
        figures["lines of the package"] += len(lines)
        figures["files of the package"] += 1
        if room == "memory":
            figures["lines of memory/"] += len(lines)
            figures["files of memory/"] += 1
        figures["lines over 100 columns"] += sum(len(line) > COLUMNS for line in lines)
        figures["formatting switched off"] += text.count("# fmt: ")
        figures["signatures with Any"] += signatures_with_any(tree)
        excused = any(str(place).startswith(part) for part in MANY_PARAMETERS_ALLOWED)
        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS):
                figures["comprehensions in 1,000 lines of code"] += 1
                figures["comprehensions inside another"] += any(
                    isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node
                )
            figures["conditional expressions in 1,000 lines of code"] += isinstance(node, ast.IfExp)
            if isinstance(node, FUNCTIONS) and not excused:
                figures["functions of more than 7 parameters"] += len(parameters(node)) > PARAMETERS
            if str(place) != PATCHES:
                figures["own functions patched by name"] += is_patch(node, of_libraries)
            figures["docstrings without a verb or noun at the start"] += starts_badly(node)
    for file in (ROOT / PACKAGE).rglob("*"):
        if file.suffix in (".cpp", ".h"):
            figures["lines over 100 columns"] += sum(len(line) > COLUMNS for line in file.read_text().splitlines())
    for figure in LIMITS:
        if "1,000" in figure:
            figures[figure] = round(1000 * figures[figure] / code, 1)
    cycle = rooms_in_cycles(edges)
    figures["rooms in a cycle of imports"] = len(cycle)
    return figures, cycle


def worse(figures: dict[str, float]) -> list[str]:
    """A line for each figure beyond what is allowed now."""
    return [
        f"{figure}: {figures[figure]:,}, at most {allowed:,} here"
        for figure, (_, allowed) in LIMITS.items()
        if figures[figure] > allowed
    ]


def main() -> int:
    figures, cycle = measure()
    print(f"{'figure':50} {'now':>8} {'allowed':>8} {'aim':>8}")
    for figure, (aim, allowed) in LIMITS.items():
        print(f"{figure:50} {figures[figure]:8,} {allowed:8,} {aim:8,}")
    if cycle:
        print("in a cycle:", *cycle)
    complaints = worse(figures)
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
