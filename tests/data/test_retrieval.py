import math

import pytest
import torch

from ds_cmli.data.retrieval import RECALLS, WAYS, chance, recall


def metrics(i2t, t2i=None, image_of=None):
    i2t = torch.tensor(i2t)
    own = torch.arange(len(i2t))
    t2i = i2t if t2i is None else torch.tensor(t2i)
    return recall(i2t, t2i, own, own if image_of is None else torch.tensor(image_of))


def test_recall_by_hand():
    # Image 0 finds its text first, image 1 second; text 0 finds its image first, text 1 first.
    found = metrics([[3.0, 1.0], [2.0, 1.5]])
    assert (found["i2t_r1"], found["i2t_r5"]) == (0.5, 1.0)
    assert found["t2i_r1"] == 1.0


def test_recall_takes_rows_and_columns_from_their_own_scores():
    found = metrics([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]])
    assert (found["i2t_r1"], found["t2i_r1"]) == (1.0, 0.0)


def test_any_own_caption_of_a_picture_counts():
    # Captions 0 and 1 are of picture 0. It finds its second one first; of the captions 0 does not find it.
    found = metrics([[0.0, 3.0, 2.0], [1.0, 1.0, 2.5]], image_of=[0, 0, 1])
    assert found["i2t_r1"] == 1.0
    assert found["t2i_r1"] == pytest.approx(2 / 3)


def test_perfect_scores_of_five_captions_a_picture_are_perfect():
    image_of = torch.arange(50) // 5
    perfect = (torch.arange(10)[:, None] == image_of).float()
    assert set(recall(perfect, perfect, torch.arange(10), image_of).values()) == {1.0}


@pytest.mark.parametrize("captions", [1, 5])
def test_constant_scores_are_worth_chance(captions):
    image_of = torch.arange(12 * captions) // captions
    constant = torch.full((12, len(image_of)), 0.5)
    found = recall(constant, constant, torch.arange(12), image_of)
    expected = chance(image_of)
    assert found == pytest.approx({k: expected[f"chance/{k}"] for k in found})
    assert [found[f"t2i_r{k}"] for k in RECALLS] == pytest.approx([k / 12 for k in RECALLS])
    if captions == 5:
        drawn = [1 - math.comb(55, k) / math.comb(60, k) for k in RECALLS]
        assert [found[f"i2t_r{k}"] for k in RECALLS] == pytest.approx(drawn)


def test_a_tie_counts_as_a_random_order():
    # The right text shares the first place with one other, and in row 1 the second place with two others.
    found = metrics([[2.0, 2.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert found["i2t_r1"] == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert found["i2t_r5"] == 1.0


def test_scores_that_are_no_numbers_retrieve_nothing():
    assert set(metrics([[math.nan] * 12] * 12).values()) == {0.0}
    found = metrics([[1.0, math.nan], [0.0, 1.0]])
    assert (found["i2t_r1"], found["t2i_r1"]) == (0.5, 0.5)


def test_chance_of_few_pairs_is_certainty():
    assert chance(torch.arange(3))["chance/i2t_r5"] == 1.0


def scores():
    generator = torch.Generator().manual_seed(0)
    image_of = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5, 6])
    # Whole numbers: many ties.
    i2t, t2i = torch.randint(0, 4, (2, 7, 10), generator=generator).float()
    return i2t, t2i, image_of


def test_ties_find_what_orders_drawn_at_random_find():
    i2t, t2i, image_of = scores()
    expected = recall(i2t, t2i, torch.arange(7), image_of)
    drawn = {f"{way}_r{k}": 0.0 for way in WAYS for k in RECALLS}
    generator, draws = torch.Generator().manual_seed(1), 600
    for _ in range(draws):
        noisy = (x + torch.rand(x.shape, generator=generator) / 2 for x in (i2t, t2i))
        for name, value in recall(*noisy, torch.arange(7), image_of).items():
            drawn[name] += value / draws
    assert drawn == pytest.approx(expected, abs=0.05)
