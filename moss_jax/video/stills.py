"""Still pictures: decoded by Pillow and libheif, which assemble tiles and know the orientation in EXIF."""

import itertools
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from moss_jax.video.files import damaged
from moss_jax.video.truncation import iso_boxes, iso_brands

# Formats recognised by their first bytes and decoded by Pillow. Others are left to libav.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO")
# Formats in which several pictures are an animation, not pages or previews.
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"mif1"}

_EXIF_ORIENTATION = 0x0112
# The transpose that makes a picture upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_JPEG_START = re.compile(rb"\0*\xff\xd8")
# A marker. Entropy-coded data contain none: they stuff a zero after 0xff, or restart with 0xd0 to 0xd7.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_JPEG_END = 0xD9


def read_still(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decodes a still picture, upright by EXIF; None if the file is not a still, or in a format for libav.

    If there are several pages, or a thumbnail, returns the primary picture.

    Raises:
      VideoError: the picture is damaged.
    """
    if iso_boxes(path) & {b"moov", b"moof"}:  # a video, or a sequence of HEIC or AVIF
        return None
    brands = iso_brands(path)
    try:
        if brands & _HEIF and b"avif" not in brands:
            return _read_heif(path)
        with Image.open(path, formats=_FORMATS) as image:
            if image.format in _ANIMATED and getattr(image, "is_animated", False):
                return None
            if image.format == "JPEG" and is_jpeg_stream(path):
                return None
            image.load()
            return to_rgb(upright(image))
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return None
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # Pillow raises all sorts of errors for a damaged file
        raise damaged(path) from error


def _read_heif(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    # Imported lazily, since few files need it.
    import pillow_heif

    return np.asarray(pillow_heif.open_heif(path).to_pillow().convert("RGB"))


def is_jpeg_stream(path: str | os.PathLike) -> bool:
    """Whether a file is raw Motion JPEG: concatenated JPEG pictures of one size."""
    # A portrait photo may carry a second picture of the same size after the first: its depth map.
    least = 2 if Path(path).suffix.lower() in (".mjpeg", ".mjpg") else 3
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sizes = list(itertools.islice(_jpeg_sizes(data), least))
    return len(sizes) == least and len(set(sizes)) == 1


def _jpeg_sizes(data: mmap.mmap) -> Iterator[bytes]:
    """Yields height and width, as they are stored, of each JPEG picture from the beginning on."""
    at = 0
    while start := _JPEG_START.match(data, at):
        at, size = start.end(), b""
        while True:
            marker = _JPEG_MARKER.search(data, at)
            if not marker:
                return
            at = marker.end()
            kind = data[at - 1]
            if kind == _JPEG_END:
                break
            if kind in _JPEG_FRAMES:
                size = data[at + 3 : at + 7]
            at += int.from_bytes(data[at : at + 2])
        yield size


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture, rotated and mirrored by its EXIF orientation."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata doesn't matter to the picture
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a loaded picture of any mode, in 8 bits; the alpha channel is ignored."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    return np.asarray(image.convert("RGB"))
