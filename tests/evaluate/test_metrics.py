import math

import numpy as np
import pytest
import torch

from ds_cmli.evaluate.metrics import RECALLS, accuracies, chance, patches_inside, phrase_hits, recalls


def metrics(i2t, t2i=None, image_of=None):
    i2t = torch.tensor(i2t)
    own = torch.arange(len(i2t))
    t2i = i2t if t2i is None else torch.tensor(t2i)
    return recalls(i2t, t2i, own if image_of is None else torch.tensor(image_of))


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


def scores():
    generator = torch.Generator().manual_seed(0)
    image_of = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5, 6])
    # Whole numbers: many ties.
    i2t, t2i = torch.randint(0, 4, (2, 7, 10), generator=generator).float()
    return i2t, t2i, image_of


def test_ties_find_what_orders_drawn_at_random_find():
    i2t, t2i, image_of = scores()
    expected = recalls(i2t, t2i, image_of)
    drawn = dict.fromkeys(expected, 0.0)
    generator, draws = torch.Generator().manual_seed(1), 600
    for _ in range(draws):
        noisy = (x + torch.rand(x.shape, generator=generator) / 2 for x in (i2t, t2i))
        for name, value in recalls(*noisy, image_of).items():
            drawn[name] += value / draws
    assert drawn == pytest.approx(expected, abs=0.05)


def test_five_captions_a_picture_by_hand():
    # Pictures 0, 1, 2 have the captions 0-4, 5-9, 10-14. Every score is 0 but for these: from its side picture 0 finds
    # its caption 3 first, picture 1 has seven wrong captions before its best one, picture 2 has one.
    i2t, t2i = torch.zeros(3, 15), torch.zeros(3, 15)
    i2t[0, 3], i2t[0, 12] = 9, 8
    i2t[1, [0, 1, 2, 3, 4, 10, 11]], i2t[1, 7] = 5, 4
    i2t[2, 0], i2t[2, 14] = 7, 6
    # From theirs, captions 0-9 find their picture first, 10-13 second, 14 last.
    t2i[0, :5] = t2i[1, 5:10] = t2i[2, 10:14] = 1
    t2i[0, 10:14] = 2
    t2i[0, 14] = t2i[1, 14] = 1
    result = recalls(i2t, t2i, torch.arange(15) // 5)
    by_hand = {"i2t_r1": 1 / 3, "i2t_r5": 2 / 3, "i2t_r10": 1, "t2i_r1": 10 / 15, "t2i_r5": 1, "t2i_r10": 1}
    assert result == pytest.approx({**by_hand, "mean_recall": sum(by_hand.values()) / 6})


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
    result = metrics([[2.0, 0.5], [0.0, 1.0], [3.0, 0.0]], image_of=[0, 1])
    assert (result["i2t_r1"], result["t2i_r1"], result["t2i_r5"]) == (1.0, 0.5, 1.0)


def test_accuracies_by_hand():
    # Classes 0 and 1 have two pictures each, the other four none. The tie of the last picture is one of two places.
    scores = torch.eye(6)[[0, 0, 1, 1]]
    scores[1, 2] = 2.0
    scores[3, 5] = 1.0
    result = accuracies(scores, torch.tensor([0, 0, 1, 1]))
    assert result == {"top1": (1 + 0 + 1 + 0.5) / 4, "top5": 1.0, "mean_per_class": (0.5 + 0.75) / 2}


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
