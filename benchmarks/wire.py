r"""Compares the live server over the network with its scheduler alone: random weights, streams that all talk.

    python benchmarks/wire.py --weights int8 --encoder-weights fp8 --bank-dtype int8 \
        --out benchmarks/results/wire_11b_h200.json
    python benchmarks/wire.py --preset moss_tiny --streams 4 --seconds 10

One engine gets the traffic of `streams.py` in which every stream talks endlessly, in two ways:

scheduler  for `--scheduler-seconds`, from threads of this process, as in `streams.py`
wire       for `--seconds`, from a client for each stream, shared among `--client-processes`. Each sends its
           frames as JPEG files and its prompts as messages, over a WebSocket to the server's own application.
           Frames are noise, so that their files are several times as large, and slower to decode, as those of
           a camera

Figures of the wire are those of `streams.py`, measured at the clients, from sending to receiving, and:

frame_ms                 a frame to the message that it was seen or dropped
server_ttft_ms           `response.create` received to the first text, on the server, without the warm-up
fates                    frames by what became of them
late_ms                  the longest that a client was behind its traffic
resident_mb              the memory of this process, server and engine, at the begin, at the end and at most
ttft_p95_difference_ms   the 95th percentile of TTFT over the wire, minus that of the scheduler
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from inputs import random_frames
from PIL import Image
from report import device, first_line, make_parser, publish, say, write
from streaming import spread
from streams import (
    LEAST_SECONDS,
    WITHOUT_END,
    Floors,
    StreamsEngine,
    Subject,
    add_flags,
    check_fill,
    frame_size,
    line,
    live,
    make_engine,
    make_subject,
    note_compilations,
    tell,
)
from timing import measure_ceilings
from traffic import SHARES, Listener, Push, figures_of, random_traffic
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from moss_jax.command import at_least
from moss_jax.config import SchedulerConfig, SessionConfig
from moss_jax.serving.app import make_app, make_server
from moss_jax.serving.hub import Hub, warm_up_all
from moss_jax.stream import FrameSeen, Text, Turn
from moss_jax.stream.scheduler import Scheduler
from moss_jax.stream.stream import Clock, Stream

MIB = 2**20
PICTURES = 8
# Time for the clients to start and to end, besides their traffic; and for their last answers.
AROUND_SECONDS, END_SECONDS = 30.0, 10.0
SAMPLE_SECONDS = 2.0  # Between two looks at the memory.
NO_TIME = struct.pack(">d", float("nan"))  # The time of a frame that is taken when it arrives.


class FilledScheduler(Scheduler):
    """A scheduler that registers what the slots of its engine begin with; each may be taken once."""

    engine: StreamsEngine

    def open(self, *args: Any, **options: Any) -> Stream:
        """Opens a stream as `Scheduler.open` does."""
        # Under the lock, so that the stream gets no step before.
        with self.changed:
            stream = super().open(*args, **options)
            tell(stream, self.engine)
        return stream


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """A server of the hub in a thread of this process, at the URL that is yielded."""
    ready = threading.Event()
    server = make_server(make_app(hub, warm_up=False, on_ready=ready.set), hub)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), name="server")
    thread.start()
    try:
        if not ready.wait(AROUND_SECONDS):
            raise RuntimeError("the server did not start")
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/v1/realtime"
    finally:
        server.should_exit = True
        thread.join()


def over_the_wire(
    engine: StreamsEngine, prompt: str, seconds: float, args: argparse.Namespace, compiled: list[str]
) -> dict[str, Any]:
    """Runs a server and its clients for some seconds after a warm-up; returns the figures of a row.

    Args:
      compiled: list that grows with each compilation.
    """
    engine.talk([True] * args.streams)
    # A record of all calls would grow the memory that is measured.
    engine.calls = collections.deque(maxlen=0)
    hub = Hub(FilledScheduler(engine), session=SessionConfig(max_tokens_per_turn=WITHOUT_END))
    ttft: list[float] = []
    hub.counters.observers.append(lambda name, seconds: ttft.append(seconds) if name == "ttft" else None)
    with serving(hub) as url:
        before = engine.num_programs(), len(compiled)
        found, resident = run_clients(url, prompt, seconds, args)
        after = engine.num_programs(), len(compiled)
    # The last ones are those that count.
    counted = ttft[-found["ttft_ms"]["samples"] :]
    return found | {
        "server_ttft_ms": spread([1e3 * seconds for seconds in counted]),
        "slow_clients": hub.counters.slow_clients,
        "failures": hub.scheduler.counters.failures,
        "compiled": max(now - then for now, then in zip(after, before, strict=True)),
        "resident_mb": {"begin": resident[0], "end": resident[-1], "most": max(resident)},
    }


@dataclasses.dataclass
class Heard:
    """Latency samples and counts of the clients in one process; times are in seconds since their start.

    Attributes:
      ttft, frame_to_token, gaps: as of `traffic.Listener`.
      frame: for each frame, when its fate was known, the number of its stream, and the seconds since it was
        sent.
      fates: frames by what became of them.
      frames_pushed, prompts_waiting: frames that were sent, and prompts without a token after them.
      late: the longest that a client was behind its traffic, in seconds.
      errors: codes of errors of the server, and of connections that were lost.
      file_kb: mean size of a frame's file.
    """

    ttft: list[tuple[float, int, float]]
    frame_to_token: list[tuple[float, int, float]]
    gaps: list[tuple[float, int, float]]
    frame: list[tuple[float, int, float]]
    fates: collections.Counter[str]
    frames_pushed: int
    prompts_waiting: int
    late: float
    errors: list[str]
    file_kb: float

    def add(self, other: "Heard") -> "Heard":
        """Merges the samples and counts of two processes."""
        added = {name: getattr(self, name) + getattr(other, name) for name in ADDED}
        return dataclasses.replace(self, **added, late=max(self.late, other.late))


ADDED = (
    "ttft",
    "frame_to_token",
    "gaps",
    "frame",
    "fates",
    "frames_pushed",
    "prompts_waiting",
    "errors",
)


def run_clients(
    url: str, prompt: str, seconds: float, args: argparse.Namespace
) -> tuple[dict[str, Any], list[float]]:
    """Runs the clients in processes of their own; returns their figures, and this one's memory meanwhile."""
    flags = {name: getattr(args, name) for name in ("streams", "warm_seconds", "fps", "frame_size")}
    flags |= {"seconds": seconds, "url": url, "prompt": prompt}
    flags |= {"client_processes": min(args.client_processes, args.streams)}
    command = [sys.executable, __file__, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    # The device is the server's.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    resident, until = [], time.monotonic() + args.warm_seconds + seconds + 2 * AROUND_SECONDS
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        outs = [Path(folder) / str(number) for number in range(flags["client_processes"])]
        clients = [
            started.enter_context(
                subprocess.Popen([*command, f"--share={number}", f"--out={out}"], env=environment)
            )
            for number, out in enumerate(outs)
        ]
        while any(client.poll() is None for client in clients):
            time.sleep(SAMPLE_SECONDS)
            resident.append(resident_mb())
            if time.monotonic() > until:
                for client in clients:
                    client.kill()
        if codes := [client.returncode for client in clients if client.returncode]:
            raise RuntimeError(f"clients ended with codes {codes}")
        heard = functools.reduce(Heard.add, (Heard(**pickle.loads(out.read_bytes())) for out in outs))
    warm, end = args.warm_seconds, args.warm_seconds + seconds
    found = {
        "admitted": args.streams,
        **figures_of(heard, warm, end),
        "frame_ms": spread([1e3 * s for at, _, s in heard.frame if warm <= at < end]),
        "frames_pushed": heard.frames_pushed,
        "frames_seen": heard.fates["seen"],
        "frames_dropped": heard.fates["dropped"],
        "frames_waiting": heard.frames_pushed - heard.fates.total(),
        "prompts_waiting": heard.prompts_waiting,
        "fates": dict(heard.fates),
        "file_kb": heard.file_kb,
        "late_ms": 1e3 * heard.late,
        "errors": heard.errors,
    }
    return found, resident


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


class Client:
    """A client of the server with one stream, which plays its traffic and reports events to a listener.

    Args:
      number: of the stream.
      listener: gets the messages as events of the stream.
      clock: of all streams.

    Attributes:
      sent: the times of the frames.
      fates: frames by what became of them.
      frame: for each frame, when its fate was known, the number of the stream, and the seconds since it was
        sent.
      late: the longest that it was behind its traffic, in seconds.
      errors: codes of errors of the server, and of a connection that was lost.
    """

    def __init__(self, number: int, listener: Listener, clock: Clock):
        self._number, self._listener, self._clock = number, listener, clock
        self.sent: list[float] = []
        self.fates: collections.Counter[str] = collections.Counter()
        self.frame: list[tuple[float, int, float]] = []
        self.late = 0.0
        self.errors: list[str] = []

    async def run(
        self, url: str, prompt: str, pushes: Sequence[Push], until: float, ready: asyncio.Barrier
    ) -> None:
        """Asks the prompt, plays the traffic up to `until` seconds, and waits for the end of the stream.

        Args:
          ready: passed once all clients are connected.
        """
        async with connect(url, max_size=None, compression=None) as connection:
            moss = {"version": 1, "frames": "binary"}
            session = {"type": "realtime", "instructions": "", "moss": moss}
            await send(connection, "session.update", session=session)
            await ready.wait()
            self._clock.start()
            hearing = asyncio.create_task(self._hear_all(connection))
            try:
                await ask(connection, prompt)
                for push in pushes:
                    await self._wait(push.at)
                    self.late = max(self.late, self._clock.now() - push.at)
                    await self._push(connection, push)
                await self._wait(until)
                await send(connection, "moss.finish")
                await asyncio.wait_for(hearing, END_SECONDS)
            except (ConnectionClosed, TimeoutError) as error:
                self.errors.append(first_line(error))
            finally:
                hearing.cancel()

    async def _wait(self, until: float) -> None:
        await asyncio.sleep(max(0.0, until - self._clock.now()))

    async def _push(self, connection: ClientConnection, push: Push) -> None:
        if isinstance(push.what, bytes):
            self.sent.append(self._clock.now())
            await connection.send(NO_TIME + push.what)
        elif isinstance(push.what, str):
            self._listener.voices[self._number].asked.append(self._clock.now())
            await ask(connection, push.what)

    async def _hear_all(self, connection: ClientConnection) -> None:
        async for message in connection:
            event = json.loads(message)
            self._hear(event, self._clock.now())
            if event["type"] == "moss.end":
                return

    def _hear(self, event: dict[str, Any], now: float) -> None:
        """Records a message of the server."""
        stamp = {"slot": self._number, "stream_time": now, "wall_time": now}
        match event:
            case {"type": "response.output_text.delta", "delta": text}:
                self._listener.hear(Text(**stamp, text=text), now)
            case {"type": "response.created", "moss": {"asked": True}}:
                self._listener.hear(Turn(**stamp, prompt="asked"), now)
            case {"type": "conversation.item.done", "moss": {"frame": {"index": index, "fate": fate}}}:
                self.fates[fate] += 1
                self.frame.append((now, self._number, now - self.sent[index]))
                if fate == "seen":
                    self._listener.hear(FrameSeen(**stamp, index=index, time=self.sent[index]), now)
            case {"type": "error", "error": {"code": code}}:
                self.errors.append(code)


async def send(connection: ClientConnection, event: str, **fields: Any) -> None:
    """Sends an event to the server."""
    await connection.send(json.dumps({"type": event, **fields}))


async def ask(connection: ClientConnection, prompt: str) -> None:
    """Sends a prompt to the server."""
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": prompt}]}
    await send(connection, "conversation.item.create", item=item)
    await send(connection, "response.create")


async def play(args: argparse.Namespace) -> Heard:
    """Runs the clients of this process, all at once; returns what they have recorded."""
    end = args.warm_seconds + args.seconds
    files = [jpeg(picture) for picture in random_frames(PICTURES, (*frame_size(args.frame_size), 3))]
    traffic = random_traffic(args.streams, SHARES["all"], end, args.fps, files, args.prompt)
    clock = Clock(is_realtime=True)
    numbers = range(args.share, args.streams, args.client_processes)
    listener, ready = Listener(clock, args.streams), asyncio.Barrier(len(numbers))
    clients = [Client(number, listener, clock) for number in numbers]
    async with asyncio.TaskGroup() as tasks:
        for number, client in zip(numbers, clients, strict=True):
            pushes = [push for push in traffic.pushes if push.stream == number]
            tasks.create_task(client.run(args.url, args.prompt, pushes, end, ready))
    voices = [listener.voices[number] for number in numbers]
    return Heard(
        listener.ttft,
        listener.frame_to_token,
        listener.gaps,
        frame=[noted for client in clients for noted in client.frame],
        fates=sum((client.fates for client in clients), collections.Counter()),
        frames_pushed=sum(len(client.sent) for client in clients),
        prompts_waiting=sum(len(voice.asked) + len(voice.turns) for voice in voices),
        late=max(client.late for client in clients),
        errors=[error for client in clients for error in client.errors],
        file_kb=sum(map(len, files)) / len(files) / 1e3,
    )


def jpeg(picture) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    return file.getvalue()


def warm_up(engine: StreamsEngine, subject: Subject) -> None:
    """Compiles everything for the frames of both ways: the server scales them before they are sent."""
    warm_up_all(engine, subject.model.config.vision.image_size)
    # Of frames of another shape, only their preprocessing differs.
    encoder, picture = engine.frame_encoder, subject.pictures[0]
    for count in encoder.warm_counts:
        jax.block_until_ready(engine.encode([picture] * count))
    encoder.measure(picture.shape)


def rows_of(args: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields the row of the scheduler, then that of the wire."""
    ceilings = measure_ceilings(jax.default_backend() == "cpu")
    compiled, subject = note_compilations(), make_subject(args)
    engine = make_engine(subject, args.streams, args)
    warm_up(engine, subject)

    def seconds_of(asked: float, others: float = 0.0) -> float:
        return min(asked, deadline - time.monotonic() - args.warm_seconds - others)

    if (seconds := seconds_of(args.scheduler_seconds)) < LEAST_SECONDS:
        return
    traffic = subject.traffic(args.streams, "all", args.warm_seconds + seconds, args.fps)
    figures = live(
        engine, Floors(engine, ceilings), traffic, args.warm_seconds, seconds, compiled, SchedulerConfig()
    )
    yield {"measure": "scheduler", "seconds": seconds} | figures
    gc.collect()
    if (seconds := seconds_of(args.seconds, AROUND_SECONDS)) < LEAST_SECONDS:
        return
    try:
        figures = over_the_wire(engine, subject.prompt, seconds, args, compiled)
    except Exception as error:
        figures = {"failed": first_line(error)}
    yield {"measure": "wire", "seconds": seconds} | figures


def main() -> None:
    parser = make_parser(__doc__)
    add_flags(parser)
    parser.add_argument("--streams", type=at_least(1), default=32, help="number of streams")
    parser.add_argument("--seconds", type=float, default=300.0, help="of traffic that counts, over the wire")
    parser.add_argument("--scheduler-seconds", type=float, default=30.0, help="of that of the scheduler")
    parser.add_argument(
        "--client-processes", type=at_least(1), default=8, help="that the clients are shared among"
    )
    # Given to the processes of the clients; `--share` is the number of the process.
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--prompt", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.url:
        # Unlike JSON, pickle is quick for millions of numbers.
        Path(args.out).write_bytes(pickle.dumps(vars(asyncio.run(play(args)))))
        return
    check_fill(parser, args)
    deadline = time.monotonic() + args.limit
    say(device())
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rows": rows}
    used = argparse.Namespace(**vars(args), checkpoint=None)
    for row in rows_of(used, deadline):
        rows.append({"streams": args.streams} | row)
        say(line(rows[-1]))
        # In case the run is interrupted.
        write("wire.py", args, result)
    if len(rows) < 2:
        say("out of time: the remaining traffic was left out")
    p95 = {row["measure"]: row["ttft_ms"]["p95"] for row in rows if "ttft_ms" in row}
    if len(p95) == 2:
        result["ttft_p95_difference_ms"] = p95["wire"] - p95["scheduler"]
    publish("wire.py", args, result)


if __name__ == "__main__":
    main()
