"""Pictures of any aspect."""

import json
import random
from pathlib import Path

from PIL import Image

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14}


NAFLEX = {"use_naflex": True}


SETTINGS = {
    "data": {"aspect_patch": 14, "image_size": 42},
    "student": {"image_overrides": SIZES | NAFLEX},
    "teacher": {"overrides": SIZES | NAFLEX},
}


def of_many_aspects(folder: Path) -> list[str]:
    """`--data` with 63 pictures of many aspects."""
    draw, lines = random.Random(0), []
    folder.mkdir()
    for number in range(63):
        size = draw.randrange(20, 90), draw.randrange(20, 90)
        Image.new("RGB", size, (draw.randrange(256), draw.randrange(256), number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number} of {size}. It is small."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return ["--data", str(folder)]
