"""Streams of the tabletop world: a world, the camera on it, and the requests of a user."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import UInt8

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.dialogue import Request, draw_requests
from moss_jax.worlds.tabletop.render import Look, Scene, paint, photograph
from moss_jax.worlds.tabletop.world import World, generate

# First entry of a stream's seed: no stream of evaluation is one of training, whatever the other entries.
TRAINING, EVALUATION = 0, 1


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

    def frames(self, size: int) -> UInt8[np.ndarray, "F H W 3"]:
        """Renders the frames of the whole seconds, `size` pixels wide and high."""
        scenes = (self.world.scene(float(second)) for second in range(self.world.seconds))
        return np.stack(list(take_photographs(scenes, self.look, seed=self.noise, size=size)))


def take_photographs(
    scenes: Iterable[Scene], look: Look, *, seed: int, size: int
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Renders scenes in order, and paints those alone that differ from the scene before.

    Args:
      scenes: to be photographed.
      look: of the stream.
      seed: of the camera's noise and shake.
      size: side of the photographs, in pixels.
    """
    rng = np.random.default_rng(seed)
    for _, same in itertools.groupby(scenes):
        picture = None
        for scene in same:
            picture = paint(scene, look, size) if picture is None else picture
            yield photograph(picture, look, rng, size)


def draw_stream(
    rng: np.random.Generator, seconds: int, *, split: int = TRAINING, dense: bool = False
) -> TabletopStream:
    """Samples a stream.

    Args:
      rng: the source of randomness.
      seconds: length of the stream.
      split: TRAINING or EVALUATION; their handwritten digits are disjoint.
      dense: many events, and requests in quick succession.
    """
    indices = digits.training_indices() if split == TRAINING else digits.held_out_indices()
    rate, gap = (0.5, 1) if dense else (rng.uniform(0.1, 0.6), int(rng.integers(1, 5)))
    world = generate(rng, seconds, digit_indices=indices, rate=rate, gap=gap)
    first_turn = 0.3 if split == TRAINING and not dense else 0.0
    requests = draw_requests(rng, world, first_turn=first_turn, dense=dense)
    return TabletopStream(world, Look.draw(rng), requests, int(rng.integers(2**31)))


def evaluation_stream(seed: int, index: int, seconds: int) -> TabletopStream:
    """Returns held-out stream `index` of a seed."""
    return draw_stream(np.random.default_rng([EVALUATION, seed, index]), seconds, split=EVALUATION)
