"""The jitted steps of live streams: encode frames; append what happened and draw the next token.

One step does it all: it appends a row to each slot - the token drawn last, then prompts and frames - and
draws the next one. A token that was drawn is *pending* until the next step appends it, so a silent second
costs one step, and the host knows each token as soon as it is drawn.

B slots, T tokens, F frames, P pool of encoded frames, N vectors a frame, D width, V vocabulary
"""

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from moss_jax.config import EngineConfig, TokenSampling
from moss_jax.memory import StreamState, init_state
from moss_jax.nn import MossVideo, for_decoding
from moss_jax.stream.sampling import sample
from moss_jax.text import Tokenizer
from moss_jax.video import preprocess

# In a row: the token that was drawn last.
PENDING = -1

# Sizes that programs are compiled for. Longer rows are taken in pieces. The most tokens are the most frames
# with 64 others around them.
TOKEN_BUCKETS = (1, 2, 4, 16, 64, 320)
FRAME_BUCKETS = (1, 8, 32, 256)
ENCODE_BUCKETS = (1, 8, 32)
# Into which a frame that comes alone is cut on its way to the device.
STRIPS = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """What one step appends to a slot.

    Attributes:
      tokens: may begin with PENDING.
      frames: for each `<|image|>` among the tokens, in order, the index of its frame in the pool.
      new_turn: the repetition penalty forgets what was said.
    """

    tokens: Sequence[int]
    frames: Sequence[int] = ()
    new_turn: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """The state of all slots between two steps.

    Attributes:
      stream: what the model knows.
      pending: the token that was drawn last and is not part of the stream yet.
      logits: the scores that it was drawn from.
      said: tokens of the current turn that the repetition penalty applies to; None without a penalty.
    """

    stream: StreamState
    pending: Int[Array, " B"]
    logits: Float[Array, "B V"]
    said: Bool[Array, "B V"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step found.

    Attributes:
      tokens: the next token of each slot; silence where the model would end its turn, since in a stream that
        stays open.
      logits: the scores that they were drawn from; part of the state, so gone with the next step.
    """

    tokens: Int[Array, " B"]
    logits: Float[Array, "B V"]


class Engine:
    """A model ready to stream: its parameters, and the compiled programs for a bounded set of shapes.

    Holds no stream: `start` makes a state, `step` takes one and returns the next.

    Args:
      model: may be dropped by the caller; its parameters are shared, not copied, but for those that go to
        another device or are arranged anew for decoding.
      tokenizer: of the same checkpoint.
      config: slots and capacities.
      sampling: how tokens are drawn.
      perception_device: encodes the frames, so that they take no time from the device that makes the text;
        None for the one that the model is on.

    Raises:
      ValueError: the tokenizer is of another vocabulary than the model.
    """

    def __init__(
        self,
        model: MossVideo,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        sampling: TokenSampling | None = None,
        *,
        perception_device: jax.Device | None = None,
    ):
        if tokenizer.vocab_size != model.config.decoder.vocab_size:
            raise ValueError(
                f"the tokenizer predicts {tokenizer.vocab_size} tokens, "
                f"the model {model.config.decoder.vocab_size}; they must be of one checkpoint"
            )
        self.config = config or EngineConfig()
        self.sampling = sampling or TokenSampling()
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.dtype = model.dtype
        self.perception_device = perception_device
        self._encoder, encode = _pure(
            model, lambda model, pixels: model.encode(pixels), lambda path, _: path[0] != "decoder"
        )
        special = tokenizer.special
        decoder = for_decoding(model.decoder)
        self._decoder, step = _pure(decoder, functools.partial(_step, self.sampling, special))
        # Everything is said to be where it is: programs are compiled for that, so features that come from
        # another device find the same ones.
        (device,) = self._decoder[0].devices()
        self._place = SingleDeviceSharding(device)
        self._decoder = jax.device_put(self._decoder, self._place)
        self._perception = SingleDeviceSharding(perception_device) if perception_device else self._place
        self._encoder = jax.device_put(self._encoder, self._perception)
        # Two programs: the device is at the first while the host takes its millisecond to launch the second.
        pixels = functools.partial(_pixels, model.config.vision, model.dtype)
        self._pixels = jax.jit(pixels, in_shardings=self._perception, out_shardings=self._perception)
        self._encode = jax.jit(encode)
        penalised = self.sampling.repetition_penalty != 1
        start = functools.partial(_start, model.config, model.dtype, penalised)
        self._start = jax.jit(start, static_argnums=0, out_shardings=self._place)
        # It returns the state alone, in the memory that it came in: where nothing changes its place, the
        # device replays the step as it was recorded.
        # (What a step doesn't use of the state, the logits before, is kept for that.)
        self._step = jax.jit(step, donate_argnums=(2,), keep_unused=True)
        # Arguments of a step that appends pending tokens alone, by which slots stand still.
        self._going_on: dict[tuple[bool, ...], tuple] = {}
        # The session writes the frame of the dialogue; the model only what it says, and when it is done.
        never = tokenizer.control_ids - {special.silence, special.eot}
        allowed = np.ones(tokenizer.vocab_size, bool)
        allowed[[i for i in never if i < tokenizer.vocab_size]] = False
        rules = _Rules(jax.random.key(self.sampling.seed), allowed, exempt=tokenizer.penalty_exempt())
        self._rules = jax.device_put(rules, self._place)

    def start(self) -> EngineState:
        """A state with nothing in it. Each slot's first row must begin with a real token."""
        return self._start(self.config)

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Array, "P N D"]:
        """Features of frames of any sizes, from any streams; those of one size share a program call.

        The result may hold more rows than frames; row `i` belongs to frame `i`.
        """
        shapes = {frame.shape for frame in frames}
        if len(shapes) > 1:
            parts = [self.encode([frame]) for frame in frames]
        else:
            batches, parts = map(self._send, _batches(list(frames))), []
            sent = collections.deque(itertools.islice(batches, 1))
            while sent:
                parts.append(self._encode_sent(sent.popleft()))
                # What is sent to the device waits for the programs called before, so from the second batch on
                # the frames of the next are sent before one is encoded.
                sent.extend(itertools.islice(batches, 2 - len(sent)))
        if len(parts) == 1:
            return parts[0]
        # As many rows as a power of two, so that few sizes of pool come to be compiled for.
        pool = jnp.concatenate(parts)
        return jnp.pad(pool, ((0, (1 << (len(pool) - 1).bit_length()) - len(pool)), (0, 0), (0, 0)))

    def step(
        self, state: EngineState, rows: Sequence[Row | None], pool: Float[Array, "P N D"] | None = None
    ) -> tuple[EngineState, Drawn]:
        """Appends a row to each slot and draws its next token; slots whose row is None stand still.

        Args:
          state: is used up (donated).
          rows: one for each slot; the caller sees to it that they fit.
          pool: features that the rows' frames point into.
        """
        pieces = [list(_pieces(row, self.tokenizer.special.image)) if row else [] for row in rows]
        count = max(map(len, pieces))
        # Short rows wait, so that the last piece is the last of every slot and the draw is made from it.
        pieces = [[None] * (count - len(p)) + p for p in pieces]
        for piece in zip(*pieces, strict=True):
            state, drawn = self._step_piece(state, piece, pool)
        return state, drawn

    def warm_up(self, frame_shape: tuple[int, int, int]) -> None:
        """Compiles all that a session of one slot calls for, with frames of this shape.

        With more slots, rows of several kinds can meet in one step; such programs compile when they come up.
        """
        image, eot = self.tokenizer.special.image, self.tokenizer.special.eot
        frame = np.zeros(frame_shape, np.uint8)
        batches = [_shaped(_in_strips([frame] * count), self._perception) for count in ENCODE_BUCKETS]
        pixels = [_shaped(jax.eval_shape(self._pixels, x), self._perception) for x in batches]
        rows = [Row([PENDING] + [eot] * (length - 1)) for length in TOKEN_BUCKETS]
        rows += [Row([image] * count, [0] * count) for count in FRAME_BUCKETS]
        with futures.ThreadPoolExecutor() as threads:
            # Calls find what has been compiled here, side by side.
            compiled = [threads.submit(self._encode.lower(self._encoder, x).compile) for x in pixels]
            compiled += [threads.submit(self._pixels.lower(x).compile) for x in batches]
            state = _shaped(jax.eval_shape(self.start), self._place)
            vectors = jax.eval_shape(self._encode, self._encoder, pixels[0]).shape[1:]
            for row in rows:
                *arguments, feed, index = self._arguments([row] * self.config.slots)
                if feed is not None:
                    features = jax.ShapeDtypeStruct(
                        (*index.shape, *vectors), self.dtype, sharding=self._place
                    )
                    feed = dataclasses.replace(feed, features=features)
                lowered = self._step.lower(self._decoder, self._rules, state, *arguments, feed)
                compiled.append(threads.submit(lowered.compile))
        for program in compiled:
            program.result()
        one, few, many = ENCODE_BUCKETS
        # Up to a large batch behind a small one; those of several batches are put together first.
        pools = [self.encode([frame] * count) for count in (one, *range(few, few + many + 1, few))]
        for row, pool in itertools.product(rows, {len(pool): pool for pool in pools}.values()):
            if row.frames or pool is pools[0]:
                # Of the state nothing is kept, so that there is never room needed for two.
                drawn = self.step(self.start(), [row] * self.config.slots, pool)[1]
                jax.block_until_ready(drawn)

    def _send(self, frames):
        """Frames of one size, as many as fill a bucket, as `_pixels` takes them."""
        size = _bucket(len(frames), ENCODE_BUCKETS)
        missing, frames = size - len(frames), _in_strips(frames)
        # The program is called with a frame that lies on the host, since `device_put` takes Python half a
        # millisecond; of several, the first is to be sent but once, however often it fills the bucket.
        if size > 1:
            frames = jax.device_put(frames, self._perception)
        return frames + [frames[0]] * missing

    def _encode_sent(self, frames):
        features = self._encode(self._encoder, self._pixels(frames))
        return features if self.perception_device is None else jax.device_put(features, self._place)

    def _step_piece(self, state, rows, pool):
        *arguments, feed, index = self._arguments(rows)
        if feed is not None:
            # Beforehand, so that one program serves pools of all sizes.
            feed = dataclasses.replace(feed, features=_take(pool, index))
        state = self._step(self._decoder, self._rules, state, *arguments, feed)
        return state, Drawn(_copy(state.pending), state.logits)

    def _arguments(self, rows):
        """As `_arguments`; those of the step that is taken most stay on the device."""
        if any(row and (list(row.tokens) != [PENDING] or row.new_turn) for row in rows):
            return _arguments(rows, self.tokenizer.special.image)
        standing = tuple(row is None for row in rows)
        if standing not in self._going_on:
            arguments = _arguments(rows, self.tokenizer.special.image)
            self._going_on[standing] = jax.device_put(arguments, self._place)
        return self._going_on[standing]


