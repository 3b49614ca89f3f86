"""Measures how long streams stall while another one is saved to a file, and resumed from it.

    python benchmarks/saving.py --bank-capacity 256 --out benchmarks/results/saving_11b_h200.json

Two streams of a random model talk endlessly. A third first sees as many frames as its bank holds. Then it is
saved `--rounds` times, as the live server does it: copied on the device between two steps, fetched by another
thread, written to a file. Last, it is stopped and resumed from the file as often.

gap_ms      inter-token latency of the two streams: with nothing else, while saving, while resuming
seconds     of one save, up to the complete file, and of one `Scheduler.open`
file_mb     size of the file; slot_mb is the state of a slot, all of which is copied
compiled    programs that XLA compiled meanwhile
"""

import argparse
import collections
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

from report import device, make_parser, publish, say
from streaming import spread
from streams import (
    MB,
    WITHOUT_END,
    add_flags,
    make_engine,
    make_subject,
    note_compilations,
)
from traffic import Listener

from moss_jax.command import at_least, freeze_heap
from moss_jax.config import SchedulerConfig, SessionConfig
from moss_jax.stream.capacity import slot_bytes
from moss_jax.stream.saved import write_stream
from moss_jax.stream.scheduler import Scheduler
from moss_jax.stream.stream import Clock, Stream

SLOTS = 3
SAVED = 2  # The slot of the stream that is saved.
FRAME_GAP = 0.03  # Seconds between the frames that fill its bank.
PAUSE = 0.5  # Seconds between rounds.


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all phases; returns their figures."""
    compiled, subject = note_compilations(), make_subject(args)
    engine = make_engine(subject, SLOTS, args)
    # Streams begin empty, so that what is saved has been seen.
    engine.held = engine.said = 0
    engine.talk([slot != SAVED for slot in range(SLOTS)])
    engine.warm_up(subject.pictures[0].shape)
    freeze_heap()
    clock = Clock(is_realtime=True)
    listener = Listener(clock, SLOTS)
    scheduler = Scheduler(engine, SchedulerConfig())
    settings = SessionConfig(max_tokens_per_turn=WITHOUT_END)
    streams = [scheduler.open(settings, clock=clock, prompt=subject.prompt) for _ in range(SLOTS)]
    for stream in streams:
        stream.inbox = listener.inbox
    # Times at which each phase began and ended, once per round.
    phases: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    before = len(compiled)
    with tempfile.TemporaryDirectory() as folder, futures.ThreadPoolExecutor(2) as threads:
        heard = threads.submit(listener.listen)
        clock.start()
        path, saved = Path(folder) / "stream.safetensors", streams[SAVED]

        def save() -> None:
            copied = saved.copy_while_running().result()
            threads.submit(lambda: write_stream(path, copied.fetch())).result()

        def resume() -> Stream:
            # A clock of its own, since it continues at the time of the file.
            return scheduler.open(settings, resume=path)

        def timed[T](phase: str, call: Callable[[], T]) -> T:
            begin = clock.now()
            result = call()
            phases[phase].append((begin, clock.now()))
            time.sleep(PAUSE)
            return result

        with scheduler:
            for number in range(args.bank_capacity):
                saved.push_frame(subject.pictures[number % len(subject.pictures)])
                time.sleep(FRAME_GAP)
            time.sleep(PAUSE)
            timed("talking", lambda: time.sleep(args.seconds))
            for _ in range(args.rounds):
                timed("saving", save)
            for _ in range(args.rounds):
                saved.stop()
                wait_for(lambda: scheduler.free_slots == 1)
                saved = timed("resuming", resume)
        file_mb = path.stat().st_size / MB
        listener.inbox.put(None)
        heard.result()
    return {
        "gap_ms": {phase: gaps(listener, spans) for phase, spans in phases.items()},
        "seconds": {
            phase: statistics.median(end - begin for begin, end in spans) for phase, spans in phases.items()
        },
        "file_mb": file_mb,
        "slot_mb": slot_bytes(engine.model_config, engine.config, engine.dtype) / MB,
        "compiled": len(compiled) - before,
        "failures": sorted(set(listener.failures)),
    }


def gaps(listener: Listener, spans: list[tuple[float, float]]) -> dict[str, float]:
    """Latency between tokens of the streams that talk, in milliseconds, for tokens within some times."""
    found = [
        1e3 * gap
        for at, slot, gap in listener.gaps
        if slot != SAVED and any(begin <= at <= end for begin, end in spans)
    ]
    return spread(found) | {"longest": max(found)}


def wait_for(done: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits until something is so.

    Raises:
      TimeoutError: it has not become so in time.
    """
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("the stream did not end")
        time.sleep(0.005)


def main() -> None:
    parser = make_parser(__doc__)
    add_flags(parser)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="saves, and resumptions")
    parser.add_argument("--seconds", type=float, default=5.0, help="with nothing but talk")
    args = parser.parse_args()
    args.checkpoint = None
    say(device())
    publish("saving.py", args, run(args))


if __name__ == "__main__":
    main()
