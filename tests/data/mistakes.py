"""What can be wrong in data: see tests/test_mistakes.py."""

from pathlib import Path

from tests import make


def table(text: str):
    def prepare(here: Path) -> None:
        make.pairs(here / "pairs")
        (here / "pairs" / "metadata.jsonl").write_text(text)

    return prepare


PAIRS = "train --data {here}/pairs"

MISTAKES = [
    ("train --data {here}/nowhere", "nowhere"),
    (PAIRS, "pairs", lambda here: (here / "pairs").mkdir()),
    (PAIRS, "captoin", lambda here: make.pairs(here / "pairs", column="captoin")),
    (PAIRS, "metadata.jsonl", table('{"file_name": "0.png", "text": "a"}\n{"file_name": \n')),
    (PAIRS, "8", lambda here: make.pairs(here / "pairs", 5)),
    (PAIRS, "data.max_bad_share", lambda here: make.pairs(here / "pairs", empty=range(0, 24, 2))),
    (PAIRS + " --set data.held_out=0.999", "data.held_out", lambda here: make.pairs(here / "pairs")),
    ("train --data {here}/0.tar", "0.tar", lambda here: (here / "0.tar").write_bytes(b"no tar at all" * 100)),
    ("train --set data.tokenizer={here}/nowhere", "data.tokenizer"),
]
