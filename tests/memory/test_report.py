"""Events replayed by hand, and the report as a user reads it."""

import io

from ds_cmli.memory.report import CATEGORIES, PHASES, Report, show, summarise
from ds_cmli.memory_model.caching_allocator import Event


def events(*rows) -> list[Event]:
    return [Event(*row) for row in rows]


def test_peaks_and_categories_by_hand():
    figures = summarise(
        events(
            (0, 100, "parameters", "init"),
            (1, 30, "activations student", "forward"),
            (2, 50, "temporaries", "forward"),
            (2, -50, "temporaries", "forward"),
            (3, 20, "gradients", "backward"),
            (1, -30, "activations student", "backward"),
            (4, 90, "optimizer states", "optimizer"),
            (3, -20, "gradients", "optimizer"),
        ),
        {"preset": "by hand"},
        "predicted",
    )
    at_peak = {"parameters": 100, "gradients": 20, "optimizer states": 90}
    assert figures.categories == {**dict.fromkeys(CATEGORIES, 0), **at_peak}
    assert figures.totals == {"requested": 210}
    # What lived when a phase began counts: backward starts at 130 and reaches 150.
    assert figures.phases == {"init": 100, "forward": 180, "loss": 0, "backward": 150, "optimizer": 210}


def test_a_phase_that_only_frees_peaks_at_its_beginning():
    figures = summarise(
        events((0, 70, "teacher", "forward"), (0, -70, "teacher", "backward")), {}, "predicted"
    )  # fmt: skip
    assert figures.phases["backward"] == 70


def test_no_events():
    figures = summarise([], {}, "predicted")
    assert figures.totals == {"requested": 0}
    assert figures.categories == dict.fromkeys(CATEGORIES, 0)
    assert figures.phases == dict.fromkeys(PHASES, 0)


def test_tables_show_every_category_phase_and_total():
    from rich.console import Console

    out = io.StringIO()
    figures = summarise(
        events((0, 123_456_789, "CMLI op", "loss")), {"preset": "demo", "checkpointing": True}, "predicted"
    )
    figures.totals["device"] = 987_654_321
    show(Report(**figures.to_dict()), Console(file=out, width=120))
    text = out.getvalue()
    assert "predicted: preset demo, checkpointing on" in text
    for word in (*CATEGORIES, *PHASES, "123,456,789", "0.123", "100.0%", "987,654,321"):
        assert word in text
