"""The baseline that sees the newest frames alone: no older frame, no earlier word.

Each question is asked in a stream of its own. In a stream that goes on, the tokens of earlier frames and
answers remain in the text cache, whatever is left in the bank.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from moss_jax.config import EngineConfig, MemoryConfig
from moss_jax.eval.harness import play
from moss_jax.eval.memory import ages
from moss_jax.eval.tabletop import scores
from moss_jax.eval.tabletop.scores import Probe
from moss_jax.stream import EngineLike, Event
from moss_jax.worlds.tabletop import TabletopStream
from moss_jax.worlds.tabletop.answers import truth_of
from moss_jax.worlds.tabletop.language import LIVE
from moss_jax.worlds.tabletop.requests import Request

# Frames that a question is asked about: the newest.
RECENT = 4
# Tokens, more than an excerpt has: the opening, the frames, the question and an answer.
TEXT_CAPACITY = 512


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The newest frames of a stream at a probe, and its question after them, as a stream of its own.

    Attributes:
      stream: the stream.
      probe: the first probe of the question.
    """

    stream: TabletopStream
    probe: Probe

    @property
    def start(self) -> int:
        """The second of its first frame."""
        return max(self.probe.second + 1 - RECENT, 0)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The question, half a second after the last frame."""
        asked = self.stream.requests[self.probe.request]
        return (dataclasses.replace(asked, time=self.probe.second - self.start + 0.5),)

    def frames(self, size: int) -> UInt8[np.ndarray, "F H W 3"]:
        """Renders the frames, `size` pixels wide and high."""
        return self.stream.frames(size, self.start, self.probe.second + 1)

    def judge(self, events: Iterable[Event]) -> ages.Answer:
        """Judges the answer in the events of this stream, by the truth at the probe."""
        (request,), probe = self.requests, self.probe
        said = scores.transcribe(events, self.requests).statements
        stated = [s.facts for s in said if s.request == 0 and s.facts]
        # As in `scores.probes`: about the present, later statements override earlier ones; about the past,
        # the first is the answer.
        facts: dict[str, str] = {}
        for each in stated if request.kind in LIVE else stated[:1]:
            facts.update(each)
        truth = truth_of(request, self.stream.world, probe.second)
        right = bool(facts) and scores.is_right_answer(request, facts, truth)
        age = ages.bucket(ages.evidence(request, self.stream.world, probe.second), probe.second)
        return ages.Answer(request.kind, age, float(right), {probe.value: 1.0})


def engine_config(slots: int) -> EngineConfig:
    """Capacities of an engine for excerpts, in which nothing is evicted."""
    return EngineConfig(slots, TEXT_CAPACITY, RECENT, MemoryConfig("full", text="full"))


def excerpts(stream: TabletopStream, probes: Iterable[Probe]) -> Iterator[Excerpt]:
    """Yields an excerpt for each question, at its first probe.

    Args:
      stream: the stream that the questions are about.
      probes: its probes, in order.
    """
    for _, asked in itertools.groupby(probes, key=lambda probe: probe.request):
        yield Excerpt(stream, next(asked))


def ask(
    engine: EngineLike, asked: Sequence[Excerpt], *, image_size: int, tokens_per_second: int
) -> list[ages.Answer]:
    """Plays the excerpts and judges the answers.

    Args:
      engine: with the capacities of `engine_config`.
      asked: the excerpts.
      image_size: side of the frames, in pixels.
      tokens_per_second: speed of speech.
    """
    played = play(
        {engine.config.slots: engine}, asked, image_size=image_size, tokens_per_second=tokens_per_second
    )
    return [excerpt.judge(events) for excerpt, events in zip(asked, played, strict=True)]
