"""Write settings.md from the dataclasses of the configuration: `python docs/settings.py`.

A setting's meaning is the description of its field, its range that of the field's type.
"""

import dataclasses
import json
import sys
from pathlib import Path

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ds_cmli.config.options import FLAGS
from ds_cmli.config.presets import PRESETS
from ds_cmli.config.schema import MAX_NUMBER, SECTIONS, description

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

All settings of a run, with the defaults that presets change. `--set SECTION.SETTING=VALUE` gives
any of them; values are JSON, or plain text. Some settings also have an option. If a setting is
given more than once, the last one counts. `--dry-run` prints the resolved settings. Explicit
numbers of the DeepSpeed JSON win over those of `optim`.

This page is generated from the code by `python docs/settings.py`.
"""
OPTIONS = {setting: f"<br>`{flag}`" for flag, setting in FLAGS.items()}
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def accepted(schema: dict) -> str:
    """The values that a field of a JSON schema takes, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(accepted, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    words = [schema["type"].replace("null", "`null`")]
    for part in ("items", "propertyNames", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            words.append(f"of {accepted(schema[part])}")
    limits = [key for key in SIGNS if abs(schema.get(key, MAX_NUMBER)) < MAX_NUMBER]
    return " ".join(words) + ",".join(f" {SIGNS[key]} {schema[key]:,}" for key in limits)


def table(name: str, section: type) -> list[str]:
    """A line for each setting of a section."""
    lines = [
        f"## {name.capitalize()}",
        "",
        "| setting | default | values | meaning |",
        "|---|---|---|---|",
    ]
    properties = TypeAdapter(section).json_schema()["properties"]
    for field in dataclasses.fields(section):
        default = json.dumps(getattr(section(), field.name))
        option = OPTIONS.get(f"{name}.{field.name}", "")
        cells = (
            f"`{name}.{field.name}`{option}",
            f"`{default}`",
            accepted(properties[field.name]),
            description(name, field.name),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page() -> str:
    lines = [HEAD]
    for name, section in SECTIONS.items():
        lines += table(name, section)
    lines += ["## Presets", "", "| preset | what it changes of the defaults |", "|---|---|"]
    for name, sections in PRESETS.items():
        changes = [
            f"`{section}.{key}={json.dumps(value)}`"
            for section, settings in sections.items()
            for key, value in settings.items()
        ]
        lines.append(f"| `{name}` | {', '.join(changes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
