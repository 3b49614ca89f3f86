"""The tabletop evaluation: held-out streams in live sessions, scored against the world's truth.

`scores` judges what the model says. For comparison there are answers to the same questions given offline,
about the clip up to that moment, and a run over the same streams without their frames.
"""

import dataclasses
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_jax.config import (
    DecoderWeights,
    EncoderWeights,
    EngineConfig,
    KVDtype,
    MemoryConfig,
    SelectionConfig,
)
from moss_jax.convert import open_model
from moss_jax.eval.harness import EVERY_FRAME, TAIL_TOKENS, Blindfold, library_versions, play
from moss_jax.eval.tabletop import scores
from moss_jax.eval.tabletop.scores import Ratio, Score
from moss_jax.stream import Engine, EngineLike, Event, FrameSeen, FrameUnseen, Text, answer_offline
from moss_jax.text import Tokenizer
from moss_jax.video import Frame
from moss_jax.worlds.tabletop import TabletopStream, evaluation_stream
from moss_jax.worlds.tabletop.answers import truth_of
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse
from moss_jax.worlds.tabletop.language import understand

# Seconds of the shortest clip to ask about offline, as in training.
SHORTEST_CLIP = 8


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
      checkpoint: folder in Hugging Face layout; None for the shipped model.
      weights, encoder_weights: as `open_model` takes them.
      streams: number of held-out streams.
      seconds: length of a stream.
      last: how many seconds at the end of each stream are scored; None for all.
      seed: selects the held-out streams.
      slots: streams side by side.
      tokens_per_second: speed of speech.
      policy: a name in `memory.policies`, for a bank that is too small for the stream.
      frames: size of the bank, in whole frames; None for a bank that never gets full.
      text_capacity: tokens in the text cache, which evicts as in a live stream; None for one that never gets
        full.
      bank_dtype: dtype of keys and values in the bank; None for the dtype of the model.
      text_dtype: likewise in the text cache.
      selection: which frames are shown to the model.
      event_rate: range that event rates, per second, are drawn from; the rates then vary within a stream, as
        in streams of more than a minute. None for the usual rates.
      narrated: the user asks for a narration at the beginning of each stream, and for nothing else.
      offline: ask the questions offline as well.
      blind_streams: how many of the streams to repeat without their frames; None for all, 0 for none.
    """

    checkpoint: Path | None = None
    weights: DecoderWeights | None = None
    encoder_weights: EncoderWeights | None = None
    streams: int = 200
    seconds: int = 32
    last: int | None = None
    seed: int = 0
    slots: int = 8
    tokens_per_second: int = 8
    policy: str = MemoryConfig.policy
    frames: int | None = None
    text_capacity: int | None = None
    bank_dtype: KVDtype | None = None
    text_dtype: KVDtype | None = None
    selection: SelectionConfig = EVERY_FRAME
    event_rate: tuple[float, float] | None = None
    narrated: bool = False
    offline: bool = True
    blind_streams: int | None = None


def evaluate(config: EvaluationConfig, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Plays the streams and scores them.

    Args:
      config: settings.
      log: receives a line when each part begins.

    Returns:
      Settings, scores and versions, JSON-ready; the times include compilation.

    Raises:
      CheckpointError, TokenizerError: the checkpoint can't be used.
      ConfigError: the model can't be quantized as asked, the policy is unknown, or the bank is too small for
        it.
    """
    opened = open_model(config.checkpoint, weights=config.weights, encoder_weights=config.encoder_weights)
    model, tokenizer = opened.model, opened.tokenizer
    # Room for a model that never stops talking, frames and prompts included.
    room = max(1024, (config.tokens_per_second + 10) * config.seconds + 256)
    capacities = config.text_capacity or room, config.frames or config.seconds
    memory = MemoryConfig(config.policy, bank_dtype=config.bank_dtype, text_dtype=config.text_dtype)
    engines = {
        slots: Engine(model, tokenizer, EngineConfig(slots, *capacities, memory))
        for slots in {1, config.slots}
    }
    size = model.config.vision.image_size
    drawn: dict[str, Any] = {"varied": True, "rates": config.event_rate} if config.event_rate else {}
    if config.narrated:
        drawn |= {"quiet": 1.0, "narrated": True}
    streams = [
        evaluation_stream(config.seed, index, config.seconds, **drawn) for index in range(config.streams)
    ]
    ideals = [ideal_dialogue(stream, tokenizer, config.tokens_per_second) for stream in streams]

    def played_to(engines: Mapping[int, EngineLike], count: int) -> list[list[Event]]:
        return play(
            engines,
            streams[:count],
            image_size=size,
            tokens_per_second=config.tokens_per_second,
            selection=config.selection,
        )

    scored = range(config.seconds - config.last, config.seconds) if config.last else scores.ALWAYS

    def judge(played: Sequence[Iterable[Event]]) -> list[Score]:
        return [
            scores.score(
                stream,
                scores.transcribe(events, stream.requests),
                ideal,
                tokenizer=tokenizer,
                tokens_per_second=config.tokens_per_second,
                during=scored,
            )
            for stream, events, ideal in zip(streams, played, ideals, strict=False)
        ]

    log(f"{len(streams)} streams of {config.seconds} s, {config.slots} side by side")
    started = time.monotonic()
    played = played_to(engines, len(streams))
    found = judge(played)
    wall = time.monotonic() - started
    result = {
        "checkpoint": opened.name,
        "seed": config.seed,
        "streams": config.streams,
        "seconds": config.seconds,
        "last": config.last,
        "slots": config.slots,
        "tokens_per_second": config.tokens_per_second,
        "policy": config.policy,
        "frames": config.frames,
        "text_capacity": config.text_capacity,
        "bank_dtype": config.bank_dtype,
        "text_dtype": config.text_dtype,
        "selection": dataclasses.asdict(config.selection),
        "event_rate": config.event_rate,
        "narrated": config.narrated,
        "image_size": size,
        "dtype": str(model.dtype),
        "weights": config.weights,
        "encoder_weights": config.encoder_weights,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": library_versions(),
        "wall_s": wall,
        "times_real_time": config.streams * config.seconds / wall,
        "encoded": scores.entry(encoded(played)),
        **scores.summary(found),
    }
    if config.offline:
        log("the same questions offline")
        result["offline"] = offline_accuracy(engines[1], streams, found, image_size=size)
    blind = len(streams) if config.blind_streams is None else min(config.blind_streams, len(streams))
    if blind:
        log(f"{blind} streams without their frames")
        blindfolded = {slots: Blindfold(engine) for slots, engine in engines.items()}
        probes = [score.probes for score in judge(played_to(blindfolded, blind))]
        result["blind"] = {"streams": blind, **scores.accuracy(probes)}
    return result


