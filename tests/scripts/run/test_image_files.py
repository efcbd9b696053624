"""Images: kinds that are read, their colours, and the names of those that are not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from scripts.run.image_files import BROKEN, file_kind, is_image_name, read_image

HEADS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "TIFF or a camera's raw format": b"II*\0\x08\0\0\0",
    "Photoshop": b"8BPS\0\1",
    "BMP": b"BM\x8a\0\0\0",
    "PDF": b"%PDF-1.7\n",
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a video (MP4 or MOV)": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "a video (Matroska or WebM)": b"\x1aE\xdf\xa3\x9fB\x86\x81\1",
    "a video (AVI)": b"RIFF\xff\0\0\0AVI LIST",
    "a pointer of Git LFS (`git lfs pull` fetches the file)": b"version https://git-lfs.github.com/spec/v1\n",
    "text": b"<html><body>Not found</body></html>",
    "empty": b"",
    "an unknown format": bytes(64),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_no_image_of_these_formats_is_named(kind, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(HEADS[kind])
    assert file_kind(path) == kind
    with pytest.raises(ValueError) as raised:
        read_image(path)
    remedy = "; save it as PNG" if kind[0].isupper() else ""
    assert str(raised.value) == f"it is {kind}{remedy}"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF"])
def test_these_formats_are_read(image_format, tmp_path):
    path = tmp_path / f"a.{image_format.lower()}"
    Image.new("RGB", (40, 24), (200, 40, 60)).save(path, image_format)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(image).astype(int) - (200, 40, 60)).max() <= 4
    assert is_image_name(path) == (image_format != "GIF") and not is_image_name(tmp_path / "._a.png")


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "AVIF", "GIF"])
def test_several_frames_are_no_image(image_format, tmp_path):
    frames = [Image.new("RGB", (32, 32), (60 * n, 0, 0)) for n in range(3)]
    frames[0].save(tmp_path / "a.png", image_format, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animated, with 3 frames"):
        read_image(tmp_path / "a.png")


def test_the_first_picture_of_a_phones_jpeg_is_taken(tmp_path):
    """Phones add a second picture, as of the depth, to a JPEG, which Pillow calls MPO."""
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg")).astype(int) - (255, 0, 0)).max() <= 2


def swapped_profile() -> bytes:
    """Makes a colour profile that is sRGB, but whose red is green and whose green is red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")  # in the table: name, offset, size
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_followed(mode, tmp_path):
    image = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert np.abs(np.asarray(read_image(tmp_path / "a.png")).astype(int) - (0, 255, 0)).max() <= 3


def test_a_profile_that_is_damaged_or_of_other_channels_is_ignored(tmp_path):
    for mode, profile in (("RGB", b"nothing"), ("L", swapped_profile())):
        Image.new(mode, (8, 8), "white").save(tmp_path / "a.png", icc_profile=profile)
        assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_damaged_image_says_so(tmp_path):
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "PNG")
    for size in (20, 2000):
        (tmp_path / "a.png").write_bytes(stream.getvalue()[:size])
        with pytest.raises(BROKEN, match=r"(?i)truncated"):
            read_image(tmp_path / "a.png")
