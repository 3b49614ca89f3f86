"""Live sources: cameras and network streams, of which only the newest frame is kept."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError

from moss_jax.config import FrameSampling
from moss_jax.video.files import VideoError
from moss_jax.video.reader import DecodedFrame, Frame

# Timeout of a source that sends nothing, in seconds. One that stops is waited for twice if libav was still
# probing it, or holding its last picture back until the next one begins.
TIMEOUT = 10.0
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# libav's input format for the cameras of each platform, and the prefix of their names.
_CAMERAS = {"linux": ("v4l2", "/dev/video"), "darwin": ("avfoundation", ""), "win32": ("dshow", "video=")}


def is_live(source: str | os.PathLike) -> bool:
    """Whether a source is a camera's number, a device or a URL rather than a file."""
    name = os.fspath(source)
    return name.isdecimal() or name.startswith("/dev/") or bool(_URL.match(name))


def without_credentials(source: str) -> str:
    """A source as it may be shown: a URL without user name and password."""
    return re.sub(r"(?<=://)[^/?#]*@", "", source) if _URL.match(source) else source


def read_live(source: str, sampling: FrameSampling) -> Iterator[Frame]:
    """Opens a live source immediately, and returns an iterator over its frames at up to `fps` a second.

    A separate thread reads the source, so each frame is the newest at that time, however long the consumer
    took with the previous one. The times are seconds of the wall clock since the iteration began. It ends
    when the source ends or closes the connection. Damaged pictures are left out.

    Args:
      source: the number of a camera, a device such as /dev/video0, or a URL such as rtsp://host/path, of any
        protocol that libav supports.

    Raises:
      VideoError: the source cannot be opened; while iterating, it fails or sends nothing for `TIMEOUT`
        seconds.
    """
    newest = _Newest(_open(source), source)
    newest.start()
    return newest.frames(sampling.fps)


def _open(source: str) -> InputContainer:
    # Nothing here asks for the frame rate, which libav would measure over 20 frames.
    name, form, options = source, None, {"fpsprobesize": "0"}
    if source.isdecimal() or source.startswith("/dev/"):
        form, prefix = _CAMERAS.get(sys.platform, _CAMERAS["linux"])
        name = f"{prefix}{source}" if source.isdecimal() else source
    elif source.lower().startswith("rtsp"):
        options["rtsp_transport"] = "tcp"
    began = time.monotonic()
    try:
        container = av.open(name, format=form, options=options, timeout=TIMEOUT)
    except (FFmpegError, OSError, ValueError) as error:
        reason = _reason(error, began)
        raise VideoError(
            f"{without_credentials(source)} cannot be opened ({reason}); is it there, and free?"
        ) from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{without_credentials(source)} has no video stream")
    return container


def _reason(error: Exception, began: float) -> str:
    """Why what began then has failed; libav has no error of its own for a timeout."""
    if time.monotonic() - began > TIMEOUT:
        return f"nothing came for {TIMEOUT:g} s"
    return (getattr(error, "strerror", None) or str(error)).lower()


class _Newest(threading.Thread):
    """Reads a source and keeps only its newest frame."""

    def __init__(self, container: InputContainer, source: str):
        super().__init__(name="source", daemon=True)
        self._container, self._source = container, source
        self._changed = threading.Condition()
        self._picture: av.VideoFrame | None = None
        self._is_over = self._is_closed = False
        self._error: VideoError | None = None

    def run(self) -> None:
        began = time.monotonic()
        try:
            with self._container as container:
                for packet in container.demux(video=0):
                    with contextlib.suppress(InvalidDataError):  # The pictures after a damaged one are good.
                        for picture in packet.decode():
                            with self._changed:
                                self._picture = picture
                                self._changed.notify_all()
                    if self._is_closed:
                        return
                    began = time.monotonic()
        except (FFmpegError, OSError) as error:
            self._error = VideoError(
                f"{without_credentials(self._source)} has failed: {_reason(error, began)}"
            )
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def frames(self, fps: float) -> Iterator[Frame]:
        """Yields the newest frame, at most at this rate."""
        started, number, last = time.monotonic(), 0, None
        try:
            while True:
                with self._changed:
                    due = started + number / fps
                    while not self._is_over and (wait := due - time.monotonic()) > 0:
                        self._changed.wait(wait)
                    self._changed.wait_for(lambda last=last: self._is_over or self._picture is not last)
                    if self._picture is last:
                        break
                    last = self._picture
                assert last is not None
                taken = time.monotonic() - started
                yield Frame(DecodedFrame(last, 0.0).rgb, taken, 1 / fps)
                # Those that were due while nobody took them are not made up for.
                number = max(number, int(taken * fps)) + 1
        finally:
            self._is_closed = True
        if self._error is not None:
            raise self._error
