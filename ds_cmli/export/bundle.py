"""Copies the code that a model needs into files beside its weights, for use without this package.

transformers loads a model's code as files in one folder that import each other as `from .file
import name`. Therefore each module becomes one file with rewritten imports, which holds only the
definitions that are used, directly or indirectly.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = "ds_cmli"
HEADER = "# Copied from ds-cmli (Apache-2.0) by its export; only what this model uses.\n"


class Use(NamedTuple):
    """A definition that the code uses."""

    module: str
    name: str | None  # None: the module itself, all of whose definitions are kept


def bundle(entries: Mapping[str, str], replaced: Mapping[str, str]) -> dict[str, str]:
    """The files to write: file name -> content.

    Args:
        entries: module -> name of its file without ".py". All their definitions are kept.
        replaced: module -> source code instead of its own, for modules that cannot be copied.
    """
    modules: dict[str, Module] = {}
    todo = [Use(entry, None) for entry in entries]
    seen: set[Use] = set()
    while todo:
        use = todo.pop()
        if use in seen:
            continue
        seen.add(use)
        if use.module not in modules:
            modules[use.module] = Module(use.module, replaced.get(use.module))
        todo += modules[use.module].keep(use.name)
    names = dict(entries)
    for module in modules:
        names.setdefault(module, module.removeprefix(f"{PACKAGE}.").replace(".", "_"))
    return {f"{names[module]}.py": found.text(names) for module, found in modules.items()}


class Module:
    """A module's source, the names of its top level, and which of them are kept."""

    def __init__(self, name: str, text: str | None):
        self.source = _path(name).read_text(encoding="utf-8") if text is None else text
        self.tree = ast.parse(self.source)
        self.defined: dict[str, list[int]] = {}  # name -> the statements that define it, by index
        self.imported: dict[str, tuple[ast.Import | ast.ImportFrom, ast.alias]] = {}
        self.kept: set[int] = set()  # indices of statements
        self.used_imports: set[str] = set()
        for i, statement in enumerate(self.tree.body):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    self.imported[_known_as(alias)] = (statement, alias)
            else:
                for defined in _defined(statement):
                    self.defined.setdefault(defined, []).append(i)

    def keep(self, name: str | None) -> list[Use]:
        """Keep the definition of `name`, or all, and what it uses; returns the uses elsewhere."""
        others: list[Use] = []
        for i, statement in enumerate(self.tree.body):
            if _acts(statement):  # kept whenever the module is used
                self._take(i, others)
        for wanted in self.defined if name is None else [name]:
            for i in self.defined.get(wanted, ()):
                self._take(i, others)
        if name in self.imported:
            self._take_import(name, others)
        return others

    def _take(self, i: int, others: list[Use]) -> None:
        """Keep statement `i` and all that it uses in this module; add what it uses elsewhere."""
        if i in self.kept:
            return
        self.kept.add(i)
        statement = self.tree.body[i]
        for node in _own_imports(statement):
            others += [_source(node, alias) for alias in node.names]
        for name in _used(statement):
            if name in self.defined:
                for other in self.defined[name]:
                    self._take(other, others)
            elif name in self.imported:
                self._take_import(name, others)

    def _take_import(self, name: str, others: list[Use]) -> None:
        self.used_imports.add(name)
        statement, alias = self.imported[name]
        if isinstance(statement, ast.ImportFrom) and _own(statement):
            others.append(_source(statement, alias))

    def text(self, names: Mapping[str, str]) -> str:
        """The file's content.

        Args:
            names: module -> name of its file without ".py", for all modules.
        """
        lines = self.source.splitlines(keepends=True)
        out = [HEADER]
        if self.tree.body and _is_text(self.tree.body[0]):
            out += lines[: self.tree.body[0].end_lineno]
        out.append("\nfrom __future__ import annotations\n\n")
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                aliases = [a for a in statement.names if _known_as(a) in self.used_imports]
                if aliases:
                    out.append(_rewritten(statement, aliases, names))
        first = 0  # the comments above a statement are copied too
        for i, statement in enumerate(self.tree.body):
            assert statement.end_lineno is not None
            if i in self.kept:
                segment = lines[first : statement.end_lineno]
                for node in sorted(_own_imports(statement), key=lambda node: -node.lineno):
                    new = _rewritten(node, node.names, names).splitlines(keepends=True)
                    indented = [" " * node.col_offset + line for line in new]
                    segment[node.lineno - 1 - first : (node.end_lineno or 0) - first] = indented
                out += segment
            first = statement.end_lineno
        return "".join(out)


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and not a package
        return False


def _own(node: ast.ImportFrom) -> bool:
    return node.module is not None and node.module.split(".")[0] == PACKAGE


def _own_imports(statement: ast.stmt) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(statement) if isinstance(node, ast.ImportFrom) and _own(node)]


def _source(node: ast.ImportFrom, alias: ast.alias) -> Use:
    """What an import refers to."""
    inside = f"{node.module}.{alias.name}"
    # Which attributes of a module that is imported itself are used is not analysed.
    if _is_module(inside):
        return Use(inside, None)
    return Use(str(node.module), alias.name)


def _rewritten(
    node: ast.Import | ast.ImportFrom, aliases: list[ast.alias], names: Mapping[str, str]
) -> str:
    if isinstance(node, ast.Import):
        return ast.unparse(ast.Import(aliases)) + "\n"
    if not _own(node):
        return ast.unparse(ast.ImportFrom(node.module, aliases, node.level)) + "\n"
    out = ""
    for alias in aliases:
        module, name = _source(node, alias)
        file, known_as = names[module], _known_as(alias)
        if name is None:
            # transformers looks for imports of the first form only to find the files it needs.
            out += f"from .{file} import __name__ as _\nfrom . import {_as(file, known_as)}\n"
        else:
            out += f"from .{file} import {_as(name, known_as)}\n"
    return out


def _as(name: str, known_as: str) -> str:
    return name if name == known_as else f"{name} as {known_as}"


def _known_as(alias: ast.alias) -> str:
    return alias.asname or alias.name.split(".")[0]


def _is_text(statement: ast.stmt) -> bool:
    """Whether the statement is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _acts(statement: ast.stmt) -> bool:
    """Whether the statement acts at import, and does not only define or help a checker."""
    if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
        return False
    return isinstance(statement, ast.Expr | ast.If | ast.Try) and not _is_text(statement)


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _used(node: ast.AST) -> set[str]:
    """The names that the code looks up when it runs, so not those of annotations."""
    out = {node.id} if isinstance(node, ast.Name) else set()
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                out |= _used(child)
    return out
