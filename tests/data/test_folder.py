import json

import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data import build_data, train_loader
from ds_cmli.data.folder import HELD_OUT_MOST, load_folder, load_image, read_metadata
from ds_cmli.data.sampler import GlobalBatchSampler


def write(folder, rows, images=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k, row in enumerate(rows if images else []):
        Image.new("RGB", (20, 20), (k, 0, 0)).save(folder / row["file_name"])


def rows(count, text="red apple"):
    return [{"file_name": f"{k:03}.png", "text": text} for k in range(count)]


def build(folder, **settings):
    return build_data(DataConfig(source=str(folder), image_size=8, tokenizer="builtin", **settings), seed=0)


def user_error(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pairs_of_a_folder(tmp_path):
    write(tmp_path, rows(40))
    data = build(tmp_path)
    assert (len(data.train), len(data.evals["val"])) == (38, 2)
    assert not data.has_places
    held_out = set(data.evals["val"].rows.files)
    assert not held_out & set(data.train.rows.files)
    sample = data.train[0]
    assert sample.image.shape == (3, 8, 8)
    assert sample.image[0, 4, 4] == int(data.train.rows.files[0][:3])
    batch = data.collate([sample])
    assert (batch.token_picture == -1).all()
    assert (batch.cell_picture == -1).all()


def test_which_files_are_held_out_depends_on_their_names_only(tmp_path):
    write(tmp_path / "a", rows(40), images=False)
    write(tmp_path / "b", rows(40, "other text")[::-1], images=False)
    assert set(load_folder(str(tmp_path / "a"))[1].files) == set(load_folder(str(tmp_path / "b"))[1].files)


def test_all_captions_of_an_image_fall_on_the_same_side(tmp_path):
    write(tmp_path, rows(20) + rows(20, "green pear"), images=False)
    train, validation = load_folder(str(tmp_path))
    assert sorted(validation.texts) == ["green pear", "red apple"]
    assert len(set(validation.files)) == 1
    assert len(train.files) == 38


def test_at_most_a_thousand_files_are_held_out(tmp_path):
    write(tmp_path, rows(20_100), images=False)
    assert len(load_folder(str(tmp_path))[1].files) == HELD_OUT_MOST


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_validation_folder_is_used_as_it_is(tmp_path, name):
    write(tmp_path / "train", rows(5))
    write(tmp_path / name, rows(3, "green pear"))
    data = build(tmp_path)
    assert (len(data.train), len(data.evals["val"])) == (5, 3)
    assert data.evals["val"].rows.folder == tmp_path / name


def test_a_train_folder_alone_has_a_share_held_out(tmp_path):
    write(tmp_path / "train", rows(5))
    assert [len(part.files) for part in load_folder(str(tmp_path))] == [4, 1]


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path):
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\na.png,"a cat, asleep"\nb.png,dog\n', encoding="utf-8")
    found = read_metadata(tmp_path / "metadata.csv")
    assert (found.files, found.texts) == (["a.png", "b.png"], ["a cat, asleep", "dog"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "a.png", "caption": "x"}', "line 2 has no column 'text' (found: file_name, caption)"),
        (
            '{"filename": "a.png", "text": "x"}',
            "no column 'file_name' (found: filename, text): did you mean 'filename'?",
        ),
        ("{}", "line 2 has no column 'file_name' (found: none)"),
        ('{"file_name": "a.png", "text": ', "line 2 is no JSON"),
        ('["a.png", "x"]', "line 2 is list"),
        ('{"file_name": "../a.png", "text": "x"}', "file_name '../a.png': give a path inside"),
        ('{"file_name": "b/../../a.png", "text": "x"}', "give a path inside"),
        ('{"file_name": "/etc/a.png", "text": "x"}', "give a path inside"),
        ('{"file_name": "", "text": "x"}', "has file_name ''"),
        ('{"file_name": "a.png", "text": ["x"]}', "has text ['x']"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, said):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line + "\n")
    assert said in user_error(load_folder, str(tmp_path))


def test_csv_without_the_column_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,txt\na.png,x\n")
    assert "line 2 has no column 'text' (found: file_name, txt): did you mean 'txt'?" in user_error(
        load_folder, str(tmp_path)
    )


def test_folder_mistakes_are_one_line(tmp_path):
    assert "which is no folder" in user_error(load_folder, str(tmp_path / "none"))
    assert "no metadata.jsonl or metadata.csv" in user_error(load_folder, str(tmp_path))
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    assert "save it as UTF-8" in user_error(load_folder, str(tmp_path))
    write(tmp_path, rows(1))
    assert "names 1 images with a caption" in user_error(load_folder, str(tmp_path))


def test_too_many_empty_captions_stop_at_load_and_few_are_reported(tmp_path):
    some = rows(30)
    some[7]["text"], some[9]["text"] = "  ", None
    write(tmp_path, some)
    said = user_error(build, tmp_path)
    assert "007.png (empty caption), 009.png (empty caption)" in said
    data = build(tmp_path, max_bad_share=0.1)
    assert data.bad == [("007.png", "empty caption"), ("009.png", "empty caption")]
    assert len(data.train) + len(data.evals["val"]) == 28


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
    found = [batch for batch, _ in zip(train_loader(data, sampler, workers), range(2), strict=False)]
    assert sorted(name for batch in found for name, _ in batch.bad) == ["002.png", "003.png", "004.png", "006.png"]
    assert sorted(torch.cat([batch.index for batch in found]).tolist()) == list(range(10))


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


def image_value(mode, colour, size=(4, 4)):
    return load_image(Image.new(mode, size, colour), 4)[:, 0, 0].tolist()


def test_every_kind_of_image_becomes_rgb_on_white():
    assert image_value("RGB", (1, 2, 3)) == [1, 2, 3]
    assert image_value("L", 7) == [7, 7, 7]
    assert image_value("RGBA", (0, 0, 0, 0)) == [255, 255, 255]
    assert image_value("LA", (0, 255)) == [0, 0, 0]
    assert image_value("I;16", 0x8000) == [128, 128, 128]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert load_image(palette, 4)[:, 0, 0].tolist() == [10, 20, 30]
    palette.info["transparency"] = 0
    assert load_image(palette, 4)[:, 0, 0].tolist() == [255, 255, 255]


def test_images_are_cropped_at_the_centre_and_turned_upright():
    wide = Image.new("RGB", (12, 4), (0, 0, 0))
    wide.paste((255, 0, 0), (4, 0, 8, 4))
    assert (load_image(wide, 4)[0] == 255).all()  # the middle 4 x 4
    upside = Image.new("RGB", (4, 4), (0, 0, 0))
    upside.paste((255, 255, 255), (0, 0, 4, 2))
    upside.getexif()[0x0112] = 3  # orientation: turned by 180 degrees
    assert load_image(upside, 4)[0, :, 0].tolist() == [0, 0, 255, 255]
