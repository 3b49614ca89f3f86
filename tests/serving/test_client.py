"""The clients, on a server that answers."""

import asyncio

import numpy as np
import pytest
from servers import wait_for

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
        assert event.counters and event.counters["frames"] == 1


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
