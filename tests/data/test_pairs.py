import gc

import pytest
import torch
from PIL import Image

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.captions import drawn
from ds_cmli.data.load import build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import Draw, GlobalBatchSampler
from tests.data.sources.samples import build, rows, user_error, write


def break_some(folder):
    """Of ten training pairs: 2 is missing, 3 is no image, 4 is cut off, 6's caption has no token."""
    some = rows(10)
    some[6]["text"] = "\u200b"
    write(folder / "train", some)
    write(folder / "val", rows(1))
    (folder / "train" / "002.png").unlink()
    (folder / "train" / "003.png").write_text("no image")
    Image.effect_noise((64, 64), 90).save(folder / "train" / "004.png")
    whole = (folder / "train" / "004.png").read_bytes()
    (folder / "train" / "004.png").write_bytes(whole[: len(whole) // 2])


def test_samples_that_cannot_be_used_are_replaced_by_the_next_and_reported(tmp_path):
    break_some(tmp_path)
    train = build(tmp_path).train
    samples = [train[i] for i in range(10)]
    assert [int(s.image[0, 0, 0]) for s in samples] == [0, 1, 5, 5, 5, 5, 7, 7, 8, 9]
    assert [s.index for s in samples] == list(range(10))
    reasons = {s.bad[0]: s.bad[1] for s in samples if s.bad}
    assert list(reasons) == ["002.png", "003.png", "004.png", "006.png"]
    assert (reasons["002.png"], reasons["006.png"]) == ("no such file", "caption without a token")
    assert all("\n" not in reason and str(tmp_path) not in reason for reason in reasons.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_report_bad_samples_once_an_epoch(tmp_path, workers):
    break_some(tmp_path)
    data = build(tmp_path)
    sampler = GlobalBatchSampler(10, 5, 0, 1, seed=0)
    result = [batch for batch, _ in zip(train_loader(data, sampler, workers), range(2), strict=False)]
    assert sorted(name for batch in result for name, _ in batch.bad) == ["002.png", "003.png", "004.png", "006.png"]
    assert sorted(torch.cat([batch.index for batch in result]).tolist()) == list(range(10))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_line_also_from_a_loading_process(tmp_path, workers):
    write(tmp_path, rows(8))
    data = build(tmp_path)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    sampler = GlobalBatchSampler(len(data.train), 2, 0, 1, seed=0)
    said = user_error(next, iter(train_loader(data, sampler, workers)))
    assert said.startswith("7 samples in a row of")
    assert "no such file" in said


def test_a_folder_without_its_images_is_refused_at_once(tmp_path):
    write(tmp_path, rows(200), images=False)
    assert user_error(build, tmp_path).startswith("100 samples in a row of")


def test_captions_of_one_picture_have_its_number_and_so_has_a_stand_in(tmp_path):
    write(tmp_path / "train", rows(4) + rows(2))
    write(tmp_path / "val", rows(1))
    (tmp_path / "train" / "002.png").unlink()
    (tmp_path / "train" / "002.png").symlink_to("001.png")
    (tmp_path / "train" / "003.png").write_text("no image")
    assert len(build(tmp_path).train) == 4
    ids = [build(tmp_path).train[Draw(k % 4, k)].image_id for k in range(6)]
    assert ids[0] == ids[4] == ids[3]  # 3 is broken: 0 stands in for it
    assert ids[1] == ids[2] == ids[5] != ids[0]
    # Another place, the same numbers: every node may have its own copy.
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "node").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "node" / "train")
    write(tmp_path / "node" / "val", rows(1))
    assert [build(tmp_path / "node").train[Draw(k % 4, k)].image_id for k in range(6)] == ids


def test_a_picture_has_another_of_its_captions_at_each_turn_by_seed_and_index_alone(tmp_path):
    texts = ["red apple", "green pear", "blue car"]
    write(tmp_path / "train", [row for text in texts for row in rows(20, text)])
    write(tmp_path / "val", rows(1))

    def said(turn, seed=0):
        data = build_data(DataConfig(source=str(tmp_path), image_size=8, tokenizer="builtin"), seed)
        return [data.tokenizer.decode(data.train[Draw(k, turn)].tokens.input_ids) for k in range(20)]

    first = said(0)
    assert first == said(0) and set(first) == set(texts)
    assert first == [texts[drawn(3, 1, 0, 0, k)[0]] for k in range(20)]
    assert first != said(1) and first != said(0, seed=1)
    counts = torch.tensor([drawn(5, 1, 0, turn, 7)[0] for turn in range(5000)]).bincount()
    assert counts.min() > 900  # all about equally often


def test_every_caption_of_every_picture_is_evaluated(tmp_path):
    write(tmp_path / "train", rows(3))
    write(tmp_path / "val", rows(4) + rows(4, "green pear") + rows(2, "blue car"))
    held_out = build(tmp_path).evals["val"]
    assert len(held_out) == 10
    assert [held_out.name(k)[:3] for k in range(10)] == ["000"] * 3 + ["001"] * 3 + ["002"] * 2 + ["003"] * 2
    assert len({held_out[k].image_id for k in range(10)}) == 4


def test_pictures_of_two_sources_are_two_even_if_they_are_named_alike(tmp_path):
    for name in "ab":
        write(tmp_path / name, rows(10))
    data = build_data(DataConfig(source=[f"{tmp_path}/a::1", f"{tmp_path}/b::3"], image_size=8, tokenizer="builtin"), 0)
    assert len(data.train) == data.mixture.draws == 18 and data.mixture.shares == [5, 13]  # of 4.5 and 13.5
    assert len({data.train[k].image_id for k in range(18)}) == 18
    assert len(data.evals["val"]) == 2


def test_garbage_collection_in_a_loading_process_passes_over_what_was_there_before_it(tmp_path):
    write(tmp_path, rows(8))
    data, before = build(tmp_path), gc.get_freeze_count()
    sampler = GlobalBatchSampler(len(data.train), 2, 0, 1, seed=0)
    lines = tmp_path / "frozen"
    next(iter(train_loader(data, sampler, 1, lambda worker: lines.write_text(str(gc.get_freeze_count())))))
    assert int(lines.read_text()) > 10_000
    assert gc.get_freeze_count() <= before  # here nothing is frozen; what was so may have been freed
