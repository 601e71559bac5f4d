from ds_cmli.data.bad import BadSamples


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
