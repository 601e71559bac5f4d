"""Random damage of lists, metadata and tars: what is lost is told, or the file is refused in one line.

`pytest -m soak -s tests/data/test_soak.py` prints how the cases ended. `SOAK_CASES` sets their number for each format.
"Unchanged" is a case in which nothing is lost that the damage left whole: another letter in a text,
or a line that is gone as a whole, cannot be noticed.
"""

import contextlib
import io
import json
import os
import random
import signal
import string
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.load import build_data
from tests.data.sources.samples import members, picture, tar

CASES = int(os.environ.get("SOAK_CASES", "150"))
COUNT = 24  # pictures
ENDS = ("refused in one line", "told", "unchanged", "silent", "traceback", "hang")
HUGE = ("x" * 5_000, "red apple " * 20_000, "9" * 5_000, "1e400", "-1", "[" * 2_000)
TEXTS = ("red apple", "a cat, asleep", 'the "big" dog', "a green pear", "blue car\tred van", "5", "caf\u00e9")


def caption(k: int) -> str:
    return f"{TEXTS[k % len(TEXTS)]} {k}"


def cell(text: str, separator: str) -> str:
    """A text as CSV writers quote it."""
    if separator in text or '"' in text:
        return '"' + text.replace('"', '""') + '"'
    return text


def table(separator: str, columns: tuple[str, str]) -> str:
    rows = [f"{k}.png{separator}{cell(caption(k), separator)}" for k in range(COUNT)]
    return "\n".join([separator.join(columns), *rows]) + "\n"


def coco() -> str:
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(COUNT)]
    annotations = [{"id": k, "image_id": k, "caption": caption(k)} for k in range(COUNT)]
    return json.dumps({"images": images, "annotations": annotations})


def karpathy() -> str:
    split = ("train", "restval", "train", "val", "test")
    images = [
        {"filename": f"{k}.png", "split": split[k % 5], "sentences": [{"raw": caption(k)}], "imgid": k}
        for k in range(COUNT)
    ]
    return json.dumps({"images": images, "dataset": "coco"})


def lines() -> str:
    return "".join(json.dumps({"file_name": f"{k}.png", "text": caption(k)}) + "\n" for k in range(COUNT))


FORMATS = {
    "pairs.csv": lambda: table(",", ("filepath", "title")),
    "pairs.tsv": lambda: table("\t", ("filepath", "title")),
    "metadata.csv": lambda: table(",", ("file_name", "text")),
    "metadata.jsonl": lines,
    "captions.json": coco,
    "dataset.json": karpathy,
    "pairs.tar": None,
}


def damage_bytes(content: bytes, chance: random.Random, structure: bytes) -> tuple[bytes, range]:
    """Change one place; returns the new content and the bytes of the old one that are no longer as they were."""
    structural = [i for i, byte in enumerate(content) if byte in structure]
    at = chance.choice(structural) if chance.random() < 0.6 else chance.randrange(len(content))
    kind = chance.choice(("flip", "delete", "insert", "nul", "cut", "huge", "double", "swap", "zeros"))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :], range(at, at + 1)
    if kind == "delete":
        stop = at + chance.choice((1, 1, 1, 7, 300))
        return content[:at] + content[stop:], range(at, stop)
    if kind == "insert":
        new = bytes([chance.choice(structure)])
        return content[:at] + new + content[at:], range(at, at + 1)
    if kind == "nul":
        return content[:at] + b"\0" * chance.choice((1, 4)) + content[at:], range(at, at + 1)
    if kind == "cut":
        return content[:at], range(at, len(content))
    if kind == "huge":
        return content[:at] + chance.choice(HUGE).encode() + content[at:], range(at, at + 1)
    if kind == "double":
        stop = at + chance.choice((1, 30, 200))
        return content[:stop] + content[at:stop] + content[stop:], range(at, stop)
    if kind == "swap":
        new = chance.choice(string.printable).encode()
        return content[:at] + new + content[at + 1 :], range(at, at + 1)
    stop = at + chance.choice((1, 60, 600))
    return content[:at] + bytes(len(content[at:stop])) + content[stop:], range(at, stop)


