"""Boxes with phrases: three published formats, damage of each, and what views of pictures show of them."""

import json

import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data.batch import Collate
from ds_cmli.data.boxes import Boxed, Boxes, in_view
from ds_cmli.data.load import build_data
from ds_cmli.data.sampler import Draw

XML = """<annotation><size><width>100</width><height>50</height></size>
<object><name>1</name><bndbox><xmin>10</xmin><ymin>5</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>20</xmin><ymin>10</ymin><xmax>40</xmax><ymax>45</ymax></bndbox></object>
<object><name>2</name><scene>1</scene></object></annotation>"""
SENTENCES = "[/EN#1/people Two men] in [/EN#2/scene a park] .\n[/EN#1/people Two men] and [/EN#1/people a boy]\n"
BOX = {"image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 20]}
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50}],
    "categories": [{"id": 1, "name": "red_square"}],
    "annotations": [
        BOX,
        {**BOX, "iscrowd": 1},
        {**BOX, "bbox": [10, 5, 0, 20]},
    ],
}
REGION = {"x": 10, "y": 5, "width": 20, "height": 20, "phrase": " the red square "}
GENOME = [{"id": 7, "regions": [{**REGION, "image_id": 7}, {**REGION, "phrase": " "}]}, {"id": 8, "regions": []}]


def entities(folder):
    for name, suffix, text in (("Annotations", "xml", XML), ("Sentences", "txt", SENTENCES)):
        (folder / name).mkdir(parents=True)
        (folder / name / f"a.{suffix}").write_text(text)
    return folder


def test_flickr30k_entities(tmp_path):
    boxes = Boxes(str(entities(tmp_path)))
    # The box around both of the entity's, once for each of its phrases.
    expected = [Boxed("a", (100, 50), (10, 5, 40, 45), phrase) for phrase in ("Two men", "a boy")]
    assert boxes.of("folder/a.jpg") == expected and boxes.of("b.jpg") == []


@pytest.mark.parametrize(
    "content, name, size, phrase, left_out",
    [(COCO, "train/a.jpg", (100, 50), "red square", 1), (GENOME, "VG_100K/7.jpg", (0, 0), "the red square", 1)],
)
def test_json_of_coco_and_of_visual_genome(tmp_path, content, name, size, phrase, left_out):
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(content))
    boxes = Boxes(str(file))
    assert boxes.of(name) == [Boxed(name.split("/")[1][0], size, (10, 5, 30, 25), phrase)]
    assert boxes.left_out == left_out and boxes.fingerprint["boxes"] == 1


REFUSED = "which (cannot be read|has no box)"


@pytest.mark.parametrize(
    "content, words",
    [
        ("", REFUSED),
        ("[1]", REFUSED),
        ("[]", REFUSED),
        (json.dumps(COCO)[:-5], REFUSED),
        (json.dumps([{"regions": [{**REGION, "x": None}]}]), REFUSED),
        (json.dumps([{"regions": [{**REGION, "x": "NaN"}]}]), REFUSED),
        # As the suites name them.
        ("{}", "its object: no 'categories': fetch it again, or repair it"),
        (json.dumps({**COCO, "images": [{"id": 7}]}), r"images\[0\]: no 'coco_url'"),
        (
            json.dumps({**COCO, "annotations": [{"image_id": 7, "category_id": 2}]}),
            r"annotations\[0\]: its 'category_id'",
        ),
        (
            json.dumps({**COCO, "annotations": [{**BOX, "bbox": ["1", 2, 3, 4]}]}),
            r"annotations\[0\]: its bbox is \['1'",
        ),
    ],
)
def test_damage_is_one_line(tmp_path, content, words):
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"^data\.boxes(:| is) .*boxes\.json'?, {words}[^\n]*$"):
        Boxes(str(file))


def test_a_damaged_or_empty_folder_is_one_line(tmp_path):
    for damage in (lambda folder: None, lambda folder: (entities(folder) / "Annotations" / "a.xml").write_text("<a")):
        damage(tmp_path)
        with pytest.raises(UserError, match=r"^data\.boxes is .* cannot be read [^\n]*$"):
            Boxes(str(tmp_path))


