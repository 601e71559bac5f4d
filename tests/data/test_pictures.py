import io
import os
import socket
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Refused
from ds_cmli.data.pictures import decode, load_image, read_picture
from ds_cmli.data.transforms import Framing


def image_value(mode, colour, size=(4, 4)):
    return load_image(Image.new(mode, size, colour), Framing(4))[:, 0, 0].tolist()


def test_every_kind_of_image_becomes_rgb_on_white():
    assert image_value("RGB", (1, 2, 3)) == [1, 2, 3]
    assert image_value("L", 7) == [7, 7, 7]
    assert image_value("RGBA", (0, 0, 0, 0)) == [255, 255, 255]
    assert image_value("LA", (0, 255)) == [0, 0, 0]
    assert image_value("I;16", 0x8000) == [128, 128, 128]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert load_image(palette, Framing(4))[:, 0, 0].tolist() == [10, 20, 30]
    palette.info["transparency"] = 0
    assert load_image(palette, Framing(4))[:, 0, 0].tolist() == [255, 255, 255]


def test_images_are_cropped_at_the_centre_and_turned_upright():
    wide = Image.new("RGB", (12, 4), (0, 0, 0))
    wide.paste((255, 0, 0), (4, 0, 8, 4))
    assert (load_image(wide, Framing(4))[0] == 255).all()  # the middle 4 x 4
    upside = Image.new("RGB", (4, 4), (0, 0, 0))
    upside.paste((255, 255, 255), (0, 0, 4, 2))
    upside.getexif()[0x0112] = 3  # orientation: turned by 180 degrees
    assert load_image(upside, Framing(4))[0, :, 0].tolist() == [0, 0, 255, 255]


def read(path, root=None, max_pixels=10_000, follow_symlinks=False):
    return read_picture(path, os.path.realpath(root or path.parent), Framing(8), max_pixels, follow_symlinks)


def refused(*arguments, **settings):
    with pytest.raises(Refused) as error:
        read(*arguments, **settings)
    return str(error.value)


def levels(tmp_path, samples, form="TIFF"):
    """What a file with these samples in its pixels is read as."""
    file = tmp_path / f"x.{form.lower()}"
    Image.fromarray(np.tile(samples, (8, 1))).save(file, form)
    return read(file)[0, 0].tolist()


RAMP = np.arange(8) / 7
SHOWN = [round(float(v)) for v in 255 * RAMP]


@pytest.mark.parametrize("form", ["TIFF", "PNG", "PPM"])
def test_16_bits_are_scaled_to_8(tmp_path, form):
    assert levels(tmp_path, (65535 * RAMP).astype(np.uint16), form) == pytest.approx(SHOWN, abs=1)
    # Their range is declared: a dark picture stays dark.
    assert max(levels(tmp_path, (200 * RAMP).astype(np.uint16), form)) <= 1


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_32_bits_have_the_range_that_their_samples_fill(tmp_path, white):
    assert levels(tmp_path, (white * RAMP).astype(np.int32)) == pytest.approx(SHOWN, abs=1)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_have_the_range_that_their_samples_fill(tmp_path, white):
    assert levels(tmp_path, (white * RAMP).astype(np.float32)) == pytest.approx(SHOWN, abs=1)


def tiff(bits, data):
    """An 8 x 8 grey TIFF of unsigned samples."""
    tags = [(256, 3, 8), (257, 3, 8), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1), (278, 3, 8)]
    entries = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in [*tags, (279, 4, len(data))]]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + data


def test_12_and_unsigned_32_bits_are_scaled_by_what_the_file_declares(tmp_path):
    twelve = [int(4095 * v) for v in RAMP]
    packed = b"".join(((a << 12) + b).to_bytes(3, "big") for a, b in zip(twelve[::2], twelve[1::2], strict=True))
    (tmp_path / "12.tiff").write_bytes(tiff(12, 8 * packed))
    (tmp_path / "32.tiff").write_bytes(tiff(32, 8 * ((2**32 - 1) * RAMP).astype("<u4").tobytes()))
    for name in ("12.tiff", "32.tiff"):
        assert read(tmp_path / name)[0, 0].tolist() == pytest.approx(SHOWN, abs=1)


