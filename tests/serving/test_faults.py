"""What clients, devices and disks do wrong: others go on, an error says what it was, and nothing is left."""

import asyncio
import base64
import collections
import contextlib
import errno
import gc
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pydantic
import pytest
import websockets
from servers import Client, Running, data_url, png, running, wait_for
from starlette.responses import Response
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed, InvalidStatus

from moss_jax.config import (
    MemoryConfig,
    SchedulerConfig,
    SecurityConfig,
    ServerConfig,
    SessionConfig,
)
from moss_jax.serving import app, hub, protocol, saved
from moss_jax.serving.dialogue import Dialogue
from moss_jax.serving.hub import Hub
from moss_jax.serving.realtime import Client as Connected
from moss_jax.serving.security import Gate, Tokens, protection
from moss_jax.serving.session import Session
from moss_jax.stream import Scheduler, Stream

GREY = np.full((24, 32, 3), 128, np.uint8)
SLOTS = 4
CONFIG = ServerConfig(
    counters_seconds=0.5, grace_seconds=0.2, restart_seconds=0.2, queue_events=64, save_seconds=3600
)
TALK = SessionConfig(max_tokens_per_turn=8)


@pytest.fixture(scope="module")
def server(make_engine, tmp_path_factory) -> Iterator[Running]:
    """A server of a small model with random weights, whose programs are compiled."""
    engine = make_engine(slots=SLOTS, memory=MemoryConfig(policy="window", text="window"))
    folder = tmp_path_factory.mktemp("state")
    made = Hub(Scheduler(engine, SchedulerConfig()), CONFIG, session=TALK, state_folder=folder)
    gate = Gate(SecurityConfig(connections_per_second=1e6, messages_per_second=1e6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "ABORT_SECONDS", 0.5)
        with running(made, middleware=protection(gate)) as served:
            for _ in range(2):
                with Client(served.realtime) as client:
                    client.negotiate()
                    client.show(GREY)
                    answered(client)
                    client.send("moss.save")
                    client.until("moss.saved")
            # What is there by now is no client's; without it, looking for what clients leave is quick.
            gc.collect()
            gc.freeze()
            yield served
            gc.unfreeze()


def left(server: Running) -> dict[str, object]:
    """What a server has of its clients: nothing, once all are gone."""
    held = {
        "sessions": len(server.hub.sessions),
        "streams": len(server.hub.scheduler.streams),
        "reserved": len(server.hub.scheduler.reserved),
        "connections": server.hub.counters.connections,
        "saved": sorted(os.listdir(server.hub.state_folder)) if server.hub.state_folder else [],
    }
    return {name: found for name, found in held.items() if found} or in_memory()


def in_memory() -> dict[str, int]:
    """Objects that are alive of clients that are gone."""
    gc.collect()
    kinds = {Session, Dialogue, Connected, Stream}
    alive = collections.Counter(type(o).__name__ for o in gc.get_objects() if type(o) in kinds)
    # The loop of the scheduler has the streams of its last step, until there is another one; pytest has those
    # of a loop that failed, as long as it keeps the log.
    if alive["Stream"] <= 2 * SLOTS:
        del alive["Stream"]
    return dict(alive)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def nothing_left(server: Running) -> Iterator[None]:
    """Checks that afterwards nothing is there that was not there before."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not left(server), 20, every=0.2)
    assert left(server) == {}
    files, threads = open_files(), lasting_threads()
    yield
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not left(server) and open_files() == files, 20, every=0.2)
    assert left(server) == {}
    assert open_files() == files
    # Threads of an earlier test may still have been ending at the first look.
    assert not lasting_threads() - threads


def lasting_threads() -> collections.Counter[str]:
    """Names of threads, but for those that serve whoever comes next, made as needed, up to a number."""
    return collections.Counter(
        t.name for t in threading.enumerate() if not t.name.startswith(("asyncio_", "decode"))
    )


def answered(client: Client, text: str = "What is there?") -> None:
    """Asks, and waits for the answer; the model speaks unasked, too."""
    client.ask(text, response={"metadata": {"text": text}})
    while (response := client.until("response.done")["response"]).get("metadata") != {"text": text}:
        pass
    assert response["status"] in ("completed", "incomplete")


@pytest.fixture
def others(server) -> Iterator[Client]:
    """A client that goes on while another test's client does wrong; afterwards nothing is left of either."""
    with nothing_left(server), Client(server.realtime) as client:
        client.negotiate()
        client.show(GREY)
        client.until("conversation.item.done")
        yield client
        answered(client, "Are you still there?")
        assert not [event for event in client.events if event["type"] == "error"]


def open_socket(server: Running) -> socket.socket:
    """A WebSocket by hand, so that it can be misused."""
    raw = socket.create_connection(("127.0.0.1", server.port))
    key = base64.b64encode(os.urandom(16)).decode()
    raw.sendall(
        f"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    answer = raw.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return raw


def reset(raw: socket.socket) -> None:
    """Cuts a connection as the kernel does for a process that was killed."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def test_a_client_is_killed_in_the_middle_of_a_frame(server, others):
    for opcode in (0x81, 0x82):
        raw = open_socket(server)
        wait_for(lambda: len(server.hub.sessions) == 2)
        # A message of 1 MiB, of which little comes.
        raw.sendall(struct.pack(">BBQ4s", opcode, 0xFF, 2**20, b"mask") + b"x" * 1000)
        reset(raw)
        wait_for(lambda: len(server.hub.sessions) == 1)


def test_a_client_is_killed_while_it_is_answered(server, others):
    with Client(server.realtime) as client:
        client.ask("What is there?")
        client.until("response.created")
        client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.lose()
        client.until_closed()
    wait_for(lambda: len(server.hub.scheduler.streams) == 1)


class Fuzz:
    """Messages that are wrong in some way, made from the types of the protocol.

    Args:
      random: decides.
    """

    ODD = (
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        "",
        "x",
        "é\u0000\ud83d\ude00",
        [],
        {},
        [[]],
        {"a": {"b": None}},
        "inf",
    )

    def __init__(self, random: random.Random):
        self.random = random
        self.schema = pydantic.TypeAdapter(protocol.ClientEvent).json_schema()
        self.kinds = [entry["$ref"] for entry in self.schema["oneOf"]]

    def value(self, schema: dict, depth: int = 0):
        """A value of a schema, or sometimes not."""
        choice = self.random.random()
        if choice < 0.1 or depth > 6:
            return self.random.choice(self.ODD)
        if "$ref" in schema:
            return self.value(self.schema["$defs"][schema["$ref"].rsplit("/", 1)[1]], depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.random.choice(schema["enum"])
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(self.random.choice(options), depth)
        match schema.get("type"):
            case "object":
                made = {
                    name: self.value(part, depth + 1)
                    for name, part in schema.get("properties", {}).items()
                    if name in ("type", "item", "content") or self.random.random() < 0.5
                }
                return made | ({"surprise": 1} if choice > 0.95 else {})
            case "array":
                return [
                    self.value(schema.get("items", {}), depth + 1) for _ in range(self.random.randrange(3))
                ]
            case "string":
                texts = ("user", "system", "message", "input_text", "input_image", "Hello?", data_url(GREY))
                return self.random.choice((*texts, "data:image/png;base64,AAAA", "x" * 3000))
            case "integer":
                return self.random.choice((0, 1, 7, 513, -5, 2**31))
            case "number":
                return self.random.choice((0.0, 0.5, 1.0, 3, -1.0, 1e9))
            case "boolean":
                return self.random.random() < 0.5
        return self.random.choice(self.ODD)

    def message(self) -> str | bytes:
        """A message."""
        choice = self.random.random()
        if choice < 0.1:
            return self.random.randbytes(self.random.randrange(64))
        if choice < 0.2:
            return struct.pack(">d", self.random.uniform(-1, 9)) + png(GREY)[: self.random.randrange(200)]
        if choice < 0.3:
            return self.random.randbytes(self.random.randrange(64)).decode("latin-1")
        text = json.dumps(self.value({"$ref": self.random.choice(self.kinds)}))
        if choice < 0.5:  # Some characters are lost or repeated.
            at = self.random.randrange(len(text))
            text = text[:at] + text[at + self.random.randrange(-9, 9) :]
        return text


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_malformed_messages(server, others, count):
    fuzz, sent, codes = Fuzz(random.Random(count)), 0, collections.Counter()
    while sent < count:
        # One that happens to be right may end the session.
        with contextlib.suppress(ConnectionClosed), Client(server.realtime) as client:
            if fuzz.random.random() < 0.5:
                client.negotiate(frames="binary")
            for _ in range(min(50, count - sent)):
                sent += 1
                client.socket.send(fuzz.message())
            client.send("no.such.event", event_id="last")
            while (event := client.receive()).get("error", {}).get("event_id") != "last":
                if event["type"] == "error":
                    codes[event["error"]["code"]] += 1
                    assert event["error"]["message"]
    assert codes["internal_error"] == 0
    assert codes["invalid_json"] > count / 100
    assert codes["invalid_event"] > count / 100
    assert codes["invalid_image"] + codes["invalid_frame"] > count / 100
    assert len(codes) > 6


def test_messages_that_break_the_protocol_close_their_connection_alone(server, others):
    # Of bad UTF-8, without a mask, of an unknown kind, and larger than is allowed.
    for message, code in (
        (struct.pack(">BB4s", 0x81, 0x82, b"\0\0\0\0") + b"\xff\xfe", 1007),
        (struct.pack(">BB", 0x81, 2) + b"{}", 1002),
        (struct.pack(">BB4s", 0x8F, 0x80, b"\0\0\0\0"), 1002),
        (struct.pack(">BBQ4s", 0x81, 0xFF, 2**40, b"\0\0\0\0"), 1009),
    ):
        with open_socket(server) as raw:
            raw.sendall(message)
            raw.settimeout(20)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(65536):
                    received += part
            assert struct.pack(">H", code) in received


def test_a_client_that_never_reads_is_cut_off(server, others):
    before = server.hub.counters.slow_clients
    with Client(server.realtime, max_queue=1) as client:
        client.negotiate()
        text = "x" * 100_000
        item = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": text}],
            "id": "big",
        }
        client.send("conversation.item.create", item=item)
        client.until("conversation.item.added")
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            for _ in range(2000):
                client.send("conversation.item.retrieve", item_id="big")
                if server.hub.counters.slow_clients > before:
                    break
        wait_for(lambda: server.hub.counters.slow_clients == before + 1)
        wait_for(lambda: server.hub.counters.connections == 1)
        # What had been sent is there, then the connection is over.
        client.until_closed()


def test_a_client_that_takes_nothing_of_a_response_is_cut_off(answering, monkeypatch):
    monkeypatch.setattr(app, "STALL_SECONDS", 0.5)
    content = bytes(2**26)
    made = Hub(Scheduler(answering, SchedulerConfig()), CONFIG, session=TALK)
    with running(made, routes=[Route("/large", lambda _: Response(content))]) as server:
        assert httpx.get(f"{server.url}/large").content == content
        connections = server.server.server_state.connections
        wait_for(lambda: not connections)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: connections)
            wait_for(lambda: not connections)


def test_a_slow_client_gets_everything(server, others):
    with Client(server.realtime, max_queue=1) as client:
        client.negotiate()
        for number in range(40):
            client.send("make.coffee", event_id=str(number))
            if number % 8 == 0:
                time.sleep(0.02)
        for number in range(40):
            assert client.until("error")["error"]["event_id"] == str(number)


def test_500_connect_at_once(server, others):
    async def attempt() -> str:
        try:
            async with websockets.connect(server.realtime, open_timeout=60) as client:
                event = json.loads(await client.recv())
                if event["type"] == "session.created":
                    await asyncio.sleep(0.2)
                    return "created"
                await client.wait_closed()
                assert client.close_code == 1013
                return event["error"]["code"]
        except InvalidStatus as error:
            content = json.loads(error.response.body)
            return content["error"]["code"]

    async def rush() -> list[str]:
        return await asyncio.gather(*(attempt() for _ in range(500)))

    results = collections.Counter(asyncio.run(rush()))
    assert results.total() == 500
    assert results.keys() <= {"created", "no_free_stream", "too_many_connections"}
    assert results["created"] >= SLOTS - 1


def test_wrong_tokens_and_origins(answering):
    token = "a-token-that-is-long-enough"
    made = Hub(Scheduler(answering, SchedulerConfig()), CONFIG)
    with running(made, middleware=protection(Gate(tokens=Tokens([token])))) as server:
        for options, status in (
            ({}, 401),
            ({"additional_headers": {"Authorization": "Bearer wrong"}}, 401),
            ({"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]}, 401),
            (
                {
                    "origin": "https://evil.example",
                    "additional_headers": {"Authorization": f"Bearer {token}"},
                },
                403,
            ),
        ):
            with pytest.raises(InvalidStatus) as refused, Client(server.realtime, **options):
                pass
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body)["error"]["message"]
        assert not made.sessions
        assert made.counters.connections_total == 0
        with Client(server.realtime, additional_headers={"Authorization": f"Bearer {token}"}) as client:
            client.ask("Is there a cat?")
            client.until("response.done")


def test_times_in_the_wrong_order(answering):
    made = Hub(Scheduler(answering, SchedulerConfig(clock="lockstep")), CONFIG)
    with running(made) as server, Client(server.realtime) as client, Client(server.realtime) as other:
        for each in (client, other):
            each.negotiate()
        other.show(GREY, moss={"time": 0.5})
        for at in (1.0, 3.0):
            client.show(GREY, moss={"time": at})
            client.until("conversation.item.added")
        for at, code in ((2.0, "invalid_time"), (-1.0, "invalid_event"), ("soon", "invalid_event")):
            client.show(GREY, moss={"time": at})
            assert client.until("error")["error"]["code"] == code
        client.show(GREY)
        assert "needs the time" in client.until("error")["error"]["message"]
        client.show(GREY, moss={"time": 4.0})
        client.until("conversation.item.added")
        other.show(GREY, moss={"time": 1.5})
        for each, frames in ((client, 3), (other, 2)):
            each.send("moss.finish")
            end = each.until("moss.end")
            assert (end["reason"], end["counters"]["frames"]) == ("finished", frames)


def test_a_device_error_in_one_step(server, monkeypatch):
    engine, restarts = server.hub.scheduler.engine, server.hub.counters.restarts
    step, broken = type(engine).step, threading.Event()

    def fail(*arguments):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("the device is lost")
        return step(*arguments)

    with nothing_left(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.realtime)) for _ in range(3)]
        for client in clients[:2]:
            client.negotiate()
            client.show(GREY)
            client.until("conversation.item.done")
        monkeypatch.setattr(type(engine), "step", fail)
        broken.set()
        clients[0].show(GREY)
        # All streams of the device end, and say so.
        for client in clients[:2]:
            error = client.until("error")["error"]
            if error["code"] == "stream_is_over":  # Where another stream's step came before the frame.
                error = client.until("error")["error"]
            assert (error["code"], error["type"]) == ("stream_failed", "server_error")
            assert "lost" not in error["message"]
            assert client.until("moss.end")["reason"] == "failed"
        wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        assert server.hub.counters.restarts == restarts + 1
        # Who had not begun yet does not notice, nor does who comes.
        with Client(server.realtime) as late:
            for client in (clients[2], late):
                answered(client)
                assert not [event for event in client.events if event["type"] == "error"]


def test_a_stream_goes_on_as_of_its_last_save_after_a_failed_step(server, monkeypatch):
    engine = server.hub.scheduler.engine
    with nothing_left(server):
        with Client(server.realtime) as client:
            session = client.negotiate()
            client.show(GREY)
            client.until("conversation.item.done")
            answered(client)
            client.send("moss.save")
            client.until("moss.saved")

            def fail(*_):
                monkeypatch.undo()
                raise RuntimeError("the device is lost")

            monkeypatch.setattr(type(engine), "step", fail)
            client.ask("And now?")
            assert "resume this one" in client.until("error")["error"]["message"]
            client.until_closed()
        wait_for(lambda: server.hub.is_ready and not server.hub.sessions)
        address = f"{server.realtime}?session={session['id']}&token={session['moss']['token']}"
        with Client(address) as client:
            assert client.receive()["session"]["moss"]["resumed"]["saved"] is True
            answered(client, "Well?")
            client.send("moss.finish")
            counters = client.until("moss.end")["counters"]
            assert (counters["frames"], counters["prompts"]) == (1, 2)


def test_a_stream_that_is_opened_while_the_scheduler_is_down(server, monkeypatch):
    wait_for(lambda: server.hub.is_ready and not server.hub.sessions)
    monkeypatch.setattr(type(server.hub), "is_ready", property(lambda hub: False))
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    monkeypatch.undo()
    with Client(server.realtime) as client:
        client.receive()
        monkeypatch.setattr(Scheduler, "is_started", property(lambda scheduler: False))
        monkeypatch.setattr(Scheduler, "start", lambda scheduler: scheduler)
        client.ask("What is there?")
        error = client.until("error")["error"]
        assert (error["code"], error["type"]) == ("no_free_stream", "server_error")
        assert "in a moment" in error["message"]
        monkeypatch.undo()
        answered(client)


def test_a_full_disk_at_a_save(server, others, monkeypatch):
    folder = server.hub.state_folder
    with Client(server.realtime) as client:
        session = client.negotiate()
        client.show(GREY)
        client.until("conversation.item.done")
        client.send("moss.save")
        client.until("moss.saved")
        files = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
        assert len(files) == 2

        write = saved.write_stream

        def fill(path, saved):
            with open(path, "wb") as file:
                file.write(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(saved, "write_stream", fill)
        failed = server.hub.counters.failed_saves
        client.send("moss.save", event_id="mine")
        error = client.until("error")["error"]
        assert (error["code"], error["type"], error["event_id"]) == ("save_failed", "server_error", "mine")
        assert "No space left on device" in error["message"]
        assert server.hub.counters.failed_saves == failed + 1
        # The description of the stream does not fit either.
        monkeypatch.setattr(saved, "write_stream", write)
        monkeypatch.setattr(saved.json, "dump", lambda *_: fill(os.devnull, None))
        client.send("moss.save")
        assert client.until("error")["error"]["code"] == "save_failed"
        monkeypatch.undo()
        # The save before is as it was, and the stream goes on and is saved once there is room.
        assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files
        answered(client)
        client.send("moss.save")
        assert client.until("moss.saved")
        assert len(os.listdir(folder)) == 2
        assert session["id"] in server.hub.sessions


def test_what_nobody_resumes_is_removed(server, others, monkeypatch):
    folder = server.hub.state_folder
    for name, age in (
        ("sess_old.stream", 2 * CONFIG.keep_seconds),
        ("sess_new.stream", 10.0),
        ("other", 1e9),
    ):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    monkeypatch.setattr(hub, "CLEAN_SECONDS", 0.0)
    wait_for(lambda: not (folder / "sess_old.stream").exists())
    assert sorted(os.listdir(folder)) == ["other", "sess_new.stream"]
    for name in os.listdir(folder):
        (folder / name).unlink()


def test_many_come_and_go(server, others):
    def visit(number: int) -> None:
        with contextlib.suppress(ConnectionClosed), Client(server.realtime) as client:
            if client.receive()["type"] == "error":
                return
            client.show(GREY)
            if number % 2:
                client.until("conversation.item.done")
            if number % 3 == 0:
                client.ask("What is there?")
            if number % 5 == 0:
                client.lose()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
