"""Images that clients send."""

import base64
import binascii
import dataclasses
import io

import av
import numpy as np
from jaxtyping import UInt8


class MediaError(ValueError):
    """What a client sent is no image that is taken."""


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Bounds of what is decoded."""

    max_pixels: int = 16 * 2**20
    max_bytes: int = 8 * 2**20


def parse_data_url(url: str) -> tuple[str, bytes]:
    """The type and the content of a data URL."""
    head, comma, content = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise MediaError("an image is a data URL: data:image/jpeg;base64,…")
    try:
        return head[5:-7], base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise MediaError(f"the data URL is no base64: {error}") from error


def decode_image(data: bytes, *, limits: MediaLimits) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image."""
    try:
        with av.open(io.BytesIO(data)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, StopIteration, IndexError, ValueError) as error:
        raise MediaError(f"the image cannot be decoded: {error}") from error
