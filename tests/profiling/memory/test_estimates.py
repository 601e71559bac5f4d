import pytest

from ds_cmli.common.errors import UserError
from profiling.memory.estimates import (
    DOCUMENT,
    Setting,
    claims,
    zero_model_states,
)

OTHER = Setting(B=96, P=2, N=100, M=40, H=512, D=128)
# What each implementation stores, by hand.
STORED = {
    ("E1", "broadcast"): (512 * 512 * 768 * 4, 192 * 192 * 512 * 4),
    ("E1", "materialised"): (1_048_576, 192 * 192 * 4),
    ("E1", "ours"): (524_288, 96 * 192 * 4),
    ("E2", "broadcast"): (3_367_254_360_064, 192 * 192 * 4000 * 128 * 4),
    ("E2", "materialised, all"): (13_153_337_344, 192 * 192 * 4000 * 4),
    ("E2", "materialised"): (6_576_668_672, 96 * 192 * 4000 * 4),
    ("E2", "ours"): (256 * 512 * 196, 96 * 192 * 100),  # one byte a patch of each pair
    ("E3", "broadcast"): (1_644_167_168, 96 * 4000 * 128 * 2),
    ("E3", "materialised"): (6_422_528, 96 * 4000 * 2),
    ("E3", "ours"): (256 * 196 * 256 * 4, 96 * 100 * 128 * 4),
    ("E5", "E2 materialised, 62 of 64"): (256 * 512 * 196 * 62 * 4, None),
    ("E5", "E3 materialised, 62 of 64"): (256 * 196 * 62 * 2, None),
}


def test_the_document_s_figures():
    figures = claims()
    assert {id: claim.document_bytes for id, claim in figures.items()} == {
        "E1": 805_306_368,
        "E2": 6_576_668_672,
        "E3": 1_644_167_168,
        "E4": 2_000_000_000,
        "E5": None,
    }
    # As written, 256 texts and not 512: half of what it prints.
    assert figures["E2"].arithmetic_bytes == 3_288_334_336
    assert figures["E1"].arithmetic_bytes == 805_306_368


def test_which_step_of_its_arithmetic_is_wrong():
    figures = claims()
    assert {id: claim.arithmetic for id, claim in figures.items()} == {
        "E1": "right",
        "E2": "wrong: 256 * 12,544 = 3,211,264, not 6,422,528",
        "E3": "right",
        "E4": "no numbers of the document",
        "E5": "wrong: 196 * 62 = 12,152, not 12,544",
    }
    assert [step.right for step in figures["E2"].steps] == [True, False, True]


def test_other_settings_have_no_printed_numbers():
    figures = claims(OTHER)
    assert [(step.text, step.value) for step in figures["E1"].steps] == [
        ("(96 * 2)^2", 36_864),
        ("36,864 * 512 * 4", 75_497_472),
    ]
    assert {claim.arithmetic for claim in figures.values()} == {"no numbers of the document"}


def test_what_is_stored():
    for (id, name), (document, other) in STORED.items():
        assert claims()[id].stored[name] == document, (id, name)
        if other is not None:
            assert claims(OTHER)[id].stored[name] == other, (id, name)
    assert {(id, name) for id, claim in claims().items() for name in claim.stored} == set(STORED)
    assert list(claims(OTHER)["E5"].stored.values()) == [96 * 192 * 100 * 38 * 4, 96 * 100 * 38 * 2]


def test_quotes_hold_the_figures():
    assert "805.31 MB" in claims()["E1"].quote
    assert "256 * 12,544 = 6,422,528" in claims()["E2"].quote
    assert "1.64 GB" in claims()["E3"].quote


@pytest.mark.parametrize(("name", "value"), [("B", 0), ("P", -1), ("M", 2)])
def test_impossible_sizes_are_named(name, value):
    with pytest.raises(UserError, match=rf"--{name} is {value}: give "):
        Setting(**{**vars(DOCUMENT), name: value})


def test_zero_formulas():
    assert zero_model_states(100, 4, 0) == {
        "parameters": 200,
        "gradients": 200,
        "master weights": 400,
        "optimizer states": 800,
    }
    assert zero_model_states(100, 4, 1) == {
        "parameters": 200,
        "gradients": 200,
        "master weights": 100,
        "optimizer states": 200,
    }
    # Figure 1 of the ZeRO paper: 7.5 billion parameters on 64 GPUs.
    totals = [sum(zero_model_states(7_500_000_000, 64, stage).values()) / 1e9 for stage in range(4)]
    assert [round(total, 1) for total in totals] == [120.0, 31.4, 16.6, 1.9]
    with pytest.raises(UserError, match="stage is 4"):
        zero_model_states(1, 1, 4)
