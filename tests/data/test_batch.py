import pytest
import torch

from ds_cmli.data.batch import Collate, Sample
from ds_cmli.data.tokens import Tokens, load_tokenizer


def sample(length, index=0, **places):
    tokens = Tokens(list(range(2, 2 + length)), [False, *[True] * (length - 2), False], [0] * length)
    return Sample(torch.full((3, 4, 4), index, dtype=torch.uint8), tokens, index, image_id=index, **places)


def test_captions_are_padded_to_a_multiple_of_eight():
    batch = Collate(load_tokenizer("builtin", 32))([sample(3, 7), sample(9, 5)])
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [2, 3, 4] + [0] * 13
    assert batch.attention_mask.sum(1).tolist() == [3, 9]
    assert batch.token_mask[0].tolist() == [False, True] + [False] * 14
    assert batch.index.tolist() == [7, 5]
    assert [batch.image.dtype, batch.input_ids.dtype, batch.token_mask.dtype] == [torch.uint8, torch.int64, torch.bool]


def test_pairs_of_one_picture_or_one_caption_have_its_number():
    batch = Collate(load_tokenizer("builtin", 32))([sample(4, 7), sample(4, 5), sample(5, 7)])
    first, second, third = batch.pair_id.tolist()
    assert first[0] == third[0] != second[0]
    assert first[1] == second[1] != third[1]


def test_padding_never_exceeds_the_text_positions():
    batch = Collate(load_tokenizer("builtin", 13))([sample(13), sample(4)])
    assert batch.input_ids.shape == (2, 13)


@pytest.mark.parametrize("lengths", [(13, 4), (13, 13), (8, 8), (7, 8)])
def test_a_batch_knows_whether_a_text_is_padded(lengths):
    batch = Collate(load_tokenizer("builtin", 13))(list(map(sample, lengths)))
    assert batch.padded is not bool(batch.attention_mask.all())


def test_places_are_minus_one_where_there_are_none():
    batch = Collate(load_tokenizer("builtin", 32))(
        [sample(4), sample(3, token_picture=[-1, 0, -1], cell_picture=[-1, 0, -1, 1])]
    )
    assert batch.token_picture.tolist() == [[-1] * 8, [-1, 0] + [-1] * 6]
    assert batch.cell_picture.tolist() == [[[-1, -1], [-1, -1]], [[-1, 0], [-1, 1]]]


def test_to_moves_tensors_and_keeps_the_reports():
    batch = Collate(load_tokenizer("builtin", 32))([sample(4, bad=("a.jpg", "broken")), sample(4)])
    moved = batch.to("meta")
    assert moved.image.device.type == moved.cell_picture.device.type == "meta"
    assert moved.bad == [("a.jpg", "broken")]
