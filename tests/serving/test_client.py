"""The clients, on a server that answers."""

import asyncio

import av
import numpy as np
import pytest
from servers import wait_for

from moss_jax import serve
from moss_jax.config import ConfigError
from moss_jax.serving import protocol
from moss_jax.serving.client import AsyncClient, Client, ServerError, watch
from moss_jax.stream import End, FrameSeen, Text, Turn
from moss_jax.video import Frame

GREY = np.full((24, 32, 3), 128, np.uint8)


def test_the_plain_client_shows_asks_and_finishes(served):
    with Client(served.url, lossless=True) as client:
        client.show(GREY)
        client.ask("Is there a cat?")
        said, events = "", iter(client)
        for event in events:
            said += event.delta if isinstance(event, protocol.TextDelta) else ""
            if isinstance(event, protocol.ResponseDone):
                client.finish()
        assert said == "A cat. It sleeps."
        assert isinstance(event, protocol.EndEvent)
        assert event.counters is not None
        assert event.counters["frames"] == 1


def test_the_async_client_gets_a_lost_connection_back(served):
    async def talk() -> str:
        async with AsyncClient(served.url) as client:
            await client.show(GREY)
            await client.ask("Tell me a story.")
            said, is_lost = "", False
            async for event in client:
                if isinstance(event, protocol.TextDelta):
                    said += event.delta
                    if not is_lost and len(said) > 100:
                        is_lost = True
                        client._socket.transport.abort()
                if isinstance(event, protocol.ResponseDone):
                    assert event.response.output[0].content[0].text == said
                    await client.finish()
            assert is_lost
            return said

    assert asyncio.run(talk()).startswith("And then, " * 100)
    assert served.hub.counters.resumed_total == 1
    wait_for(lambda: not served.hub.sessions)


def test_a_clip_is_watched(served):
    frames = [Frame(GREY, index / 20, 0.05) for index in range(4)]
    with Client(served.url) as client:
        events = list(watch(client, frames, [(0.1, "Is there a cat?")]))
    assert [event.prompt for event in events if isinstance(event, Turn)] == ["Is there a cat?"]
    assert "".join(event.text for event in events if isinstance(event, Text)) == "A cat. It sleeps."
    assert sum(isinstance(event, FrameSeen) for event in events) == 4
    assert isinstance(events[-1], End)
    assert events[-1].counters.frames == 4


def test_errors_are_told_when_the_client_connects(served):
    with (
        pytest.raises(ServerError, match="temperature -1") as told,
        Client(served.url, settings={"sampling": {"temperature": -1}}),
    ):
        pass
    assert told.value.code == "invalid_setting"
    with pytest.raises(ValueError, match="is like http://127"):
        Client("127.0.0.1:8765")
    wait_for(lambda: served.hub.free_slots == 8)


def test_the_command_shows_a_server_a_clip(served, monkeypatch, capsys, tmp_path):
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.resize(GREY, (48, 64, 3)))))
        container.mux(stream.encode())
    arguments = ["--video", str(clip), "--connect", served.url, "--fps", "5", "--prompt", "Is there a cat?"]
    monkeypatch.setattr("sys.argv", ["serve.py", *arguments, "--compilation-cache", ""])
    assert serve.run() == 0
    # The marks of frames may come between two pieces of a word.
    shown = capsys.readouterr().out.replace("▫", "")
    assert "› Is there a cat?" in shown
    assert "A cat. It sleeps." in shown
    assert "5 frames" in shown
    monkeypatch.setattr("sys.argv", ["serve.py", *arguments, "--memory", "window"])
    with pytest.raises(ConfigError, match="--memory is decided by the server"):
        serve.run()
    monkeypatch.setattr("sys.argv", ["serve.py", "--video", str(clip), "--connect", "http://127.0.0.1:9"])
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9: .*Connect call failed"):
        serve.run()
