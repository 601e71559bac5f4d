import json

import pytest

from ds_cmli.data.bad import BadFile, BadSamples
from ds_cmli.distributed.process_group import CollectiveFlags


def test_the_share_is_of_the_whole_set_not_of_the_samples_so_far():
    bad = BadSamples(max_share=0.01, length=200)
    bad.add([("a.jpg", "no such file"), ("b.jpg", "no such file")])
    assert not bad.too_many(bad.count, seen=8)  # 2 of 200 is not more than 1%
    assert bad.too_many(3, seen=8)


def test_a_second_epoch_does_not_count_twice():
    bad = BadSamples(max_share=0.01, length=200)
    assert not bad.too_many(4, seen=400)
    assert bad.too_many(5, seen=400)


def test_samples_left_out_at_load_count_in_every_epoch():
    bad = BadSamples(max_share=0.1, length=18, at_load=[("a", "empty caption"), ("b", "empty caption")])
    assert not bad.too_many(0, seen=0)
    assert not bad.too_many(0, seen=180)
    assert bad.too_many(1, seen=0)


def test_no_share_allows_none_and_the_whole_allows_all():
    assert BadSamples(0.0, 1000).too_many(1, seen=0)
    assert not BadSamples(0.0, 1000).too_many(0, seen=0)
    assert not BadSamples(1.0, 10).too_many(10, seen=10)


def test_the_message_names_the_first_files_once():
    bad = BadSamples(0.01, 100)
    for name in ("a", "b", "a", "c", "d", "e", "f"):
        bad.add([(name, "broken")])
    message = bad.message(bad.count)
    assert "\n" not in message
    assert "7 samples of 100" in message
    assert message.endswith("a (broken), b (broken), c (broken), d (broken), e (broken)")


LOAD = [("1.png", "empty caption"), ("1.png", "empty caption")]


def read(path):
    """Sample, reason and phase of each line."""
    return [tuple(json.loads(line).values())[:3] for line in path.read_text().splitlines()]


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
