"""Reads image files as 8-bit RGB, and names what a file is by its first bytes."""

import io
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".avif"))
# Pillow raises these for a file that is broken or of another kind.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, RuntimeError, Image.DecompressionBombError)
HEAD = 4096  # bytes that tell what a file is
STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF or a camera's raw format",
    b"MM\0*": "TIFF or a camera's raw format",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"v/1\x01": "OpenEXR",
    b"PK\x03\x04": "a zip archive",
    b"\x1aE\xdf\xa3": "a video (Matroska or WebM)",
    b"OggS": "a video or audio (Ogg)",
    b"ID3": "audio (MP3)",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the file)",
}
BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)
RIFF = {b"WEBP": "WebP", b"AVI ": "a video (AVI)", b"WAVE": "audio (WAV)"}


def file_kind(path: Path) -> str:
    """Returns what a file is by its first bytes, as `HEIC` or `text`; OSError if it cannot be read."""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if not head:
        return "empty"
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "a video (MP4 or MOV)")
    starts = STARTS | {b"RIFF" + head[4:8] + mark: kind for mark, kind in RIFF.items()}
    for start, kind in starts.items():
        if head.startswith(start):
            return kind
    try:
        text = head[:-4].decode()  # the last character may be cut
    except UnicodeDecodeError:
        return "an unknown format"
    return "an unknown format" if "\0" in text else "SVG" if "<svg" in text else "text"


def is_image_name(path: Path) -> bool:
    """Returns whether a file is an image by its name; hidden files, as `._a.png` of macOS, are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_image(path: Path, ground: str = "black") -> Image.Image:
    """Reads a file of one image as 8-bit RGB, as `upright` does.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another kind, damaged, animated, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError(f"it is animated, with {image.n_frames} frames; save one of them as PNG")
            return upright(image, ground)
    except UnidentifiedImageError as error:
        kind = file_kind(path)
        if kind.upper() in FORMATS:
            raise ValueError(f"it is a damaged {kind}") from error
        remedy = "" if kind.startswith(("a ", "an ", "audio", "text", "empty")) else "; save it as PNG"
        raise ValueError(f"it is {kind}{remedy}") from error


def upright(image: Image.Image, ground: str = "black") -> Image.Image:
    """Makes 8-bit RGB, rotated by EXIF, in sRGB and composited on the colour `ground`.

    Raises ValueError for more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, more than 8 bits a channel")
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):  # viewers ignore a profile that is damaged
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, ground), alpha)
    return image