def test_negative_samples_are_black_and_others_than_numbers_refused(tmp_path):
    assert levels(tmp_path, np.array([-5, 0, 1] * 2 + [0.5, 0.5], dtype=np.float32))[:3] == [0, 0, 255]
    for odd in (np.nan, np.inf):
        Image.fromarray(np.full((8, 8), odd, dtype=np.float32)).save(tmp_path / "odd.tiff")
        assert refused(tmp_path / "odd.tiff") == "pixels that are not finite"


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_usual_formats_are_read_whatever_the_file_is_named(tmp_path, form):
    Image.new("RGB", (9, 9), (250, 0, 0)).save(tmp_path / "x.png", form)
    assert read(tmp_path / "x.png")[:, 4, 4].tolist() == pytest.approx([250, 0, 0], abs=5)


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "SGI", "TGA", "PCX"])
def test_no_other_decoder_runs(tmp_path, form, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png", form)
    for module in ("os.system", "subprocess.Popen", "subprocess.check_call"):
        monkeypatch.setattr(module, None)  # as for Ghostscript
    assert refused(tmp_path / "x.png") == "cannot identify image file: none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"


def test_more_pixels_than_allowed_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (101, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert refused(tmp_path / "x.png") == "101 x 100 pixels, more than data.max_pixels = 10000"
    monkeypatch.undo()
    assert read(tmp_path / "x.png", max_pixels=10_100).shape == (3, 8, 8)
    # Pillow has a limit of its own, and another error; the user's counts where it is higher.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read(tmp_path / "x.png", max_pixels=10_100).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert refused(tmp_path / "x.png", max_pixels=1000) == "more pixels than data.max_pixels = 1000"


def test_the_default_limit_is_64_megapixels():
    assert DataConfig().max_pixels == 64_000_000 < Image.MAX_IMAGE_PIXELS


def test_symlinks_out_of_the_data_folder_are_refused_unless_allowed(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    outside, data = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "x.png")
    Image.new("RGB", (9, 9)).save(data / "in.png")
    (data / "file.png").symlink_to(outside / "x.png")
    (data / "folder").symlink_to(outside)
    (data / "chain.png").symlink_to(data / "file.png")
    (data / "deep" / "back.png").symlink_to("../in.png")
    for name in ("file.png", "folder/x.png", "chain.png"):
        said = refused(data / name, root=data)
        assert said == "a symlink out of the data folder: data.follow_symlinks=true allows it"
        assert read(data / name, root=data, follow_symlinks=True).shape == (3, 8, 8)
    # Within it, and where the data folder itself is a symlink, nothing leads out.
    assert read(data / "deep" / "back.png", root=data).shape == (3, 8, 8)
    (tmp_path / "alias").symlink_to(data)
    assert read(tmp_path / "alias" / "in.png").shape == (3, 8, 8)


def test_fifos_devices_sockets_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for name in ("fifo.png", "folder.png", "socket.png"):
            assert refused(tmp_path / name) == "no regular file"
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    assert refused(tmp_path / "zero.png", follow_symlinks=True) == "no regular file"


def noise(width, height, orientation=None):
    """A JPEG of smooth random colours."""
    small = np.random.default_rng(0).integers(0, 256, (height // 160, width // 160, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, exif=exif)
    return file


def whole(file, size):
    """The same without a reduced scale, by Pillow alone."""
    picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


@pytest.mark.parametrize(("size", "orientation"), [(56, None), (100, None), (224, None), (56, 6), (30, 3)])
def test_a_jpeg_decoded_at_a_reduced_scale_looks_as_one_decoded_whole(size, orientation):
    file = noise(1203, 801, orientation)
    picture = Image.open(file)
    result = load_image(picture, Framing(size))
    assert result.shape == (3, size, size) and result.dtype == torch.uint8 and result.is_contiguous()
    assert (result.int() - whole(file, size).int()).abs().float().mean() < 1  # of 255
    reduced = {56: 4, 100: 4, 224: 1, 30: 8}[size] if orientation is None else 1
    assert max(picture.size) == -(-1203 // reduced)


def test_a_part_of_a_picture_is_what_the_view_says():
    picture = Image.new("RGB", (80, 60), "white")
    picture.paste("black", (20, 30, 40, 50))
    assert (load_image(picture, Framing(7), lambda width, height: (20, 30, 40, 50)) == 0).all()
    assert (load_image(picture, Framing(7), lambda width, height: (width - 30, 0, width, 30)) == 255).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_tiff_on_its_side_is_cropped_as_it_is_seen(orientation):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :50, 0], pixels[:30, :, 1] = 255, 255  # each quarter in a colour of its own
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffers = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(buffers[0], "TIFF", exif=exif)
    turned = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    Image.fromarray(np.rot90(pixels, turned)).save(buffers[1], "PNG")
    tiff, upright = (decode(buffer.getvalue(), Framing(40), 10**6) for buffer in buffers)
    assert torch.equal(tiff, upright)
