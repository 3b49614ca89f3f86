"""Truncation and structure of a file as declared by its container, without decoding.

MP4 and QuickTime, AVI and WebP, Matroska and WebM declare their sizes. Other formats (MPEG-TS, FLV, GIF, raw
streams) do not, nor do Matroska recordings of live streams; those are read to wherever they end.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

_ISO_FIRST_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def missing_part(path: str | os.PathLike) -> str | None:
    """Describes the missing part of a truncated file, as a predicate to its name; None if it looks complete.

    Reads a few bytes of each top-level element of the container.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if head[4:8] in _ISO_FIRST_BOXES:
            return _missing_of_iso(file, size)
        if head[:4] == b"RIFF":
            return _shortfall(size, _riff_end(file, size))
        if head[:4] == _EBML:
            return _shortfall(size, _segment_end(file))
        return None


def iso_boxes(path: str | os.PathLike) -> set[bytes]:
    """Returns the kinds of the top-level boxes of an MP4, QuickTime, HEIC or AVIF file; of others none.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        is_iso = file.read(8)[4:] in _ISO_FIRST_BOXES
        return {kind for kind, _ in _boxes(file, size)} if is_iso else set()


def iso_brands(path: str | os.PathLike) -> set[bytes]:
    """Returns the major and the compatible brands of such a file.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        length, kind = int.from_bytes(file.read(4)), file.read(4)
        content = file.read(min(length, 4096) - 8) if kind == b"ftyp" and length > 8 else b""
    return {content[i : i + 4] for i in range(0, len(content), 4) if i != 4}


def _shortfall(size: int, declared: int | None) -> str | None:
    if declared is None or declared <= size:
        return None
    return f"is cut off: it has {size} bytes of at least {declared}"


def _missing_of_iso(file: BinaryIO, size: int) -> str | None:
    kinds = set()
    for kind, end in _boxes(file, size):
        kinds.add(kind)
        if kind in (b"moov", b"moof", b"mdat") and end > size:
            return _shortfall(size, end)
    if b"mdat" in kinds and not kinds & {b"moov", b"moof", b"meta"}:
        return "is cut off or was never finished: its index (the moov box) is missing"
    return None


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Yields kind and end of each top-level box of an ISO file."""
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4]), header[4:8]
        if length == 0:  # the box runs to the end of the file
            length = size - offset
        elif length == 1:
            length = int.from_bytes(header[8:16])
        if length < 8:  # cameras append data of their own that are not boxes
            return
        offset += length
        yield kind, offset


def _riff_end(file: BinaryIO, size: int) -> int | None:
    # A file beyond 1 GB is several RIFF chunks in a row. 0 and -1 are placeholders for an unknown length.
    end = 0
    while end + 8 <= size:
        file.seek(end)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            break
        end += 8 + length
    # Some writers include the chunk's header of 8 bytes.
    return end if end > size + 8 else None


def _segment_end(file: BinaryIO) -> int | None:
    file.seek(4)
    header_length = _ebml_size(file)
    if header_length is None:
        return None
    file.seek(header_length, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return None
    length = _ebml_size(file)
    return None if length is None else file.tell() + length


def _ebml_size(file: BinaryIO) -> int | None:
    """Reads a size of 1 to 8 bytes; None for "unknown", which is what a live stream declares."""
    first = file.read(1)
    if first in (b"", b"\0"):
        return None
    extra = 8 - first[0].bit_length()
    unknown = (1 << 7 * (extra + 1)) - 1
    size = int.from_bytes(first + file.read(extra)) & unknown
    return None if size == unknown else size
