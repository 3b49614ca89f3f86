"""The evaluation of memory: the same long streams under each memory policy in turn.

A model answers questions about the past from three sources: the bank, the text cache with the tokens of
earlier frames and answers, and prior likelihood. Baselines separate them: the last four frames alone
(`recent`), a bank of four frames, an empty one, one without eviction, and the best constant guess.
"""

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from moss_jax.config import EngineConfig, KVDtype, MemoryConfig
from moss_jax.convert import OpenModel, open_model
from moss_jax.eval.feeding import Renderer
from moss_jax.eval.harness import Blindfold, library_versions, play
from moss_jax.eval.memory import ages, recent
from moss_jax.eval.memory.recent import RECENT
from moss_jax.eval.memory.stopwatch import Stopwatch
from moss_jax.eval.tabletop import ideal_dialogue, scores
from moss_jax.eval.tabletop.scores import Score, StreamTranscript
from moss_jax.memory.policies import make_policy
from moss_jax.stream import Engine, Event
from moss_jax.text import Tokenizer
from moss_jax.worlds.tabletop import TabletopStream, evaluation_stream

# Seconds at the end of a stream, and at its beginning, whose figures are reported separately.
MINUTE = 60


@dataclasses.dataclass(frozen=True)
class MemoryEvaluationConfig:
    """Settings of an evaluation of memory.

    Attributes:
      checkpoint: folder in Hugging Face layout; None for the shipped model.
      minutes: length of a stream.
      streams: number of held-out streams.
      seed: selects them.
      past: share of the questions that are about the past.
      old: share of those that are drawn again for old evidence; see `draw_stream`.
      quiet: share of each stream, at its beginning, in which the user says nothing: no earlier answer helps.
      policies: names in `memory.policies`, to be compared.
      budgets: sizes of the bank, in whole frames; each policy runs with each.
      bank_dtypes: dtypes of keys and values, None for the dtype of the model; each policy runs with each.
      slots: streams side by side.
      tokens_per_second: speed of speech.
      text_capacity: tokens in the text cache, which evicts as in a live stream.
      render_processes: number of processes that render frames; 0 for a thread of this process.
    """

    checkpoint: Path | None = None
    minutes: float = 10.0
    streams: int = 32
    seed: int = 0
    past: float = 0.5
    old: float = 0.0
    quiet: float = 0.0
    policies: tuple[str, ...] = ("pyramid",)
    budgets: tuple[int, ...] = (64,)
    bank_dtypes: tuple[KVDtype | None, ...] = (None,)
    slots: int = 8
    tokens_per_second: int = 8
    text_capacity: int = 1024
    # A few suffice for a GPU; on a small CPU, the model needs all cores.
    render_processes: int = min((os.cpu_count() or 1) // 4, 4)

    @property
    def seconds(self) -> int:
        """Length of a stream, in seconds."""
        return round(60 * self.minutes)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A memory configuration that the streams are played with.

    Attributes:
      name: name of the policy, or of the baseline.
      policy: a name in `memory.policies`.
      frames: size of the bank, in whole frames.
      bank_dtype: dtype of its keys and values.
      blind: whether the bank is left empty.
    """

    name: str
    policy: str
    frames: int
    bank_dtype: KVDtype | None = None
    blind: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.frames} frames{f' in {self.bank_dtype}' if self.bank_dtype else ''}"

    def engine_config(self, config: MemoryEvaluationConfig) -> EngineConfig:
        """Capacities of the engine."""
        memory = MemoryConfig(self.policy, bank_dtype=self.bank_dtype, text="window")
        slots = min(config.slots, config.streams)
        return EngineConfig(slots, config.text_capacity, self.frames, memory)


def variants(config: MemoryEvaluationConfig) -> list[Variant]:
    """Returns the policies at each size and dtype, each with "window" at the same bytes, and the baselines.

    "full" has room for the whole stream. With a bank of four frames, a compaction of "window" leaves three,
    before the next frame comes in, so the four newest are visible at any time.
    """
    compared = [
        Variant(policy, policy, frames, bank_dtype)
        for frames in config.budgets
        for bank_dtype in config.bank_dtypes
        for policy in (*config.policies, "window")
    ]
    return list(
        dict.fromkeys(
            [
                *compared,
                Variant("full", "full", config.seconds),
                Variant("window", "window", RECENT),
                Variant("empty bank", "window", RECENT, blind=True),
            ]
        )
    )


def evaluate(config: MemoryEvaluationConfig, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Plays the streams with each memory and scores what is said.

    Args:
      config: settings.
      log: receives a line when each run begins.

    Returns:
      Settings, scores and versions, JSON-ready.

    Raises:
      CheckpointError, TokenizerError: the checkpoint can't be used.
      ConfigError: a policy is unknown, a bank is too small for it, or the text capacity exceeds the model's
        positions.
    """
    opened = open_model(config.checkpoint)
    model, tokenizer = opened.model, opened.tokenizer
    compared = variants(config)
    for variant in compared:
        # Invalid settings are rejected before anything has run.
        engine_config = variant.engine_config(config)
        make_policy(engine_config.memory, model.config, engine_config.bank_capacity)
    log(f"{config.streams} streams of {config.minutes:g} min, {config.slots} side by side")
    streams = [
        evaluation_stream(
            config.seed, index, config.seconds, past=config.past, old=config.old, quiet=config.quiet
        )
        for index in range(config.streams)
    ]
    judge = Judge(streams, tokenizer, config.tokens_per_second)
    image_size = model.config.vision.image_size
    runs, engine = [], None
    with Renderer(
        streams, seconds=config.seconds, image_size=image_size, processes=config.render_processes
    ) as renderer:
        for variant in compared:
            log(str(variant))
            if engine is None or engine.config != variant.engine_config(config):
                engine = Engine(model, tokenizer, variant.engine_config(config))
            watch = Stopwatch(
                Blindfold(engine) if variant.blind else engine, functools.partial(programs_compiled, engine)
            )
            started = time.monotonic()
            played = play(
                {engine.config.slots: watch},
                streams,
                image_size=image_size,
                tokens_per_second=config.tokens_per_second,
                renderer=renderer,
            )
            wall = time.monotonic() - started
            runs.append(
                {
                    "memory": variant.name,
                    "frames": variant.frames,
                    "bank_dtype": variant.bank_dtype,
                    **bytes_of_a_stream(engine),
                    **watch.times(),
                    "wall_s": wall,
                    "times_real_time": config.streams * config.seconds / wall,
                    **judge.figures(played),
                }
            )
    log(f"the last {RECENT} frames alone")
    runs.append(run_of_recent(opened, config, judge))
    return {
        "checkpoint": opened.name,
        **{name: value for name, value in dataclasses.asdict(config).items() if name != "checkpoint"},
        "image_size": image_size,
        "dtype": str(model.dtype),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": library_versions(),
        "constant_guess": judge.constant_guess(),
        "runs": runs,
    }


def run_of_recent(opened: OpenModel, config: MemoryEvaluationConfig, judge: "Judge") -> dict[str, Any]:
    """Asks each question about the newest frames alone, and scores the answers, JSON-ready."""
    engine = Engine(opened.model, opened.tokenizer, recent.engine_config(min(config.slots, config.streams)))
    started = time.monotonic()
    answers = recent.ask(
        engine,
        judge.excerpts(),
        image_size=opened.model.config.vision.image_size,
        tokens_per_second=config.tokens_per_second,
    )
    return {
        "memory": f"recent-{RECENT}",
        "frames": RECENT,
        "bank_dtype": None,
        **bytes_of_a_stream(engine),
        "wall_s": time.monotonic() - started,
        **ages.summary(answers),
    }


class Judge:
    """Scores runs over the same streams.

    Args:
      streams: with their truth, all of one length.
      tokenizer: the model's tokenizer.
      tokens_per_second: speed of speech.
    """

    def __init__(self, streams: Sequence[TabletopStream], tokenizer: Tokenizer, tokens_per_second: int):
        self._streams, self._tokenizer, self._speed = streams, tokenizer, tokens_per_second
        self._ideals = [ideal_dialogue(stream, tokenizer, tokens_per_second) for stream in streams]

    def figures(self, played: Sequence[Iterable[Event]]) -> dict[str, Any]:
        """The figures of a run, JSON-ready.

        Args:
          played: the events of each stream.
        """
        said = [
            scores.transcribe(events, stream.requests)
            for events, stream in zip(played, self._streams, strict=True)
        ]
        end = self._streams[0].world.seconds
        return {
            "streams_cut_short": sum(not transcript.whole for transcript in said),
            **ages.summary(self._answers(said)),
            "first_minute": present(self._scores(said, range(-1, MINUTE))),
            "last_minute": present(self._scores(said, range(end - MINUTE, end))),
        }

    def constant_guess(self) -> dict[str, Any]:
        """The counts of the best constant guess, JSON-ready."""
        return ages.constant_guess(self._answers(self._nothing))

    def excerpts(self) -> list[recent.Excerpt]:
        """The questions, each with the newest frames alone."""
        return [
            excerpt
            for stream, probes in self._probes(self._nothing)
            for excerpt in recent.excerpts(stream, probes)
        ]

    @property
    def _nothing(self) -> list[StreamTranscript]:
        """A model that says nothing: questions and right answers don't depend on what is said."""
        return [StreamTranscript((), frozenset())] * len(self._streams)

    def _answers(self, said: Sequence[StreamTranscript]) -> list[ages.Answer]:
        return [answer for stream, probes in self._probes(said) for answer in ages.answers(stream, probes)]

    def _probes(
        self, said: Sequence[StreamTranscript]
    ) -> Iterator[tuple[TabletopStream, Iterator[scores.Probe]]]:
        rate = scores.SpeechRate(self._tokenizer, self._speed)
        for stream, transcript in zip(self._streams, said, strict=True):
            yield stream, scores.probes(stream, transcript, rate)

    def _scores(self, said: Sequence[StreamTranscript], during: range) -> list[Score]:
        settings = {"tokenizer": self._tokenizer, "tokens_per_second": self._speed, "during": during}
        return [
            scores.score(stream, transcript, ideal, **settings)
            for stream, transcript, ideal in zip(self._streams, said, self._ideals, strict=True)
        ]


def bytes_of_a_stream(engine: Engine) -> dict[str, int]:
    """Bytes of one slot's memory bank (keys, values, scales) and of its KV cache."""
    stream = jax.eval_shape(engine.start).stream

    def size(arrays: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)) // engine.config.slots

    return {
        "bank_bytes": size((stream.bank.keys, stream.bank.values)),
        "text_bytes": size((stream.text.keys, stream.text.values)),
    }


def programs_compiled(engine: Engine) -> int:
    """The number of programs that an engine has compiled so far."""
    # jitted functions have no public count.
    return sum(p._cache_size() for p in engine.programs.values())  # pyright: ignore[reportAttributeAccessIssue]


def present(found: Sequence[Score]) -> dict[str, Any]:
    """Five figures of the tabletop evaluation that need no long memory, answers about the present first."""
    figures = scores.summary(found)
    return {
        "accuracy": figures["accuracy_now"],
        **{name: figures[name] for name in ("alerts", "silence", "revision", "stale")},
    }
