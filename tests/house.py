"""Prints the lines and files of each room, the totals beside their limits, and the files over 500 lines."""

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ds_cmli"
MAX_LINES = {PACKAGE: 18_700, "tests": 12_600}  # of Python
MAX_FILE_LINES = 500


def count_lines() -> dict[Path, int]:
    """Return the number of lines of each Python and Markdown file, by its path in the repository."""
    paths = [
        path
        for folder in (PACKAGE, "tests", "profiling", "docs")
        for suffix in ("py", "md")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    return {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in paths}


def rooms(lines: dict[Path, int]) -> dict[str, tuple[int, int]]:
    """Return the lines and files of each room: a folder of the package, or a folder beside it."""
    totals: dict[str, list[int]] = defaultdict(list)
    for path, count in lines.items():
        depth = 2 if path.parts[0] == PACKAGE and len(path.parts) > 2 else 1
        totals["/".join(path.parts[:depth])].append(count)
    return {room: (sum(counts), len(counts)) for room, counts in totals.items()}


def violations(lines: dict[Path, int]) -> list[str]:
    """Return a sentence for each total above its limit, and for each Python file that is too long."""
    sentences = []
    for folder, limit in MAX_LINES.items():
        total = sum(n for path, n in lines.items() if path.parts[0] == folder and path.suffix == ".py")
        if total > limit:
            sentences.append(f"{folder}: {total} lines, at most {limit}")
    for path, count in lines.items():
        if path.suffix == ".py" and count > MAX_FILE_LINES:
            sentences.append(f"{path}: {count} lines, at most {MAX_FILE_LINES}")
    return sentences


if __name__ == "__main__":
    lines = count_lines()
    for room, (total, files) in sorted(rooms(lines).items()):
        print(f"{room:24} {total:7,} lines {files:4} files")
    package = sum(total for room, (total, _) in rooms(lines).items() if room.startswith(PACKAGE))
    print(f"{'the package':24} {package:7,} lines, at most {MAX_LINES[PACKAGE]:,}")
    for sentence in violations(lines):
        print(sentence)
    sys.exit(bool(violations(lines)))
