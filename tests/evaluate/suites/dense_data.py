"""Small data sets of masks and boxes in their published formats."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ds_cmli.evaluate.suites import suite
from tests.evaluate.suites.lists import picture, write_suite

SIZES = ((20, 14), (15, 15), (12, 25))  # width, height
ADE = ("wall", "building, edifice", "sky", "floor, flooring", "tree", "ceiling", "road, route", "bed ")
# The classes of COCO without masks, as https://github.com/nightrome/cocostuff names them.
WITHOUT = (
    *("street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door", "blender"),
    *("hair brush",),
)
PROMPTS = ["a {}.", "the big {} here"]


def values(number: int, size: tuple[int, int], among: list[int]) -> np.ndarray:
    """The pixels of a mask: blocks of some values."""
    blocks = np.random.default_rng(number).choice(among, (5, 4)).astype(np.uint8)
    return np.array(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))


def save_mask(file: Path, pixels: np.ndarray, palette: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image = image.convert("P") if image.mode == "P" else image
        image.putpalette(list(range(256)) * 3)
    image.save(file)


def masks(folder: Path, where: str, among: list[int], palette: bool, names: list[str]) -> None:
    """A mask of each name, at `where`."""
    for number, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        save_mask(folder / where.format(name), values(number, size, among), palette)


def pictures(folder: Path, where: str, names: list[str]) -> None:
    for number, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        picture(folder / where.format(name), number, size)


def voc(folder: Path) -> dict:
    names = ["2007_000033", "2007_000042", "2007_000061"]
    pictures(folder, "JPEGImages/{}.jpg", names)
    masks(folder, "SegmentationClass/{}.png", [0, 1, 5, 15, 20, 255], True, names)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names) + "\n")
    return {"kind": "voc", "data": str(folder)}


def ade20k(folder: Path) -> dict:
    names = [f"ADE_val_0000000{number}" for number in (1, 2, 3)]
    pictures(folder, "images/validation/{}.jpg", names)
    masks(folder, "annotations/validation/{}.png", [0, 1, 2, 8, 150], False, names)
    rows = ["Idx\tRatio\tTrain\tVal\tName"]
    for number in range(1, 151):
        name = ADE[number - 1] if number <= len(ADE) else f"thing {number}"
        rows.append(f"{number}{' ' * (number == 22)}\t0.0111\t{number}\t7\t{name}")
    (folder / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return {"kind": "ade20k", "data": str(folder)}


def coco_stuff(folder: Path) -> dict:
    names = [f"00000000{number}" for number in (139, 285, 632)]
    pictures(folder, "images/val2017/{}.jpg", names)
    masks(folder, "annotations/val2017/{}.png", [0, 12, 91, 181, 255], False, names)
    labels = {0: "unlabeled", 1: "person", 13: "stop sign", 92: "banner", 182: "wood"}
    labels |= dict(zip((12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91), WITHOUT, strict=True))
    rows = [f"{number}: {labels.get(number, f'stuff-{number}')}" for number in range(183)]
    (folder / "labels.txt").write_text("\n".join(rows) + "\n")
    return {"kind": "coco_stuff", "data": str(folder)}


def boxes(folder: Path, lvis: bool = False) -> dict:
    """COCO's file has a picture without a box, a box of a crowd and one that exceeds its picture by rounding."""
    images, annotations = [], []
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate((*SIZES, (9, 9))):
        name = f"{number:012}.jpg"
        picture(folder / "val2017" / name, number, (width, height))
        image = {"id": 10 + number, "width": width, "height": height}
        url = f"http://images.cocodataset.org/val2017/{name}"
        images.append(image | ({"coco_url": url} if lvis else {"file_name": name, "coco_url": url}))
        for _ in range(number and 6 if number < 3 else 0):
            left, top = draw.uniform(0, width - 3), draw.uniform(0, height - 3)
            box = [left, top, draw.uniform(1, width - left), draw.uniform(1, height - top)]
            annotations.append({"image_id": 10 + number, "category_id": int(draw.choice([3, 7, 90])), "bbox": box})
    more = [
        {"image_id": 10, "category_id": 7, "bbox": [0, 0, 20.4, 14], "iscrowd": 0},
        {"image_id": 11, "category_id": 3, "bbox": [0, 0, 15, 15], "iscrowd": 1},
    ]
    annotations += more[: 1 if lvis else 2]
    for number, annotation in enumerate(annotations):
        annotation |= {"id": number + 1, "area": 1.0}
    names = {90: "toothbrush", 3: "old car", 7: "aerosol_can" if lvis else "train", 5: "sheep"}
    categories = [{"id": key, "name": name, "frequency": "f"} for key, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    where = "." if lvis else "val2017"
    return {"kind": "boxes", "annotations": str(folder / "instances.json"), "images": str(folder / where)}


def task(folder: Path, settings: dict):
    """The task of these settings, with prompts that a short context holds."""
    return suite.read_suite(write_suite(folder, task={"templates": PROMPTS, **settings}))["task"]
