import numpy as np
import pytest
import torch

from ds_cmli.evaluate.pointing_game import parse_annotation, parse_sentence, patches_inside, phrase_hits, scene_hits


def test_centres_of_patches_by_hand():
    # A picture of 120 x 80, of which the model sees the middle 80 x 80 in 4 x 4 patches: centres at 30, 50, 70, 90 from
    # the left and 10, 30, 50, 70 from the top.
    inside = patches_inside([(40, 0, 75, 30)], (20, 0, 100, 80), (4, 4)).view(4, 4)
    assert inside.nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    two = patches_inside([(40, 0, 75, 30), (100, 0, 120, 80), (85, 60, 100, 80)], (20, 0, 100, 80), (4, 4)).view(4, 4)
    assert two.nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [3, 3]]


@pytest.mark.parametrize("case", range(20))
def test_hits_as_a_loop_over_phrases_finds_them(case):
    draw = np.random.default_rng(case)
    rows, columns, d = draw.integers(2, 6), draw.integers(2, 6), 5
    count, phrases = draw.integers(3, 12), draw.integers(1, 4)
    patches, tokens = draw.normal(size=(rows * columns, d)), draw.normal(size=(count, d))
    phrase = draw.integers(-1, phrases, count)
    view = (10.0, 20.0, 10.0 + 7 * columns, 20.0 + 9 * rows)
    boxes = [[tuple(sorted(draw.uniform(10, 60, 2)) + sorted(draw.uniform(20, 70, 2)))] for _ in range(phrases)]
    boxes = [[(x0, y0, x1, y1) for x0, x1, y0, y1 in found] for found in boxes]
    expected = []
    for number in range(phrases):
        own = [j for j in range(count) if phrase[j] == number]
        if not own:
            expected.append(False)
            continue
        best = max(range(rows * columns), key=lambda n: np.mean([patches[n] @ tokens[j] for j in own]))
        x, y = 10 + 7 * (best % columns + 0.5), 20 + 9 * (best // columns + 0.5)
        expected.append(any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes[number]))
    inside = torch.stack([patches_inside(found, view, (int(rows), int(columns))) for found in boxes])
    found = phrase_hits(torch.tensor(patches), torch.tensor(tokens), torch.tensor(phrase), inside)
    assert found.tolist() == expected


@pytest.mark.parametrize("case", range(20))
def test_hits_of_scenes_as_a_loop_over_tokens_finds_them(case):
    draw = np.random.default_rng(case)
    patches, tokens = draw.normal(size=(16, 3)), draw.normal(size=(6, 3))
    cells = draw.permutation([0, 1, -1, -1])
    names = draw.integers(-1, 2, 6)
    hits = 0
    for j in range(6):
        best = max(range(16), key=lambda n: patches[n] @ tokens[j] / np.linalg.norm(patches[n]))
        row, column = divmod(best, 4)
        hits += names[j] >= 0 and cells[2 * (row // 2) + column // 2] == names[j]
    found = scene_hits(
        torch.tensor(patches), torch.tensor(tokens), torch.tensor(names), torch.tensor(cells).view(2, 2), (4, 4)
    )
    assert found.tolist() == [hits, (names >= 0).sum()]


def test_sentences_and_annotations_of_flickr30k_entities():
    text, phrases = parse_sentence("[/EN#1/people Two men] on [/EN#22/vehicles/other a small boat] .")
    assert text == "Two men on a small boat ."
    assert [(text[p.start : p.end], p.number) for p in phrases] == [("Two men", "1"), ("a small boat", "22")]
    size, boxes = parse_annotation(
        "<annotation><size><width>500</width><height>375</height></size>"
        "<object><name>1</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>50</xmax><ymax>60</ymax></bndbox></object>"
        "<object><name>1</name><name>22</name>"
        "<bndbox><xmin>7</xmin><ymin>8</ymin><xmax>9</xmax><ymax>10</ymax></bndbox></object>"
        "<object><name>9</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"
    )
    assert size == (500, 375)
    assert boxes == {"1": [(3, 4, 50, 60), (7, 8, 9, 10)], "22": [(7, 8, 9, 10)]}
