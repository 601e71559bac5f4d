"""Small data sets in every form that a source reads, of the same pictures and captions."""

import io
import json
import tarfile

from PIL import Image

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.load import build_data


def picture(k: int) -> bytes:
    """A PNG whose colour says which one it is."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (k % 256, k // 256, 0)).save(out, "PNG")
    return out.getvalue()


def tar(path, members, end=True):
    """A shard of (name, content) members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def members(ks, caption="red apple {k}"):
    """What img2dataset writes for each sample."""
    for k in ks:
        text = caption.format(k=k)
        yield f"{k:06}.png", picture(k)
        yield f"{k:06}.txt", text.encode()
        yield f"{k:06}.json", json.dumps({"caption": text, "url": "x"}).encode()


def build(source, seed=0, **settings):
    source = source if isinstance(source, list) else str(source)
    return build_data(DataConfig(source=source, image_size=8, tokenizer="builtin", **settings), seed)


def shown(sample) -> int:
    """Which picture a sample shows."""
    return int(sample.image[0, 4, 4]) + 256 * int(sample.image[1, 4, 4])
