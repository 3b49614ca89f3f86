"""What rows in 8 bits are.

K columns
"""

from typing import NamedTuple

from jaxtyping import Array, Float8e4m3fn, Float32


class Rounded(NamedTuple):
    """Rows that stand for `numbers * scale[..., None]`.

    Attributes:
      numbers: the largest of a row is that of the dtype.
      scale: one number a row.
    """

    numbers: Float8e4m3fn[Array, "... K"]
    scale: Float32[Array, "..."]
