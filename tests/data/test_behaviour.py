"""The sampler, and tokens and ids of the data of the smallest folders."""

import pytest
import torch

from ds_cmli.data.order import permutation
from ds_cmli.data.sampler import Draw, GlobalBatchSampler
from ds_cmli.errors import UserError
from tests import make


def test_a_state_of_other_data_or_another_seed_is_refused():
    state = GlobalBatchSampler(26, 4, 0, 1, 3).state_dict()
    for samples, seed, named in ((27, 3, "length of 26"), (26, 4, "seed of 3")):
        with pytest.raises(UserError, match=named):
            GlobalBatchSampler(samples, 4, 0, 1, seed).load_state_dict(state)


def test_a_permutation_is_a_function_of_its_arguments_alone():
    for _ in range(2):
        torch.rand(3)  # what the global generator does must not matter
        assert permutation(6, 0, 0).tolist() == [4, 1, 0, 2, 3, 5]  # never another order: runs resume by it


@pytest.mark.parametrize(("global_batch", "epoch", "first"), [(2, 0, 20), (8, 1, 0)])
def test_another_global_batch_goes_on_and_a_larger_one_loses_only_the_end_of_the_epoch(global_batch, epoch, first):
    sampler = GlobalBatchSampler(26, global_batch, 0, 1, 3)
    sampler.load_state_dict({"epoch": 0, "position": 20, "length": 26, "seed": 3, "window": 0})
    draws = next(iter(sampler))  # 6 samples of the epoch are left
    assert [draw.sample for draw in draws] == permutation(26, 3, epoch)[first : first + global_batch].tolist()
    sampler.advance()
    assert (sampler.epoch, sampler.position) == (epoch, first + global_batch)


def test_tokens_are_those_of_the_caption_without_special_ones_and_padding(tmp_path):
    captions = ["one", "two words", "a much longer caption " * 3, "end"]
    source = make.captioned(tmp_path, [[text] for text in captions])
    loaded = make.data(source, val_source=source)
    batch = make.batches(loaded, 4, 1)[0]  # all samples, in their order
    positions = range(batch.input_ids.shape[1])
    for row, text in enumerate(captions):
        ids = loaded.tokenizer(text).input_ids
        assert batch.attention_mask[row].tolist() == [n < len(ids) for n in positions]
        assert batch.token_mask[row].tolist() == [0 < n < len(ids) - 1 for n in positions]  # no class or end token
        assert batch.input_ids[row, : len(ids)].tolist() == ids
    assert len(positions) <= 32 and batch.index.tolist() == [0, 1, 2, 3]


def test_equal_pictures_and_equal_captions_are_told_by_their_ids(tmp_path):
    source = make.captioned(tmp_path, [["same", "other"], ["same"], ["third"], ["fourth"]])
    loaded = make.data(source, val_source=source)
    assert len(loaded.train) == 4  # a picture a sample, with one of its captions at a turn
    ids = loaded.collate([loaded.train[n] for n in range(4)]).pair_id
    assert len({*ids[:, 0].tolist()}) == 4
    drawn = [loaded.collate([loaded.train[Draw(0, turn)], loaded.train[1]]).pair_id for turn in range(16)]
    captions_are_equal = {(pair_ids[0, 1] == pair_ids[1, 1]).item() for pair_ids in drawn}
    assert captions_are_equal == {True, False} and len({pair_ids[0, 0].item() for pair_ids in drawn}) == 1
