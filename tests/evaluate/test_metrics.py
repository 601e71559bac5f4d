import math

import numpy as np
import pytest
import torch

from ds_cmli.evaluate.metrics import RECALLS, chance, patches_inside, phrase_hits, recalls


@pytest.mark.parametrize("captions", [1, 5])
def test_constant_scores_are_worth_chance(captions):
    image_of = torch.arange(12 * captions) // captions
    constant = torch.full((12, len(image_of)), 0.5)
    result = recalls(constant, constant, image_of)
    expected = chance(image_of)
    assert result == pytest.approx(expected)
    assert [result[f"t2i_r{k}"] for k in RECALLS] == pytest.approx([k / 12 for k in RECALLS])
    if captions == 5:
        drawn = [1 - math.comb(55, k) / math.comb(60, k) for k in RECALLS]
        assert [result[f"i2t_r{k}"] for k in RECALLS] == pytest.approx(drawn)


def test_ties_find_what_orders_drawn_at_random_find():
    image_of = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5, 6])
    # Whole numbers: many ties.
    i2t, t2i = torch.randint(0, 4, (2, 7, 10), generator=torch.Generator().manual_seed(0)).float()
    expected = recalls(i2t, t2i, image_of)
    drawn = dict.fromkeys(expected, 0.0)
    generator, draws = torch.Generator().manual_seed(1), 600
    for _ in range(draws):
        noisy = (x + torch.rand(x.shape, generator=generator) / 2 for x in (i2t, t2i))
        for name, value in recalls(*noisy, image_of).items():
            drawn[name] += value / draws
    assert drawn == pytest.approx(expected, abs=0.05)


def recall_by_sorting(i2t, t2i, image_of, k):
    """As COCO's evaluations compute it: sort, and look for an own one among the first k."""
    order = np.argsort(-i2t, axis=1)[:, :k]
    by_image = np.mean([(image_of[order[i]] == i).any() for i in range(len(i2t))])
    order = np.argsort(-t2i, axis=0)[:k]
    return by_image, np.mean([image_of[j] in order[:, j] for j in range(len(image_of))])


@pytest.mark.parametrize("case", range(20))
def test_recall_as_by_sorting(case):
    draw = np.random.default_rng(case)
    m = int(draw.integers(2, 8)) * 2
    image_of = draw.permutation(np.concatenate([np.arange(m), draw.integers(0, m, draw.integers(0, 3 * m))]))
    i2t, t2i = draw.normal(size=(2, m, len(image_of)))
    i2t[np.arange(m)[:, None] == image_of] += draw.uniform(0, 2)
    result = recalls(torch.tensor(i2t), torch.tensor(t2i), torch.tensor(image_of))
    for k in RECALLS:
        assert (result[f"i2t_r{k}"], result[f"t2i_r{k}"]) == pytest.approx(recall_by_sorting(i2t, t2i, image_of, k))


def test_a_picture_without_a_caption_is_a_candidate_alone():
    # Caption 0 finds picture 2, which has none, before its own.
    scores = torch.tensor([[2.0, 0.5], [0.0, 1.0], [3.0, 0.0]])
    result = recalls(scores, scores, torch.tensor([0, 1]))
    assert (result["i2t_r1"], result["t2i_r1"], result["t2i_r5"]) == (1.0, 0.5, 1.0)


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
    boxes = [[(x0, y0, x1, y1) for x0, x1, y0, y1 in entry] for entry in boxes]
    expected = []
    for number in range(phrases):
        own = [j for j in range(count) if phrase[j] == number]
        if not own:
            expected.append(False)
            continue
        best = max(range(rows * columns), key=lambda n: np.mean([patches[n] @ tokens[j] for j in own]))
        x, y = 10 + 7 * (best % columns + 0.5), 20 + 9 * (best // columns + 0.5)
        expected.append(any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes[number]))
    inside = torch.stack([patches_inside(entry, view, (int(rows), int(columns))) for entry in boxes])
    entry = phrase_hits(torch.tensor(patches), torch.tensor(tokens), torch.tensor(phrase), inside)
    assert entry.tolist() == expected
