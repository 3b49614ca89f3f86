"""The input of a training step.

B sequences, S tokens, F frames, H W pixels; in batches of segments K segments, C tokens kept of the text
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """How the rows of a batch continue streams: K segments each, before which their memory changes.

    Attributes:
      begins: whether the segment begins a new stream, with an empty memory.
      lengths: tokens of the segment.
      skipped: positions that are left out before it.
      kept: indices of the tokens that stay in the text cache, ascending, the first `kept_length` of them.
    """

    begins: Bool[np.ndarray, "B K"]
    lengths: Int[np.ndarray, "B K"]
    skipped: Int[np.ndarray, "B K"]
    kept: Int[np.ndarray, "B K C"]
    kept_length: Int[np.ndarray, "B K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded sequences with their frames.

    With `segments`, a row is K segments, each padded to S/K tokens and F/K frames.

    Attributes:
      tokens: input ids; padding is id 0.
      labels: the token ids where they are targets; IGNORED elsewhere and in the padding.
      frames: resized and padded to the square tile, 8 bit; normalised on the device.
      frame_positions: index of each frame's `<|image|>` among the tokens, ascending; S for absent frames.
      segments: None for whole sequences.
    """

    tokens: Int[np.ndarray, "B S"]
    labels: Int[np.ndarray, "B S"]
    frames: UInt8[np.ndarray, "B F H W 3"]
    frame_positions: Int[np.ndarray, "B F"]
    segments: Segments | None = None
