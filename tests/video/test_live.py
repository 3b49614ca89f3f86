"""Live sources: a stream over the network, of which the newest frame is taken."""

import http.server
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from moss_jax.config import FrameSampling
from moss_jax.video import VideoError, is_live, read_live


@pytest.fixture
def address(tmp_path):
    """A web server that sends a clip of 20 frames, each brighter than the one before."""
    clip = tmp_path / "clip.ts"
    with av.open(str(clip), "w", format="mpegts") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 200, 10):
            rgb = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/clip.ts"
        server.shutdown()


def test_the_newest_frame_is_taken(address):
    frames = read_live(address, FrameSampling(fps=200))
    time.sleep(0.5)  # All of it is there by now, as far as the reader is concerned.
    taken = list(frames)
    assert [frame.rgb.shape for frame in taken] == [(48, 64, 3)] * len(taken)
    assert taken[-1].rgb.mean() == pytest.approx(190, abs=4)
    times = [frame.time for frame in taken]
    assert times == sorted(times)
    assert not any(thread.name == "source" for thread in threading.enumerate())


def test_what_is_live():
    assert all(is_live(name) for name in ("0", "/dev/video1", "rtsp://host/path", "https://host/live.m3u8"))
    assert not any(is_live(name) for name in ("clip.mp4", Path("folder/0.mp4"), "a:b.mp4"))


@pytest.mark.parametrize("source", ["99", "/dev/video99", "http://127.0.0.1:9/clip.ts", "nonsense://x"])
def test_a_source_that_cannot_be_opened_says_so(source):
    with pytest.raises(VideoError, match=f"^{source} cannot be opened"):
        read_live(source, FrameSampling())
