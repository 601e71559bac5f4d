"""Scenes that differ in one thing."""

import pytest

from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.tokens import load_tokenizer
from profiling.learning.linked import COLOURS, KINDS, PERSONS, LinkedScenes


@pytest.fixture(scope="module")
def linked():
    pictures, tokenizer = DemoPictures(56), load_tokenizer("builtin", 64)
    return {kind: LinkedScenes(kind, 100, pictures, tokenizer) for kind in KINDS}


def words_and_names(scenes, index):
    """The caption's words around the names, and the names."""
    caption, spans = scenes.caption(index)
    names = [caption[first:last] for first, last in spans]
    for first, last in reversed(spans):
        caption = caption[:first] + "*" + caption[last:]
    return caption, names


@pytest.mark.parametrize("kind", KINDS)
def test_both_of_a_pair_have_their_pictures_in_the_same_quarters(linked, kind):
    scenes = linked[kind]
    assert len(scenes) == 200 and len({scenes.image_id(i) for i in range(200)}) == 200
    for one in range(0, 200, 2):
        layouts = scenes.layout(one), scenes.layout(one + 1)
        assert [cell for _, cell in layouts[0]] == [cell for _, cell in layouts[1]]
        assert words_and_names(scenes, one)[0] == words_and_names(scenes, one + 1)[0]
        assert len(layouts[0]) in (3, 4)


def test_captions_differ_in_one_name(linked):
    scenes = linked["one_name"]
    for one in range(0, 200, 2):
        names = [words_and_names(scenes, i)[1] for i in (one, one + 1)]
        assert sum(a != b for a, b in zip(*names, strict=True)) == 1
        assert {*names[0], *names[1]} <= {scenes.pictures.names[i] for i in scenes.pictures.held_out}


def test_two_attributes_are_exchanged_half_of_them_colours(linked):
    scenes, colours = linked["swap"], 0
    for one in range(0, 200, 2):
        before, after = (words_and_names(scenes, i)[1] for i in (one, one + 1))
        changed = [(a.split(" ", 1), b.split(" ", 1)) for a, b in zip(before, after, strict=True) if a != b]
        (first, first_now), (second, second_now) = changed
        assert first[1] == first_now[1] and second[1] == second_now[1]  # the things stay
        assert (first_now[0], second_now[0]) == (second[0], first[0])
        assert {first[0], second[0]} <= set(COLOURS) or {first[0], second[0]} <= set(PERSONS)
        colours += first[0] in COLOURS
    assert colours == 50
