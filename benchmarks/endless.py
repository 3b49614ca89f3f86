"""Measures whether the cost of an endless stream stays constant: one lockstep stream with a bounded bank.

    python benchmarks/endless.py --out benchmarks/results/endless_moss_tiny.json
    python benchmarks/endless.py --preset moss_video_11b --frames 20000 --out FILE

A frame a second, so 43,200 are twelve hours, and a prompt every minute or so. The shipped model sees a few
hundred frames of the tabletop world, which are rendered beforehand and shown over and over, so that rendering
is not in the figures; its prompts are those of that world. A preset has random weights and sees noise; since
such a model would talk forever or never, a mask of the tokens that may be sampled makes it answer each prompt
with `ANSWER` tokens, and be silent otherwise.

Each row covers 1,000 frames; the first begins when the bank is full. The ratios are the last row over the
first. Rows differ in how much is said, and each token is a step, so times are also given per step. CPU time
is that of all threads of the process, so on a busy machine it is more meaningful than wall time. A stall is
the time from one sample to the next with a compaction between them, minus the median of the row's steps that
append a silence and a frame. The longest of many such steps is above their median without any compaction,
too, so `gaps_ms` has the distribution of both.
"""

import argparse
import collections
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from inputs import padded_tokenizer, random_frames
from report import add_out, device, make_parser, publish, say

from moss_jax.command import at_least
from moss_jax.config import PRESETS, EngineConfig, MemoryConfig, SessionConfig
from moss_jax.convert import open_model
from moss_jax.memory.policies import POLICIES
from moss_jax.nn import MossVideo
from moss_jax.stream import End, Engine, Event, FrameSeen, Row, Session, Turn, TurnLimit
from moss_jax.worlds.tabletop import evaluation_stream

MB = 1e6
EVERY = 1000  # Frames of a row.
AHEAD = 2  # Frames in the inbox: a lockstep stream continues once it knows what comes next.
ANSWER = 16  # Tokens of a random model's answers.
STREAMS, SECONDS = 10, 32  # Of the tabletop world, from which frames and prompts are taken.
PROMPT_GAP = 30, 90  # Seconds between prompts.


class Watched:
    """An `EngineLike` that records the cost of its steps and the state of the stream."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.perception_device = engine.perception_device
        self.start, self.encode = engine.start, engine.encode
        self.compactions = collections.Counter()
        self.steps = 0
        self._gaps: dict[str, list[float]] = collections.defaultdict(list)
        self._sampled_at = time.monotonic()
        self._stream: Any = None

    def step(self, state, rows: Sequence[Row | None], features=None):
        """Steps the engine, and waits for the sample, as a lockstep session does in any case."""
        state, sampled = self._engine.step(state, rows, features)
        jax.block_until_ready(sampled.tokens)
        (row,) = rows
        assert row is not None
        now = time.monotonic()
        kinds = ["bank"] * (row.compact is not None) + ["text"] * (row.kept is not None)
        self._gaps[" and ".join(kinds) or str((len(row.tokens), len(row.frames)))].append(
            now - self._sampled_at
        )
        self.compactions.update(kinds)
        self.steps, self._sampled_at, self._stream = self.steps + 1, now, state.stream
        return state, sampled

    def gaps(self) -> dict[str, dict[str, float]]:
        """Returns the time between samples since the last call, in milliseconds.

        By kind of compaction between them; "neither" is that of the steps which append a silence and a frame.
        """
        gaps, self._gaps = self._gaps, collections.defaultdict(list)
        gaps["neither"] = gaps[str((2, 1))]
        return {
            kind: {
                "count": len(gaps[kind]),
                "median": 1e3 * float(np.median(gaps[kind])),
                "p97": 1e3 * float(np.quantile(gaps[kind], 0.97)),
                "longest": 1e3 * max(gaps[kind]),
            }
            for kind in ("bank", "text", "bank and text", "neither")
            if gaps[kind]
        }

    def held(self) -> dict[str, int]:
        """Returns bank vectors, text tokens and position of the stream after the last step."""
        bank, text = self._stream.bank, self._stream.text
        return {
            "bank_vectors": int(bank.length[0]),
            "text_tokens": int(text.length[0]),
            "position": int(text.position[0]),
        }

    def num_programs(self) -> int:
        """Returns the number of programs compiled so far."""
        return sum(program._cache_size() for program in self._engine.programs.values())


def endless(
    engine: Engine,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str],
    frames: int,
    settings: SessionConfig,
    hear: Callable[[Event], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Plays a stream and yields a row for every `EVERY` frames after those that fill the bank.

    Args:
      engine: an engine with one slot.
      pictures: shown over and over.
      prompts: asked in random order.
      frames: number of frames of the stream.
      settings: settings of the session, in lockstep.
      hear: called with each event.
    """
    watched = Watched(engine)
    session = Session(watched, settings)
    feeding = feed(session, pictures, prompts, frames)
    for _ in range(AHEAD):
        next(feeding)
    begin = None
    for event in session:
        hear(event)
        if not isinstance(event, FrameSeen):
            continue
        next(feeding, None)
        seen = event.index + 1
        if (seen - engine.config.bank_capacity) % EVERY or seen < engine.config.bank_capacity:
            continue
        now = {"wall": time.monotonic(), "cpu": time.process_time(), "steps": watched.steps}
        gaps = watched.gaps()
        usual = gaps["neither"]["median"]
        stalls = {kind: gap["longest"] - usual for kind, gap in gaps.items() if kind != "neither"}
        if begin:
            steps = now["steps"] - begin["steps"]
            took = {f"{clock}_ms": 1e3 * (now[clock] - begin[clock]) for clock in ("wall", "cpu")}
            yield {
                "frames": seen,
                **{f"{name}_a_frame": time_ms / EVERY for name, time_ms in took.items()},
                **{f"{name}_a_step": time_ms / steps for name, time_ms in took.items()},
                "steps": steps,
                "stalls_ms": stalls,
                "gaps_ms": gaps,
                "compactions": dict(watched.compactions),
                **watched.held(),
                "programs": watched.num_programs(),
                "resident_mb": resident() / MB,
                **device_memory(),
            }
        begin = now


