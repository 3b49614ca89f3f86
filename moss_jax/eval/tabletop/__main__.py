"""Judges a model by held-out streams of the tabletop world, in live sessions.

    python -m moss_jax.eval.tabletop --checkpoint checkpoints/moss-tiny --streams 200 --json scores.json

Several streams run side by side in the slots of one session, in lockstep, with the prompts that their users
give. What the model says is judged by `scores`. Beside it stand answers to the same questions about the clip
up to there, seen whole before it is asked about, and a run over the same streams without their frames.
"""

import argparse
import collections
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from moss_jax.config import ConfigError, DecoderWeights, EncoderWeights, EngineConfig, SessionConfig
from moss_jax.convert import CheckpointError, open_model
from moss_jax.eval.tabletop import scores
from moss_jax.eval.tabletop.scores import Score, Share, Transcript
from moss_jax.stream import Engine, Event, Row, Session, Text, answer_offline
from moss_jax.text import Tokenizer, TokenizerError
from moss_jax.video import Frame
from moss_jax.worlds.tabletop import Stream, evaluation_stream
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse
from moss_jax.worlds.tabletop.language import PAST, understand

# Tokens that the last answer may still take after the end of a stream, and an offline answer at most.
TAIL_TOKENS = 48
# Seconds of the shortest clip that is asked about offline: as short as those that are trained on.
SHORTEST_CLIP = 8


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        result = evaluate(args, Console(stderr=True, highlight=False))
    except (CheckpointError, ConfigError, TokenizerError) as error:
        print(f"moss_jax.eval.tabletop: {error}", file=sys.stderr)
        return 2
    print_tables(result, Console(highlight=False))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def evaluate(args: argparse.Namespace, log: Console) -> dict[str, Any]:
    """Runs the streams and returns all that was measured, JSON-ready; the times include compilation."""
    opened = open_model(args.checkpoint, weights=args.weights, encoder_weights=args.encoder_weights)
    model, tokenizer = opened.model, opened.tokenizer
    # Room for somebody who never stops talking, frames and prompts included.
    capacity = max(1024, (args.tokens_per_second + 10) * args.seconds + 256)
    engines = {
        slots: Engine(model, tokenizer, EngineConfig(slots, capacity, args.seconds))
        for slots in {1, args.slots}
    }
    size = model.config.vision.image_size
    streams = [evaluation_stream(args.seed, index, args.seconds) for index in range(args.streams)]
    ideals = [ideal(stream, tokenizer, args.tokens_per_second) for stream in streams]

    def judge(count: int, wrap: Callable = lambda engine: engine) -> list[Score]:
        said = listen(
            {slots: wrap(engine) for slots, engine in engines.items()},
            streams[:count],
            image_size=size,
            tokens_per_second=args.tokens_per_second,
        )
        pace = {"tokenizer": tokenizer, "tokens_per_second": args.tokens_per_second}
        return [scores.score(*each, **pace) for each in zip(streams[:count], said, ideals, strict=False)]

    log.print(f"{len(streams)} streams of {args.seconds} s, {args.slots} side by side", style="dim")
    started = time.monotonic()
    found = judge(len(streams))
    wall = time.monotonic() - started
    result = {
        "checkpoint": opened.name,
        "seed": args.seed,
        "streams": args.streams,
        "seconds": args.seconds,
        "slots": args.slots,
        "tokens_per_second": args.tokens_per_second,
        "image_size": size,
        "dtype": str(model.dtype),
        "weights": args.weights,
        "encoder_weights": args.encoder_weights,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": versions(),
        "wall_s": wall,
        "times_real_time": args.streams * args.seconds / wall,
        **scores.summary(found),
    }
    if not args.skip_offline:
        log.print("the same questions offline", style="dim")
        result["offline"] = offline(engines[1], streams, found, image_size=size)
    if not args.skip_blind:
        count = len(streams) if args.blind_streams is None else min(args.blind_streams, len(streams))
        log.print(f"{count} streams without their frames", style="dim")
        result["blind"] = {
            "streams": count,
            **scores.accuracy([score.probes for score in judge(count, Blindfold)]),
        }
    return result


