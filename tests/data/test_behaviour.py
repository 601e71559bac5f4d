"""Which samples a run sees, in which order, and what is in them: the sampler and the data of the smallest folders."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_cmli.data.order import FullOrder, permutation
from ds_cmli.data.sampler import Draw, GlobalBatchSampler
from ds_cmli.errors import UserError
from tests import make


def consumed(samples, count: int, micro_batch: int = 4, state=None, seed: int = 3) -> tuple:
    """The samples of the next `count` batches of one rank, and the state after them."""
    sampler = GlobalBatchSampler(samples, micro_batch, 0, 1, seed)
    if state:
        sampler.load_state_dict(state)
    seen = []
    for _, draws in zip(range(count), sampler, strict=False):
        seen.append([draw.sample for draw in draws])
        sampler.advance()
    return seen, sampler.state_dict()


def test_an_epoch_has_each_sample_once_and_each_epoch_its_own_order():
    seen, _ = consumed(FullOrder([12, 8]), 15)
    epochs = [[*chain(*seen[first : first + 5])] for first in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert seen == consumed(20, 15)[0] != consumed(20, 15, seed=4)[0]


def test_a_state_of_other_data_or_another_seed_is_refused():
    _, state = consumed(26, 3)
    for samples, seed, named in ((27, 3, "length of 26"), (26, 4, "seed of 3")):
        with pytest.raises(UserError, match=named):
            consumed(samples, 1, state=state, seed=seed)


def test_a_mixture_takes_its_shares_and_every_sample_before_one_again():
    mixture = FullOrder([30, 10], [1.0, 3.0])  # of 40 draws 10 and 30
    epochs = [mixture.samples(np.arange(40), 0, epoch) for epoch in range(3)]
    for indices, _ in epochs:
        assert (indices < 30).sum() == 10 and len(indices) == 40
        assert 0 < (indices[:20] < 30).sum() < 10  # mixed, not one source after the other
    times = Counter(chain.from_iterable(indices.tolist() for indices, _ in epochs))
    assert [times[n] for n in range(30)] == [1] * 30 and [times[n] for n in range(30, 40)] == [9] * 10
    draws = {(int(i), int(turn)) for indices, turns in epochs for i, turn in zip(indices, turns, strict=True)}
    assert len(draws) == 120  # no sample comes twice at the same turn, so none gets the same view twice
    assert FullOrder([3, 3, 4], [1, 1, 1e-9]).shares == [5, 4, 1]  # each source keeps one


def test_a_permutation_is_a_function_of_its_arguments_alone():
    for _ in range(2):
        torch.rand(3)  # what the global generator does must not matter
        assert permutation(6, 0, 0).tolist() == [4, 1, 0, 2, 3, 5]  # never another order: runs resume by it


def test_a_larger_global_batch_loses_only_the_end_of_the_epoch():
    _, state = consumed(26, 5)
    assert state["position"] == 20
    larger, after = consumed(26, 1, 8, state)  # 6 samples of the epoch are left, fewer than 8
    assert larger[0] == permutation(26, 3, 1)[:8].tolist()
    assert (after["epoch"], after["position"]) == (1, 8)


# What a sample is.


def data(folder: Path, **settings):
    return make.data_of(make.config(data={"source": str(folder), "workers": 0, **settings}))


def listed(folder: Path, texts: list[list[str]]):
    """The data of pictures 0.png, 1.png, ... with these captions."""
    for n in range(len(texts)):
        make.picture(n).save(folder / f"{n}.png")
    rows = [{"file_name": f"{n}.png", "text": text} for n, of in enumerate(texts) for text in of]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data(folder, val_source=str(folder))


def test_tokens_are_those_of_the_caption_without_special_ones_and_padding(tmp_path):
    captions = ["one", "two words", "a much longer caption " * 3, "end"]
    loaded = listed(tmp_path, [[text] for text in captions])
    batch = make.batches(loaded, 4, 1)[0]  # all samples, in their order
    positions = range(batch.input_ids.shape[1])
    for row, text in enumerate(captions):
        ids = loaded.tokenizer(text).input_ids
        assert batch.attention_mask[row].tolist() == [n < len(ids) for n in positions]
        assert batch.token_mask[row].tolist() == [0 < n < len(ids) - 1 for n in positions]  # no class or end token
        assert batch.input_ids[row, : len(ids)].tolist() == ids
    assert len(positions) <= 32 and batch.index.tolist() == [0, 1, 2, 3]


def test_equal_pictures_and_equal_captions_are_told_by_their_ids(tmp_path):
    loaded = listed(tmp_path, [["same", "other"], ["same"], ["third"], ["fourth"]])
    assert len(loaded.train) == 4  # a picture a sample, with one of its captions at a turn
    ids = loaded.collate([loaded.train[n] for n in range(4)]).pair_id
    assert len({*ids[:, 0].tolist()}) == 4
    drawn = [loaded.collate([loaded.train[Draw(0, turn)], loaded.train[1]]).pair_id for turn in range(16)]
    same = [(of[0, 1] == of[1, 1]).item() for of in drawn]
    assert set(same) == {True, False} and len({of[0, 0].item() for of in drawn}) == 1


def test_a_broken_sample_is_replaced_by_the_next_and_counted(tmp_path):
    source = make.pairs(tmp_path / "pairs", 12, broken=(3,), empty=(7,))
    loaded = data(source, val_source=source, max_bad_share=0.5)
    samples = [loaded.train[n] for n in range(len(loaded.train))]
    assert [sample.bad[0] for sample in samples if sample.bad] == ["3.png"]
    assert len(samples) == 11  # the picture without a caption is left out
    assert [sample.index for sample in samples] == list(range(len(samples)))
    whole = samples[4]
    broken = next(sample for sample in samples if sample.bad and "3.png" in sample.bad[0])
    assert torch.equal(broken.image, whole.image) and broken.image.any()
