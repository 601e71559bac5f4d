"""Segmentation from masks in the published formats, against the metrics computed pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.data.transforms import Framing
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.suites import dense
from ds_cmli.evaluate.suites.task import Measure
from tests.evaluate.suites import dense_data as data
from tests.models import dual_models, open_clip_models
from tests.run_folder import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return EvaluatedModel.load(str(write_run(tmp_path_factory.mktemp("run"))), 3, 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return EvaluatedModel.load(str(dual_models.clip(tmp_path_factory.mktemp("clip"))), 3, 0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def bilinear(grid, height, width):
    """[h, w, Q] -> [height, width, Q], by the formula of pixels' centres."""
    rows, columns = grid.shape[:2]

    def weights(pixels, cells):
        out = np.zeros((pixels, cells))
        for x in range(pixels):
            u = max((x + 0.5) * cells / pixels - 0.5, 0)
            out[x, int(u)] += 1 - u % 1
            out[x, min(int(u) + 1, cells - 1)] += u % 1
        return out

    return np.einsum("yi,xj,ijq->yxq", weights(height, rows), weights(width, columns), grid)


def texts_of(model, name, known={}):  # noqa: B006
    """The vectors of a name, from one prompt at a time: of the class's text, and of its tokens."""
    if (model.name, name) not in known:
        known[model.name, name] = vectors_of(model, name)
    return known[model.name, name]


def vectors_of(model, name):
    prompts = [model.texts([prompt.replace("{}", name)]) for prompt in data.PROMPTS]
    mean = unit(np.mean([prompt.cls[0].numpy() for prompt in prompts], 0))
    projected = unit(model.objective.student.projection(torch.tensor(mean)).detach().numpy())
    return {"global": projected, "cmli": np.mean([prompt.tokens.float().numpy().mean(0) for prompt in prompts], 0)}


def cosines(model, file, box, vectors):
    """The scores of one view, at its pixels: [H, W, Q]."""
    left, top, right, bottom = box
    patches, grid = patches_of(model, file, box)
    return bilinear(patches.reshape(*grid, -1) @ vectors.T, bottom - top, right - left)


def patches_of(model, file, box):
    """The patches of a part of a picture, resized to the model's square, or in its own aspect; and their grid."""
    config = model.config.data
    if config.aspect_patch:
        images = model.images([PictureFile(file, box)])
        return images.patches_of(0).float().numpy(), images.grid_of(0)
    pixels = torch.from_numpy(np.array(Image.open(file).crop(box))).permute(2, 0, 1)
    square = Framing.of(config).resized(pixels, (config.image_size, config.image_size))
    with torch.no_grad():
        _, patches = model.objective.student.image_embeddings(square[None])
    return patches[0].float().numpy(), model.objective.student.grid


def by_loops(model, task, names, class_of, kind, first, background=None, boxes=None):
    """The mean intersection over union and the accuracy of all pixels; the mask's class of value v is v - first."""
    vectors = np.array([texts_of(model, name)[kind] for name in names])
    both, either, right, count = {}, {}, 0, 0
    for picture, (width, height) in task.pictures:
        total, times = np.zeros((height, width, len(names))), np.zeros((height, width, 1))
        for box in boxes(width, height) if boxes else [(0, 0, width, height)]:
            view = slice(box[1], box[3]), slice(box[0], box[2])
            total[view] += cosines(model, picture.picture, box, vectors)
            times[view] += 1
        scores = total / times
        mask = np.array(Image.open(picture.mask))
        for y in range(height):
            for x in range(width):
                ours = class_of[int(scores[y, x].argmax())]
                if background is not None:
                    logits = model.scales[kind] * scores[y, x]
                    probability = 1 / np.exp(logits - logits.max()).sum()
                    ours = ours if probability >= background else "background"
                theirs = first(int(mask[y, x]))
                if theirs is None:
                    continue
                right += ours == theirs
                count += 1
                for label in {ours, theirs}:
                    either[label] = either.get(label, 0) + 1
                    both[label] = both.get(label, 0) + (ours == theirs)
    return np.mean([both[label] / either[label] for label in either]), right / count


def check(measured, model, task, *how, **more):
    assert measured.samples == 3
    for kind in {"global", "cmli"} & set(model.scales):
        miou, accuracy = by_loops(model, task, how[0], how[1], kind, how[2], **more)
        assert measured.measures[f"{kind}/miou"].value == pytest.approx(miou)
        assert measured.measures[f"{kind}/pixel_accuracy"].value == pytest.approx(accuracy)