def test_views_by_hand():
    boxed = Boxed("a", (100, 50), (10, 5, 30, 25), "x")
    assert in_view(boxed, (100, 50), (0, 0, 100, 50), False) == pytest.approx((0.1, 0.1, 0.3, 0.5))
    assert in_view(boxed, (200, 100), (0, 0, 200, 100), True) == pytest.approx((0.7, 0.1, 0.9, 0.5))  # twice the size
    assert in_view(boxed, (100, 50), (20, 0, 70, 50), False) == pytest.approx((0.0, 0.1, 0.2, 0.5))  # half cut away
    assert in_view(boxed, (100, 50), (30, 0, 80, 50), False) is None
    assert in_view(boxed._replace(size=(0, 0)), (40, 40), (0, 0, 40, 40), False) == (0.25, 0.125, 0.75, 0.625)


def pictures(folder, **settings):
    """Pictures of a red box on blue, and their boxes."""
    folder.mkdir(exist_ok=True)
    rows, genome = ["filepath\ttitle"], []
    for n in range(8):
        image = Image.new("RGB", (120, 80), "blue")
        image.paste("red", (20 + n, 30, 70, 60))
        image.save(folder / f"{n}.png")
        rows.append(f"{n}.png\tsome red on blue")
        regions = [{"x": 20 + n, "y": 30, "width": 50 - n, "height": 30, "phrase": "some red"}]
        genome.append({"id": n, "regions": regions * (n < 7)})
    (folder / "x.csv").write_text("\n".join(rows))
    (folder / "boxes.json").write_text(json.dumps(genome))
    given = {"source": str(folder / "x.csv"), "boxes": str(folder / "boxes.json"), "regions": 2, "held_out": 1}
    return load_preset("tiny", {"data": {**given, **settings}}).data


@pytest.mark.parametrize(
    "settings",
    [{}, {"augmentation": {"random_resized_crop": 0.2, "horizontal_flip": 0.5}}, {"resize": "squash"}],
    ids=str,
)
def test_boxes_follow_the_view(tmp_path, settings):
    config = pictures(tmp_path / "data", **settings)
    data, shown = build_data(config, 0), 0
    assert "data.boxes: 7 boxes with phrases" in "\n".join(data.notices)
    for index in range(len(data.train)):
        for turn in range(6):
            sample = data.train[Draw(index, turn)]
            assert len(sample.regions) == 2 and sample.regions[1] is None
            if sample.regions[0] is None:
                continue
            shown += 1
            left, top, right, bottom = (round(side * config.image_size) for side in sample.regions[0].box)
            red = (sample.image[0] > 128).float()
            inside = red[top:bottom, left:right].sum()
            assert red.sum() - inside <= 2 * (right - left + bottom - top + 2)  # but for the border
            assert inside >= (right - left - 2) * (bottom - top - 2)
    assert shown > 20


def test_a_batch_has_as_many_of_each_picture(tmp_path):
    data = build_data(pictures(tmp_path / "data"), 0)
    samples = [data.train[Draw(index, 0)] for index in range(4)]
    batch = Collate(data.tokenizer)(samples)
    regions = batch.regions
    assert regions.boxes.shape == (4, 2, 4) and regions.input_ids.shape == (8, batch.input_ids.shape[1])
    assert regions.present.view(4, 2).tolist() == [[sample.regions[0] is not None, False] for sample in samples]
    assert (regions.input_ids[1] == batch.input_ids[0]).all()  # in the place of one that is absent
    assert regions.attention_mask.any(1).all()
    equal = regions.phrase_id[::2][regions.present[::2]]
    assert (equal == equal[0]).all()
    assert torch.equal(Collate(data.tokenizer)(samples).to("cpu").regions.boxes, regions.boxes)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"boxes": ""}, "data.boxes is '': data.regions is 2, and .* has no boxes: name their file"),
        ({"boxes": "nowhere.json"}, "data.boxes is 'nowhere.json', which cannot be read"),
    ],
)
def test_mistakes(tmp_path, settings, line):
    with pytest.raises(UserError, match=line):
        build_data(pictures(tmp_path / "data", **settings), 0)
    (tmp_path / "other.json").write_text(json.dumps([{"id": "other", "regions": [REGION]}]))
    with pytest.raises(
        UserError, match=r"none of the 7 pictures that were looked at has a box there, the first is 0\.png"
    ):
        build_data(pictures(tmp_path / "data", boxes=str(tmp_path / "other.json")), 0)


def test_the_loss_needs_regions():
    with pytest.raises(
        UserError, match=r"^data\.regions is 0: regions compares boxes with their phrases: give 1 or more"
    ):
        load_preset("tiny", {"loss": {"weights": {"regions": 1.0}}})