def ideal(stream: Stream, tokenizer: Tokenizer, tokens_per_second: int) -> Dialogue:
    """What the ideal assistant says over a stream; its choice of words is always the same."""
    rng = np.random.default_rng(0)
    return converse(stream.world, stream.requests, tokenizer, tokens_per_second=tokens_per_second, rng=rng)


# ------------------------------------------------------------------------------------ streaming


def listen(
    engines: Mapping[int, Engine], streams: Sequence[Stream], *, image_size: int, tokens_per_second: int
) -> list[Transcript]:
    """What is said over each stream.

    Args:
      engines: by their number of slots; one of them has a single slot.
    """
    transcripts: dict[int, Transcript] = {}
    for first_turn, group in rounds(streams, max(engines)):
        engine = engines[max(engines) if len(group) > 1 else 1]
        events = watch(
            engine,
            [streams[index] for index in group],
            first_turn=first_turn,
            image_size=image_size,
            tokens_per_second=tokens_per_second,
        )
        said: dict[int, list[Event]] = collections.defaultdict(list)
        for event in events:
            said[event.slot].append(event)
        for slot, index in enumerate(group):
            transcripts[index] = scores.transcribe(said[slot], streams[index].requests)
    return [transcripts[index] for index in range(len(streams))]


def rounds(streams: Sequence[Stream], slots: int) -> Iterator[tuple[str, list[int]]]:
    """The streams that share a session, at most `slots` of them: those with the same first user turn."""
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index, stream in enumerate(streams):
        groups[first_turn(stream)].append(index)
    for text, group in groups.items():
        for begin in range(0, len(group), slots):
            yield text, group[begin : begin + slots]


def first_turn(stream: Stream) -> str:
    """What is asked before anything is seen opens the dialogue; empty if nothing is."""
    return stream.requests[0].text if stream.requests and not stream.requests[0].time else ""


def watch(
    engine: Engine, streams: Sequence[Stream], *, first_turn: str, image_size: int, tokens_per_second: int
) -> Session:
    """A lockstep session over streams with the same first turn, one in each slot; all is pushed."""
    config = SessionConfig(
        clock="lockstep",
        tokens_per_second=tokens_per_second,
        tail_seconds=TAIL_TOKENS / tokens_per_second,
    )
    session = Session(engine, config, prompt=first_turn)
    for slot, stream in enumerate(streams):
        for second, rgb in enumerate(stream.frames(image_size)):
            session.push_frame(rgb, float(second), slot=slot)
        for request in stream.requests[bool(first_turn) :]:
            session.push_prompt(request.text, request.time, slot=slot)
    session.finish()
    return session