VOC = "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,horse,motorbike,person,potted plant"
VOC = [*VOC.split(","), "sheep", "sofa", "train", "tv monitor"]
LABELS = dict(enumerate(["background", *VOC]))


@pytest.mark.parametrize("name", ["run", "clip"])
def test_voc_without_background(tmp_path, name, request):
    model = request.getfixturevalue(name)
    task = data.task(tmp_path, data.voc(tmp_path))
    measured = task.run(model)
    assert set(measured.measures) == {
        f"{kind}/{metric}" for kind in model.scales for metric in ("miou", "pixel_accuracy")
    }
    check(measured, model, task, VOC, VOC, lambda value: LABELS.get(value) if value else None)


def test_voc_with_background(tmp_path, run):
    settings = data.voc(tmp_path)
    # About the middle of what the model gives, so that some pixels fall below.
    task = data.task(tmp_path, settings | {"background": 0.06})
    measured = task.run(run)
    assert measured.figures["classes"] == 21
    check(measured, run, task, VOC, VOC, LABELS.get, background=0.06)

    names = ["sky, wall", *VOC[:-1], "monitor, television"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    task = data.task(tmp_path, settings | {"background": 0.06, "classes": "names.txt"})
    queries = ["sky", "wall", *VOC[:-1], "monitor", "television"]
    class_of = ["background", "background", *VOC, VOC[-1]]
    how = queries, class_of, LABELS.get
    check(task.run(run), run, task, *how, background=0.06)


def test_ade20k_by_its_published_names(tmp_path, clip):
    task = data.task(tmp_path, data.ade20k(tmp_path))
    rows = [*data.ADE, *(f"thing {number}" for number in range(9, 151))]
    names, class_of = [], []
    for number, row in enumerate(rows, 1):
        for name in row.strip().split(", "):
            names.append(name)
            class_of.append(number)
    assert task.names[0] == names
    check(task.run(clip), clip, task, names, class_of, lambda value: value or None)


def test_coco_stuff_has_171_classes(tmp_path, clip):
    task = data.task(tmp_path, data.coco_stuff(tmp_path))
    names = [line.split(": ")[1] for line in (tmp_path / "labels.txt").read_text().splitlines()[1:]]
    kept = [number for number, name in enumerate(names) if name not in data.WITHOUT]
    measured = task.run(clip)
    assert measured.figures["classes"] == 171 and task.names[0] == [names[number] for number in kept]
    check(measured, clip, task, task.names[0], kept, lambda value: value if value < 255 else None)
    # With a background, unlabeled pixels are one.
    task = data.task(tmp_path, {"kind": "coco_stuff", "data": str(tmp_path), "background": 0.02})
    how = task.names[0], kept, lambda value: value if value < 255 else "background"
    check(task.run(clip), clip, task, *how, background=0.02)


def test_windows(tmp_path, clip):
    # The model takes 56 pixels.
    task = data.task(tmp_path, data.voc(tmp_path) | {"shorter_side": 84, "background": 0.1})

    def boxes(width, height):
        side = min(width, height) * 56 / 84
        out = []
        for axis in (height, width):
            places, at = [], 0.0
            while at + side < axis - 1e-9:
                places.append(at)
                at += side / 2
            out.append([*places, axis - side])
        return [(*map(round, (x, y)), *map(round, (x + side, y + side))) for y in out[0] for x in out[1]]

    assert len(boxes(20, 14)) > 4
    check(task.run(clip), clip, task, VOC, VOC, LABELS.get, boxes=boxes, background=0.1)
    task = data.task(tmp_path, {"kind": "voc", "data": str(tmp_path), "shorter_side": 40})
    with pytest.raises(UserError, match=r"shorter_side is 40, and .* takes 56 pixels: give at least"):
        task.run(clip)


def test_parts_that_overlap_have_their_mean():
    draw = np.random.default_rng(0)
    boxes, vectors = [(0, 0, 4, 4), (2, 0, 6, 4)], draw.normal(size=(3, 5))
    patches = draw.normal(size=(2, 2, 2, 5))
    total, times = np.zeros((4, 6, 3)), np.zeros((4, 6, 1))
    for (left, top, right, bottom), of_part in zip(boxes, patches, strict=True):
        total[top:bottom, left:right] += bilinear(of_part @ vectors.T, 4, 4)
        times[top:bottom, left:right] += 1
    probability = np.exp(2 * total / times)
    probability /= probability.sum(2, keepdims=True)
    least = float(np.median(probability.max(2)))
    expected = np.where(probability.max(2) < least, 0, probability.argmax(2) + 1)
    parts = [
        dense.Part(box, torch.tensor(p).flatten(0, 1).float(), (2, 2)) for box, p in zip(boxes, patches, strict=True)
    ]
    result = dense.predicted(parts, (6, 4), torch.tensor(vectors).float(), torch.arange(1, 4), 2.0, least + 1e-6)
    assert result.tolist() == expected.tolist()


@pytest.mark.parametrize("size", [(20, 14), (14, 20), (15, 15), (1000, 333)])
@pytest.mark.parametrize("share", [1.0, 0.667, 0.3, 0.01])
def test_windows_cover_the_picture(size, share):
    side = max(1, min(size) * share)
    boxes = dense.windows(size, min(size) * share)
    shown = np.zeros(size)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert abs(right - left - side) <= 1 and abs(bottom - top - side) <= 1
        shown[left:right, top:bottom] = 1
    assert shown.all() and len(boxes) <= math.prod(math.ceil(2 * (length / side - 1)) + 1 for length in size)


def test_names_in_blocks(monkeypatch):
    part = dense.Part((0, 0, 8, 6), torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), (2, 3))
    how = [part], (8, 6), torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), torch.arange(40), 2.0, 0.3
    expected = dense.predicted(*how)
    monkeypatch.setattr(dense, "PIXELS", 3 * 48)
    assert 0 < (expected == 0).sum() < 48 and torch.equal(dense.predicted(*how), expected)


