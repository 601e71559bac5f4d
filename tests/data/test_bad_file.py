import json

import pytest

from ds_cmli.data import BadSamples
from ds_cmli.data.bad_file import BadFile
from ds_cmli.distributed.collective_flags import CollectiveFlags

LOAD = [("1.png", "empty caption"), ("1.png", "empty caption")]


def read(path):
    return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]


def samples(path, at_load=()):
    bad = BadSamples(1.0, 100, list(at_load))
    bad.file = BadFile(path, at_load)
    return bad


def test_each_sample_is_named_once_with_its_reason(tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = samples(path, LOAD)
    bad.gather(CollectiveFlags())
    assert read(path) == [("1.png", "empty caption", "load")] * 2
    met = [(f"{k}.png", "no such file") for k in range(9)]
    for _ in range(2):
        bad.add(met)
        bad.gather(CollectiveFlags())
    bad.evaluated([*LOAD, ("3.png", "no such file"), ("3.png", "no such file")])
    assert read(path)[2:] == [(*item, "training") for item in met] + [("3.png", "no such file", "evaluation")]
    (line,) = bad.summary(CollectiveFlags())
    assert line.startswith("skipped 2 samples at load and 18 in training") and line.endswith(f"; all are in {path}")


def test_a_resumed_run_adds_what_is_new_and_renews_what_is_left_out_at_load(tmp_path):
    path = tmp_path / "bad.jsonl"
    first = samples(path, LOAD)
    first.add([("2.png", "broken")])
    first.gather(CollectiveFlags())
    path.write_bytes(path.read_bytes() + b'{"name": "3.png", "rea')  # stopped in the middle of a line
    second = samples(path, [("9.png", "empty caption")])
    second.add([("2.png", "broken"), ("4.png", "broken")])
    second.gather(CollectiveFlags())
    assert read(path) == [
        ("9.png", "empty caption", "load"), ("2.png", "broken", "training"), ("4.png", "broken", "training"),
    ]  # fmt: skip


def test_without_bad_samples_there_is_no_file(tmp_path):
    samples(tmp_path / "bad.jsonl").gather(CollectiveFlags())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_once_and_waits(tmp_path, capsys):
    path = tmp_path / "run" / "bad.jsonl"
    bad = samples(path, LOAD[:1])
    for k in range(3):
        bad.add([(f"{k}.png", "broken")])
        bad.gather(CollectiveFlags())
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"warning: {path} cannot be written now: No such file" in said
    path.parent.mkdir()
    bad.add([("9.png", "broken")])
    bad.gather(CollectiveFlags())
    assert [name for name, *_ in read(path)] == ["1.png", "0.png", "1.png", "2.png", "9.png"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_last_ones_are_named_before_a_run_ends_for_them(tmp_path, share):
    path = tmp_path / "bad.jsonl"
    bad = samples(path)
    bad.max_share = share
    bad.add([("1.png", "broken")])
    if share:
        bad.check(CollectiveFlags(), seen=1)
    else:
        with pytest.raises(Exception, match="1 samples of 100 cannot be used"):
            bad.check(CollectiveFlags(), seen=1)
    assert read(path) == [("1.png", "broken", "training")]
