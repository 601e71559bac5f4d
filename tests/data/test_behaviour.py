"""Which samples a run sees, in which order, and what is in them: the sampler and the data of the smallest folders."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.data.sampler import Draw, GlobalBatchSampler, Mixture
from tests import make


def consumed(samples, count: int, micro_batch: int = 4, world: int = 1, state=None, seed: int = 3) -> tuple:
    """The samples of the next `count` global micro-batches, all ranks together, and the state after them."""
    samplers = [GlobalBatchSampler(samples, micro_batch, rank, world, seed) for rank in range(world)]
    for sampler in samplers:
        if state:
            sampler.load_state_dict(state)
    seen: list[list[int]] = [[] for _ in range(count)]
    for sampler in samplers:
        for batch, draws in zip(seen, sampler, strict=False):
            batch += [draw.sample for draw in draws]
            sampler.advance()
    assert len({json.dumps(sampler.state_dict()) for sampler in samplers}) == 1
    return seen, samplers[0].state_dict()


def test_an_epoch_has_each_sample_once_and_each_epoch_its_own_order():
    seen, _ = consumed(20, 15)
    epochs = [[*chain(*seen[first : first + 5])] for first in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert seen == consumed(20, 15)[0] != consumed(20, 15, seed=4)[0]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_has_the_same_batches(world):
    assert consumed(26, 15, 4 // world, world) == consumed(26, 15)


@pytest.mark.parametrize("before, worlds", [(3, (1, 1)), (8, (1, 2)), (6, (4, 1)), (13, (2, 4))])
def test_a_resumed_order_repeats_nothing_and_skips_nothing(before, worlds):
    """Also at the end of an epoch, of which the last 2 of 26 samples are no whole batch."""
    whole = consumed(26, 15)[0]
    first, state = consumed(26, before, 4 // worlds[0], worlds[0])
    rest, _ = consumed(26, 15 - before, 4 // worlds[1], worlds[1], json.loads(json.dumps(state)))
    assert first + rest == whole


def test_a_state_of_other_data_or_of_another_seed_is_refused():
    _, state = consumed(26, 3)
    for samples, seed in ((27, 3), (26, 4)):
        with pytest.raises(UserError):
            consumed(samples, 1, state=state, seed=seed)


def test_a_mixture_takes_its_shares_and_every_sample_before_one_again():
    mixture = Mixture([30, 10], [1.0, 3.0])  # of 40 draws 10 and 30
    taken = [mixture.order(0, epoch) for epoch in range(3)]
    for indices, _ in taken:
        assert int((indices < 30).sum()) == 10 and len(indices) == 40
    times = Counter(torch.cat([indices for indices, _ in taken]).tolist())
    assert [times[n] for n in range(30)] == [1] * 30 and [times[n] for n in range(30, 40)] == [9] * 10
    turns = {(int(i), int(turn)) for indices, turns in taken for i, turn in zip(indices, turns, strict=True)}
    assert len(turns) == 120  # no sample comes twice at the same turn, so none gets the same view twice


# What a sample is.


def data(folder: Path, **settings):
    return make.data_of(make.config(data={"source": str(folder), "workers": 0, **settings}))


@pytest.fixture(scope="module")
def captions() -> dict[str, str]:
    return {f"{n}.png": text for n, text in enumerate(("one", "two words", "a much longer caption " * 3, "end"))}


@pytest.fixture(scope="module")
def folder(captions, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pairs"
    make.pairs(folder, len(captions))
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def batch(folder):
    """All samples, in their order."""
    return make.batches(data(folder, val_source=str(folder)), 4, 1)[0]


def test_tokens_are_those_of_the_caption_without_special_ones_and_padding(folder, captions, batch):
    of_words = data(folder, val_source=str(folder)).tokenizer
    for row, text in enumerate(captions.values()):
        length = len(of_words(text).input_ids)
        assert batch.attention_mask[row].tolist() == [n < length for n in range(batch.input_ids.shape[1])]
        expected = [0 < n < length - 1 for n in range(batch.input_ids.shape[1])]  # not the class and the end token
        assert batch.token_mask[row].tolist() == expected
        assert batch.input_ids[row, :length].tolist() == of_words(text).input_ids
    assert batch.input_ids.shape[1] <= 32 and batch.index.tolist() == [0, 1, 2, 3]


def test_equal_pictures_and_equal_captions_are_told_by_their_ids(folder, tmp_path):
    for n in range(4):
        Image.open(folder / f"{n}.png").save(tmp_path / f"{n}.png")
    texts = {"0.png": ["same", "other"], "1.png": ["same"], "2.png": ["third"], "3.png": ["fourth"]}
    rows = [{"file_name": name, "text": text} for name, of in texts.items() for text in of]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = data(tmp_path, val_source=str(tmp_path))
    assert len(loaded.train) == 4  # a picture a sample, with one of its captions at a turn
    ids = loaded.collate([loaded.train[n] for n in range(4)]).pair_id
    assert len({*ids[:, 0].tolist()}) == 4
    drawn = [loaded.collate([loaded.train[Draw(0, turn)], loaded.train[1]]).pair_id for turn in range(16)]
    same = [(of[0, 1] == of[1, 1]).item() for of in drawn]
    assert set(same) == {True, False} and len({of[0, 0].item() for of in drawn}) == 1


def test_held_out_pictures_are_not_trained_on(tmp_path):
    source = Path(make.pairs(tmp_path / "pairs", 200))
    loaded = data(source)
    (held_out,) = loaded.evals.values()
    trained = {loaded.train.images.name(n) for n in range(len(loaded.train))}
    evaluated = {held_out.name(n) for n in range(len(held_out))}
    assert len(trained) + len(evaluated) == 200 and not trained & evaluated and 1 <= len(evaluated) <= 40


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


def test_a_picture_is_shown_whole_in_its_colours(tmp_path):
    """Its left half red, its right half blue: channels, sides and the range of values."""
    source = Path(make.pairs(tmp_path / "pairs", 8))
    image = Image.new("RGB", (80, 80), (255, 0, 0))
    image.paste((0, 0, 255), (40, 0, 80, 80))
    image.save(source / "0.png")
    shown = data(source, val_source=str(source)).train[0].image
    assert shown.shape == (3, 56, 56) and shown.dtype == torch.uint8
    assert shown[:, 28, 10].tolist() == [255, 0, 0] and shown[:, 28, 45].tolist() == [0, 0, 255]


def test_tars_have_the_pairs_of_their_names(tmp_path):
    for first in (0, 10):
        make.tar(tmp_path / f"{first}.tar", 10, first)
    loaded = data(tmp_path, val_source=str(tmp_path))
    assert len(loaded.train) == 20
    found = [loaded.train[n] for n in range(20)]
    assert len({sample.tokens.text for sample in found}) == 20 and not any(sample.bad for sample in found)
    numbers = [int(sample.tokens.text.split()[-1]) for sample in found]
    for number, sample in zip(numbers, found, strict=True):
        colour = make.picture(number).getpixel((20, 0)), make.picture(number).getpixel((20, 39))
        edges = [tuple(sample.image[:, y, 28].tolist()) for y in (0, 55)]
        assert edges[1] == colour[1] or edges[0] == colour[0], number