@pytest.mark.parametrize("case", range(10))
def test_areas_as_torchmetrics_counts_them(case):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    draw = torch.Generator().manual_seed(case)
    index = MulticlassJaccardIndex(7, average="macro", ignore_index=-1)
    accuracy = MulticlassAccuracy(7, average="micro", ignore_index=-1)
    areas = []
    for _ in range(3):
        ours, theirs = (torch.randint(low, 6, (9, 8), generator=draw) for low in (0, -1))
        areas.append(dense.areas(ours, theirs, 7))
        for metric in (index, accuracy):
            metric.update(ours[None], theirs[None])
    both, ours, theirs = torch.stack(areas, 1).double()
    assert Measure(both, ours + theirs - both).value == pytest.approx(index.compute().item())
    assert (both.sum() / theirs.sum()).item() == pytest.approx(accuracy.compute().item())


def test_other_models_segment(tmp_path):
    """Whose patches are their own pictures' aspect, or whose pictures are resized to a square."""
    settings = data.voc(tmp_path / "voc") | {"background": 0.07}
    folders = [dual_models.siglip(tmp_path / "siglip"), dual_models.naflex(tmp_path / "naflex")]
    folders.append(open_clip_models.saved(tmp_path / "open_clip", "vit"))
    for folder in folders:
        model = EvaluatedModel.load(str(folder), 3, 0)
        task = data.task(tmp_path, settings)
        check(task.run(model), model, task, VOC, VOC, LABELS.get, background=0.07)


def test_scores_that_are_nan_are_no_class():
    part = dense.Part((0, 0, 4, 3), torch.full((6, 5), torch.nan), (2, 3))
    with pytest.raises(UserError, match="the model's scores are NaN"):
        dense.predicted([part], (4, 3), torch.eye(5), torch.arange(5), 1.0)


def broken_png(file):
    file.write_bytes(file.read_bytes()[:60])


def rgb(file):
    Image.open(file).convert("RGB").save(file)


def deep(file):
    Image.fromarray(np.array(Image.open(file)).astype(np.uint16)).save(file)


def changed(value):
    def change(file):
        pixels = np.array(Image.open(file))
        pixels[3, 2] = value
        Image.fromarray(pixels).save(file)

    return change


def turned(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).save(file, exif=exif)


