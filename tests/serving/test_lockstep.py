"""Many lockstep clients of one server: each gets what it gets alone."""

import threading
import time

import numpy as np
import pytest
from servers import Client, Running, running, wait_for
from websockets.exceptions import ConnectionClosed

from moss_jax.config import SchedulerConfig, ServerConfig, SessionConfig
from moss_jax.serving.hub import Hub
from moss_jax.serving.session import CLOSE_LATER
from moss_jax.stream import Scheduler

POLICIES = ("window", "pyramid", "merge")


def settings(number: int) -> dict:
    """Of the object `moss`; every stream has others."""
    sampling = [None, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3}]
    rng = np.random.default_rng(number)
    policy = ("full", *POLICIES)[number % 4]
    chosen = {
        "limits": {"tokens_per_second": int(rng.integers(3, 9))},
        "memory": {
            "policy": policy,
            "text": "window",
            "text_recent": 0.3,
            "bank_capacity": 32 if policy == "full" else int(rng.integers(16, 32)),
            "text_capacity": int(rng.integers(120, 240)),
        },
        "frames": "binary",
    }
    if sampling[number % 3]:
        chosen["sampling"] = sampling[number % 3] | {"seed": number}
    return chosen


def play(server: Running, number: int, frames: list[np.ndarray]) -> list[dict]:
    """Shows and asks one stream's script; what the server told of the stream, without what is by chance."""
    rng = np.random.default_rng(100 + number)
    with Client(server.realtime) as client:
        client.send("session.update", session={"type": "realtime", "instructions": "You watch."})
        client.send("session.update", session={"type": "realtime", "max_output_tokens": 12})
        client.negotiate(**settings(number))
        for second in range(int(rng.integers(8, 24))):
            if rng.random() < 0.8:
                client.show(frames[int(rng.integers(len(frames)))], moss={"time": float(second)})
            if rng.random() < 0.3:
                client.ask("why where and what? " * int(rng.integers(1, 10)), moss={"time": second + 0.3})
                if rng.random() < 0.5:
                    client.ask("And?", moss={"time": second + 0.6})
        client.send("moss.finish")
        client.until("moss.end")
        return normal(client.events)


def normal(events: list[dict]) -> list[dict]:
    """Without ids, and without what is told of the client's own input or by the wall clock."""

    def strip(value):
        if isinstance(value, list):
            return [strip(x) for x in value]
        if isinstance(value, dict):
            chance = ("id", "event_id", "item_id", "response_id", "previous_item_id", "queued", "figures")
            return {k: strip(v) for k, v in value.items() if k not in chance}
        return value

    own = ("session.created", "session.updated", "moss.counters")
    return [
        strip(event)
        for event in events
        if event["type"] not in own
        and not (event["type"] == "conversation.item.added" and event["item"]["role"] == "user")
    ]


@pytest.fixture
def serve(make_engine):
    def serve():
        engine = make_engine(slots=3, policies=POLICIES)
        scheduler = Scheduler(engine, SchedulerConfig(clock="lockstep"))
        return running(Hub(scheduler, ServerConfig(counters_seconds=0.05), session=SessionConfig()))

    return serve


@pytest.mark.slow
def test_each_of_many_streams_gets_what_it_gets_alone(serve, frames):
    """Eight clients over three slots, with one more that is killed in the middle."""
    with serve() as server:
        alone = [play(server, number, frames) for number in range(8)]
    kinds = {event["type"] for events in alone for event in events}
    assert {"response.output_text.delta", "response.done", "moss.silence", "conversation.item.done"} <= kinds
    reasons = {
        (event["response"].get("status_details") or {}).get("reason")
        for events in alone
        for event in events
        if event["type"] == "response.done"
    }
    assert {"turn_detected", "max_output_tokens"} <= reasons
    together: dict[int, list[dict]] = {}
    free = threading.Semaphore(3)

    with serve() as server:

        def run(number: int) -> None:
            with free:
                while number not in together:
                    try:
                        together[number] = play(server, number, frames)
                    except ConnectionClosed as closed:
                        if not closed.rcvd or closed.rcvd.code != CLOSE_LATER:
                            raise
                        # The slot of the client that vanished is not free yet.
                        time.sleep(0.02)

        def vanish() -> None:
            with free, Client(server.realtime) as client:
                client.negotiate(**settings(3))
                for second in range(10):
                    client.show(frames[second], moss={"time": float(second)})
                client.until("conversation.item.done")
                client.socket.close(1000)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        threads.insert(2, threading.Thread(target=vanish))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        wait_for(lambda: server.hub.free_slots == 3 and not server.hub.sessions)
    for number, events in enumerate(alone):
        assert together[number] == events, number


def test_a_lockstep_stream_refuses_what_has_no_time_or_comes_too_late(serve, frames):
    with serve() as server, Client(server.realtime) as client:
        client.negotiate()
        client.show(frames[0])
        assert client.until("error")["error"]["code"] == "invalid_time"
        client.show(frames[0], moss={"time": 2.0})
        client.show(frames[0], moss={"time": 1.0})
        error = client.until("error")["error"]
        assert (error["code"], error["param"]) == ("invalid_time", "moss.time")
        assert "1 s came after 2 s" in error["message"]
        client.send("moss.finish")
        assert client.until("moss.end")["counters"]["frames"] == 1
