import pytest

from ds_cmli.common.errors import UserError
from profiling.memory.estimates import DOCUMENT, Setting, arithmetic, claims, sentences

OTHER = Setting(B=96, P=2, N=100, M=40, H=512, D=128)
# What each implementation stores, by hand.
STORED = {
    ("E1", "broadcast"): (512 * 512 * 768 * 4, 192 * 192 * 512 * 4),
    ("E1", "materialised"): (1_048_576, 192 * 192 * 4),
    ("E1", "ours"): (524_288, 96 * 192 * 4),
    ("E2", "broadcast"): (3_367_254_360_064, 192 * 192 * 4000 * 128 * 4),
    ("E2", "materialised, all"): (13_153_337_344, 192 * 192 * 4000 * 4),
    ("E2", "materialised"): (6_576_668_672, 96 * 192 * 4000 * 4),
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
        "E4": None,
        "E5": None,
    }
    assert all(claim.figure in claim.quote for claim in figures.values())


def test_which_line_of_its_arithmetic_is_wrong():
    verdicts = {id: [line.verdict for line in claim.lines] for id, claim in claims().items()}
    assert verdicts == {
        "E1": ["right", "right, rounded"],
        # 256 * 12,544 is half of what it has.
        "E2": ["right", "wrong: the document has 6,422,528", "right, rounded"],
        "E3": ["right", "right, rounded"],
        "E4": [],
        "E5": ["wrong: the document has 12,544"],
    }
    assert [line.value for line in claims()["E2"].lines] == [12_544, 3_211_264, 6_576_668_672]


def test_other_settings_have_numbers_of_their_own():
    lines = [(line.formula, line.value) for line in claims(OTHER)["E1"].lines]
    assert lines == [("(96 * 2)^2", 36_864), ("36,864 * 512 * 4", 75_497_472)]
    assert "wrong" in arithmetic(claims(), DOCUMENT) and "wrong" not in arithmetic(claims(OTHER), OTHER)


def test_what_holds_in_words():
    assert list(sentences(claims()))[1] == (
        "E2 all-pairs CMLI, 6.58 GB: all pairs are 512^2 * 12,544 = 3,288,334,336 dot products, a rank's similarities "
        "6.58 GB (the same, as B = D); none need be kept: which patch or token won is 34.1 MB."
    )
    assert "the same" not in list(sentences(claims(OTHER)))[1]


def test_what_is_stored():
    for (id, name), (document, other) in STORED.items():
        assert claims()[id].stored[name] == document, (id, name)
        if other is not None:
            assert claims(OTHER)[id].stored[name] == other, (id, name)
    assert {(id, name) for id, claim in claims().items() for name in claim.stored} == set(STORED)
    assert list(claims(OTHER)["E5"].stored.values()) == [96 * 192 * 100 * 38 * 4, 96 * 100 * 38 * 2]


@pytest.mark.parametrize(("name", "value"), [("B", 0), ("P", -1), ("M", 2)])
def test_impossible_sizes_are_named(name, value):
    with pytest.raises(UserError, match=rf"--{name} is {value}: give "):
        Setting(**{**vars(DOCUMENT), name: value})
