"""Classes of boxes of COCO's and LVIS's files, against accuracies computed one box at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.suites import dense
from tests.evaluate.suites import dense_data as data
from tests.evaluate.suites.test_segmentation import patches_of, texts_of, unit
from tests.models import dual_models
from tests.run_folder import write_run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "run").mkdir()
    folders = write_run(folder / "run"), dual_models.clip(folder / "clip")
    return [EvaluatedModel.load(str(each), 3, 0) for each in folders]


def overlap(box, cell):
    wide = min(box[0] + box[2], cell[2]) - max(box[0], cell[0])
    high = min(box[1] + box[3], cell[3]) - max(box[1], cell[1])
    return max(wide, 0) * max(high, 0)


@pytest.mark.parametrize("lvis", [False, True])
def test_accuracies_by_loops(tmp_path, models, lvis):
    task = data.task(tmp_path, data.boxes(tmp_path, lvis))
    content = json.loads((tmp_path / "instances.json").read_text())
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = [category["name"].replace("_", " ") for category in categories]
    assert names == ["old car", "sheep", "aerosol can" if lvis else "train", "toothbrush"] == task.content[0]
    for model in models:
        measured = task.run(model)
        for kind in ("global", "cmli"):
            vectors = np.array([texts_of(model, name)[kind] for name in names])
            top1, top2, by_class = [], [], {}
            for annotation in content["annotations"]:
                if annotation.get("iscrowd"):
                    continue
                image = next(image for image in content["images"] if image["id"] == annotation["image_id"])
                file = tmp_path / "val2017" / image["coco_url"].split("/")[-1]
                size = 0, 0, image["width"], image["height"]
                patches, (rows, columns) = patches_of(model, file, size)
                total = 0
                for n, patch in enumerate(patches.astype(float)):
                    x, y = n % columns * image["width"] / columns, n // columns * image["height"] / rows
                    cell = x, y, x + image["width"] / columns, y + image["height"] / rows
                    total = total + overlap(annotation["bbox"], cell) * patch
                order = np.argsort(-(vectors @ unit(total)))
                target = [category["id"] for category in categories].index(annotation["category_id"])
                top1.append(order[0] == target)
                top2.append(target in order[:2])
                by_class.setdefault(target, []).append(order[0] == target)
            value = {name: measured.measures[f"{kind}/{name}"].value for name in ("top1", "top5", "mean_per_class")}
            assert value["top1"] == pytest.approx(np.mean(top1)) and value["top5"] == 1
            assert value["mean_per_class"] == pytest.approx(np.mean([np.mean(hits) for hits in by_class.values()]))
        assert measured.samples == 3 and measured.figures["boxes"] == len(top1) == 13
        assert measured.figures["chance/top1"] == 0.25 and measured.figures["chance/top5"] == 1


@pytest.mark.parametrize("case", range(20))
def test_whole_cells_as_means_of_patches(case):
    """Boxes that end between patches are means of these; RoIAlign with a sample a patch gives them too."""
    draw = np.random.default_rng(case)
    grid, size = draw.integers(2, 7, 2), draw.integers(5, 40, 2)
    patches = torch.tensor(draw.normal(size=(*grid, 5))).float()
    (top, left), (bottom, right) = np.sort([[draw.integers(0, n), draw.integers(1, n + 1)] for n in grid]).T
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    scale = size[::-1] / grid
    box = [left * scale[1], top * scale[0], right * scale[1], bottom * scale[0]]
    result = dense.pooled(patches.flatten(0, 1), tuple(grid), tuple(size), [tuple(box)])
    cells = torch.tensor([[0.0, left, top, right, bottom]])
    ratio = 1 if (bottom - top, right - left) == (1, 1) else None
    expected = patches[top:bottom, left:right].mean((0, 1))
    torch.testing.assert_close(result[0], expected / expected.norm())
    if ratio:
        aligned = torchvision.ops.roi_align(patches.permute(2, 0, 1)[None], cells, 1, sampling_ratio=1, aligned=True)
        torch.testing.assert_close(result[0], aligned.flatten() / aligned.norm())


def test_a_part_of_a_picture_is_decoded_as_whole_ones_are(tmp_path, models):
    """Transparent pixels are white, and data.max_pixels holds."""
    file, model = tmp_path / "a.png", models[0]
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(file)
    part = model.read(PictureFile(file, (0, 0, 20, 20)))
    assert part.bad is None and part.image.min() == 255
    config = replace(model.config, data=replace(model.config.data, max_pixels=1199))
    part = replace(model, config=config).read(PictureFile(file, (0, 0, 20, 20)))
    assert part.bad == (str(file), "40 x 30 pixels, more than data.max_pixels = 1199")


def entry(key, number, **values):
    def change(content):
        content[key][number] |= values

    return change


def without(key, number, name):
    def change(content):
        del content[key][number][name]

    return change


def whole(key, value):
    def change(content):
        content[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (whole("annotations", []), "its object: its 'annotations' is empty: fetch it again, or repair it"),
        (whole("categories", {}), "its object: its 'categories' is dict, and a list is needed"),
        (lambda content: content.pop("images"), "its object: no 'images'"),
        (whole("images", ["a.jpg"]), "images[0]: str where an object is needed"),
        (without("images", 1, "file_name"), None),
        (without("images", 1, "width"), "images[1]: no 'width'"),
        (entry("images", 1, id=10), "images[1]: its 'id' 10 is that of another"),
        (entry("images", 1, file_name="a.jpg"), "a.jpg cannot be read (no such file): fetch it again"),
        (entry("images", 1, file_name=3), "images[1]: its 'file_name' is int, and a text is needed"),
        (entry("images", 1, width=16), "000000000001.jpg has 15 x 15 pixels, and in "),
        (entry("categories", 0, id=3), "categories[1]: its 'id' 3 is that of another"),
        (entry("categories", 0, name=" "), "categories[0]: its 'name' is ' ', and a text"),
        (entry("annotations", 2, image_id=99), "annotations[2]: its 'image_id' is 99, which is not in the file"),
        (entry("annotations", 2, category_id=4), "annotations[2]: its 'category_id' is 4, which is not in the file"),
        (without("annotations", 2, "bbox"), "annotations[2]: no 'bbox'"),
        (entry("annotations", 2, bbox=[1, 2, 3]), "annotations[2]: its bbox is [1, 2, 3], and four numbers are needed"),
        (entry("annotations", 2, bbox=[1, 2, 3, "4"]), "and four numbers are needed"),
        (entry("annotations", 2, bbox=[1, 2, 3, float("nan")]), "and four numbers are needed"),
        (entry("annotations", 2, bbox=[1, 2, 3, 0]), "its bbox is [1, 2, 3, 0], a box without area"),
        (entry("annotations", 2, bbox=[1, 2, -3, 4]), "a box without area"),
        (entry("annotations", 2, bbox=[1, 2, 30, 4]), "outside of its picture of 15 x 15 pixels"),
        (entry("annotations", 2, bbox=[-2, 2, 5, 4]), "outside of its picture of 15 x 15 pixels"),
        (entry("annotations", 2, bbox=[15.2, 2, 0.5, 4]), "outside of its picture of 15 x 15 pixels"),
    ],
)
def test_damage_is_one_line(tmp_path, change, words):
    settings = data.boxes(tmp_path)
    file = tmp_path / "instances.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    if words is None:
        assert data.task(tmp_path, settings).content
        return
    with pytest.raises(UserError) as error:
        data.task(tmp_path, settings)
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "which cannot be read as JSON ("), ("[]", "list where an object is")]
)
def test_a_file_that_is_no_object(tmp_path, text, words):
    settings = data.boxes(tmp_path)
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(UserError) as error:
        data.task(tmp_path, settings)
    assert words in str(error.value)


def test_a_file_of_crowds_has_no_box(tmp_path):
    settings = data.boxes(tmp_path)
    file = tmp_path / "instances.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no box: fetch it again, or name another"):
        data.task(tmp_path, settings)
