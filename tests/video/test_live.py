"""Live sources: streams over the network and an IP camera, of which the newest frame is taken."""

import dataclasses
import http.server
import re
import socket
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from rtsp import Camera, filming

from moss_jax.config import FrameSampling
from moss_jax.video import VideoError, is_live, live, read_live, without_credentials


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


def wait_until_let_go() -> None:
    """Waits until no source is read."""
    for thread in threading.enumerate():
        if thread.name == "source":
            thread.join(30)
            assert not thread.is_alive()


def test_the_newest_frame_is_taken(address):
    frames = read_live(address, FrameSampling(fps=200))
    time.sleep(0.5)  # All of it is there by now, as far as the reader is concerned.
    taken = list(frames)
    assert [frame.rgb.shape for frame in taken] == [(48, 64, 3)] * len(taken)
    assert taken[-1].rgb.mean() == pytest.approx(190, abs=4)
    times = [frame.time for frame in taken]
    assert times == sorted(times)
    wait_until_let_go()


def test_what_is_live():
    assert all(is_live(name) for name in ("0", "/dev/video1", "rtsp://host/path", "https://host/live.m3u8"))
    assert not any(is_live(name) for name in ("clip.mp4", Path("folder/0.mp4"), "a:b.mp4"))


@pytest.mark.parametrize("source", ["99", "/dev/video99", "http://127.0.0.1:9/clip.ts", "nonsense://x"])
def test_a_source_that_cannot_be_opened_says_so(source):
    with pytest.raises(VideoError, match=f"^{source} cannot be opened"):
        read_live(source, FrameSampling())


# ----------------------------------------------------------------------------------------- IP cameras


@pytest.fixture(scope="module")
def camera(draw) -> Camera:
    """A camera that films the numbers from 0 to 29, in 1.5 seconds."""
    return Camera([draw(number) for number in range(30)], fps=20)


@pytest.fixture
def numbers(draw, number_of):
    """The numbers in frames, which must not be damaged."""

    def numbers(frames) -> list[int]:
        frames = list(frames)
        shown = [number_of(frame.rgb) for frame in frames]
        for frame, number in zip(frames, shown, strict=True):
            assert np.abs(frame.rgb.astype(int) - draw(number)).mean() < 10
        return shown

    return numbers


def test_a_camera_is_seen_at_the_rate_that_is_asked_for(camera, numbers):
    with filming(camera) as url:
        frames = list(read_live(url, FrameSampling(fps=5)))
    # The last one is taken as soon as the stream is over.
    assert all(frame.time >= number / 5 for number, frame in enumerate(frames[:-1]))
    shown = numbers(frames)
    assert shown == sorted(set(shown))
    assert shown[-1] == 29
    assert len(shown) >= 3
    wait_until_let_go()


def test_a_slow_reader_misses_all_but_the_newest_picture(camera, numbers):
    with filming(camera) as url:
        reader = read_live(url, FrameSampling(fps=5))
        next(reader)
        wait_until_let_go()
        assert numbers(reader) == [29]


def test_what_a_reader_misses_does_not_raise_the_rate(camera):
    with filming(dataclasses.replace(camera, fps=10)) as url:
        reader = read_live(url, FrameSampling(fps=5))
        times = [next(reader).time]
        time.sleep(1)
        times += [frame.time for frame in reader]
    ticks = [int(time * 5) for time in times[:-1]]
    assert ticks == sorted(set(ticks))


def test_pictures_that_need_one_that_is_missing_are_left_out(camera, numbers):
    with filming(dataclasses.replace(camera, first=3)) as url:
        assert numbers(read_live(url, FrameSampling(fps=50)))[0] >= 10


def test_a_damaged_picture_does_not_end_the_stream(camera, number_of):
    with filming(dataclasses.replace(camera, damaged=15)) as url:
        assert number_of(list(read_live(url, FrameSampling(fps=5)))[-1].rgb) == 29


@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_stream_is_over_when_the_camera_hangs_up(camera, numbers, then):
    with filming(dataclasses.replace(camera, then=then)) as url:
        assert numbers(read_live(url, FrameSampling(fps=5)))[-1] == 29


@pytest.mark.parametrize(
    ("silent", "message"),
    [("connect", "cannot be opened"), ("play", "has failed"), ("", "has failed")],
)
def test_a_camera_that_falls_silent_is_given_up(camera, monkeypatch, silent, message):
    monkeypatch.setattr(live, "TIMEOUT", 2.0)
    with filming(dataclasses.replace(camera, silent=silent, then="stall")) as url:
        with pytest.raises(VideoError, match=rf"^{url} {message}.*nothing came for 2 s"):
            list(read_live(url, FrameSampling(fps=5)))
        wait_until_let_go()


def test_a_camera_that_is_left_is_let_go(camera):
    with filming(camera) as url:
        reader = read_live(url, FrameSampling(fps=5))
        next(reader)
        reader.close()
        wait_until_let_go()


def test_a_path_that_the_camera_does_not_have(camera):
    message = "/other cannot be opened (server returned 404 not found)"
    with filming(camera) as url, pytest.raises(VideoError, match=re.escape(url + message)):
        read_live(f"{url}/other", FrameSampling())


def test_a_port_at_which_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"rtsp://127.0.0.1:{listener.getsockname()[1]}/stream"
    with pytest.raises(VideoError, match=rf"^{url} cannot be opened \(connection refused"):
        read_live(url, FrameSampling())


def test_no_message_shows_a_password():
    with pytest.raises(VideoError, match=r"rtsp://127\.0\.0\.1:1/door cannot be opened") as caught:
        read_live("rtsp://me:secret@127.0.0.1:1/door", FrameSampling())
    assert "secret" not in str(caught.value)
    assert without_credentials("rtsp://me:a@b@host/x@y") == "rtsp://host/x@y"
    assert without_credentials("a://b@c") == "a://c"
    assert without_credentials("/home/me@work/clip.mp4") == "/home/me@work/clip.mp4"
