"""What a training step takes.

B sequences, S tokens, F frames, H W pixels
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded sequences with their frames.

    Attributes:
      tokens: what is read; padding is id 0.
      labels: the tokens themselves where they are to be learnt, IGNORED elsewhere and in the padding.
      frames: fitted into the square tile, 8 bit; normalised on the device.
      frame_positions: index of each frame's `<|image|>` among the tokens, ascending; S where there is none.
    """

    tokens: Int[np.ndarray, "B S"]
    labels: Int[np.ndarray, "B S"]
    frames: UInt8[np.ndarray, "B F H W 3"]
    frame_positions: Int[np.ndarray, "B F"]
