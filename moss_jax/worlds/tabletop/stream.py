"""A stream of the tabletop world: the world, the camera, the user - with the truth about all of it."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.dialogue import Request, draw_requests
from moss_jax.worlds.tabletop.render import Look, paint, photograph
from moss_jax.worlds.tabletop.world import World, generate

# Worlds of evaluation are drawn apart from those of training, whatever the seeds.
TRAINING, EVALUATION = 0, 1


@dataclasses.dataclass(frozen=True)
class TabletopStream:
    """What happens, how it looks and what the user says.

    Attributes:
      noise: seed of the camera's noise and shake.
    """

    world: World
    look: Look
    requests: tuple[Request, ...]
    noise: int

    def frames(self, size: int) -> UInt8[np.ndarray, "F H W 3"]:
        """The frames of the whole seconds, `size` pixels wide and high."""
        rng = np.random.default_rng(self.noise)
        frames, table, picture = [], None, None
        for second, now in enumerate(self.world.tables):
            if now != table:
                table, picture = now, paint(self.world.scene(float(second)), self.look, size)
            frames.append(photograph(picture, self.look, rng, size))
        return np.stack(frames)


def draw_stream(
    rng: np.random.Generator, seconds: int, *, split: int = TRAINING, dense: bool = False
) -> TabletopStream:
    """Draws a stream.

    Args:
      split: EVALUATION has handwritten digits that no stream of TRAINING has.
      dense: much happens and the user asks all the time.
    """
    indices = digits.training_indices() if split == TRAINING else digits.held_out_indices()
    rate, gap = (0.5, 1) if dense else (rng.uniform(0.1, 0.6), int(rng.integers(1, 5)))
    world = generate(rng, seconds, digit_indices=indices, rate=rate, gap=gap)
    first_turn = 0.3 if split == TRAINING and not dense else 0.0
    requests = draw_requests(rng, world, first_turn=first_turn, dense=dense)
    return TabletopStream(world, Look.draw(rng), requests, int(rng.integers(2**31)))


def evaluation_stream(seed: int, index: int, seconds: int) -> TabletopStream:
    """Stream `index` of the held-out ones of a seed."""
    return draw_stream(np.random.default_rng([EVALUATION, seed, index]), seconds, split=EVALUATION)
