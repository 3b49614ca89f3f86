"""A model ready to stream: compiled programs that encode frames and step all slots.

B slots, P encoded frames, N vectors a frame, D width, V vocabulary
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int, UInt8

from moss_jax.config import ConfigError, EngineConfig, MemoryConfig, TokenSampling
from moss_jax.memory.policies import FULL, make_policy
from moss_jax.memory.selection import feature_distance
from moss_jax.nn import MossVideo, for_decoding
from moss_jax.stream.parameters import functionalize
from moss_jax.stream.perception import ENCODE_BUCKETS, FrameEncoder
from moss_jax.stream.placement import abstract, mesh_of, place, placement_of, state_sharding, traced_on
from moss_jax.stream.rows import (
    FRAME_BUCKETS,
    PENDING,
    TOKEN_BUCKETS,
    Compaction,
    Row,
    StepArguments,
    split_row,
    step_arguments,
)
from moss_jax.stream.sampling import SlotSampling
from moss_jax.stream.step import (
    EngineState,
    Sampled,
    SamplingRules,
    compact_bank,
    compact_text,
    put_slot,
    set_sampling,
    slot_from_host,
    slot_to_host,
    start,
    step,
)
from moss_jax.text import Tokenizer

# Arguments of decode steps that are kept on the device, one for each set of slots that take part.
DECODE_ARGUMENTS = 64


class EngineLike(Protocol):
    """The part of an engine that `Session` and `answer_offline` use.

    A session passes the state and the features on without a look into them. Wrappers and stand-ins of an
    `Engine` need no more than this.
    """

    @property
    def config(self) -> EngineConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def perception_device(self) -> jax.Device | None: ...  # pyright: ignore[reportInvalidTypeForm]

    def start(self) -> Any:
        """A state of empty slots."""
        ...

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]], /) -> Any:
        """Features of frames, with that of frame `i` at index `i`."""
        ...

    def distance(self, before: Any, index_before: int, after: Any, index_after: int, /) -> float:
        """Distance of the features of two encoded frames; asked for where `selection.min_distance` is set."""
        ...

    def step(self, state: Any, rows: Sequence[Row | None], features: Any = None, /) -> tuple[Any, Sampled]:
        """Appends a row to each slot and samples its next token; uses up the state."""
        ...


class Engine:
    """A model with the compiled programs of a stream, for a bounded set of shapes.

    Holds no stream: `start` makes a state, `step` takes one and returns the next.

    Args:
      model: may be dropped by the caller; its parameters are shared, not copied, but for those that go to
        another device or are laid out anew for decoding. If they are on a mesh, so are the programs: its
        axes split slots and heads.
      tokenizer: of the same checkpoint.
      config: slots and capacities.
      sampling: how tokens are sampled in the slots of a new state; `set_sampling` gives one slot another.
      perception_device: encodes the frames, so that they take no time from the device that decodes; None for
        the device of the model.

    Attributes:
      placement: the device of the decoder and of every state; on a mesh, of what is not split over it.
      parameters: the decoder's, as the step takes them.
      frame_encoder: perception.
      programs: the jitted functions by name: "step", "set_sampling", "compact_text", "pixels", "encode", and
        for each policy that forgets or merges one such as "compact_bank.pyramid".

    Raises:
      ValueError: the tokenizer is of another vocabulary than the model.
      ConfigError: the text capacity is beyond the model's positions, there is no such memory policy, or the
        bank is too small for one: for `memory.policy` with its settings, for others with the defaults.
    """

    def __init__(
        self,
        model: MossVideo,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        sampling: TokenSampling | None = None,
        *,
        perception_device: jax.Device | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ):
        if tokenizer.vocab_size != model.config.decoder.vocab_size:
            raise ValueError(
                f"the tokenizer predicts {tokenizer.vocab_size} tokens, "
                f"the model {model.config.decoder.vocab_size}; they must be of one checkpoint"
            )
        self.config = config or EngineConfig()
        positions = model.config.decoder.max_positions
        if self.config.text_capacity > positions:
            raise ConfigError(
                f"engine.text_capacity can be at most {positions}, the number of positions that the model "
                f"has, not {self.config.text_capacity}"
            )
        self.sampling = sampling or TokenSampling()
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.dtype = model.dtype
        self.perception_device = perception_device
        # Some parameters that training changes and quantization does not, to tell models of one config apart.
        bias = model.projector.bias
        assert bias is not None
        parts = model.decoder.norm.weight, bias
        self._weights = hashlib.sha256(b"".join(np.asarray(x[...]).tobytes() for x in parts)).hexdigest()
        special = tokenizer.special
        pure_step = functools.partial(step, special)
        parameters, pure_step = functionalize(for_decoding(model.decoder), pure_step)
        # Every argument is committed to its device, so features that come from another device find the same
        # programs.
        self.placement = placement_of(parameters)
        self.parameters = place(parameters, self.placement)
        perception = SingleDeviceSharding(perception_device) if perception_device else self.placement
        self.frame_encoder = FrameEncoder(model, perception, self.placement)
        pure_start = functools.partial(start, model.config, model.dtype, self.sampling)
        # Programs return a state as the list of its arrays, so that each can be told where it goes.
        arrays, self._structure = jax.tree.flatten(jax.eval_shape(functools.partial(pure_start, self.config)))
        shardings = [state_sharding(x, self.placement) for x in arrays]
        self._start = jax.jit(_flat(pure_start), static_argnums=0, out_shardings=shardings)

        # The state alone is returned, in the memory that it came in: where no buffer changes its address, the
        # device replays the step as a recorded graph. `keep_unused` keeps the logits, which a step does not
        # read, among the donated arguments.
        def program(change: Callable[..., EngineState], state: int):
            """Compiles a change of the state, which is argument number `state`."""
            return jax.jit(
                _flat(traced_on(self.placement, change)),
                donate_argnums=(state,),
                keep_unused=True,
                out_shardings=shardings if mesh_of(self.placement) else None,
            )

        self._step = program(pure_step, 2)
        self._compact_text = program(compact_text, 0)
        self._put_slot = program(put_slot, 0)
        self._set_sampling = program(set_sampling, 0)
        # One program for each policy; a stream's settings and its share of the bank are in the budget.
        self._compact_bank = {}
        for memory in self._memories:
            if policy := make_policy(memory, model.config, self.config.bank_capacity):
                compact = functools.partial(compact_bank, policy.compact)
                self._compact_bank[memory.policy] = program(compact, 0)
        self.programs = {
            "step": self._step,
            "set_sampling": self._set_sampling,
            "compact_text": self._compact_text,
            **{f"compact_bank.{name}": compact for name, compact in self._compact_bank.items()},
            **self.frame_encoder.programs,
        }
        # Those last used alone, since of many slots there is no end of sets that take part.
        decode_arguments = functools.partial(_decode_arguments, special.image, self.placement)
        self._decode_arguments = functools.lru_cache(maxsize=DECODE_ARGUMENTS)(decode_arguments)
        # The session writes the frame of the dialogue; the model samples text, silence and the end of a turn.
        never = tokenizer.control_ids - {special.silence, special.eot}
        allowed = np.ones(tokenizer.vocab_size, bool)
        allowed[[i for i in never if i < tokenizer.vocab_size]] = False
        rules = allowed, tokenizer.penalty_exempt()
        self.rules = SamplingRules(*jax.device_put(rules, self.placement))

    @property
    def _memories(self) -> list[MemoryConfig]:
        """Settings for each policy that streams may have: the engine's, and the defaults of the others."""
        return [self.config.memory, *map(MemoryConfig, self.config.allowed_policies[1:])]

    @property
    def allowed(self) -> Bool[Array, " V"]:
        """Mask of the tokens that may be sampled. Setting it compiles nothing."""
        return self.rules.allowed

    @allowed.setter
    def allowed(self, mask: Bool[Array, " V"]) -> None:
        self.rules = dataclasses.replace(self.rules, allowed=jax.device_put(mask, self.placement))

    def start(self) -> EngineState:
        """A state of empty slots. Each slot's first row must begin with a real token."""
        return jax.tree.unflatten(self._structure, self._start(self.config))

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Array, "P N D"]:
        """Features of frames of any sizes, from any streams; those of one size are encoded in batches.

        The result may be padded; index `i` belongs to frame `i`.
        """
        return self.frame_encoder.encode(frames)

    def distance(
        self,
        before: Float[Array, "P N D"],
        index_before: int,
        after: Float[Array, "Q N D"],
        index_after: int,
    ) -> float:
        """Waits for the features of two encoded frames; their distance by `feature_distance`."""
        return float(
            _distance(pick_frame(before, np.int32(index_before)), pick_frame(after, np.int32(index_after)))
        )

    def step(
        self,
        state: EngineState,
        rows: Sequence[Row | None],
        features: Float[Array, "P N D"] | None = None,
    ) -> tuple[EngineState, Sampled]:
        """Appends a row to each slot and samples its next token; slots whose row is None stand still.

        Args:
          state: is donated.
          rows: one for each slot, at least one of them not None; the caller checks that they fit.
          features: of encoded frames, which the rows' frames index.
        """
        for slot, row in enumerate(rows):
            if row:
                state = self._compact(state, slot, row)
        pieces = [list(split_row(row, self.tokenizer.special.image)) if row else [] for row in rows]
        count = max(map(len, pieces))
        # Short rows wait, so that the last piece is the last of every slot and the sample is made from it.
        padded = [[None] * (count - len(p)) + p for p in pieces]
        for piece in zip(*padded, strict=True):
            *arguments, frames, index = self._arguments(piece)
            if frames is not None and index is not None:
                # Gathered beforehand, so that one program serves any number of encoded frames.
                frames = dataclasses.replace(frames, features=gather(features, index))
            arrays = self._step(self.parameters, self.rules, state, *arguments, frames)
            state = jax.tree.unflatten(self._structure, arrays)
        return state, Sampled(_copy(state.pending), state.logits)

    def _compact(self, state: EngineState, slot: int, row: Row) -> EngineState:
        """Makes the room that a row asks for."""
        if row.compact is not None:
            policy = make_policy(row.compact.memory, self.model_config, row.compact.frames)
            assert policy is not None, "with the policy full there is no compaction to ask for"
            compact = self._compact_bank[row.compact.memory.policy]
            state = jax.tree.unflatten(self._structure, compact(state, np.int32(slot), policy.budget))
        if row.kept is not None:
            kept = np.zeros(self.config.text_capacity, np.int32)
            kept[: len(row.kept)] = row.kept
            arrays = self._compact_text(state, np.int32(slot), kept, np.int32(len(row.kept)))
            state = jax.tree.unflatten(self._structure, arrays)
        return state

    def stream_settings(self, stream: EngineConfig) -> dict[str, Any]:
        """Settings that a saved stream depends on, JSON-ready, by name.

        Args:
          stream: of `stream_config`.
        """
        model = dataclasses.asdict(self.model_config)
        for implementation in ("attention", "remat"):
            del model[implementation]
        config = dataclasses.asdict(stream)
        for other in ("slots", "policies"):
            del config[other]
        settings = {
            "model": model | {"dtype": str(self.dtype), "weights": self._weights},
            "tokenizer": hashlib.sha256(self.tokenizer.content).hexdigest(),
            "memory": config.pop("memory"),
            "engine": config,
        }
        return dict(_flat_items(settings))

    def set_sampling(self, state: EngineState, slot: int, sampling: TokenSampling) -> EngineState:
        """Has one slot sample in another way from the next step on.

        Args:
          state: is donated.

        Raises:
          ValueError: there is no such slot.
        """
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"there is no slot {slot}; the engine has {self.config.slots}, counted from 0")
        arrays = self._set_sampling(state, np.int32(slot), SlotSampling.of(sampling, 1))
        return jax.tree.unflatten(self._structure, arrays)

    def save_slot(self, state: EngineState, slot: int) -> dict[str, np.ndarray]:
        """Copies all arrays of one slot to the host, by name."""
        return slot_to_host(state, slot)

    def check_slot(self, saved: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Pads the arrays of `save_slot`, of an engine with the same `stream_settings`, for `load_slot`.

        Raises:
          ValueError: naming an array that does not fit.
        """
        return slot_from_host(jax.eval_shape(self.start), saved)

    def load_slot(self, state: EngineState, slot: int, arrays: Sequence[np.ndarray]) -> EngineState:
        """Writes saved arrays into one slot.

        Args:
          state: is donated.
          arrays: of `check_slot`.
        """
        return jax.tree.unflatten(self._structure, self._put_slot(state, np.int32(slot), list(arrays)))

    def warm_up(self, frame_shape: tuple[int, int, int]) -> None:
        """Compiles the programs of a session of one slot with frames of this shape.

        With more slots, rows of several kinds can meet in one step; such programs compile when they come up.
        """
        image, eot = self.tokenizer.special.image, self.tokenizer.special.eot
        rows = [Row([PENDING] + [eot] * (length - 1)) for length in TOKEN_BUCKETS]
        rows += [Row([image] * count, [0] * count) for count in FRAME_BUCKETS]
        # Compiled in threads beforehand; the calls below find the programs.
        with futures.ThreadPoolExecutor() as threads:
            programs = itertools.chain(self.frame_encoder.lower(frame_shape), self._lower(rows))
            compiled = [threads.submit(program.compile) for program in programs]
        for program in compiled:
            program.result()
        frame = np.zeros(frame_shape, np.uint8)
        one, few, many = ENCODE_BUCKETS
        # Up to a large batch behind a small one; the features of several batches are concatenated.
        encoded = [self.encode([frame] * count) for count in (one, *range(few, few + many + 1, few))]
        for features in encoded:
            self.distance(features, 0, features, 0)
        for row, features in itertools.product(rows, {len(x): x for x in encoded}.values()):
            if row.frames or features is encoded[0]:
                # The state is dropped each time, so that there is never room needed for two.
                sampled = self.step(self.start(), [row] * self.config.slots, features)[1]
                jax.block_until_ready(sampled)
        state = self.set_sampling(self.start(), 0, self.sampling)
        for memory in self._memories:
            compact = None if memory.policy == FULL else Compaction(memory, self.config.bank_capacity)
            row = Row([PENDING], compact=compact, kept=[0])
            state, sampled = self.step(state, [row] * self.config.slots)
            jax.block_until_ready(sampled)

    def _lower(self, rows: Sequence[Row]) -> Iterator[jax.stages.Lowered]:
        """The step for each of these rows in every slot, yet to be compiled."""
        state = jax.tree.map(
            lambda x: abstract(x, state_sharding(x, self.placement)), jax.eval_shape(self.start)
        )
        vectors = self.model_config.vectors_per_frame, self.model_config.decoder.hidden_size
        for row in rows:
            *arguments, frames, index = self._arguments([row] * self.config.slots)
            if frames is not None and index is not None:
                features = jax.ShapeDtypeStruct((*index.shape, *vectors), self.dtype, sharding=self.placement)
                frames = dataclasses.replace(frames, features=features)
            yield self._step.lower(self.parameters, self.rules, state, *arguments, frames)

    def _arguments(self, rows: Sequence[Row | None]) -> StepArguments:
        """As `step_arguments`; those of a decode step, the most frequent one, stay on the device."""
        image = self.tokenizer.special.image
        if any(row and (list(row.tokens) != [PENDING] or row.new_turn) for row in rows):
            # Arguments from the host would need another program of one token than those on the device.
            return step_arguments(rows, image, least=2)
        return self._decode_arguments(tuple(row is not None for row in rows))


def _decode_arguments(image: int, placement: Sharding, taking_part: tuple[bool, ...]) -> StepArguments:
    """Arguments of a step that appends the pending token alone in the slots that take part, on the device."""
    rows = [Row([PENDING]) if takes_part else None for takes_part in taking_part]
    return jax.device_put(step_arguments(rows, image), placement)


def _flat_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts by their dotted names, tuples as lists."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _flat[**Arguments](function: Callable[Arguments, EngineState]) -> Callable[Arguments, list[jax.Array]]:
    return lambda *args, **kwargs: jax.tree.leaves(function(*args, **kwargs))


@jax.jit
def gather(features: Float[Array, "P N D"], index: Int[Array, "B F"]) -> Float[Array, "B F N D"]:
    """The features of each slot's frames."""
    return features[index]


@jax.jit
def pick_frame(features: Float[Array, "P N D"], index: Int[Array, ""]) -> Float[Array, "N D"]:
    """The features of one frame, so that their comparison is one program for any number of encoded ones."""
    return features[index]


_distance = jax.jit(feature_distance)


@jax.jit
def _copy(x: Array) -> Array:
    return jnp.copy(x)
