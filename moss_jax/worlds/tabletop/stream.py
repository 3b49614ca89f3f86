"""Streams of the tabletop world: a world, the camera on it, and the requests of a user."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from moss_jax.worlds.tabletop import digits, language
from moss_jax.worlds.tabletop.answers import evidence
from moss_jax.worlds.tabletop.render import Look, Scene, impair, paint, photograph
from moss_jax.worlds.tabletop.requests import PACE, Request, draw_request, draw_requests
from moss_jax.worlds.tabletop.world import IMPAIRMENTS, Impairment, World, generate, pick

# First entry of a stream's seed: no stream of evaluation is one of training, whatever the other entries.
TRAINING, EVALUATION = 0, 1
# Streams longer than this, in seconds, vary in the rate of events and in the user's pace.
VARIED = 60
# Range of the rates of events, per second, and of the mean times between two requests, in seconds.
RATES, PACES = (0.01, 0.6), (3.0, 30.0)
# Range of the lengths of the quiet and busy stretches of a stream whose rate of events changes, in seconds.
STRETCHES = (20.0, 240.0)
# Share of the training streams with an impaired camera, and the length of a stream that may have one.
IMPAIRED, SHORTEST_IMPAIRED = 0.12, 12
# Seconds from the beginning of a stream within which a user who then only listens asks for a narration.
ASKED_WITHIN = 8
# Range of the ages, in seconds, beyond which old evidence must be, and how often a question is drawn for it.
OLD, DRAWS = (15.0, 300.0), 8


@dataclasses.dataclass(frozen=True)
class TabletopStream:
    """A stream with its ground truth.

    Attributes:
      world: the events and the truth.
      look: table, light and camera.
      requests: the user's prompts, in order of time.
      noise: seed of the camera's noise and shake.
    """

    world: World
    look: Look
    requests: tuple[Request, ...]
    noise: int

    @property
    def impairments(self) -> tuple[Impairment, ...]:
        """When the camera is impaired, in order of time."""
        return self.world.impairments

    def frames(self, size: int, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "F H W 3"]:
        """Renders the frames of whole seconds, in time proportional to their number.

        Args:
          size: width and height of the frames, in pixels.
          start: the first second.
          stop: the second after the last; None for the end of the stream.

        Returns:
          The frames; those of a range are the same as in the whole stream.

        Raises:
          ValueError: the stream has no such range of seconds.
        """
        stop = self.world.seconds if stop is None else stop
        if not 0 <= start < stop <= self.world.seconds:
            raise ValueError(
                f"0 <= start < stop <= {self.world.seconds} must hold, not start {start} and stop {stop}"
            )
        return np.stack(list(take_photographs(self, size=size, start=start, stop=stop)))


def take_photographs(
    stream: TabletopStream, *, size: int, start: int, stop: int, fps: int = 1
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Renders a range of seconds in order.

    Args:
      stream: to be rendered.
      size: side of the photographs, in pixels.
      start: the first second.
      stop: the second after the last.
      fps: photographs a second.
    """
    for number in range(start * fps, stop * fps):
        impairment = stream.world.impairment(number // fps)
        if impairment and impairment.kind == "frozen":
            number = impairment.start * fps
        kind = impairment.kind if impairment and impairment.kind != "frozen" else None
        picture = _picture(stream.world.scene(number / fps), stream.look, size, kind)
        # Each photograph has its own seed, so that a range is the same as in the whole stream.
        yield photograph(picture, stream.look, np.random.default_rng([stream.noise, number]), size)


# A scene that does not change is painted once, also when a range continues another of the same stream.
@functools.lru_cache(maxsize=4)
def _picture(
    scene: Scene, look: Look, size: int, kind: Literal["black", "blurred", "overexposed"] | None
) -> Float[np.ndarray, "P P 3"]:
    """Paints what the camera sees, impaired or not."""
    picture = paint(scene, look, size)
    return impair(picture, kind) if kind else picture


def draw_stream(
    rng: np.random.Generator,
    seconds: int,
    *,
    split: int = TRAINING,
    dense: bool = False,
    past: float | None = None,
    varied: bool | None = None,
    rates: tuple[float, float] = RATES,
    paces: tuple[float, float] = PACES,
    impaired: float | None = None,
    old: float = 0.0,
    quiet: float = 0.0,
    narrated: bool = False,
) -> TabletopStream:
    """Samples a stream.

    Args:
      rng: the source of randomness.
      seconds: length of the stream.
      split: TRAINING or EVALUATION; their handwritten digits are disjoint.
      dense: many events, and requests in quick succession.
      past: share of questions about the past among the requests, which then are of all kinds; None for the
        usual share of those in `language.RECENT_PAST`.
      varied: draw the rate of events, which may also change, and the user's pace from wide ranges; None if
        the stream is longer than a minute.
      rates: the range that rates of varied streams are drawn from, in events per second.
      paces: the range that the user's pace is drawn from, in seconds between two requests.
      impaired: probability of an impaired camera; None for the usual one in a training stream of more than
        12 seconds and 0 in others.
      old: share of the questions about the past that are drawn again until their evidence is older than a
        time drawn log-uniformly between 15 seconds and 5 minutes, as far as there are such questions.
      quiet: share of the stream, at its beginning, in which the user says nothing, so that no earlier answer
        helps to remember it.
      narrated: whether the user asks for a narration in the first seconds, which goes on all that time.

    Raises:
      ValueError: a share is not in [0, 1], rates are not a range within (0, 1], or a stream of less than 4
        seconds has an impaired camera.
    """
    for name, share in (("past", past), ("impaired", impaired), ("old", old), ("quiet", quiet)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1; got {share}")
    if not 0 < rates[0] <= rates[1] <= 1:
        raise ValueError(f"rates must be a range within (0, 1]; got {rates}")
    if impaired is None:
        usual = split == TRAINING and not dense and seconds > SHORTEST_IMPAIRED
        impaired = IMPAIRED if usual else 0.0
    if impaired and seconds < 4:
        raise ValueError(f"a stream with an impaired camera needs at least 4 seconds; got {seconds}")
    if varied is None:
        varied = seconds > VARIED and not dense
    indices = digits.training_indices() if split == TRAINING else digits.held_out_indices()
    rate, gap = (0.5, 1) if dense else (rng.uniform(0.1, 0.6), int(rng.integers(1, 5)))
    pace = PACE
    if varied:
        rate = _rates(rng, seconds, rates)
        mean = _log_uniform(rng, *paces)
        pace = (0.4 * mean, 1.6 * mean)
    impairments = _impairments(rng, seconds) if impaired and rng.random() < impaired else ()
    world = generate(rng, seconds, digit_indices=indices, rate=rate, gap=gap, impairments=impairments)
    first_turn = 0.3 if split == TRAINING and not dense else 0.0
    requests = draw_requests(rng, world, first_turn=first_turn, dense=dense, past=past, pace=pace)
    requests = tuple(request for request in requests if request.time >= quiet * seconds)
    if narrated:
        asked = round(int(rng.integers(min(ASKED_WITHIN, seconds))) + rng.uniform(0.05, 0.95), 2)
        requests = (
            Request(asked, language.ask(rng, "narrate"), "narrate"),
            *(request for request in requests if request.time > asked),
        )
    if old:
        requests = tuple(
            _older(rng, world, request) if request.kind in language.PAST and rng.random() < old else request
            for request in requests
        )
    return TabletopStream(world, Look.draw(rng), requests, int(rng.integers(2**31)))


def _older(rng: np.random.Generator, world: World, request: Request) -> Request:
    """A question asked at the same time that needs old evidence, or the last one drawn if none is found."""
    if request.kind == "times":  # Needs the whole stream.
        return request
    age = _log_uniform(rng, *OLD)
    for _ in range(DRAWS):
        if _needs_older(request, world, age):
            break
        request = draw_request(rng, world, request.time, past=1.0)
    return request


def _needs_older(request: Request, world: World, age: float) -> bool:
    """Whether a question needs evidence older than `age`; never "seen", since in the end all has been."""
    second = int(request.time)
    shown = evidence(request, world, second)
    return request.kind != "seen" and shown is not None and second - shown > age


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _rates(rng: np.random.Generator, seconds: int, among: tuple[float, float]) -> list[float]:
    """Samples the rate of events in each second: the same for all, or with quiet and busy stretches."""
    if rng.random() < 0.5:
        return [_log_uniform(rng, *among)] * seconds
    rates: list[float] = []
    while len(rates) < seconds:
        rates += [_log_uniform(rng, *among)] * round(_log_uniform(rng, *STRETCHES))
    return rates[:seconds]


def _impairments(rng: np.random.Generator, seconds: int) -> tuple[Impairment, ...]:
    """Samples when the camera is impaired: once, and in long streams again and for longer."""
    longest = max(2.0, min(15.0 if seconds <= VARIED else 60.0, seconds / 3))
    found: list[Impairment] = []
    for _ in range(1 + rng.poisson(seconds / 600)):
        length = round(_log_uniform(rng, 2.0, longest))
        start = int(rng.integers(1, seconds - length))
        drawn = Impairment(start, start + length, pick(rng, IMPAIRMENTS))
        # At least one clear second between two.
        if all(drawn.stop < other.start or other.stop < drawn.start for other in found):
            found.append(drawn)
    return tuple(sorted(found, key=lambda i: i.start))


def evaluation_stream(
    seed: int,
    index: int,
    seconds: int,
    *,
    past: float | None = None,
    varied: bool | None = None,
    rates: tuple[float, float] = RATES,
    impaired: float = 0.0,
    old: float = 0.0,
    quiet: float = 0.0,
    narrated: bool = False,
) -> TabletopStream:
    """Returns held-out stream `index` of a seed; see `draw_stream`."""
    rng = np.random.default_rng([EVALUATION, seed, index])
    chosen = {"past": past, "varied": varied, "rates": rates, "impaired": impaired, "narrated": narrated}
    return draw_stream(rng, seconds, split=EVALUATION, old=old, quiet=quiet, **chosen)
