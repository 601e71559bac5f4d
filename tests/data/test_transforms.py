import hashlib
import io
import json
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import AugmentationName as Names
from ds_cmli.data.load import build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import Draw, GlobalBatchSampler
from ds_cmli.data.transforms import Augmentation, central_square

ALL = {"random_resized_crop": 0.3, "horizontal_flip": 0.5, "color_jitter": 0.4}


def picture():
    """Red grows from left to right, green from top to bottom."""
    x = torch.arange(64).mul(4).to(torch.uint8)
    return torch.stack([x.expand(64, 64), x[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)])


def test_all_names_do_something_and_nothing_is_random_without_them():
    assert set(get_args(Names)) == set(ALL)
    none = Augmentation({}, 0)
    with none.seeded(0, 0):
        assert none.view(300, 200) == central_square(300, 200) == (50, 0, 250, 200)
        image, flipped = none.pixels(picture())
    assert (image == picture()).all() and not flipped
    for name in ALL:
        augmentation = Augmentation({name: 0.5}, 0)
        seen = set()
        for index in range(8):
            with augmentation.seeded(0, index):
                seen.add((augmentation.view(300, 200), augmentation.pixels(picture())[0].numpy().tobytes()))
        assert len(seen) > 1, name


def test_what_is_random_depends_on_seed_turn_and_index_alone():
    def draw(seed, turn, index):
        augmentation = Augmentation(ALL, seed)
        with augmentation.seeded(turn, index):
            return augmentation.view(300, 200), augmentation.pixels(picture())[0].numpy().tobytes()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = draw(1, 2, 3)
    assert (torch.rand(3) == expected).all()  # the process's own generator goes on as if nothing had been drawn
    assert draw(1, 2, 3) == first
    assert len({first, draw(0, 2, 3), draw(1, 0, 3), draw(1, 2, 0)}) == 4


def test_crops_keep_to_the_share_and_flips_to_their_probability():
    augmentation, areas, flips = Augmentation({**ALL, "horizontal_flip": 0.25}, 0), [], 0
    for index in range(400):
        with augmentation.seeded(0, index):
            left, top, right, bottom = augmentation.view(400, 300)
            image, flipped = augmentation.pixels(picture())
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.73 < (right - left) / (bottom - top) < 1.35
        areas.append((right - left) * (bottom - top) / 120_000)
        assert flipped == (image[0, 0, 0] > image[0, 0, -1])
        flips += flipped
    assert 0.28 < min(areas) < 0.4 and max(areas) > 0.8
    assert 70 < flips < 130


def tiny(source="demo", **augmentation):
    return load_preset("tiny", {"data": {"source": str(source), "augmentation": augmentation}}).data


def test_scenes_refuse_to_be_cropped_and_take_their_quarters_along_when_flipped():
    with pytest.raises(UserError, match="random_resized_crop': the demo's scenes keep their pictures in quarters"):
        build_data(tiny(random_resized_crop=0.5), 0)
    plain, flipping = build_data(tiny(), 0), build_data(tiny(horizontal_flip=0.5), 0)
    assert not flipping.evals["seen"].augmentation.strengths
    flipped = 0
    for index in range(10):
        before, after = plain.train[index], flipping.train[Draw(index, 3)]
        if not (before.image == after.image).all():
            flipped += 1
            assert (before.image.flip(-1) == after.image).all()
            cells = torch.tensor(before.cell_picture).view(2, 2).flip(1)
            assert after.cell_picture == cells.flatten().tolist()
    assert 0 < flipped < 10


def folder(path, count=24):
    path.mkdir()
    lines = []
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{k}.jpg")
        lines += [json.dumps({"file_name": f"{k}.jpg", "text": f"picture {k} {c}"}) for c in range(1 + k % 3)]
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def global_batches(config, count, ranks, micro_batch, workers, state=None):
    """A hash of pictures and captions of each global batch, and the state behind the last one."""
    data, parts = build_data(config, 3), []
    for rank in range(ranks):
        sampler = GlobalBatchSampler(data.mixture, micro_batch, rank, ranks, seed=3)
        if state:
            sampler.load_state_dict(state)
        batches = []
        for batch, _ in zip(train_loader(data, sampler, workers), range(count), strict=False):
            sampler.advance()
            rows = zip(batch.image, batch.input_ids.tolist(), strict=True)
            batches.append([(row.numpy().tobytes(), [i for i in ids if i]) for row, ids in rows])
        parts.append(batches)
    rows = [[row for part in batch for row in part] for batch in zip(*parts, strict=True)]
    return [hashlib.sha256(repr(batch).encode()).hexdigest() for batch in rows], sampler.state_dict()


@pytest.mark.parametrize("kind", ["demo", "folder", "tar"])
def test_batches_are_the_same_after_a_stop_on_any_number_of_ranks_and_workers(tmp_path, kind):
    config = tiny(horizontal_flip=0.5, color_jitter=0.4)
    if kind != "demo":
        config = tiny(folder(tmp_path / "data"), **ALL)
    if kind == "tar":
        config = tiny(tar(tmp_path / "data", tmp_path / "a.tar"), **ALL)
    whole, _ = global_batches(config, 9, 1, 4, 0)  # 23 pictures are 5 batches: into the second epoch
    assert len(set(whole)) == 9
    head, state = global_batches(config, 7, 2, 2, 0)
    assert head == whole[:7]
    for ranks, micro_batch, workers in ((1, 4, 2), (2, 2, 1), (4, 1, 0)):
        assert global_batches(config, 2, ranks, micro_batch, workers, state)[0] == whole[7:], (ranks, workers)


def tar(source, path):
    import tarfile

    with tarfile.open(path, "w") as archive:
        for file in sorted(source.glob("*.jpg")):
            archive.add(file, file.name)
            text = f"picture {file.stem}".encode()
            info = tarfile.TarInfo(f"{file.stem}.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return path
