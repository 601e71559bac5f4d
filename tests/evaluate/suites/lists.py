"""Small lists of benchmarks in their published formats, with pictures, and models that are not trained."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red apple", "green pear", "blue bird", "black cat", "white dog", "old car", "big tree", "cold sea")


def picture(file: Path, number: int, size: tuple[int, int] = (48, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file)


def sugarcrepe(folder: Path, count: int = 4) -> dict:
    """Three of the seven files; returns the settings of the task."""
    (folder / "data").mkdir(parents=True)
    for part, name in enumerate(("add_obj", "replace_att", "swap_obj")):
        entries = {}
        for k in range(count + part):
            picture(folder / "val2017" / f"{k:012}.jpg", k)
            right, wrong = WORDS[(k + part) % 8], WORDS[(3 * k + 1) % 8]
            entries[str(k)] = {"filename": f"{k:012}.jpg", "caption": f"a {right}", "negative_caption": f"a {wrong}"}
        (folder / "data" / f"{name}.json").write_text(json.dumps(entries))
    return {"kind": "sugarcrepe", "files": "data", "images": "val2017"}


def write_suite(folder: Path, **tasks: dict) -> str:
    """A suite of the tasks' settings; returns its file."""
    lines = []
    for name, settings in tasks.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    (folder / "suite.toml").write_text("\n".join(lines))
    return str(folder / "suite.toml")
