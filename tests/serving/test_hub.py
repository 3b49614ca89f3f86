"""Sessions that outlive connections and processes, over a small engine that can save its streams."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest
from servers import Client, Running, running, wait_for
from websockets.exceptions import ConnectionClosed

from moss_jax.config import SchedulerConfig, ServerConfig, SessionConfig
from moss_jax.serving.hub import Hub
from moss_jax.serving.saved import read_session
from moss_jax.serving.session import event_number
from moss_jax.stream import Scheduler

CONFIG = ServerConfig(grace_seconds=30.0, counters_seconds=0.05, save_seconds=0.2)
BRIEF = SessionConfig(max_tokens_per_turn=4)


@pytest.fixture
def serve(make_engine, tmp_path):
    """Starts servers over one engine and one folder."""

    @contextlib.contextmanager
    def serve(folder=tmp_path / "state", clock="realtime", **changes):
        scheduler = Scheduler(make_engine(slots=2), SchedulerConfig(clock=clock))
        config = dataclasses.replace(CONFIG, **changes)
        with running(Hub(scheduler, config, session=BRIEF, state_folder=folder)) as server:
            yield server

    return serve


def address(server: Running, session: dict, after: str | None = None) -> str:
    last = f"&after={after}" if after else ""
    return f"{server.realtime}?session={session['id']}&token={session['moss']['token']}{last}"


def test_a_stream_goes_on_after_the_server_was_restarted(serve, frames, tmp_path):
    with serve() as server, Client(server.realtime) as client:
        session = client.negotiate(sampling={"temperature": 0.5, "seed": 7})
        client.show(frames[0])
        client.until("conversation.item.done")
        client.say("What is this?")
        client.until("conversation.item.added")
        server.server.should_exit = True
        end = client.until("moss.end")
        assert (end["reason"], end["saved"]) == ("shutdown", True)
    saved = read_session(tmp_path / "state", session["id"])
    assert session["moss"]["token"] not in json.dumps(saved.dialogue)
    with serve() as server:
        with Client(address(server, session) + "x") as thief:
            assert thief.receive()["error"]["code"] == "session_not_found"
        with Client(address(server, session, end["event_id"])) as client:
            created = client.receive()["session"]
            assert created["moss"]["resumed"]["saved"] is True
            assert created["moss"]["sampling"] == session["moss"]["sampling"] | {
                "temperature": 0.5,
                "seed": 7,
            }
            # The text that was held is asked, and counters and numbers go on.
            client.send("response.create")
            wait_for(lambda: client.until("response.created")["moss"]["asked"])
            client.until("response.done")
            client.show(frames[1])
            assert client.until("conversation.item.added")["moss"]["frame"]["index"] == 1
            wait_for(lambda: client.until("moss.counters")["counters"]["frames"] == 2)
            memory = client.until("moss.counters")["memory"]
            assert [entry["detail"] for entry in memory] == ["whole", "whole"]
            assert memory[0]["time"] < created["moss"]["resumed"]["time"] <= memory[1]["time"]
            client.send("moss.finish")
            assert client.until("moss.end")["counters"]["frames"] == 2
        wait_for(lambda: not server.hub.sessions)
        # Of what is over, nothing is kept, once a save under way has ended.
        wait_for(lambda: not list((tmp_path / "state").iterdir()))


def test_a_stream_goes_on_from_its_last_save_after_the_process_was_killed(serve, frames, tmp_path):
    folder = tmp_path / "state"
    with serve(save_seconds=1000.0) as server, Client(server.realtime) as client:
        session = client.negotiate()
        for second in range(3):
            client.show(frames[second], moss={"time": float(second)})
            client.until("conversation.item.done")
        client.send("moss.save")
        at = client.until("moss.saved")["time"]
        # What comes after it is lost.
        client.show(frames[3], moss={"time": 3.0})
        client.until("conversation.item.done")
        # The files as a process that was killed leaves them.
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        client.lose()
    (killed := tmp_path / "killed").mkdir()
    for name, content in files.items():
        (killed / name).write_bytes(content)
    with serve(killed) as server, Client(address(server, session, client.events[-1]["event_id"])) as client:
        resumed = client.receive()["session"]["moss"]["resumed"]
        assert resumed["saved"] is True
        assert resumed["time"] <= at
        client.show(frames[3])
        client.until("conversation.item.done")
        counters = client.until("moss.counters")
        assert counters["counters"]["frames"] in (3, 4)


def test_running_streams_are_saved_again_and_again(serve, frames, tmp_path):
    with serve() as server, Client(server.realtime) as client, Client(server.realtime) as other:
        session = client.negotiate()
        for each in (client, other):
            each.show(frames[0])
            each.until("conversation.item.done")
        wait_for(lambda: server.hub.counters.saves >= 2)
        names = {path.name.split(".")[0] for path in (tmp_path / "state").iterdir()}
        # The other client does not know how to resume it.
        assert names == {session["id"]}
        assert len(list((tmp_path / "state").glob("*.stream"))) <= 2


def test_copies_of_sessions_are_fetched_one_at_a_time(serve, frames, monkeypatch):
    with serve(save_seconds=1000.0) as server, Client(server.realtime) as one, Client(server.realtime) as two:
        engine, lock, at_once = server.hub.scheduler.engine, threading.Lock(), []
        fetch = engine.save_slot

        def fetch_alone(copied):
            at_once.append(lock.acquire(blocking=False))
            try:
                time.sleep(0.2)  # Long enough for the other session to begin.
                return fetch(copied)
            finally:
                if at_once[-1]:
                    lock.release()

        monkeypatch.setattr(engine, "save_slot", fetch_alone)
        for client in (one, two):
            client.negotiate()
            client.show(frames[0])
            client.until("conversation.item.done")
        for client in (one, two):
            client.send("moss.save")
        for client in (one, two):
            client.until("moss.saved")
        assert at_once == [True, True]


def test_a_save_that_fails_is_told_and_harms_nothing(serve, frames, tmp_path, monkeypatch):
    with serve(save_seconds=1000.0) as server, Client(server.realtime) as client:
        client.negotiate()
        client.show(frames[0])
        client.until("conversation.item.done")
        client.send("moss.save")
        client.until("moss.saved")
        before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("moss_jax.serving.saved.write_stream", full)
        client.send("moss.save", event_id="mine")
        error = client.until("error")["error"]
        assert (error["code"], error["event_id"]) == ("save_failed", "mine")
        assert "No space left" in error["message"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before
        client.ask("Well?")
        client.until("response.done")


def test_a_lost_stream_ends_after_the_grace_period(serve, frames):
    with serve(grace_seconds=0.1) as server:
        for negotiates in (True, False):
            with Client(server.realtime) as client:
                if negotiates:
                    client.negotiate()
                client.show(frames[0])
                client.until("conversation.item.done")
                client.lose()
            wait_for(lambda: server.hub.free_slots == 2 and not server.hub.sessions)
        wait_for(lambda: server.hub.counters.streams_by_end["stopped"] == 2)


def test_only_the_latest_counters_are_replayed(serve, frames):
    with serve() as server:
        with Client(server.realtime) as client:
            session = client.negotiate()
            client.show(frames[0])
            first = client.until("conversation.item.done")["event_id"]
            for _ in range(5):
                client.until("moss.counters")
            client.lose()
        (held,) = server.hub.sessions.values()
        wait_for(lambda: not held.is_connected)
        texts, missed = server.call(held.missed, event_number(first))
        assert missed == 0
        assert [json.loads(text)["type"] for text in texts].count("moss.counters") == 1
        with Client(address(server, session, first)) as client:
            assert client.receive()["session"]["moss"]["resumed"]["missed"] == 0
            assert client.receive() == json.loads(texts[0])


def test_a_client_that_does_not_read_is_closed_and_its_stream_waits(serve, frames):
    with serve(queue_events=32) as server, Client(server.realtime) as slow, Client(server.realtime) as other:
        session = slow.negotiate()
        slow.show(frames[0])
        slow.until("conversation.item.done")
        with contextlib.suppress(ConnectionClosed):
            while not server.hub.counters.slow_clients:
                slow.send("conversation.item.retrieve", item_id="x" * 60)
        wait_for(lambda: server.hub.counters.slow_clients == 1)
        other.ask("Well?")
        other.until("response.done")
        with Client(address(server, session, f"event_{10**9}")) as again:
            assert again.receive()["session"]["id"] == session["id"]
            again.ask("Well?")
            again.until("response.done")


def test_the_server_goes_on_after_a_step_has_failed(serve, frames, make_engine, monkeypatch):
    engine = make_engine(slots=2)
    with serve() as server:
        with Client(server.realtime) as client:
            client.negotiate()
            client.show(frames[0])
            client.until("conversation.item.done")
            step = engine.step

            def fail(*_):
                raise RuntimeError("the device is lost")

            monkeypatch.setattr(engine, "step", fail)
            client.show(frames[1])
            # The frame may come too late.
            errors = iter(lambda: client.until("error")["error"], None)
            error = next(e for e in errors if e["code"] != "stream_is_over")
            assert error["code"] == "stream_failed"
            # What went wrong inside is for the log.
            assert "device" not in error["message"]
            assert client.until("moss.end")["reason"] == "failed"
        monkeypatch.setattr(engine, "step", step)
        wait_for(lambda: server.hub.free_slots == 2)
        with Client(server.realtime) as client:
            client.ask("Well?")
            client.until("response.done")


def test_frames_that_are_not_seen_say_why(serve):
    still = np.full((24, 32, 3), 90, np.uint8)
    with serve() as server, Client(server.realtime) as client:
        client.negotiate(selection={"enabled": True, "max_gap": 1000.0})
        for second in range(3):
            client.show(still, moss={"time": float(second)})
        # The model may speak meanwhile, and its items are done, too.
        done = iter(lambda: client.until("conversation.item.done").get("moss"), "")
        fates = [moss["frame"]["fate"] for moss in itertools.islice(filter(None, done), 3)]
        assert fates == ["seen", "still", "still"]


def frame_fates(client):
    """The fates that a client was told, by index of the frame."""
    items = [event.get("moss") for event in client.events if event["type"] == "conversation.item.done"]
    return {item["frame"]["index"]: item["frame"]["fate"] for item in items if item is not None}


def test_frames_that_are_dropped_are_told(serve, frames, make_engine, monkeypatch):
    engine = make_engine(slots=2)
    with serve() as server, Client(server.realtime) as client:
        client.negotiate()
        gate = []

        def waiting(encode):
            def wait(frames):
                wait_for(lambda: gate)
                return encode(frames)

            return wait

        # With a step in flight, frames are sent first.
        for name in ("encode", "encode_sent"):
            monkeypatch.setattr(engine, name, waiting(getattr(engine, name)))
        for index in range(12):
            client.show(frames[index])
        for _ in range(12):
            client.until("conversation.item.added")
        gate.append(True)
        # A dropped frame's item may be done before the last frame was added. Answers are items, too.
        while len(fates := frame_fates(client)) < 12:
            client.receive()
        dropped = [index for index, fate in fates.items() if fate == "dropped"]
        assert set(fates.values()) == {"seen", "dropped"}
        assert len(dropped) == client.until("moss.counters")["counters"]["frames_dropped"]


def test_what_came_after_a_save_does_not_wait_for_ever(serve, frames, tmp_path):
    """Frames and questions that the saved stream does not have are not waited for."""
    with serve() as server, Client(server.realtime) as client:
        session = client.negotiate()
        client.show(frames[0], moss={"time": 0.0})
        client.until("conversation.item.done")
        client.send("moss.save")
        client.until("moss.saved")
        server.server.should_exit = True
        client.until("moss.end")
    path = tmp_path / "state" / f"{session['id']}.json"
    content = json.loads(path.read_text())
    late = {"item_id": "item_late", "index": 1, "time": 0.5, "arrived": 0.0}
    content["dialogue"]["frames"].append(late)
    asked = {"text": "Well?", "items": ["item_asked"], "metadata": None, "at": 0.0}
    content["dialogue"]["asked"].append(asked)
    path.write_text(json.dumps(content))
    with serve() as server, Client(address(server, session)) as client:
        client.receive()
        client.show(frames[1])
        assert client.until("conversation.item.added")["moss"]["frame"]["queued"] == 1
        client.ask("Now?", response={"metadata": {"mine": "yes"}})
        created = client.until("response.created")
        while not created["moss"]["asked"]:
            created = client.until("response.created")
        assert created["response"]["metadata"] == {"mine": "yes"}


def test_a_slot_is_never_counted_as_both_reserved_and_taken(serve, monkeypatch):
    with serve() as server:
        scheduler, gate = server.hub.scheduler, threading.Event()
        opened, slots = scheduler.open, scheduler.engine.config.slots

        def slow(**options):
            stream = opened(**options)
            gate.wait(60)
            return stream

        monkeypatch.setattr(scheduler, "open", slow)
        opening = asyncio.run_coroutine_threadsafe(server.hub.open(), server.loop)
        # The stream has its slot, and its opener does not know it yet.
        wait_for(lambda: scheduler.streams)
        assert server.hub.free_slots == slots - 1
        gate.set()
        opening.result(60).stop()
        wait_for(lambda: server.hub.free_slots == slots)


def test_a_stream_whose_opening_nobody_waits_for_is_stopped(serve, monkeypatch):
    with serve() as server:
        scheduler, gate, made = server.hub.scheduler, [], []
        opened = scheduler.open

        def slow(**options):
            wait_for(lambda: gate)
            made.append(opened(**options))
            return made[0]

        monkeypatch.setattr(scheduler, "open", slow)

        async def give_up():
            opening = asyncio.create_task(server.hub.open())
            await asyncio.sleep(0.05)
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await opening

        asyncio.run_coroutine_threadsafe(give_up(), server.loop).result(60)
        gate.append(True)
        wait_for(lambda: made and not scheduler.streams)
        wait_for(lambda: server.hub.free_slots == 2)