MASK, PICTURE = "SegmentationClass/2007_000042.png", "JPEGImages/2007_000042.jpg"
LIST = "ImageSets/Segmentation/val.txt"


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (MASK, lambda file: file.unlink(), "2007_000042.png: no such file: fetch it again, or repair it"),
        (MASK, lambda file: file.write_bytes(b""), "2007_000042.png: cannot identify image file"),
        (MASK, broken_png, "2007_000042.png: "),
        (MASK, rgb, "2007_000042.png: its pixels are RGB, and not class numbers: 8 bits or a palette's"),
        (MASK, deep, "2007_000042.png: its pixels are I;16B, and not class numbers"),
        (MASK, changed(21), "2007_000042.png: row 3, column 2 is 21, which is no class"),
        (
            MASK,
            lambda file: Image.new("L", (15, 14)).save(file),
            "2007_000042.png: 15 x 14 pixels, and ",
        ),
        (MASK, lambda file: Image.new("1", (15, 15)).save(file), "its pixels are 1, and not class numbers"),
        (PICTURE, lambda file: file.unlink(), "2007_000042.jpg cannot be read (no such file): fetch it again"),
        (PICTURE, lambda file: file.write_bytes(b"no"), "2007_000042.jpg cannot be read (cannot identify"),
        (PICTURE, turned, "2007_000042.jpg has the EXIF orientation 6, which masks and boxes do not know"),
        (
            PICTURE,
            lambda file: file.write_bytes(file.read_bytes()[:-30]),
            "2007_000042.jpg cannot be read (",
        ),
        (LIST, lambda file: file.unlink(), "val.txt, which cannot be read ("),
        (LIST, lambda file: file.write_text("\n \n"), "val.txt, which is empty: fetch it again"),
        (LIST, lambda file: file.write_bytes(b"\xff\xfe"), "val.txt, which cannot be read ('utf-8' codec"),
        (LIST, lambda file: file.write_text("other"), "other.jpg cannot be read (no such file)"),
    ],
)
def test_damage_is_one_line(tmp_path, clip, file, damage, words):
    settings = data.voc(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError) as error:
        data.task(tmp_path, settings).run(clip)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "file", "change", "words"),
    [
        (data.ade20k, "objectInfo150.txt", lambda rows: rows[:-1], "has 149 rows of 150: fetch it again"),
        (
            data.ade20k,
            "objectInfo150.txt",
            lambda rows: [*rows[:3], "3 sky", *rows[4:]],
            "line 4: '3 sky' where",
        ),
        (data.ade20k, "objectInfo150.txt", lambda rows: [rows[0], *rows[2:], rows[1]], "line 2: '2\\t0.0111\\t2\\t7"),
        (data.coco_stuff, "labels.txt", lambda rows: rows[1:], "has 182 rows of 183: fetch it again"),
        (data.coco_stuff, "labels.txt", lambda rows: [*rows[:9], "9: ", *rows[10:]], "line 10: '9:' where number 9"),
    ],
)
def test_damage_of_names_is_one_line(tmp_path, dataset, file, change, words):
    settings = dataset(tmp_path)
    rows = (tmp_path / file).read_text().splitlines()
    (tmp_path / file).write_text("\n".join(change(rows)))
    with pytest.raises(UserError) as error:
        data.task(tmp_path, settings)
    assert f"{file}" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"background": 0}, "task.background is 0: Input should be greater than 0"),
        ({"background": 1.0}, "task.background is 1.0: Input should be less than 1"),
        ({"shorter_side": -1}, "task.shorter_side is -1: Input should be greater than or equal to 0"),
        ({"split": "test"}, "test.txt, which cannot be read"),
        ({"templates": "opena"}, "task.templates is 'opena': Input should be 'openai' or 'seven'"),
        ({"templates": ["a photo"]}, "write {} once in 'a photo', where the class's name goes"),
        ({"templates": []}, "write {} once in ''"),
        ({"classes": "names.txt"}, "names.txt has 2 lines: give one for each of 20 classes"),
        ({"classes": "commas.txt"}, "commas.txt has ', ,' where a class's name is needed"),
        ({"data": "none"}, "task.data is 'none': no such file or folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, words):
    (tmp_path / "names.txt").write_text("dog\ncat")
    (tmp_path / "commas.txt").write_text("\n".join([", ,", *VOC[1:]]))
    with pytest.raises(UserError) as error:
        data.task(tmp_path, data.voc(tmp_path) | settings)
    assert words in str(error.value)


def test_masks_of_no_class(tmp_path, clip):
    settings = data.voc(tmp_path)
    for mask in (tmp_path / "SegmentationClass").glob("*.png"):
        Image.fromarray(np.array(Image.open(mask)) * 0 + 255).save(mask)
    with pytest.raises(UserError, match="no mask has a pixel of a class: give another split"):
        data.task(tmp_path, settings).run(clip)


def test_a_folder_without_masks(tmp_path):
    settings = data.ade20k(tmp_path)
    with pytest.raises(UserError, match="has no mask annotations/training/NAME"):
        data.task(tmp_path, settings | {"split": "training"})
