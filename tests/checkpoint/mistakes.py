"""What can be wrong in runs that are to go on: see tests/test_mistakes.py."""

from pathlib import Path

from tests import make


def trained(here: Path) -> Path:
    """One step."""
    source = make.pairs(here / "pairs")
    options = {"--data": source, "--steps": 1, "--output-dir": here / "run", "--losses": "global"}
    assert make.train(*make.small(options)) == 0
    return here / "run"


def damaged(here: Path) -> None:
    for state in trained(here).glob("checkpoint/*/state.json"):
        state.write_text("{}")


AGAIN = " ".join(make.small({"--data": "{here}/pairs", "--losses": "global", "--output-dir": "{here}/run"}))

MISTAKES = [
    ("train --resume {here}/nowhere", "nowhere"),
    (f"train {AGAIN} --steps 1 --lr 0.5", "lr", trained),
    (f"train {AGAIN} --steps 1", "state.json", damaged),
    ("train --output-dir {here}/file/run", "file", lambda here: (here / "file").write_text("")),
]
