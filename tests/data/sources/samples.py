"""Small data sets in every form that a source reads, of the same pictures and captions."""

import io
import json
import tarfile

import pytest
from PIL import Image

from ds_cmli.common.errors import UserError
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


def write(folder, rows, images=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k, row in enumerate(rows if images else []):
        Image.new("RGB", (20, 20), (k, 0, 0)).save(folder / row["file_name"])


def rows(count, text="red apple"):
    return [{"file_name": f"{k:03}.png", "text": text} for k in range(count)]


def names(source):
    return [source.name(i) for i in range(len(source))]


def captions(source):
    return [source.captions(i) for i in range(len(source))]


def user_error(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


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


def datasets():
    """The library, whose import takes seconds: where these tests run, and not in each process that collects them."""
    return pytest.importorskip("datasets")


def table(ks, image="image", caption="caption", as_image=False, **more):
    """A `Dataset` of pictures and captions, one text or two."""
    pictures = [{"bytes": picture(k), "path": None} if as_image else picture(k) for k in ks]
    columns = {image: pictures, caption: [f"red apple {k}" for k in ks], **more}
    result = datasets().Dataset.from_dict(columns)
    return result.cast_column(image, datasets().Image()) if as_image else result


def parquet(path, *arguments, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    table(*arguments, **settings).to_parquet(str(path))
    return path
