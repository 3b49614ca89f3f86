"""Frame encoding in bucketed batches, each transferred while the previous one is encoded.

P encoded frames, N vectors a frame, D width
"""

import collections
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, DTypeLike, Float, Int, UInt8

from moss_jax.config import VisionConfig
from moss_jax.nn import MossVideo
from moss_jax.stream.parameters import functionalize
from moss_jax.stream.placement import abstract, place, traced_on
from moss_jax.stream.rows import bucket
from moss_jax.video import preprocess

# Batch sizes that programs are compiled for: a single frame, and larger batches.
ENCODE_BUCKETS = (1, 8, 32)
SHARED_BUCKETS = (1, 2, 4, 8, 16, 32)
# Size of the small batch that comes first when there are many frames.
FEW = 8
# Number of strips that a frame is cut into when it is sent alone.
STRIPS = 4

# A batch of frames, each as a list of strips.
type Strips = list[list[np.ndarray]] | list[list[jax.Array]]


class FrameEncoder:
    """Vision encoder, compressor and projector with their compiled programs.

    Preprocessing and encoder are two programs, so that the device preprocesses during the millisecond that
    the host takes to launch the encoder.

    Args:
      model: its decoder is not kept.
      placement: of the parameters; frames are encoded there, each on every device of a mesh.
      output: placement of the features.
      buckets: batch sizes, ascending; 1 and `FEW` among them.

    Attributes:
      buckets: as given.
      programs: the jitted functions, by name.
    """

    def __init__(
        self,
        model: MossVideo,
        placement: Sharding,
        output: Sharding,
        buckets: Sequence[int] = ENCODE_BUCKETS,
    ):
        self.buckets = tuple(buckets)
        parameters, encode = functionalize(
            model, lambda model, pixels: model.encode(pixels), lambda path, _: path[0] != "decoder"
        )
        self._parameters = place(parameters, placement)
        self._placement, self._output = placement, output
        pixels = functools.partial(to_pixels, model.config.vision, model.dtype)

        def encode_batch(parameters, pixels):
            features = encode(parameters, pixels)
            if placement != output:
                return features
            # Always to the same length, so that what takes features is compiled for few lengths. Not if they
            # are to be transferred: padding would take longer on the way, and on arrival it would wait for
            # the step in flight.
            return jnp.pad(features, ((0, self.buckets[-1] - len(features)), (0, 0), (0, 0)))

        self._pixels = jax.jit(pixels, in_shardings=placement, out_shardings=placement)
        self._encode = jax.jit(traced_on(placement, encode_batch), out_shardings=placement)
        self.programs = {"pixels": self._pixels, "encode": self._encode}
        self._seconds: dict[int, float] = {}

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Array, "P N D"]:
        """Encodes frames; see `Engine.encode`."""
        if len({frame.shape for frame in frames}) > 1:
            batches = [[frame] for frame in frames]
        else:
            batches = list(split_batches(frames, self.buckets[-1]))
        sends, parts = map(self.send, batches), []
        sent = collections.deque(itertools.islice(sends, 1))
        while sent:
            parts.append(self.encode_sent(sent.popleft()))
            # A transfer waits for the programs launched before it, so each further batch is sent before the
            # previous one is encoded.
            sent.extend(itertools.islice(sends, 2 - len(sent)))
        if len(parts) == 1:
            return parts[0]
        # Padded at the end alone, and again to one of few lengths.
        begins = itertools.accumulate(map(len, parts), initial=0)
        places = [begin + np.arange(len(batch)) for begin, batch in zip(begins, batches, strict=False)]
        index = np.concatenate(places, dtype=np.int32)
        return _join(parts, np.pad(index, (0, -len(index) % self.buckets[-1])))

    def send(self, frames: Sequence[np.ndarray], *, ahead: bool = False) -> Strips:
        """Sends a batch of frames of one size, padded to a bucket with copies of the first.

        Args:
          ahead: whether other programs are launched between this and `encode_sent`.
        """
        size = bucket(len(frames), self.buckets)
        strips = in_strips(frames)
        # A single frame stays on the host until the program is called, since `device_put` costs half a
        # millisecond of Python; in a batch, the first frame is sent once, however often it pads.
        if size > 1 or ahead:
            strips = jax.device_put(strips, self._placement)
        return strips + [strips[0]] * (size - len(frames))

    def encode_sent(self, strips: Strips) -> Float[Array, "P N D"]:
        """Encodes a batch that `send` returned."""
        features = self._encode(self._parameters, self._pixels(strips))
        return features if self._placement == self._output else jax.device_put(features, self._output)

    def measure(self, frame_shape: tuple[int, int, int]) -> None:
        """Times each compiled batch size with its frames already on the device, for `largest_batch`."""
        frame = np.zeros(frame_shape, np.uint8)
        for size in self.buckets:
            for _ in range(2):  # The first call is slower.
                sent = jax.block_until_ready(self.send([frame] * size, ahead=True))
                started = time.perf_counter()
                jax.block_until_ready(self.encode_sent(sent))
                self._seconds[size] = time.perf_counter() - started

    def largest_batch(self, seconds: float) -> int:
        """The largest batch size that takes at most this time; 1 if none does, or none was measured."""
        if seconds == math.inf:
            return self.buckets[-1]
        return max((size for size, taken in self._seconds.items() if taken <= seconds), default=1)

    def padded_length(self, count: int) -> int:
        """Length that `encode` pads the features of up to this many frames of one size to."""
        most = self.buckets[-1]
        if count <= most and self._placement != self._output:
            return bucket(count, self.buckets)
        return -(-count // most) * most

    @property
    def warm_counts(self) -> list[int]:
        """Numbers of frames that together exercise all programs: the buckets, and several batches."""
        # Small batches with a remainder, and a large one among them.
        most = self.buckets[-1]
        return [*self.buckets, *range(FEW + 1, most + FEW, FEW), most + FEW, most + FEW + 1]

    def lower(self, frame_shape: tuple[int, int, int]) -> Iterator[jax.stages.Lowered]:
        """Lowers the programs for frames of one shape, without compiling."""
        frame = np.zeros(frame_shape, np.uint8)
        batches = [abstract(in_strips([frame] * size), self._placement) for size in self.buckets]
        for batch in batches:
            pixels = abstract(jax.eval_shape(self._pixels, batch), self._placement)
            yield self._encode.lower(self._parameters, pixels)
        for batch in batches:
            yield self._pixels.lower(batch)


@jax.jit
def _join(parts: Sequence[Float[Array, "P N D"]], index: Int[Array, " n"]) -> Float[Array, "n N D"]:
    """Gathers features from several batches; `index` refers to their concatenation."""
    return jnp.concatenate(parts)[index]


def split_batches(frames: Sequence[np.ndarray], most: int) -> Iterator[Sequence[np.ndarray]]:
    """Splits frames into batches of `most` and of `FEW`, and a remainder.

    Small batches come first, at least one if there is a large one, so that the device starts early and is
    busy during the transfer of the large ones.
    """
    large = max(len(frames) - FEW, 0) // most
    small, rest = divmod(len(frames) - large * most, FEW)
    left = iter(frames)
    for size in [FEW] * small + [most] * large + [rest] * bool(rest):
        yield list(itertools.islice(left, size))


def in_strips(frames: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Splits frames for the transfer: one array per frame, which saves the host a copy into a batch.

    A frame alone is cut into strips, so that one is prepared while the previous one is in transit.
    """
    if len(frames) > 1:
        return [[frame] for frame in frames]
    rows = -(-len(frames[0]) // STRIPS)
    return [[frames[0][i : i + rows] for i in range(0, len(frames[0]), rows)]]


def to_pixels(config: VisionConfig, dtype: DTypeLike, frames: Strips) -> Float[Array, "P S S 3"]:
    """Resizes, pads and normalises frames given as strips."""

    def fitted(strips):
        frame = strips[0]
        if len(strips) > 1:
            # The barrier keeps XLA from fusing the concatenation into every read of a pixel.
            frame = jax.lax.optimization_barrier(jnp.concatenate(strips))
        pixels = preprocess(frame, image_size=config.image_size, mean=config.image_mean, std=config.image_std)
        return pixels.astype(dtype)

    # Each frame is written to its place in the batch: stacking them takes another, slow pass.
    size = config.image_size
    pixels = jnp.zeros((len(frames), size, size, 3), dtype)
    for index, strips in enumerate(frames):
        pixels = pixels.at[index].set(fitted(strips))
    return pixels
