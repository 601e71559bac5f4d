"""What the charts of the scripts share."""

from profiling import figures


def test_ticks_are_numbers_that_are_read():
    assert [figures.percent(value) for value in (0.000001, 0.001, 0.01, 0.1, 1, 10)] == [
        "0.0001%", "0.1%", "1%", "10%", "100%", "1,000%"
    ]  # fmt: skip
    assert [figures.plain(value) for value in (0.1, 20, 4096.0)] == ["0.1", "20", "4,096"]