class Blindfold:
    """An engine that sees nothing: a frame leaves its `<|image|>` in the text, and the bank stays empty."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.perception_device = engine.perception_device
        self.start = engine.start

    def encode(self, frames: Sequence[np.ndarray]) -> None:
        return None

    def step(self, state, rows: Sequence[Row | None], pool=None):
        return self._engine.step(state, [row and dataclasses.replace(row, frames=()) for row in rows])


# -------------------------------------------------------------------------------------- offline


def offline(
    engine: Engine, streams: Sequence[Stream], found: Sequence[Score], *, image_size: int
) -> dict[str, Any]:
    """The accuracy when the clip up to a probe is seen whole before the question, and that of the live one.

    One question a stream: the first with a probe far enough into it.
    """
    live, whole = [], []
    for stream, score in zip(streams, found, strict=True):
        probe = next((p for p in score.probes if p.second + 1 >= SHORTEST_CLIP), None)
        if probe is None:
            continue
        request = stream.requests[probe.request]
        frames = stream.frames(image_size)[: probe.second + 1]
        clip = [Frame(rgb, float(second)) for second, rgb in enumerate(frames)]
        events: Iterable[Event] = answer_offline(engine, clip, request.text, max_tokens=TAIL_TOKENS)
        text = "".join(event.text for event in events if isinstance(event, Text))
        said = understand(text, request.subject)
        truth = stream.world.truth[probe.second]
        whole.append(said is not None and scores.answers(request, said.facts, truth))
        live.append(probe.right)
    return {
        "accuracy": scores.entry(Share.count(whole)),
        "streaming_accuracy": scores.entry(Share.count(live)),
    }


# --------------------------------------------------------------------------------------- report


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    """The result for readers."""
    blind, whole = result.get("blind"), result.get("offline")
    alerts, revision, told = result["alerts"], result["revision"], result["narration"]
    rows = [
        ("answers right when probed, each question once", result["accuracy"]),
        ("  at all probes alike", result["accuracy_all_probes"]),
        ("  at first probes", result["accuracy_first_probes"]),
        ("  best constant guess", result["constant_guess"]),
        *([("  frames taken away", blind["accuracy"])] if blind else []),
        *([("  one question a stream, clip seen whole first", whole["accuracy"])] if whole else []),
        *([("  the same questions live", whole["streaming_accuracy"])] if whole else []),
        ("alerts: F1", {"value": alerts["f1"]}),
        ("  recall", alerts["recall"]),
        ("  precision", alerts["precision"]),
        ("silent when nothing is due, frames", result["silence"]),
        ("revised within 3 s", revision),
        ("  corrections in mid-sentence, true", revision["mid_sentence"]),
        ("narration: recall", told["recall"]),
        ("  precision", told["precision"]),
        ("statements that were false", result["stale"]),
        ("statements understood", result["understood"]),
    ]
    console.print(
        f"{result['checkpoint']} · seed {result['seed']} · {result['streams']} streams of "
        f"{result['seconds']} s · {result['times_real_time']:.1f} x real time",
        markup=False,
    )
    table = Table("", "share", "n")
    for name, found in rows:
        table.add_row(name, number(found["value"]), str(found.get("n", "")))
    if revision["median_delay_s"] is not None:
        table.add_row("revision delay, median", f"{revision['median_delay_s']:.2f} s", "")
    if result["streams_cut_short"]:
        table.add_row("streams that ran out of room", "", str(result["streams_cut_short"]))
    console.print(table)
    table = Table("question", "right", "n", "constant guess", *(["frames taken away"] if blind else []))
    for kind, found in result["by_kind"].items():
        unseen = [number(blind["by_kind"].get(kind, {}).get("value"))] if blind else []
        when = " (past)" if kind in PAST else ""
        table.add_row(
            kind + when, number(found["value"]), str(found["n"]), number(found["constant_guess"]), *unseen
        )
    console.print(table)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")} | {
        "python": platform.python_version()
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moss_jax.eval.tabletop",
        description="Judge a model by held-out streams of the tabletop world.",
    )
    add = parser.add_argument
    add(
        "--checkpoint", type=Path, metavar="DIR", help="folder in Hugging Face layout; else the shipped model"
    )
    add(
        "--weights",
        choices=get_args(DecoderWeights),
        help="keep the decoder's in 8 bits; else as they are loaded",
    )
    add(
        "--encoder-weights",
        choices=get_args(EncoderWeights),
        help="encode frames in 8 bits; else as it is loaded",
    )
    add("--streams", type=positive, default=200, metavar="N")
    add("--seconds", type=positive, default=32, metavar="N", help="length of a stream")
    add("--seed", type=int, default=0, help="which held-out streams")
    add("--slots", type=positive, default=8, metavar="N", help="streams side by side")
    add("--tokens-per-second", type=positive, default=8, metavar="N", help="speed of speech")
    add("--json", type=Path, metavar="FILE", help="write the result there, too")
    add("--skip-offline", action="store_true", help="ask nothing about whole clips")
    add("--skip-blind", action="store_true", help="leave out the run without frames")
    add("--blind-streams", type=positive, metavar="N", help="how many streams of it; else all")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
