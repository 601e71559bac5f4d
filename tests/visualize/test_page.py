"""The page holds every pair's words, picture and similarities, and what a user wrote cannot become markup."""

import json
import re

import torch

from ds_cmli.inference import Match
from ds_cmli.visualize import Panel, write_figure, write_page
from ds_cmli.visualize.page import pieces

TEXT = "a <b>red</b> car"
SPANS = [(0, 1), (2, 3), (3, 4), (5, 8), (13, 16)]


def panel(**names) -> Panel:
    matches = {
        name: Match(
            torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)),
            [TEXT[a:b] for a, b in SPANS],
            SPANS,
            (2, 3),
        )
        for name, seed in names.items()
    }
    return Panel("seen 1", TEXT, torch.zeros(3, 8, 12, dtype=torch.uint8), matches)


def test_a_text_comes_apart_into_words_and_what_is_between_them():
    assert pieces("a  red car.", [(0, 1), (3, 6), (7, 10)]) == [
        ("a", 0),
        ("  ", None),
        ("red", 1),
        (" ", None),
        ("car", 2),
        (".", None),
    ]
    assert pieces("redcar", [(0, 3), (3, 6)]) == [("red", 0), ("car", 1)]
    assert pieces("", []) == []


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    shown = panel(first=1, second=2)
    write_page([shown, panel(alone=3)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<b>red</b>" not in text and "http" not in text
    assert text.count("data:image/png;base64,") == 2 and text.count('class="word"') == 10
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    models = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text).group(1))
    assert [(m["name"], m["rows"], m["columns"]) for m in models] == [("first", 2, 3), ("second", 2, 3)]
    torch.testing.assert_close(
        torch.tensor(models[1]["similarity"]), shown.matches["second"].similarity, atol=6e-4, rtol=0
    )


def test_a_figure_is_written(tmp_path):
    write_figure(panel(first=1, second=2), tmp_path / "match.png")
    assert (tmp_path / "match.png").read_bytes()[:4] == b"\x89PNG"
