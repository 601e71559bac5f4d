"""Copies the code that a model needs into files beside its weights, where it runs without this
package.

transformers loads a model's code as files in one folder that import each other as `from .file
import name`. Therefore each module becomes one file with rewritten imports, which holds only the
definitions that are used, directly or indirectly.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "ds_cmli"
HEADER = "# Copied from ds-cmli (Apache-2.0) by its export; only what this model uses.\n"


def bundle(entries: dict[str, str], replaced: dict[str, str]) -> dict[str, str]:
    """The files to write: file name -> content.

    Args:
        entries: module -> name of its file without ".py". All definitions of these modules are
            kept.
        replaced: module -> source code to use instead of its own, for modules that cannot be copied
            as they are.
    """
    names = {**entries}
    modules: dict[str, Module] = {}
    todo: list[tuple[str, str | None]] = [
        (entry, None) for entry in entries
    ]  # None: all definitions
    seen = set()
    while todo:
        module, name = todo.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        if module not in modules:
            modules[module] = Module(module, replaced.get(module))
        todo += modules[module].keep(name)
    for module in modules:
        names.setdefault(module, module.removeprefix(f"{PACKAGE}.").replace(".", "_"))
    return {f"{names[module]}.py": found.text(names) for module, found in modules.items()}


class Module:
    """A module's source, which of its top-level statements are kept (by index), and the names that
    it imports.
    """

    def __init__(self, name: str, text: str | None):
        path = _path(name)
        self.name, self.source = name, path.read_text(encoding="utf-8") if text is None else text
        self.tree = ast.parse(self.source)
        self.defined: dict[str, list[int]] = {}
        self.imported: dict[str, tuple[ast.stmt, ast.alias]] = {}
        self.kept: set[int] = set()
        self.used_imports: set[str] = set()
        for i, statement in enumerate(self.tree.body):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    self.imported[alias.asname or alias.name.split(".")[0]] = (statement, alias)
            else:
                for defined in _defined(statement):
                    self.defined.setdefault(defined, []).append(i)

    def keep(self, name: str | None) -> list[tuple[str, str | None]]:
        """Keep the definition of `name` and what it uses in this module; returns (module, name) of
        all other uses.
        """
        others: list[tuple[str, str | None]] = []
        todo = [*self.defined, *self.imported] if name is None else [name]
        # Statements that do something at import, and do not only define, are kept whenever the
        # module is used.
        done = [
            i
            for i, s in enumerate(self.tree.body)
            if isinstance(s, ast.Expr | ast.If | ast.Try) and not _text(s)
        ]
        for used in [u for i in done if i not in self.kept for u in self._take(i, others)]:
            todo.append(used)
        while todo:
            wanted = todo.pop()
            for i in self.defined.get(wanted, ()):
                if i not in self.kept:
                    todo += self._take(i, others)
            if wanted in self.imported and wanted not in self.used_imports and name is None:
                pass  # an entry's imports are kept only if its definitions use them
            elif wanted in self.imported:
                others += self._take_import(wanted)
        return others

    def _take(self, i: int, others: list[tuple[str, str | None]]) -> list[str]:
        """Keep statement `i`; returns the names of this module that it uses, and adds names of
        others to `others`.
        """
        self.kept.add(i)
        statement = self.tree.body[i]
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and _own(node):
                others += [_source(node, alias) for alias in node.names]
        used = sorted(_used(statement))
        for name in used:
            if name in self.imported and name not in self.defined:
                others += self._take_import(name)
        return [name for name in used if name in self.defined]

    def _take_import(self, name: str) -> list[tuple[str, str | None]]:
        self.used_imports.add(name)
        statement, alias = self.imported[name]
        return (
            [_source(statement, alias)]
            if isinstance(statement, ast.ImportFrom) and _own(statement)
            else []
        )

    def text(self, names: dict[str, str]) -> str:
        """The file's content. `names`: module -> name of its file without ".py", for all modules."""
        lines = self.source.splitlines(keepends=True)
        out = [HEADER]
        if self.tree.body and _text(self.tree.body[0]):
            out += lines[: self.tree.body[0].end_lineno]
        out.append("\nfrom __future__ import annotations\n\n")
        for statement in self.tree.body:
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            aliases = [
                a
                for a in statement.names
                if (a.asname or a.name.split(".")[0]) in self.used_imports
            ]
            if aliases:
                out.append(_rewritten(statement, aliases, names))
        for i, statement in enumerate(self.tree.body):
            if i not in self.kept:
                continue
            first = (
                self.tree.body[i - 1].end_lineno if i else 0
            )  # the comments above a statement are copied too
            assert first is not None
            segment = lines[first : statement.end_lineno]
            for node in sorted(_own_imports(statement), key=lambda node: -node.lineno):
                indent = " " * node.col_offset
                new = _rewritten(node, node.names, names).splitlines(keepends=True)
                segment[node.lineno - 1 - first : (node.end_lineno or 0) - first] = [
                    indent + line for line in new
                ]
            out += segment
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


def _source(node: ast.ImportFrom, alias: ast.alias) -> tuple[str, str | None]:
    """The module and the name that an import refers to; the name is None if it imports the module
    itself.
    """
    inside = f"{node.module}.{alias.name}"
    # If a module itself is imported, all of it is kept, because which of its attributes are used is
    # not analysed.
    return (inside, None) if _is_module(inside) else (str(node.module), alias.name)


def _rewritten(node: ast.stmt, aliases: list[ast.alias], names: dict[str, str]) -> str:
    assert isinstance(node, ast.Import | ast.ImportFrom)
    if isinstance(node, ast.Import):
        return ast.unparse(ast.Import(aliases)) + "\n"
    if not _own(node):
        return ast.unparse(ast.ImportFrom(node.module, aliases, node.level)) + "\n"
    out = ""
    for alias in aliases:
        module, name = _source(node, alias)
        file, known_as = names[module], alias.asname or alias.name
        if name is None:
            # transformers looks for imports of the first form only to find the files that it needs.
            out += f"from .{file} import __name__ as _\nfrom . import {_as(file, known_as)}\n"
        else:
            out += f"from .{file} import {_as(name, known_as)}\n"
    return out


def _as(name: str, known_as: str) -> str:
    return name if name == known_as else f"{name} as {known_as}"


def _text(statement: ast.stmt) -> bool:
    """Whether the statement is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _used(node: ast.AST) -> set[str]:
    """The names that the code looks up when it runs. Annotations do not count, because they are
    never evaluated.
    """
    out = {node.id} if isinstance(node, ast.Name) else set()
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                out |= _used(child)
    return out