def damage_columns(text: str, chance: random.Random, separator: str) -> str:
    """Take away, double or swap a column of a table, or of one row of it."""
    rows = [line.split(separator, 1) for line in text.splitlines()]
    some = rows if chance.random() < 0.3 else [chance.choice(rows)]
    kind = chance.choice(("first", "last", "double", "swap", "empty"))
    for row in some:
        changed = {
            "first": row[1:], "last": row[:1], "double": [*row, row[-1]], "swap": row[::-1], "empty": [row[0], ""],
        }[kind]  # fmt: skip
        row[:] = changed
    return "\n".join(separator.join(row) for row in rows) + "\n"


def damage_quotes(text: str, chance: random.Random) -> str:
    """Take away a quote, or put one in front of a text or behind it, in one to three rows."""
    rows = text.splitlines()
    for number in chance.sample(range(len(rows)), chance.choice((1, 1, 2, 3))):
        places = [i for i, letter in enumerate(rows[number]) if letter in '",\t'] or [0]
        at = chance.choice((*places, len(rows[number])))
        row = rows[number]
        if row[at : at + 1] == '"' and chance.random() < 0.5:
            rows[number] = row[:at] + row[at + 1 :]
        else:
            rows[number] = row[: at + 1] + '"' + row[at + 1 :]
    return "\n".join(rows) + "\n"


