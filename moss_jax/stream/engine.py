"""The inference engine: compiled programs that encode frames and step all slots.

B slots, P encoded frames, N vectors a frame, D width, V vocabulary
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, DTypeLike, Float, Int, UInt8

from moss_jax.config import ConfigError, EngineConfig, MemoryConfig, TokenSampling
from moss_jax.memory.policies import FULL, make_policy
from moss_jax.memory.selection import feature_distance
from moss_jax.nn import MossVideo, for_decoding, stored_weights
from moss_jax.stream.capacity import slot_bytes
from moss_jax.stream.parameters import functionalize
from moss_jax.stream.perception import ENCODE_BUCKETS, SHARED_BUCKETS, FrameEncoder, Strips
from moss_jax.stream.placement import abstract, mesh_of, place, placement_of, state_sharding, traced_on
from moss_jax.stream.rows import (
    PENDING,
    Compaction,
    Row,
    Shape,
    StepArguments,
    empty_arguments,
    first_step,
    pack,
    shapes,
    step_arguments,
)
from moss_jax.stream.sampling import SamplingKind, SlotSampling, kind_of
from moss_jax.stream.step import (
    SETTINGS,
    EngineState,
    Sampled,
    SamplingRules,
    compact_bank,
    compact_text,
    copy_slot,
    packed_step,
    put_slot,
    reset_slot,
    sample_pending,
    set_sampling,
    slot_from_host,
    slot_to_host,
    start,
)
from moss_jax.text import Tokenizer

# Size of the LRU cache of decode-step arguments on the device, one for each set of active slots.
DECODE_ARGUMENTS = 64


@dataclasses.dataclass(frozen=True)
class SlotArrays:
    """The arrays of a saved slot, on the device.

    Attributes:
      arrays: [1, ...] each, in the order of a state's.
      kind: sampling kind of the slot.
    """

    arrays: list[jax.Array]
    kind: SamplingKind


class EngineLike(Protocol):
    """The interface of an engine that `Session` and `answer_offline` use.

    State and features are opaque to a session. A wrapper or test double of an `Engine` needs only this.
    """

    @property
    def config(self) -> EngineConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def perception_device(self) -> jax.Device | None: ...  # pyright: ignore[reportInvalidTypeForm]

    def start(self) -> Any:
        """Returns a state of empty slots."""
        ...

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]], /) -> Any:
        """Encodes frames; the features of frame `i` are at index `i`."""
        ...

    def distance(self, before: Any, index_before: int, after: Any, index_after: int, /) -> float:
        """Distance of the features of two encoded frames; used only if `selection.min_distance` is set."""
        ...

    def step(self, state: Any, rows: Sequence[Row | None], features: Any = None, /) -> tuple[Any, Sampled]:
        """Appends a row to each slot and samples its next token; donates the state.

        Frames from several calls of `encode` are passed as a list of their features.
        """
        ...


class Engine:
    """A model with the compiled programs of a stream, for a bounded set of shapes.

    Stateless: `start` creates a state, `step` takes one and returns the next.

    Args:
      model: may be dropped by the caller; its parameters are shared, not copied, except those that move to
        another device or get another layout for decoding. If they are on a mesh, so are the programs: its
        axes split slots and heads.
      tokenizer: from the same checkpoint.
      config: slots and capacities.
      sampling: how tokens are sampled in the slots of a new state; `set_sampling` changes it for one slot.
      perception_device: encodes the frames, so that encoding takes no time from the device that decodes; None
        for the device of the model.

    Attributes:
      placement: the device of the decoder and of every state; on a mesh, that of replicated arrays.
      parameters: the decoder's, as the step takes them.
      weights: how the weights of decoder and encoder are stored; see `nn.stored_weights`.
      frame_encoder: vision encoder, compressor and projector.
      programs: the jitted functions by name: "step", "set_sampling", "reset_slot", "compact_text", "pixels",
        "encode", one such as "sample.greedy" for each `SamplingKind`, and one such as "compact_bank.pyramid"
        for each policy that forgets or merges.

    Raises:
      ValueError: the tokenizer and the model have different vocabularies.
      ConfigError: the text capacity exceeds the model's positions, a memory policy does not exist, or the
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
        self.weights = stored_weights(model)
        self.perception_device = perception_device
        # A fingerprint that tells apart models of one config: parameters that training changes, but
        # quantization does not.
        bias = model.projector.bias
        assert bias is not None
        parts = model.decoder.norm.weight, bias
        self._weights = hashlib.sha256(b"".join(np.asarray(x[...]).tobytes() for x in parts)).hexdigest()
        special = tokenizer.special
        parameters, pure_step = functionalize(for_decoding(model.decoder), packed_step)
        # Every argument is committed to its device, so features from another device need no new program.
        self.placement = placement_of(parameters)
        self.parameters = place(parameters, self.placement)
        perception = SingleDeviceSharding(perception_device) if perception_device else self.placement
        buckets = ENCODE_BUCKETS if self.config.slots == 1 else SHARED_BUCKETS
        self.frame_encoder = FrameEncoder(model, perception, self.placement, buckets)
        pure_start = functools.partial(start, model.config, model.dtype, self.sampling)
        # Programs return a state as a list of arrays, so that each can have its own output sharding.
        self._abstract_state = jax.eval_shape(functools.partial(pure_start, self.config))
        self._structure = jax.tree.structure(self._abstract_state)
        stream = self._abstract_state.stream

        def shardings(of: Any) -> list[Sharding]:
            return [state_sharding(x, self.placement) for x in jax.tree.leaves(of)]

        self._start = jax.jit(
            _flat(pure_start), static_argnums=0, out_shardings=shardings(self._abstract_state)
        )

        # Only the state, or a part of it, is returned, in its donated buffers: where no buffer changes its
        # address, the device replays the step as a captured graph. `keep_unused` keeps the logits, which a
        # step does not read, among the donated arguments.
        def program(change: Callable, donated: int, static: tuple[int, ...] = (), of: Any = None):
            """Jits a function that updates its argument number `donated`: the state, or the part `of` it."""
            return jax.jit(
                _flat(traced_on(self.placement, change)),
                static_argnums=static,
                donate_argnums=(donated,),
                keep_unused=True,
                out_shardings=shardings(of or self._abstract_state) if mesh_of(self.placement) else None,
            )

        self._step = program(pure_step, 2, static=(5,))
        self._compact_text = program(compact_text, 0, of=stream.text)
        self._put_slot = program(put_slot, 0)
        self._copy_slot = jax.jit(traced_on(self.placement, copy_slot))
        self._set_sampling = program(set_sampling, 0)
        self._reset_slot = program(reset_slot, 0)
        mesh = mesh_of(self.placement)
        self._sample = {
            kind: jax.jit(
                traced_on(self.placement, functools.partial(sample_pending, special, kind)),
                donate_argnums=(0,),
                out_shardings=state_sharding(self._abstract_state.pending, self.placement) if mesh else None,
            )
            for kind in SamplingKind
        }
        # One program for each policy; a stream's settings and its share of the bank are in the budget.
        self._compact_bank = {}
        for memory in self._memories:
            if policy := make_policy(memory, model.config, self.config.bank_capacity):
                compact = functools.partial(compact_bank, policy.compact)
                self._compact_bank[memory.policy] = program(compact, 0, of=stream.bank)
        self.programs = {
            "step": self._step,
            **{f"sample.{kind.name.lower()}": sample for kind, sample in self._sample.items()},
            "set_sampling": self._set_sampling,
            "reset_slot": self._reset_slot,
            "put_slot": self._put_slot,
            "copy_slot": self._copy_slot,
            "compact_text": self._compact_text,
            **{f"compact_bank.{name}": compact for name, compact in self._compact_bank.items()},
            **self.frame_encoder.programs,
        }
        # An LRU cache, since many slots have too many subsets to keep them all.
        decode_arguments = functools.partial(_decode_arguments, self.config.slots, self.placement)
        self._decode_arguments = functools.lru_cache(maxsize=DECODE_ARGUMENTS)(decode_arguments)
        vectors = model.config.vectors_per_frame, model.config.decoder.hidden_size
        no_features = functools.partial(_no_features, vectors, self.dtype, self.placement)
        self._no_features = functools.cache(no_features)
        # The session writes the frame of the dialogue; the model samples text, silence and the end of a turn.
        never = tokenizer.control_ids - {special.silence, special.eot}
        allowed = np.ones(tokenizer.vocab_size, bool)
        allowed[[i for i in never if i < tokenizer.vocab_size]] = False
        rules = allowed, tokenizer.penalty_exempt()
        self.rules = SamplingRules(*jax.device_put(rules, self.placement))

    @property
    def _memories(self) -> list[MemoryConfig]:
        """Settings for each policy that streams may use: the engine's, and the defaults for the others."""
        return [self.config.memory, *map(MemoryConfig, self.config.allowed_policies[1:])]

    @property
    def allowed(self) -> Bool[Array, " V"]:
        """Mask of the tokens that may be sampled; setting it does not recompile."""
        return self.rules.allowed

    @allowed.setter
    def allowed(self, mask: Bool[Array, " V"]) -> None:
        self.rules = dataclasses.replace(self.rules, allowed=jax.device_put(mask, self.placement))

    @functools.cached_property
    def slot_bytes(self) -> int:
        """Size in bytes of one slot of the state."""
        return slot_bytes(self.model_config, self.config, self.dtype)

    def start(self) -> EngineState:
        """Returns a state of empty slots. The first row of each slot must begin with a real token."""
        kinds = (kind_of(self.sampling),) * self.config.slots
        return self._with_kinds(self._start(self.config), kinds)

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Array, "P N D"]:
        """Encodes frames of any sizes, from any streams; frames of one size are batched.

        The result may be padded; index `i` belongs to frame `i`.
        """
        return self.frame_encoder.encode(frames)

    def send(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Strips:
        """Starts the transfer of frames of one size, at most one batch, for `encode_sent`."""
        return self.frame_encoder.send(frames, ahead=True)

    def encode_sent(self, sent: Strips) -> Float[Array, "P N D"]:
        """Encodes frames that `send` has sent; the result may be padded."""
        return self.frame_encoder.encode_sent(sent)

    def distance(
        self,
        before: Float[Array, "P N D"],
        index_before: int,
        after: Float[Array, "Q N D"],
        index_after: int,
    ) -> float:
        """Distance of two encoded frames by `feature_distance`; blocks until their features are ready."""
        return float(
            _distance(pick_frame(before, np.int32(index_before)), pick_frame(after, np.int32(index_after)))
        )

    def step(
        self,
        state: EngineState,
        rows: Sequence[Row[int] | None],
        features: Float[Array, "P N D"] | list[Float[Array, "P N D"]] | None = None,
    ) -> tuple[EngineState, Sampled]:
        """Appends a row to each slot and samples its next token; slots whose row is None are unchanged.

        Args:
          state: is donated.
          rows: one for each slot, at least one of them not None; the caller checks that they fit.
          features: of encoded frames, which the rows' frames index; given several batches, the frames index
            their concatenation.
        """
        batches = [] if features is None else features if isinstance(features, list) else [features]
        left = {slot: row for slot, row in enumerate(rows) if row}
        for slot, row in left.items():
            state = self._compact(state, slot, row)
        tokens = None
        while left:
            now, left = first_step(left, self.config.slots, self.tokenizer.special.image)
            state, tokens = self._append(state, now, batches)
        assert tokens is not None, "at least one row"
        return state, Sampled(tokens, state.logits)

    def _append(
        self, state: EngineState, rows: Mapping[int, Row[int]], batches: Sequence[Float[Array, "P N D"]]
    ) -> tuple[EngineState, Int[Array, " B"]]:
        """Runs one step whose shape has a compiled program, and samples."""
        slots, features = self.config.slots, None
        if all(row.is_decode for row in rows.values()):
            # The most frequent step: its arguments are cached on the device.
            taking_part = tuple(sorted((slot, row.new_turn) for slot, row in rows.items()))
            shape, packed = self._decode_arguments(taking_part)
        else:
            arguments = step_arguments(rows, slots, self.tokenizer.special.image)
            features = self._features(arguments, batches)
            shape, packed = arguments.shape, pack(arguments, slots)
        # The slot with the most expensive sampling decides the program.
        return self._run(state, shape, packed, features, max(state.kinds[slot] for slot in rows))

    def _features(
        self, arguments: StepArguments, batches: Sequence[Float[Array, "P N D"]]
    ) -> Float[Array, "P N D"] | None:
        """The features argument of a step, padded to the length of its program; None if it has no frames.

        A single batch of that length is passed unchanged. Otherwise the frames of the step are gathered, so
        that one program serves any number of encoded frames, and `arguments.frames.index` is rewritten.
        """
        if arguments.frames is None:
            return None
        index = arguments.frames.index
        length = self.frame_encoder.padded_length(index.size)
        if not batches:
            if arguments.frames.count.any():
                raise ValueError("there are frames in the rows, so `features` must be given")
            # Short rows of tokens use a program with room for frames, with or without frames.
            return self._no_features(length)
        if len(batches) == 1 and len(batches[0]) == length:
            return batches[0]
        wanted = np.zeros(length, np.int32)
        wanted[: index.size] = index.ravel()
        index[...] = np.arange(index.size).reshape(index.shape)
        return gather_all(batches, wanted)

    def _run(
        self,
        state: EngineState,
        shape: Shape,
        packed: Int[Array, " n"] | Int[np.ndarray, " n"],
        features: Float[Array, "P N D"] | None,
        kind: SamplingKind,
    ) -> tuple[EngineState, Int[Array, " B"]]:
        """Calls the programs of a step."""
        without = dataclasses.replace(state, kinds=())
        arrays = self._step(self.parameters, self.rules, without, packed, features, shape)
        state = self._with_kinds(arrays, state.kinds)
        pending, tokens = self._sample[kind](
            state.pending,
            self.rules,
            state.logits,
            state.said,
            state.sampling,
            state.stream.text.position,
            packed,
        )
        return dataclasses.replace(state, pending=pending), tokens

    def _compact(self, state: EngineState, slot: int, row: Row) -> EngineState:
        """Runs the compactions that a row requires."""
        if row.compact is not None:
            policy = make_policy(row.compact.memory, self.model_config, row.compact.frames)
            assert policy is not None, "with the policy full there is no compaction to ask for"
            compact = self._compact_bank[row.compact.memory.policy]
            state = _change_part(compact, state, "bank", np.int32(slot), policy.budget)
        if row.kept is not None:
            kept = np.zeros(self.config.text_capacity, np.int32)
            kept[: len(row.kept)] = row.kept
            length = np.int32(len(row.kept))
            state = _change_part(self._compact_text, state, "text", np.int32(slot), kept, length)
        return state

    def _change(self, program: Callable[..., list[jax.Array]], state: EngineState, *arguments) -> EngineState:
        """Calls a program that updates a state."""
        arrays = program(dataclasses.replace(state, kinds=()), *arguments)
        return self._with_kinds(arrays, state.kinds)

    def _with_kinds(self, arrays: Sequence[jax.Array], kinds: tuple[SamplingKind, ...]) -> EngineState:
        """Rebuilds the state from the arrays that a program returned and `kinds`, which stay on the host."""
        return dataclasses.replace(jax.tree.unflatten(self._structure, arrays), kinds=kinds)

    def stream_settings(self, stream: EngineConfig) -> dict[str, Any]:
        """Settings that a saved stream depends on, by name, JSON-ready.

        Args:
          stream: from `stream_config`.
        """
        model = dataclasses.asdict(self.model_config)
        for implementation in ("attention", "remat", "vision_remat"):
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
        """Changes how one slot is sampled, from the next step on.

        Args:
          state: is donated.

        Raises:
          ValueError: there is no such slot.
        """
        if not 0 <= slot < self.config.slots:
            raise ValueError(f"there is no slot {slot}; the engine has {self.config.slots}, counted from 0")
        state = self._change(self._set_sampling, state, np.int32(slot), SlotSampling.of(sampling, 1))
        return state.with_kind(slot, kind_of(sampling))

    def reset_slot(self, state: EngineState, slot: int) -> EngineState:
        """Resets one slot to empty, for another stream.

        Args:
          state: is donated.
        """
        return self._change(self._reset_slot, state, np.int32(slot))

    def copy_slot(self, state: EngineState, slot: int) -> EngineState:
        """Copies one slot on the device, as a state of one slot, so that no stream waits for `save_slot`."""
        return self._copy_slot(dataclasses.replace(state, kinds=()), np.int32(slot))

    def save_slot(self, copied: EngineState) -> dict[str, np.ndarray]:
        """Copies what `copy_slot` returned to the host, by name; any thread may call it while steps run."""
        return slot_to_host(copied)

    def bank_vectors(self, state: EngineState) -> tuple[Int[Array, "B S"], Float[Array, "B S"] | None]:
        """Copies the positions and counts of the vectors in all banks, on the device; see `MemoryBank`."""
        return _copy((state.stream.bank.positions, state.stream.bank.counts))

    def upload_slot(self, saved: Mapping[str, np.ndarray]) -> SlotArrays:
        """Checks and pads the arrays of `save_slot`, and copies them to the device for `load_slot`.

        Any thread may call it while steps run.

        Args:
          saved: from an engine of the same settings.

        Raises:
          ValueError: naming an array that does not fit.
        """
        arrays = slot_from_host(self._abstract_state, saved)
        sampling = jax.tree.unflatten(self._structure, arrays).sampling
        kind = kind_of(TokenSampling(**{name: getattr(sampling, name).item() for name in SETTINGS}))
        # One at a time: during transfers of several at once, launches by other threads wait.
        on_device = [
            jax.block_until_ready(jax.device_put(x, state_sharding(x, self.placement))) for x in arrays
        ]
        return SlotArrays(on_device, kind)

    def load_slot(self, state: EngineState, slot: int, arrays: SlotArrays) -> EngineState:
        """Writes saved arrays into one slot.

        Args:
          state: is donated.
          arrays: from `upload_slot`.
        """
        state = self._change(self._put_slot, state, np.int32(slot), arrays.arrays)
        return state.with_kind(slot, arrays.kind)

    def warm_up(self, frame_shape: tuple[int, int, int]) -> None:
        """Compiles all programs that streams with frames of this shape use."""
        # Compiled in parallel threads first; the calls below hit the cache.
        steps = self._lower(shapes(self.config.slots))
        _compile(itertools.chain(self.frame_encoder.lower(frame_shape), steps))
        frame = np.zeros(frame_shape, np.uint8)
        encoded = [self.encode([frame] * count) for count in self.frame_encoder.warm_counts]
        for features in encoded:
            self.distance(features, 0, features, 0)
            # As the first frame of a resumed stream, with the single one that was saved.
            self.distance(jnp.asarray(np.zeros(features.shape[1:], self.dtype))[None], 0, features, 0)
        if self.config.slots > 1:
            self.frame_encoder.measure(frame_shape)
        state = self.start()
        for shape in shapes(self.config.slots):
            # Features of one batch and of several, of each length; with one slot, frames are never missing.
            lengths = {len(x): x for x in encoded}.values() if shape.frames else ()
            batches = [[x] * count for x in lengths for count in (1, 2)]
            if self.config.slots > 1 or not shape.frames:
                batches.append([])
            for some in batches:
                arguments, packed = self._empty_arguments(shape)
                features = self._features(arguments, some)
                # The state is donated along, so that memory never holds two.
                state, tokens = self._run(state, shape, packed, features, SamplingKind.GREEDY)
                jax.block_until_ready(tokens)
        shape = shapes(self.config.slots)[0]
        _, on_device = self._empty_arguments(shape)
        # Once with arguments on the device and once with arguments on the host.
        for kind, packed in itertools.product(SamplingKind, (on_device, np.asarray(on_device))):
            state, tokens = self._run(state, shape, packed, None, kind)
        state = self.reset_slot(state, 0)
        state = self.load_slot(state, 0, self.upload_slot(self.save_slot(self.copy_slot(state, 0))))
        del state
        state = self.set_sampling(self.start(), 0, self.sampling)
        for memory in self._memories:
            compact = None if memory.policy == FULL else Compaction(memory, self.config.bank_capacity)
            row = Row([PENDING], compact=compact, kept=[0])
            state, sampled = self.step(state, [row] * self.config.slots)
            jax.block_until_ready(sampled)

    def compile_steps(self, wanted: Iterable[Shape]) -> None:
        """Compiles the steps of these shapes in parallel, for callers that need only a few."""
        _compile(self._lower(wanted))

    def _lower(self, wanted: Iterable[Shape]) -> Iterator[jax.stages.Lowered]:
        """Lowers the steps of these shapes, without compiling."""
        state = jax.tree.map(lambda x: abstract(x, state_sharding(x, self.placement)), self._abstract_state)
        vectors = self.model_config.vectors_per_frame, self.model_config.decoder.hidden_size
        for shape in wanted:
            _, packed = self._empty_arguments(shape)
            features = None
            if shape.frames:
                length = self.frame_encoder.padded_length(shape.frames)
                features = jax.ShapeDtypeStruct((length, *vectors), self.dtype, sharding=self.placement)
            yield self._step.lower(self.parameters, self.rules, state, packed, features, shape)

    def _empty_arguments(
        self, shape: Shape
    ) -> tuple[StepArguments, Int[Array, " n"] | Int[np.ndarray, " n"]]:
        """Arguments of a step without active slots; also packed, where they are when serving."""
        arguments = empty_arguments(shape, self.config.slots)
        packed = pack(arguments, self.config.slots)
        return arguments, packed if shape.chunks else jax.device_put(packed, self.placement)


def _compile(programs: Iterable[jax.stages.Lowered]) -> None:
    """Compiles programs in parallel threads, while the next ones are lowered."""
    with futures.ThreadPoolExecutor() as threads:
        compiled = [threads.submit(program.compile) for program in programs]
    for program in compiled:
        program.result()


def _decode_arguments(
    slots: int, placement: Sharding, taking_part: tuple[tuple[int, bool], ...]
) -> tuple[Shape, Int[Array, " n"]]:
    """Packed arguments, on the device, of a step that appends only the pending token to some slots.

    Args:
      taking_part: the active slots, each with whether a turn begins.
    """
    rows = {slot: Row([PENDING], new_turn=new_turn) for slot, new_turn in taking_part}
    arguments = step_arguments(rows, slots, -1)
    return arguments.shape, jax.device_put(pack(arguments, slots), placement)


def _no_features(
    vectors: tuple[int, int], dtype: DTypeLike, placement: Sharding, length: int
) -> Float[Array, "P N D"]:
    """Zero features, for a program with room for frames in a step without any."""
    return jax.device_put(np.zeros((length, *vectors), dtype), placement)


def _flat_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flattens nested dicts to dotted names; tuples become lists."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _change_part(
    program: Callable[..., list[jax.Array]], state: EngineState, part: Literal["bank", "text"], *arguments
) -> EngineState:
    """Calls a program that updates one part of the streams.

    Launching a program takes the host time for each array, of which a state has hundreds.
    """
    old = getattr(state.stream, part)
    new = jax.tree.unflatten(jax.tree.structure(old), program(old, *arguments))
    return dataclasses.replace(state, stream=dataclasses.replace(state.stream, **{part: new}))


