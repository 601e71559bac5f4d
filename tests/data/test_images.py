import io

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View


def stored(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def corners(width=60, height=40):
    """Return a red image with a blue left half."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (0, 0, width // 2, height))
    return image


def close(pixels, colour, limit=3):
    return (pixels.int() - torch.tensor(colour)[:, None, None]).abs().max() <= limit


@pytest.mark.parametrize("resize", ["crop", "shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_equals_pillow_but_for_the_last_bit(resize, interpolation):
    noise = np.random.default_rng(0).integers(0, 255, (50, 73, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    filter_ = Image.Resampling[interpolation.upper()]
    expected = {
        "crop": image.crop((11, 0, 61, 50)).resize((20, 20), filter_),
        "shortest": image.resize((29, 20), filter_).crop((4, 0, 24, 20)),
        "squash": image.resize((20, 20), filter_),
    }[resize]
    ours = View(20, resize, interpolation)(stored(image)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - np.asarray(expected).astype(int)).max() <= 1
    if resize != "crop":
        pixels = View(20, f"{resize}_pillow", interpolation)(stored(image)).permute(1, 2, 0).numpy()
        assert (pixels == np.asarray(expected)).all()


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_turned_upright():
    content = stored(corners(800, 400), "JPEG", quality=95)
    pixels = View(20)(content)
    assert close(pixels[:, :, :9], [0, 0, 254], 8) and close(pixels[:, :, 11:], [254, 0, 0], 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned upright by 90 degrees: left becomes up
    pixels = View(20)(stored(corners(40, 40), "JPEG", exif=exif, quality=95))
    assert close(pixels[:, :9], [0, 0, 254], 8) and close(pixels[:, 11:], [254, 0, 0], 8)


def test_transparency_is_on_white_and_every_mode_becomes_rgb():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = View(8)(stored(clear))
    assert close(pixels[:, :, :4], [0, 0, 255], 0) and close(pixels[:, :, 4:], [255, 255, 255], 0)
    for mode, colour in (("L", 7), ("1", 1), ("P", 3), ("LA", (7, 255)), ("CMYK", (0, 0, 0, 0))):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert View(4)(stored(Image.new(mode, (9, 9), colour), kind)).shape == (3, 4, 4)
    grey = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))  # sixteen bits are scaled
    assert close(View(8)(stored(grey)), [128, 128, 128], 0)
    with pytest.raises(ValueError, match="8 bits"):
        View(8)(stored(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize("content", [b"", b"not an image", stored(corners())[:80], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_raises(content):
    with pytest.raises(Exception, match=r"identify|truncated|broken"):
        View(8)(content)


def augmented(seed=0, **strengths):
    return View.of(DataConfig(image_size=16, augmentation=strengths), seed)


def test_views_are_a_function_of_seed_turn_and_index():
    view = augmented(random_resized_crop=0.2, color_jitter=0.4, horizontal_flip=0.5)
    content = stored(corners())
    state = torch.get_rng_state()
    first = view(content, 3, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(view(content, 3, 7), first)
    other_views = [view(content, 3, 8), view(content, 4, 7), augmented(1, random_resized_crop=0.2)(content, 3, 7)]
    assert not any(torch.equal(first, other_view) for other_view in other_views)


def test_flips_have_their_probability():
    content = stored(corners())
    view = augmented(horizontal_flip=0.25)
    plain = View(16)(content)
    images = [view(content, 0, index) for index in range(400)]
    num_flipped = sum(torch.equal(image, plain.flip(-1)) for image in images)
    assert 70 < num_flipped < 130
    assert num_flipped + sum(torch.equal(image, plain) for image in images) == 400
