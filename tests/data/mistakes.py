"""What can be wrong in data: see tests/test_mistakes.py."""

from tests import make

PAIRS = "train --data {here}/pairs"
WEIGHTS = PAIRS + """ --set 'data.caption_weights={{"text": %s}}'"""


def pairs(here):
    make.pairs(here / "pairs")


def karpathy(here):
    make.karpathy(make.pictures(here, "a.png") / "splits.json", [("a.png", "train", ["a cat"])])


def blank_validation(here):
    pairs(here)
    make.pairs(here / "blank", 9, empty=range(9))


MISTAKES = [
    ("train --data {here}/nowhere", "nowhere"),
    ("train --val-data {here}/nowhere", "data.val_source"),
    (PAIRS, "pairs", lambda here: (here / "pairs").mkdir()),
    (PAIRS, "8", lambda here: make.pairs(here / "pairs", 5)),
    (PAIRS, "data.max_bad_share", lambda here: make.pairs(here / "pairs", empty=range(0, 24, 2))),
    (PAIRS, "23 samples in a row cannot be used", lambda here: make.pairs(here / "pairs", broken=range(24))),
    (PAIRS + " --set data.held_out=0.999", "data.held_out", pairs),
    (WEIGHTS % -1, "data.caption_weights.text", pairs),
    (WEIGHTS % 0, "data.caption_weights.text", pairs),
    (WEIGHTS % "NaN", "data.caption_weights.text", pairs),
    (WEIGHTS % '1, "lnog": 1', "lnog", pairs),
    (WEIGHTS % 1 + " --csv-caption-key long", "data.caption_key", pairs),
    (WEIGHTS.replace("pairs", "splits.json") % 1, "data.caption_weights", karpathy),
    (WEIGHTS.replace("pairs", "0.tar") % 1, "0.tar no such captions", lambda here: make.tar(here / "0.tar")),
    (WEIGHTS.replace("{here}/pairs", "demo") % 1, "data.caption_weights"),
    (PAIRS + " --set data.caption_weights={{}}", "data.caption_weights", pairs),
    (PAIRS + " --val-data {here}/blank", "no captions to evaluate on", blank_validation),
    ("train --set data.tokenizer={here}/nowhere", "data.tokenizer"),
]
