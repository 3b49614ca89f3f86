"""The input of a training step.

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
      tokens: input ids; padding is id 0.
      labels: the token ids where they are targets; IGNORED elsewhere and in the padding.
      frames: resized and padded to the square tile, 8 bit; normalised on the device.
      frame_positions: index of each frame's `<|image|>` among the tokens, ascending; S for absent frames.
    """

    tokens: Int[np.ndarray, "B S"]
    labels: Int[np.ndarray, "B S"]
    frames: UInt8[np.ndarray, "B F H W 3"]
    frame_positions: Int[np.ndarray, "B F"]