def damage_header(content: bytes, chance: random.Random) -> tuple[bytes, range]:
    """Give a member of a tar another size or kind, with a checksum that fits."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        start = chance.choice([member.offset for member in archive])
    header = bytearray(content[start : start + 512])
    size = chance.choice((-1, -512, -5120, -(2**40), 2**33, 2**63, 2**80, 0, 100, 5000))
    if chance.random() < 0.8:
        first = 0x80 if size >= 0 else 0xFF
        header[124:136] = bytes([first]) + (size % 256**11).to_bytes(11, "big")
    if chance.random() < 0.5:
        header[156:157] = bytes([chance.choice(b"0125xgLKSV")])
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    # A size that fits swallows what follows it within the archive.
    return content[:start] + bytes(header) + content[start + 512 :], range(start, start + 512)


def damage_value(value, chance: random.Random):
    """Replace, remove or double something in a JSON value."""
    places = []

    def visit(holder) -> None:
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                visit(holder[key])

    visit(value)
    holder, key = chance.choice(places)
    kind = chance.choice(("null", "type", "remove", "rename", "huge"))
    if kind in ("remove", "rename") and isinstance(holder, list):
        kind = "null"  # a list that lacks an entry is a whole one
    if kind == "null":
        holder[key] = None
    elif kind == "type":
        holder[key] = chance.choice((7, [], {}, True, -1.5, ["x"], {"raw": 1}, "", "\ud800", "a\0b", "../../x", "/x"))
    elif kind == "remove":
        del holder[key]
    elif kind == "rename":
        holder["other"] = holder.pop(key)
    else:
        holder[key] = chance.choice(HUGE)
    return value


def damaged(name: str, whole: bytes, chance: random.Random) -> tuple[bytes, range | None]:
    """A damaged copy, and which bytes were damaged; None where that is not known."""
    structured = chance.random() < 0.4
    if name.endswith(("csv", "tsv")) and chance.random() < 0.4:
        return damage_quotes(whole.decode(), chance).encode(), None
    if structured and name.endswith(("csv", "tsv")):
        separator = "\t" if name.endswith("tsv") else ","
        return damage_columns(whole.decode(), chance, separator).encode(), None
    if structured and name.endswith(".json"):
        return json.dumps(damage_value(json.loads(whole), chance)).encode(), None
    if structured and name.endswith(".tar"):
        return damage_header(whole, chance)
    if structured and name.endswith(".jsonl"):
        some = [json.loads(line) for line in whole.decode().splitlines()]
        return "".join(json.dumps(row) + "\n" for row in damage_value(some, chance)).encode(), None
    return damage_bytes(whole, chance, b"\0\x80\xff07" if name.endswith(".tar") else b'",\n\t{}[]:')


def damage_is(name: str, whole: bytes, content: bytes, place: range | None) -> set[str]:
    """The pictures of which the damage left everything as it was, so that they must still be there."""
    if name.endswith(".tar"):
        assert place is not None
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            result = [(int(m.name.split(".")[0]), m.offset, m.offset_data + m.size) for m in archive]
        touched = {k for k, start, stop in result if start < place.stop and stop > place.start}
        return {f"{k:06}.png" for k in range(COUNT) if k not in touched}
    if not name.endswith(".json"):
        kept = set(content.decode(errors="replace").splitlines())
        rows = whole.decode().splitlines()[-COUNT:]
        return {f"{k}.png" for k in range(COUNT) if rows[k] in kept}
    try:
        before, after = json.loads(whole), json.loads(content)
        lists = [(before[key], after[key]) for key in ("images", "annotations") if key in before]
        same = [[entry in now for entry in then] for then, now in lists]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {f"{k}.png" for k in range(COUNT)}  # what is no JSON is to be refused
    return {f"{k}.png" for k in range(COUNT) if all(entries[k] for entries in same)}


def what_is_there(data) -> Counter:
    """(picture, caption) of everything that can be trained on or evaluated on."""
    result: Counter = Counter()
    for pairs in (data.train, *data.evals.values()):
        for index in range(len(pairs.pictures)):
            with contextlib.suppress(Exception):  # told when it is met: `Sample.bad`
                name = os.path.basename(pairs.pictures.name(index))
                result.update((name, text) for text in pairs.pictures.captions(index))
    return result


def heard(data) -> list[str]:
    """Every line and every skipped sample that a user hears of."""
    bad = [*data.bad, *(item for split in data.evals.values() for item in split.bad)]
    bad += [sample.bad for index in range(len(data.train)) if (sample := data.train[index]).bad]
    for split in data.evals.values():
        bad += [sample.bad for row in range(len(split)) if (sample := split.pair(row)).bad]
    return [*data.notices, *(f"{name}: {reason}" for name, reason in bad)]


def read(name: str, folder: Path) -> tuple[Counter, list[str]]:
    path = folder if name.startswith("metadata") else folder / name
    config = DataConfig(source=str(path), image_size=8, tokenizer="builtin", max_bad_share=1.0)
    with contextlib.redirect_stdout(io.StringIO()):
        data = build_data(config, 0)
        return what_is_there(data), heard(data)


def end_of(name: str, folder: Path, left: set[str], before: tuple[Counter, list[str]]) -> str:
    """How a case ends. `left` are the pictures that the damage left as they were."""
    try:
        entry, lines = read(name, folder)
    except UserError as error:
        return "traceback" if "\n" in str(error) else "refused in one line"
    must = Counter({pair: n for pair, n in before[0].items() if pair[0] in left})
    if set(lines) - set(before[1]):
        return "told"
    return "silent" if must - entry else "unchanged"


class Hang(BaseException):
    """A case that does not end. Not an `Exception`, because a reader may go on after any of those."""


def _hang(*_) -> None:
    raise Hang


@pytest.mark.soak
def test_what_is_lost_of_damaged_data_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    signal.signal(signal.SIGALRM, _hang)
    counts: dict[str, Counter] = {}
    examples = []
    for name, write in FORMATS.items():
        counts[name] = Counter()
        folder = tmp_path / f"of-{name}"
        if write is None:
            whole = tar(folder / name, members(range(COUNT))).read_bytes()
        else:
            folder.mkdir()
            whole = write().encode()
            (folder / name).write_bytes(whole)
            for k in range(COUNT):
                (folder / f"{k}.png").write_bytes(picture(k))
        before = read(name, folder)
        assert len(before[0]) == COUNT - (4 if name == "dataset.json" else 0)  # a test part is not used
        for case in range(CASES):
            content, place = damaged(name, whole, random.Random(f"{name} {case}"))
            (folder / name).write_bytes(content)
            left = damage_is(name, whole, content, place)
            signal.alarm(20)
            try:
                end = end_of(name, folder, left, before)
            except (Exception, Hang) as error:
                end = "traceback" if isinstance(error, Exception) else "hang"
                examples.append(f"{name} {case}: {type(error).__name__}: {str(error)[:200]}")
            signal.alarm(0)
            if end == "silent":
                examples.append(f"{name} {case}: silent")
            counts[name][end] += 1
    counts["all"] = sum(counts.values(), Counter())
    for name, result in counts.items():
        print(f"\n{name}: {sum(result.values())} cases, " + ", ".join(f"{result[end]} {end}" for end in ENDS), end="")
    print("\n" + "\n".join(examples[:40]))
    assert not counts["all"].keys() & {"silent", "traceback", "hang"}
