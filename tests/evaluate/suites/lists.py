"""Small lists of benchmarks in their published formats, with pictures, and suites of them.

Each function writes into a folder and returns the settings of its task.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red apple", "green pear", "blue bird", "black cat", "white dog", "old car", "big tree", "cold sea")
PATTERNS = ("Orientation", "Color")
Settings = dict[str, object]


def picture(file: Path, number: int, size: tuple[int, int] = (24, 20)) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file)


def words(k: int) -> str:
    return f"{k} a {WORDS[k % 8]} and a {WORDS[(3 * k + 1) % 8]}"


def write(file: Path, content: object) -> None:
    """Write JSON; of a list for a name with an l, one entry on each line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(content)]
    if "jsonl" in file.suffix:
        lines = list(map(json.dumps, content))
    file.write_text("\n".join(lines) + "\n")


def sugarcrepe(folder: Path) -> Settings:
    for part, name in enumerate(("add_obj", "replace_att", "swap_obj")):
        entries = {}
        for k in range(4 + part):
            picture(folder / "val2017" / f"{k:012}.jpg", k)
            right, wrong = WORDS[(k + part) % 8], WORDS[(3 * k + 1) % 8]
            entries[str(k)] = {"filename": f"{k:012}.jpg", "caption": f"a {right}", "negative_caption": f"a {wrong}"}
        write(folder / "data" / f"{name}.json", entries)
    return {"kind": "sugarcrepe", "files": "data", "images": "val2017"}


def _visual_genome(folder: Path, count: int, more) -> list[dict]:
    entries = []
    for k in range(count):
        picture(folder / "images" / f"{k % 5}.jpg", k % 5, (40, 30))
        box = {"bbox_x": k % 4, "bbox_y": k % 3, "bbox_w": 20 + k % 5, "bbox_h": 18 + k % 7}
        captions = {"true_caption": f"the {words(k)}", "false_caption": f"the {words(k + 1 + k % 3)}"}
        entries.append({"image_id": str(k), "image_path": f"{k % 5}.jpg", **box, **captions, **more(k)})
    return entries


def vg_relation(folder: Path) -> Settings:
    names = ("on", "behind", "next to", "holding")  # one of which is left out of the mean
    entries = _visual_genome(folder, 12, lambda k: {"relation_name": names[k % 4]})
    write(folder / "visual_genome_relation.json", entries)
    return {"kind": "vg_relation", "file": "visual_genome_relation.json", "images": "images"}


def vg_attribution(folder: Path) -> Settings:
    pairs = (["white", "open"], ["white", "open"], ["red", "small"], ["old", "wet"])
    entries = _visual_genome(folder, 56, lambda k: {"attributes": pairs[k % 4 if k < 52 else 2]})
    write(folder / "visual_genome_attribution.json", entries)
    return {"kind": "vg_attribution", "file": "visual_genome_attribution.json", "images": "images"}


def coco_order(folder: Path) -> Settings:
    entries = []
    for k in range(6):
        picture(folder / "val2014" / f"COCO_val2014_{k:012}.jpg", k)
        options = [words(k), *(words(k + shift) for shift in (1, 0, 2, 3))]  # the third is the right one again
        entries.append({"image": f"val2014/COCO_val2014_{k:012}.jpg", "caption_options": options})
    write(folder / "coco_order.json", entries)
    return {"kind": "coco_order", "file": "coco_order.json", "images": "."}


def winoground(folder: Path) -> Settings:
    entries = []
    for k in range(8):
        for side in (0, 1):
            picture(folder / "images" / f"ex_{k}_img_{side}.png", 2 * k + side)
        names = {f"image_{side}": f"ex_{k}_img_{side}" for side in (0, 1)}
        captions = {"caption_0": words(k), "caption_1": words(k + 1)}
        entries.append({"id": k, **names, **captions, "tag": "Noun", "num_main_preds": 1, "collapsed_tag": "Object"})
    write(folder / "examples.jsonl", entries)
    return {"kind": "winoground", "file": "examples.jsonl", "images": "images"}


def colorswap(folder: Path) -> Settings:
    entries = []
    for k in range(6):
        for side in (1, 2):
            picture(folder / "images" / f"img_{k}_{side}.png", 2 * k + side)
        names = {f"image_{side}": f"images/img_{k}_{side}.png" for side in (1, 2)}
        captions = {"caption_1": words(k), "caption_2": words(k + 3)}
        entries.append({"id": k, **captions, **names, "image_source": "midjourney", "caption_source": "human"})
    write(folder / "test.json", entries)
    return {"kind": "colorswap", "file": "test.json", "images": "."}


