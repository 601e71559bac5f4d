"""What can be wrong in data: see tests/test_mistakes.py."""

from tests import make

PAIRS = "train --data {here}/pairs"

MISTAKES = [
    ("train --data {here}/nowhere", "nowhere"),
    ("train --val-data {here}/nowhere", "data.val_source"),
    (PAIRS, "pairs", lambda here: (here / "pairs").mkdir()),
    (PAIRS, "8", lambda here: make.pairs(here / "pairs", 5)),
    (PAIRS, "data.max_bad_share", lambda here: make.pairs(here / "pairs", empty=range(0, 24, 2))),
    (PAIRS + " --set data.held_out=0.999", "data.held_out", lambda here: make.pairs(here / "pairs")),
    ("train --set data.tokenizer={here}/nowhere", "data.tokenizer"),
]
