"""Lines and files of each room against the most that pyproject.toml allows: `python tests/house.py` prints them."""

import sys
from collections import defaultdict
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ds_cmli"


def measure() -> dict[str, list[int]]:
    """Lines and files of Python and Markdown by room: a folder of the package, or one beside it."""
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for folder in (PACKAGE, "tests", "profiling", "docs"):
        for file in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")):
            parts = file.relative_to(ROOT).parts
            room = rooms["/".join(parts[: 2 if parts[0] == PACKAGE and len(parts) > 2 else 1])]
            room[0] += len(file.read_text("utf-8").splitlines())
            room[1] += 1
    return rooms


def limits() -> dict[str, list[int]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["house"]


def above(rooms: dict[str, list[int]], allowed: dict[str, list[int]]) -> list[str]:
    """The rooms with more lines or files than are allowed, or without limits."""
    return [room for room, now in rooms.items() if any(map(int.__gt__, now, allowed.get(room, [0, 0])))]


if __name__ == "__main__":
    rooms, allowed = measure(), limits()
    of_package = zip(*(now for room, now in rooms.items() if room.startswith(PACKAGE)), strict=True)
    for room, now in [*sorted(rooms.items()), ("the package", [*map(sum, of_package)])]:
        print(f"{room:24} {now[0]:7,} lines {now[1]:4} files, at most {allowed.get(room, '-')}")
    sys.exit(bool(above(rooms, allowed)))