def mmvp(folder: Path) -> Settings:
    rows = ["Question ID,Type,Statement"]
    for k in range(1, 17):
        pattern = PATTERNS[(k - 1) // 8]
        picture(folder / "MMVP_VLM_Images" / pattern / f"{k}.jpg", k)
        rows.append(f'{k},{pattern},"{WORDS[k % 8]}, with a ""{k}"" on it"')
    (folder / "Questions.csv").write_text("\n".join(rows) + "\n")
    return {"kind": "mmvp", "file": "Questions.csv", "images": "MMVP_VLM_Images"}


def long_text(k: int) -> str:
    return ". ".join(words(k + shift) for shift in range(1 + 2 * (k % 4)))


def docci(folder: Path) -> Settings:
    entries = []
    for k in range(9):
        picture(folder / "images" / f"test_{k:05}.jpg", k)
        split = "train" if k == 4 else "test"
        row = {"example_id": f"test_{k:05}", "split": split, "image_file": f"test_{k:05}.jpg"}
        entries.append({**row, "description": long_text(k)})
    write(folder / "docci_descriptions.jsonlines", entries)
    return {"kind": "docci", "file": "docci_descriptions.jsonlines", "images": "images"}


def dci(folder: Path) -> Settings:
    for k in range(8):
        picture(folder / "photos" / f"sa_{k}.jpg", k)
        extra = long_text(k) if k else ""
        content = {"image": f"sa_{k}.jpg", "short_caption": words(k), "extra_caption": extra, "mask_data": {}}
        write(folder / "annotations" / f"{k}.json", content)
    return {"kind": "dci", "files": "annotations", "images": "photos"}


def iiw(folder: Path) -> Settings:
    for first, name, key, suffix in ((0, "IIW-400", "image/key", ""), (4, "DCI_Test", "image", ".jpg")):
        entries = []
        for k in range(4):
            picture(folder / name / "photos" / f"{name}_{k}.jpg", first + k)
            entries.append({key: f"{name}_{k}{suffix}", "IIW": long_text(first + k), "objects": []})
        write(folder / name / "data.jsonl", entries)
    files, images = ["IIW-400/data.jsonl", "DCI_Test/data.jsonl"], ["IIW-400/photos", "DCI_Test/photos"]
    return {"kind": "iiw", "files": files, "images": images}


def urban1k(folder: Path) -> Settings:
    (folder / "caption").mkdir(parents=True)
    for k in range(8):
        picture(folder / "image" / f"{k}.jpg", k)
        (folder / "caption" / f"{k}.txt").write_text(f"{long_text(k)}\nnot read\n")
    return {"kind": "urban1k", "files": "caption", "images": "image"}


def sharegpt4v(folder: Path) -> Settings:
    entries = []
    for k in range(10):
        if k < 8:
            picture(folder / "coco" / f"{k}.jpg", k)
        answer = {"from": "gpt", "value": long_text(k).replace(". ", ".\n")}
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, answer]
        entries.append({"id": str(k), "image": f"coco/{k}.jpg", "conversations": turns})
    write(folder / "share-captioner.json", entries)
    return {"kind": "sharegpt4v", "file": "share-captioner.json", "images": ".", "first": 8}


def retrieval(folder: Path) -> Settings:
    images = []
    for k in range(7):
        picture(folder / "photos" / f"{k}.jpg", k)
        sentences = [{"raw": words(3 * k + c)} for c in range(1 + k % 3)]
        images.append({"filename": f"{k}.jpg", "split": "test" if k else "train", "sentences": sentences})
    write(folder / "dataset.json", {"images": images})
    return {"kind": "retrieval", "data": "dataset.json", "images": "photos", "split": "test"}


def pointing_game(folder: Path) -> Settings:
    for part in ("Annotations", "Sentences"):
        (folder / part).mkdir(parents=True)
    for k in range(4):
        picture(folder / "flickr30k-images" / f"{k}.jpg", k, (90, 60))
        (folder / "Sentences" / f"{k}.txt").write_text(
            f"[/EN#{k}/animals {WORDS[k]}] .\nthe [/EN#{k}/x {WORDS[k + 1]}]"
        )
        box = "<bndbox><xmin>15</xmin><ymin>0</ymin><xmax>45</xmax><ymax>60</ymax></bndbox>"
        size = "<size><width>90</width><height>60</height></size>"
        content = f"<annotation>{size}<object><name>{k}</name>{box}</object></annotation>"
        (folder / "Annotations" / f"{k}.xml").write_text(content)
    (folder / "test.txt").write_text("0\n1\n3\n")
    return {"kind": "pointing_game", "boxes": ".", "images": "flickr30k-images"}


CHOICES = (sugarcrepe, vg_relation, vg_attribution, coco_order, winoground, colorswap, mmvp)
LONG = (docci, dci, iiw, urban1k, sharegpt4v)


def write_suite(folder: Path, **tasks: Settings) -> str:
    """A suite of the tasks' settings; returns its file."""
    lines = []
    for name, settings in tasks.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.toml").write_text("\n".join(lines))
    return str(folder / "suite.toml")
