"""Write settings.md from the dataclasses of the configuration: `python docs/settings.py`.

A setting's meaning is the comment above or behind its field, its range that of the field's type.
"""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ds_cmli.config.options import PLACES
from ds_cmli.config.presets import PRESETS
from ds_cmli.config.schema import Config
from ds_cmli.config.validation import MOST

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

All settings of a run, with the defaults that presets change. `--set SECTION.SETTING=VALUE` gives
any of them; values are JSON, or plain text. Some have an option too. `--dry-run` prints the
resolved settings. Explicit numbers of the DeepSpeed JSON win over those of `optim`.

This page is generated from the code by `python docs/settings.py`.
"""
SECTIONS = {
    "student": "Student",
    "teacher": "Teacher",
    "data": "Data",
    "loss": "Losses",
    "optim": "Optimizer",
    "run": "Run",
}
OPTIONS = {place: "--" + name.replace("_", "-") for name, place in PLACES.items()}


def comments(section: type) -> dict[str, str]:
    """The comment of each field of a dataclass: the lines above it, or those behind it."""
    found: dict[str, str] = {}
    above: list[str] = []
    name = ""
    for line in inspect.getsource(section).splitlines():
        field = re.match(r"    (\w+): ", line)
        _, _, behind = line.partition("  # ")
        if line.startswith("    def "):
            break
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
        elif field or (name and line.startswith((" " * 8, "    )"))):
            if field:
                name, found[field[1]], above = field[1], " ".join(above), []
            found[name] = f"{found[name]} {behind}".strip()
    return found


def shown(value: object) -> str:
    return json.dumps(value).replace("|", "\\|")


def allowed(schema: dict) -> str:
    """The values that a field of a JSON schema takes, in words."""
    if "anyOf" in schema:
        parts = [allowed(part) for part in schema["anyOf"]]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "")
    if kind == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {allowed(items)}"
    if kind == "object":
        names, values = schema.get("propertyNames", {}), schema.get("additionalProperties")
        inner = allowed(values) if isinstance(values, dict) else ""
        keys = allowed(names) if "enum" in names else ""
        return "object" + (f" of {keys}" if keys else "") + (f": {inner}" if inner else "")
    words = {
        "integer": "integer",
        "number": "number",
        "boolean": "true, false",
        "string": "text",
        "null": "null",
    }
    limits = []
    for key, sign in (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    ):
        if key in schema and abs(schema[key]) < MOST:
            limits.append(
                f"{sign} {schema[key]:,}" if abs(schema[key]) >= 1000 else f"{sign} {schema[key]}"
            )
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def rows(name: str, section: type) -> list[str]:
    """A line of the table for each setting."""
    properties, meanings = TypeAdapter(section).json_schema()["properties"], comments(section)
    lines = []
    for field in dataclasses.fields(section):
        option = OPTIONS.get((name, field.name), "")
        default = getattr(section(), field.name)
        described = properties[field.name].get("description", "")
        parts = [part.rstrip(".") for part in (meanings[field.name], described) if part]
        meaning = "; ".join(parts)
        cells = [
            f"`{name}.{field.name}`" + (f"<br>`{option}`" if option else ""),
            f"`{shown(default)}`",
            allowed(properties[field.name]),
            meaning.replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def presets() -> list[str]:
    """A table for each preset: what it changes of the defaults."""
    lines = ["## Presets", "", "What each preset changes of the defaults above."]
    for name, sections in PRESETS.items():
        lines += ["", f"### {name}", "", "| setting | value |", "|---|---|"]
        for section, settings in sections.items():
            lines += [
                f"| `{section}.{key}` | `{shown(value)}` |" for key, value in settings.items()
            ]
    return lines


def page() -> str:
    lines = [HEAD]
    for field in dataclasses.fields(Config):
        lines += [
            f"## {SECTIONS[field.name]}",
            "",
            "| setting | default | values | meaning |",
            "|---|---|---|---|",
        ]
        lines += [*rows(field.name, field.default_factory), ""]  # type: ignore[arg-type]
    return "\n".join([*lines, *presets()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
