"""The exported processor: whatever pictures and texts come as, they are prepared as in training."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from ds_cmli.data.images import View
from ds_cmli.inference import Model
from tests.export.conftest import TEXTS

S = 56  # of `tiny`


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported)


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PICTURE = Image.fromarray(noise(300, 500, 3))
FILES = {
    "a JPEG that training decodes at half its scale": encoded(PICTURE, "JPEG"),
    "a JPEG on its side": encoded(PICTURE, "JPEG", exif=oriented(6)),
    "a TIFF on its side": encoded(PICTURE, "TIFF", exif=oriented(6)),
    "16 bits": encoded(Image.fromarray(noise(90, 70, dtype=np.uint16)), "PNG"),
    "a palette": encoded(PICTURE.convert("P"), "PNG"),
    "a palette with transparency": encoded(PICTURE.convert("P"), "PNG", transparency=3),
    "grey and alpha": encoded(Image.fromarray(noise(90, 70, 2), "LA"), "PNG"),
    "RGBA": encoded(Image.fromarray(noise(90, 70, 4)), "PNG"),
    "one bit": encoded(PICTURE.convert("1"), "PNG"),
    "CMYK": encoded(PICTURE.convert("CMYK"), "TIFF"),
    "a GIF": encoded(PICTURE.convert("P"), "GIF"),
    "WebP": encoded(PICTURE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_an_open_file_is_shown_as_in_training_and_left_as_it_was(processor, content):
    with Image.open(io.BytesIO(content)) as image:
        before = image.size, image.mode
        result = processor(images=image)["pixel_values"]
        # A JPEG in memory is decoded whole, where training decodes at half its scale.
        most = 20 if image.format == "JPEG" else 1e-9
        assert (result[0].float() - View(S)(content).float()).abs().mean() < most
        assert (image.size, image.mode) == before


PIXELS = noise(80, 60, 3)
KINDS = {
    "an array": PIXELS,
    "a PIL image": Image.fromarray(PIXELS),
    "a tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "an array that is not contiguous": np.asfortranarray(PIXELS),
    "an opaque array": np.concatenate([PIXELS, np.full((80, 60, 1), 255, np.uint8)], 2),
    "a list": [PIXELS],
    "a tuple": (Image.fromarray(PIXELS),),
    "a batch of arrays": PIXELS[None],
    "a batch of tensors": torch.from_numpy(PIXELS).permute(2, 0, 1)[None],
}


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS.keys())
def test_pixels_in_memory(processor, given):
    result = processor(images=given)["pixel_values"]
    assert result.shape == (1, 3, S, S) and torch.equal(result, processor(images=PIXELS)["pixel_values"])


def test_grey_ones(processor):
    grey = PIXELS[:, :, 0]
    for given in (grey, grey[:, :, None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        result = processor(images=given)["pixel_values"]
        assert torch.equal(result, processor(images=np.stack([grey] * 3, 2))["pixel_values"])


def test_arrays(processor):
    given = {"images": [PIXELS, PIXELS[:50]], "text": TEXTS}
    tensors, arrays = processor(**given), processor(**given, return_tensors="np")
    assert list(arrays) == ["pixel_values", "input_ids", "attention_mask"]
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, tensors[name].numpy()) and array.dtype == tensors[name].numpy().dtype
    assert list(processor(text="a red car", return_tensors="np")) == ["input_ids", "attention_mask"]
    assert list(processor(images=PIXELS, return_tensors="np")) == ["pixel_values"]


def test_texts_are_truncated_as_in_training_whatever_the_tokenizer_says(exported, tmp_path):
    import shutil

    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tmp_path, truncation_side="left").save_pretrained(tmp_path)
    long = "one two three " * 30
    (outcome,) = AutoProcessor.from_pretrained(tmp_path)(text=long)["input_ids"].tolist()
    assert outcome == Model.load(tmp_path, "cpu").tokenizer(long).input_ids


MISTAKES = {
    "images is empty": {"images": []},
    "text is empty": {"text": []},
    "neither images nor text": {},
    "a text is int: give a string": {"text": ["a", 3]},
    "a text is list: give a string": {"text": [["a"]]},
    "channels": {"images": PIXELS.transpose(2, 0, 1)},
    "str": {"images": "picture.png"},
    "list": {"images": [[PIXELS]]},
}


@pytest.mark.parametrize(("line", "given"), MISTAKES.items(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(processor, line, given):
    with pytest.raises((ValueError, TypeError), match=line) as error:
        processor(**given)
    assert "\n" not in str(error.value)


def test_the_processor_is_called_as_others_are(exported):
    processor = AutoProcessor.from_pretrained(exported)
    usual = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert all(torch.equal(usual[name], value) for name, value in processor(text=TEXTS).items())
    whole = processor(text=TEXTS, padding="max_length")
    assert whole["input_ids"].shape == (3, processor.context_length)
    assert torch.equal(whole["attention_mask"].sum(1), usual["attention_mask"].sum(1))
    for given, message in (
        ({"return_tensors": "tf"}, "return_tensors is 'tf': give one of 'pt', 'np', None"),
        ({"padding": False}, "padding is False: give one of True, 'longest', 'max_length'"),
        ({"audio": 1}, "audio: this processor has no such argument; it takes images, text, padding, truncation"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=TEXTS, **given)
