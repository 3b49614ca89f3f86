"""Video files encoded on the fly, whose frames carry their number as a bar code."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

WIDTH, HEIGHT, BITS = 160, 96, 8


@pytest.fixture(scope="session")
def draw() -> Callable[[int], np.ndarray]:
    """Number below 256 → uint8 [H, W, 3]: black and white bars, lowest bit left, below a third of noise."""

    def draw(number: int) -> np.ndarray:
        bars = np.array([255 * (number >> bit & 1) for bit in range(BITS)], np.uint8)
        grey = np.tile(bars.repeat(WIDTH // BITS), (HEIGHT, 1))
        grey[: HEIGHT // 3] = np.random.default_rng(number).integers(0, 90, (HEIGHT // 3, WIDTH))
        return np.stack([grey] * 3, axis=-1)

    return draw


@pytest.fixture(scope="session")
def number_of() -> Callable[[np.ndarray], int]:
    """The inverse of `draw`, also after lossy compression."""

    def number_of(rgb: np.ndarray) -> int:
        bars = rgb[2 * HEIGHT // 3].reshape(BITS, -1).mean(axis=1)
        return sum(1 << bit for bit in range(BITS) if bars[bit] > 127)

    return number_of


@pytest.fixture(scope="session")
def encode(draw) -> Callable[..., Path]:
    def encode(
        path: Path,
        count: int = 50,
        *,
        codec: str = "libx264",
        fps: int = 25,
        times_ms: list[int] | None = None,
        gop: int = 12,
        pix_fmt: str = "yuv420p",
        muxer: str | None = None,
        muxer_options: dict[str, str] | None = None,
        audio_seconds: float = 0.0,
        pixel_aspect: str = "",
        rotation: int = 0,
    ) -> Path:
        """Encodes frames 0, 1, … at `fps`, or at times in milliseconds."""
        unit = Fraction(1, 1000 if times_ms else fps)
        options = {"preset": "veryfast"} if codec == "libx264" else {}
        with av.open(str(path), "w", format=muxer, options=muxer_options or {}) as container:
            stream = container.add_stream(codec, rate=1 / unit, options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
            stream.codec_context.gop_size = gop
            stream.codec_context.time_base = unit
            if pixel_aspect:
                stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect.replace(":", "/"))
            if rotation:
                stream.set_display_rotation(rotation)
            sound = container.add_stream("aac", rate=48_000) if audio_seconds else None
            container.start_encoding()  # writes the header even if no frame follows
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
                frame.pts, frame.time_base = times_ms[i] if times_ms else i, unit
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if sound:
                _mux_silence(container, sound, audio_seconds)
        return path

    return encode


@pytest.fixture(scope="session")
def encode_audio() -> Callable[[Path], Path]:
    def encode_audio(path: Path) -> Path:
        with av.open(str(path), "w") as container:
            _mux_silence(container, container.add_stream("pcm_s16le", rate=48_000), 0.5)
        return path

    return encode_audio


def _mux_silence(container, stream, seconds: float) -> None:
    for start in range(0, int(seconds * 48_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="stereo")
        frame.rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