def _arguments(rows: Sequence[Row | None], image: int):
    """What a step is called with, but for the feed's features, and where in the pool those are."""
    slots = len(rows)
    length = _bucket(max(len(row.tokens) for row in rows if row), TOKEN_BUCKETS)
    frames = max(len(row.frames) for row in rows if row)
    lengths = np.zeros(slots, np.int32)
    new_turn = np.zeros(slots, bool)
    feed = index = None
    if frames:
        frames = _bucket(frames, FRAME_BUCKETS)
        index = np.zeros((slots, frames), np.int32)
        length = max(length, _room_for_tokens(frames))
        feed = _Feed(features=None, row=np.zeros((slots, frames), np.int32), count=np.zeros(slots, np.int32))
    tokens = np.zeros((slots, length), np.int32)
    for slot, row in enumerate(rows):
        if row is None:
            continue
        tokens[slot, : len(row.tokens)] = row.tokens
        lengths[slot] = len(row.tokens)
        new_turn[slot] = row.new_turn
        if row.frames:
            count = feed.count[slot] = len(row.frames)
            index[slot, :count] = row.frames
            feed.row[slot, :count] = [i for i, token in enumerate(row.tokens) if token == image]
    return tokens, lengths, new_turn, feed, index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rules:
    """What sampling needs beside its settings."""

    key: Key[Array, ""]
    allowed: Bool[Array, " V"]
    exempt: Bool[Array, " V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Feed:
    """Frames of a step, and at which token of the slot's row each stands."""

    features: Float[Array, "B F N D"] | None
    row: Int[Array, "B F"]
    count: Int[Array, " B"]


def _batches(frames: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """As many frames as fill a bucket, and the last few.

    Small buckets come first, so that the device begins soon and has work while many frames are on their way:
    there is a large one only behind a small one.
    """
    _, few, many = ENCODE_BUCKETS
    large = max(len(frames) - few, 0) // many
    small, rest = divmod(len(frames) - large * many, few)
    left = iter(frames)
    for size in [few] * small + [many] * large + [rest] * bool(rest):
        yield list(itertools.islice(left, size))


def _in_strips(frames: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Frames as they are sent to the device, one by one: nothing on the host puts them into one array.

    While a strip of a frame that is sent alone is on its way, the next is made ready for it.
    """
    if len(frames) > 1:
        return [[frame] for frame in frames]
    rows = -(-len(frames[0]) // STRIPS)
    return [[frames[0][i : i + rows] for i in range(0, len(frames[0]), rows)]]


def _shaped(tree, place: SingleDeviceSharding):
    """What stands for arrays of these shapes when a program is compiled for them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


@jax.jit
def _take(pool, index):
    return pool[index]


@jax.jit
def _copy(x):
    return jnp.copy(x)


def _pure(
    module: nnx.Module, call: Callable, uses: nnx.filterlib.Filter = ...
) -> tuple[list[jax.Array], Callable]:
    """A module's parameters as a plain list, and `call(module, ...)` as a function of that list.

    JAX walks a list in C++ at every call, an `nnx.State` in Python; and each array in it takes the host a
    microsecond or two. Norms, biases and gates, which are many and small, are therefore no arguments but
    constants of the program.

    Args:
      uses: the parameters that the call uses; of the others only the shapes are there.
    """
    graph, params, others = nnx.split(module, uses, ...)
    leaves, structure = jax.tree.flatten(params)
    others = jax.eval_shape(lambda: others)
    constants = {i: np.asarray(x) for i, x in enumerate(leaves) if x.ndim == 1}

    count = len(leaves)

    def pure(leaves, *arguments):
        leaves = iter(leaves)
        params = [jnp.asarray(constants[i]) if i in constants else next(leaves) for i in range(count)]
        return call(nnx.merge(graph, jax.tree.unflatten(structure, params), others), *arguments)

    return [x for i, x in enumerate(leaves) if i not in constants], pure


def _start(model_config, dtype, penalised, config):
    """The state of slots that nothing has happened to."""
    slots, vocab = config.slots, model_config.decoder.vocab_size
    return EngineState(
        stream=init_state(
            model_config,
            slots,
            text_capacity=config.text_capacity,
            bank_capacity=config.bank_capacity,
            dtype=dtype,
        ),
        pending=jnp.zeros(slots, jnp.int32),
        logits=jnp.zeros((slots, vocab), jnp.float32),
        said=jnp.zeros((slots, vocab), bool) if penalised else None,
    )


def _pixels(config, dtype, frames):
    """What the encoder takes of frames that come each in strips of its rows."""

    def fitted(strips):
        frame = strips[0]
        if len(strips) > 1:
            # Laid side by side once, and not again wherever a pixel is read.
            frame = jax.lax.optimization_barrier(jnp.concatenate(strips))
        pixels = preprocess(frame, image_size=config.image_size, mean=config.image_mean, std=config.image_std)
        return pixels.astype(dtype)

    # Each is written to its place: to put them side by side would take another pass, and a slow one.
    size = config.image_size
    pixels = jnp.zeros((len(frames), size, size, 3), dtype)
    for index, strips in enumerate(frames):
        pixels = pixels.at[index].set(fitted(strips))
    return pixels


def _step(sampling, special, decoder, rules, state, tokens, lengths, new_turn, feed):
    """One step of all slots; see `Engine.step`."""
    slots = jnp.arange(tokens.shape[0])
    spoken = tokens[:, 0] == PENDING
    said = state.said
    if said is not None:
        # Of a slot that was told nothing new, remember what it just said.
        update = jnp.where(spoken & ~rules.exempt[state.pending], True, said[slots, state.pending])
        said = said.at[slots, state.pending].set(update) & ~new_turn[:, None]
    tokens = jnp.where(tokens == PENDING, state.pending[:, None], tokens)
    stream = state.stream
    if feed is not None:
        position = stream.text.length[:, None] + feed.row
        bank = decoder.remember(stream.bank, feed.features, position, feed.count)
        stream = dataclasses.replace(stream, bank=bank)
    hidden, stream = decoder.decode(stream, tokens, lengths)
    last = hidden[slots, jnp.maximum(lengths - 1, 0)]
    logits = decoder.logits(last[:, None])[:, 0]
    keys = None
    if sampling.temperature:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rules.key, stream.text.length)
    drawn = sample(logits, sampling, keys=keys, allowed=rules.allowed, said=said)
    # A turn that the model ends stays open, so what is appended is the silence that it was trained with.
    drawn = jnp.where(drawn == special.eot, special.silence, drawn)
    pending = jnp.where(lengths > 0, drawn, state.pending)
    return EngineState(stream=stream, pending=pending, logits=logits, said=said)


def _bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`, or the largest there is."""
    return buckets[min(bisect.bisect_left(buckets, size), len(buckets) - 1)]


def _room_for_tokens(frames: int) -> int:
    """Tokens, those of the frames among them, that the program for so many frames takes; 0 if there is none.

    One more than frames at least, since a pending token may come before them.
    """
    if frames > FRAME_BUCKETS[-1]:
        return 0
    return _bucket(_bucket(frames, FRAME_BUCKETS) + 1, TOKEN_BUCKETS) if frames else TOKEN_BUCKETS[-1]


def _pieces(row: Row, image: int) -> Iterator[Row]:
    """Cuts a row into pieces that there are programs for.

    A session runs on one for each size of prompt and one for each number of frames, and on none for their
    combinations. So frames and what is around them stay together where the program of the frames has room.
    """
    start = end = taken = frames = 0

    def piece():
        return Row(row.tokens[start:end], row.frames[taken : taken + frames], row.new_turn and start == 0)

    for is_frame, run in itertools.groupby(row.tokens, lambda token: token == image):
        left = len(list(run))
        while left:
            count = min(left, (FRAME_BUCKETS if is_frame else TOKEN_BUCKETS)[-1])
            if left == count + 1 and not is_frame:
                count -= 1  # The program for one token has another form for one that is not pending.
            if end > start and end - start + count > _room_for_tokens(frames + count * is_frame):
                yield piece()
                start, taken, frames = end, taken + frames, 0
            end, frames, left = end + count, frames + count * is_frame, left - count
    yield piece()
