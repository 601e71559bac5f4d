import json

import pytest

from tests.data.sources.samples import build, picture, shown
from tests.data.sources.test_folder import captions, names, user_error

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
    found = build(coco(tmp_path), val_source=str(tmp_path / "dataset_coco.json"))
    assert found.evals["val"].name(0) == f"{prefix}3.png"
    assert "data.val_split is 'test', and" in user_error(lambda: build(coco(tmp_path), val_split="test"))


def coco(folder, subset="train2017", count=4):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / subset).mkdir(exist_ok=True)
    for k in range(count):
        (folder / subset / f"{k:012}.png").write_bytes(picture(k))
    content = {
        "images": [{"id": 100 + k, "file_name": f"{k:012}.png"} for k in range(count)],
        "annotations": [
            {"id": c, "image_id": 100 + c % count, "caption": f"red apple {c}"} for c in range(5 * count // 2)
        ],
    }
    path = folder / "annotations" / f"captions_{subset}.json"
    path.write_text(json.dumps(content))
    return path


def test_cocos_annotations_find_the_folder_beside_them(tmp_path):
    data = build(coco(tmp_path), val_source=str(coco(tmp_path, "val2017")))
    (train,) = data.train.pictures.sources
    assert names(train) == [f"{k:012}.png" for k in range(4)]
    assert train.captions(1) == ["red apple 1", "red apple 5", "red apple 9"]
    assert len(data.evals["val"]) == 10
    assert data.evals["val"].pictures.sources[0].folder == tmp_path / "val2017"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has not what it takes (TypeError"),
        ('{"images": []}', "has no caption"),
        ('{"info": 1}', "has not what it takes (KeyError: 'images')"),
        ('{"images": [{"filename": "1.png", "split": "odd", "sentences": [{"raw": "x"}]}]}', "KeyError: 'odd'"),
        ('{"images": [{"filename": "../1.png", "split": "val", "sentences": [{"raw": "x"}]}]}', "no path inside"),
        ('{"images": [{"filename": "1.png", "split": "val", "sentences": [{"raw": 3}]}]}', "TypeError"),
        ('{"images": [{"id": 1, "file_name": "x.png"}], "annotations": [{"image_id": 2, "caption": "x"}]}', "KeyError"),
        ('{"images": [{"filename": "1.png", "split": "val", "sentences": [{"raw": "x"}]}]}', "give its folder by"),
    ],
)  # fmt: skip
def test_other_json_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "x.json").write_text(content)
    assert said in user_error(build, tmp_path / "x.json")
