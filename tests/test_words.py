"""Phrases that may not come back, in pages, help texts, messages, docstrings and comments."""

import io
import re
import tokenize
from pathlib import Path

from tests.conftest import ROOT

# phrase: what is written in its place
PHRASES = {
    r"\b(?:is|are|was|were|be|been) told\b": "is printed, is logged, is named",
    r"\b(?:is|are|was|were|be|been) said\b": "is printed, is logged, is documented",
    r"\b(?:is|are|was|were|be|been) asked\b": "is requested, is called, is read",
    r"(?<!-)\bbeside\b": "next to, with, compared with, in addition to",
    r"\bwhat stands for\b": "the name of the thing",
    r"\bthe one that\b": "the noun, or the first that",
    r"\ba line a kind\b": "one line for each kind",
    r"[Ss]teps between two logged": "steps from one logged step to the next",
}
TEXTS = ("*.md", "*.jinja", "*.cpp", "*.h", "*.sh", "*.yaml")
FOLDERS = ("ds_cmli", "docs", "slurm", "profiling")
RECORDS = ROOT / "docs" / "learning"  # plans and their results stay as they were written
IN_CAPTIONS = '" beside "'  # a word of the demo's sentences


def words(file: Path) -> list[tuple[int, str]]:
    """The lines that people read, with their numbers: of Python, strings and comments."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return list(enumerate(text.splitlines(), 1))
    results = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] in ("STRING", "COMMENT", "FSTRING_MIDDLE"):
            results += [(token.start[0] + i, line) for i, line in enumerate(token.string.splitlines())]
    return results


def files() -> list[Path]:
    result = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in FOLDERS:
        for pattern in ("*.py", *TEXTS):
            result += [file for file in sorted((ROOT / folder).rglob(pattern)) if RECORDS not in file.parents]
    return result


def test_no_such_phrase():
    results = []
    any_phrase = re.compile("|".join(PHRASES))
    for file in files():
        for number, line in words(file):
            if any_phrase.search(line) and line != IN_CAPTIONS:
                instead = [better for phrase, better in PHRASES.items() if re.search(phrase, line)]
                results.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}\n  write: {'; '.join(instead)}")
    assert not results, "\n".join(results)
