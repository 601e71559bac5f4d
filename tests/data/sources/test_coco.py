import json

import pytest

from tests.data.sources.samples import build, captions, coco, names, picture, shown, user_error

SPLITS = ["train", "train", "restval", "val", "test", "train"]


def karpathy(folder, filepath="val2014"):
    images = [
        {
            **({"filepath": filepath} if filepath else {}), "filename": f"{k}.png", "split": split,
            "sentences": [{"raw": f"red apple {k}"}, {"raw": f"green pear {k}", "tokens": []}], "sentids": [1, 2],
        }
        for k, split in enumerate(SPLITS)
    ]  # fmt: skip
    place = folder / filepath
    place.mkdir(parents=True, exist_ok=True)
    for k in range(len(SPLITS)):
        (place / f"{k}.png").write_bytes(picture(k))
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


@pytest.mark.parametrize("filepath", ["val2014", ""])
def test_karpathys_splits_are_used_as_they_are(tmp_path, filepath):
    data = build(karpathy(tmp_path, filepath))
    (train,) = data.train.pictures.sources
    prefix = f"{filepath}/" if filepath else ""
    assert names(train) == [f"{prefix}{k}.png" for k in (0, 1, 2, 5)]
    assert captions(train)[2] == ["red apple 2", "green pear 2"]
    assert [data.evals["val"].name(row) for row in range(2)] == [f"{prefix}3.png"] * 2
    assert len(data.evals["val"]) == 2
    assert shown(data.train[3]) == 5
    (line,) = data.notices
    assert line.startswith("the test part of ") and line.endswith(" is not used")
    data = build(tmp_path / "dataset_coco.json", val_split="test")
    assert [data.evals["test"].name(row) for row in range(2)] == [f"{prefix}4.png"] * 2
    result = build(coco(tmp_path), val_source=str(tmp_path / "dataset_coco.json"))
    assert result.evals["val"].name(0) == f"{prefix}3.png"
    assert "data.val_split is 'test', and" in user_error(lambda: build(coco(tmp_path), val_split="test"))


def test_cocos_annotations_find_the_folder_beside_them(tmp_path):
    data = build(coco(tmp_path), val_source=str(coco(tmp_path, "val2017")))
    (train,) = data.train.pictures.sources
    assert names(train) == [f"{k:012}.png" for k in range(4)]
    assert train.captions(1) == ["red apple 1", "red apple 5", "red apple 9"]
    assert len(data.evals["val"]) == 10
    assert data.evals["val"].pictures.sources[0].folder == tmp_path / "val2017"


ODD = '{"images": [{"filename": "1.png", "split": "odd", "sentences": [{"raw": "x"}]}]}'
STRAY = '{"images": [{"id": 1, "file_name": "x.png"}], "annotations": [{"image_id": 2, "caption": "x"}]}'
ONE = '{"images": [{"filename": %s, "split": "val", "sentences": [{"raw": %s}]}]}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON (a list where an object is needed): expected are"),
        ('{"images": {}}', "has not what it takes: expected are"),
        ('{"images": []}', "has no caption"),
        ('{"info": 1}', "has not what it takes: expected are"),
        ('{"images": [], "images": []}', "is no JSON (has 'images' twice: keep one)"),
        (ODD, "1.png (its split is 'odd', none of train, restval, val, test)"),
        (ONE % ('"../1.png"', '"x"'), "image 0 ('../1.png' is no path inside a folder)"),
        (ONE % ('"1.png"', "3"), "1.png (its 'raw' is int)"),
        (ONE % ('"1.png"', "null"), "1.png (empty caption)"),
        (ONE % ('"1\\ud800.png"', '"x"'), "image 0 (no Unicode (surrogates not allowed))"),
        (ONE % ("[1]", '"x"'), "image 0 (its 'filename' is list)"),
        (STRAY, "annotation 0 (no image has its image_id 2)"),
        (ONE % ('"1.png"', '"x"'), "give its folder by"),
    ],
)
def test_other_json_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "x.json").write_text(content)
    assert said in user_error(build, tmp_path / "x.json")


def damaged(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return build(path, val_source=str(path), max_bad_share=0.5)


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda c: c["annotations"][0].update(caption=None), ("000000000000.png", "empty caption")),
        (lambda c: c["annotations"][0].update(caption=[1]), ("000000000000.png", "its 'caption' is list")),
        (lambda c: c["annotations"][0].pop("image_id"), ("annotation 0", "no 'image_id'")),
        (lambda c: c["annotations"].insert(0, None), ("annotation 0", "no object but NoneType")),
        (lambda c: c["images"].append({"id": 100, "file_name": "b.png"}),
         ("image 4", "its id 100 is that of '000000000000.png'")),
        (lambda c: c["images"].append({"id": 1}), ("image 4", "no 'file_name'")),
    ],
)  # fmt: skip
def test_one_defective_entry_is_left_out_and_named(tmp_path, change, bad):
    data = damaged(coco(tmp_path), change)
    assert data.bad[0] == bad
    assert len(data.train) == 4


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda image: image.update(split="foo"), "its split is 'foo', none of train, restval, val, test"),
        (lambda image: image.pop("split"), "no 'split'"),
        (lambda image: image.update(sentences=[]), "empty caption"),
        (lambda image: image.update(filepath=7), "its 'filepath' is int"),
    ],
)
def test_one_defective_picture_of_karpathys_is_left_out_and_named(tmp_path, change, bad):
    data = damaged(karpathy(tmp_path, ""), lambda content: change(content["images"][0]))
    assert data.bad[0][1] == bad
    assert names(data.train.pictures.sources[0]) == ["1.png", "2.png", "5.png"]


def test_images_without_an_annotation_are_told(tmp_path):
    path = coco(tmp_path)
    data = damaged(path, lambda c: c["images"].append({"id": 1, "file_name": "lone.png"}))
    assert f"1 images of {path} have no annotation and are not used, the first: lone.png" in data.notices


def test_a_list_whose_first_pictures_are_missing_is_still_found(tmp_path):
    path = coco(tmp_path)
    (tmp_path / "train2017" / "000000000000.png").unlink()
    assert build(path, val_source=str(path)).train.pictures.sources[0].folder == tmp_path / "train2017"


def test_keys_that_are_not_read_are_named(tmp_path):
    path = karpathy(tmp_path)
    content = json.loads(path.read_text())
    content["images"][1] |= {"imgid": 7, "negatives": ["x"]}
    content["images"][2]["sentences"][1]["wrong"] = "\ud800"
    path.write_text(json.dumps({**content, "more": 1}))
    assert build(path).summary[0].endswith(", none left out, not read: the keys more, negatives, wrong")
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    content["annotations"][1] |= {"segmentation": [], "id": 3}
    path.write_text(json.dumps(content))
    assert build(path).summary[0].endswith(", none left out, not read: the keys segmentation")