def feed(
    session: Session, pictures: Sequence[np.ndarray], prompts: Sequence[str], frames: int
) -> Iterator[None]:
    """Pushes a frame each time it is resumed, and a prompt now and then."""
    rng = random.Random(0)
    due = rng.randint(*PROMPT_GAP)
    for second in range(frames):
        session.push_frame(pictures[second % len(pictures)], float(second))
        if second == due:
            session.push_prompt(rng.choice(prompts), second + 0.5)
            due += rng.randint(*PROMPT_GAP)
        yield
    session.finish()


def resident() -> int:
    """Returns the resident memory of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def device_memory() -> dict[str, float]:
    """Returns the memory in use on the device, if it reports that."""
    stats = jax.devices()[0].memory_stats()
    return {"device_mb": stats["bytes_in_use"] / MB} if stats else {}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the last row over the first, for figures that should not grow."""
    names = [name for name in rows[0] if name.endswith(("_a_frame", "_a_step", "_mb"))]
    return {name: rows[-1][name] / rows[0][name] for name in names}


def tabletop(size: int) -> tuple[list[np.ndarray], list[str]]:
    """Frames and prompts of the tabletop world."""
    streams = [evaluation_stream(0, index, SECONDS) for index in range(STREAMS)]
    pictures = [picture for stream in streams for picture in stream.frames(size)]
    return pictures, [request.text for stream in streams for request in stream.requests]


def random_model(preset: str) -> tuple[MossVideo, Any]:
    """Random weights in bfloat16, and a tokenizer for them."""
    config = PRESETS[preset]()
    model = MossVideo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    return model, padded_tokenizer(config.decoder.vocab_size)


def answering(engine: Engine) -> Callable[[Event], None]:
    """Returns an event handler that makes a random model answer each prompt up to the turn limit."""
    special = engine.tokenizer.special
    ids = np.arange(engine.tokenizer.vocab_size)
    silence = ids == special.silence
    text = np.asarray(engine.allowed) & ~silence & (ids != special.eot)

    def hear(event: Event) -> None:
        if isinstance(event, Turn) and event.prompt:
            engine.allowed = text
        elif isinstance(event, TurnLimit):
            engine.allowed = silence

    engine.allowed = silence
    return hear


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plays the stream; returns the rows and its outcome."""
    if args.preset:
        model, tokenizer = random_model(args.preset)
        pictures, prompts = random_frames(8), tabletop(8)[1]
    else:
        opened = open_model()
        model, tokenizer = opened.model, opened.tokenizer
        pictures, prompts = tabletop(model.config.vision.image_size)
    capacity = EngineConfig(1, args.text_capacity, args.bank_capacity, MemoryConfig(args.memory))
    engine = Engine(model, tokenizer, capacity)
    del model
    engine.warm_up(pictures[0].shape)
    answer = answering(engine) if args.preset else lambda _: None
    last: list[Event] = []

    def hear(event: Event) -> None:
        answer(event)
        last[:] = [event]

    settings = SessionConfig(tokens_per_second=8, max_tokens_per_turn=ANSWER if args.preset else 256)
    rows = []
    for row in endless(engine, pictures, prompts, args.frames, settings, hear):
        rows.append(row)
        say(line(row))
    (end,) = last
    assert isinstance(end, End)
    result = {"end": end.reason, "counters": vars(end.counters), "rows": rows}
    return result | ({"ratios": ratios(rows)} if rows else {})


def line(row: dict[str, Any]) -> str:
    """Formats a row as text."""
    shown = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items() if k != "frames"}
    shown["stalls_ms"] = {kind: f"{stall:.1f}" for kind, stall in row["stalls_ms"].items()}
    shown["gaps_ms"] = {kind: f"{gap['median']:.1f}" for kind, gap in row["gaps_ms"].items()}
    return f"{row['frames']:>6} frames  " + "  ".join(f"{name} {value}" for name, value in shown.items())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="random weights of this model, not the shipped one")
    parser.add_argument("--frames", type=at_least(AHEAD), default=43_200, help="length of the stream")
    parser.add_argument("--bank-capacity", type=int, default=64, help="whole frames in the memory bank")
    parser.add_argument("--text-capacity", type=int, default=1024, help="tokens in the text cache")
    parser.add_argument("--memory", choices=POLICIES, default=MemoryConfig.policy, help="policy of the bank")
    add_out(parser)
    args = parser.parse_args()
    say(device())
    publish("endless.py", args, run(args))


if __name__ == "__main__":
    main()