def _flat[**Arguments](function: Callable[Arguments, Any]) -> Callable[Arguments, list[jax.Array]]:
    return lambda *args, **kwargs: jax.tree.leaves(function(*args, **kwargs))


@jax.jit
def gather(features: Float[Array, "P N D"], index: Int[Array, " Q"]) -> Float[Array, "Q N D"]:
    """Gathers the features of some frames of a batch."""
    return features[index]


@jax.jit
def gather_into(
    gathered: Float[Array, "Q N D"], features: Float[Array, "P N D"], index: Int[Array, " Q"]
) -> Float[Array, "Q N D"]:
    """Overwrites gathered features with those of another batch wherever the index is not negative."""
    return jnp.where((index >= 0)[:, None, None], features[index], gathered)


def gather_all(
    batches: Sequence[Float[Array, "P N D"]], index: Int[np.ndarray, " Q"]
) -> Float[Array, "Q N D"]:
    """Gathers the features of some frames; `index` refers to the concatenation of all batches."""
    first, *others = batches
    gathered, begin = gather(first, np.where(index < len(first), index, 0)), len(first)
    for features in others:
        here = (index >= begin) & (index < begin + len(features))
        gathered = gather_into(gathered, features, np.where(here, index - begin, -1))
        begin += len(features)
    return gathered


@jax.jit
def pick_frame(features: Float[Array, "P N D"], index: Int[Array, ""]) -> Float[Array, "N D"]:
    """The features of one frame, so that the comparison compiles once for any number of encoded frames."""
    return features[index]


@jax.jit
def _copy[Tree](arrays: Tree) -> Tree:
    return jax.tree.map(jnp.copy, arrays)


_distance = jax.jit(feature_distance)