def encoded(played: Iterable[Iterable[Event]]) -> Ratio:
    """Share of the incoming frames that were encoded, including those encoded and then skipped as alike."""
    frames = [event for events in played for event in events if isinstance(event, FrameSeen | FrameUnseen)]
    return Ratio.count(isinstance(frame, FrameSeen) or frame.reason == "alike" for frame in frames)


def ideal_dialogue(stream: TabletopStream, tokenizer: Tokenizer, tokens_per_second: int) -> Dialogue:
    """The ideal assistant's dialogue over a stream, in a fixed choice of words."""
    rng = np.random.default_rng(0)
    return converse(stream.world, stream.requests, tokenizer, tokens_per_second=tokens_per_second, rng=rng)


def offline_accuracy(
    engine: EngineLike, streams: Sequence[TabletopStream], found: Sequence[Score], *, image_size: int
) -> dict[str, Any]:
    """Scores answers about whole clips: one question a stream, asked after the clip up to a probe of it.

    The probe is the stream's first that leaves a clip of at least `SHORTEST_CLIP` seconds.

    Args:
      engine: an engine with one slot.
      streams: as they were played.
      found: the live score of each stream.
      image_size: side of the frames, in pixels.

    Returns:
      The accuracy of these answers, and of the live ones at the same probes.
    """
    live, offline = [], []
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
        truth = truth_of(request, stream.world, probe.second)
        offline.append(said is not None and scores.is_right_answer(request, said.facts, truth))
        live.append(probe.right)
    return {
        "accuracy": scores.entry(Ratio.count(offline)),
        "streaming_accuracy": scores.entry(Ratio.count(live)),
    }
