"""The pure step function: appends rows to slots, then samples the next token of each.

A sampled token is *pending* until the next step appends it, so a silent second costs one step, and the host
has each token as soon as it is sampled.

B slots, V vocabulary
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from moss_jax.config import EngineConfig, ModelConfig, TokenSampling
from moss_jax.memory import (
    NO_POSITION,
    MemoryBank,
    StreamState,
    TextCache,
    init_state,
    keep_tokens,
    load_slot,
    save_slot,
)
from moss_jax.memory.policies import Compact
from moss_jax.nn.decoder import Decoder, Rows
from moss_jax.ops.qarray import DTYPES
from moss_jax.stream.rows import PENDING, Shape, StepArguments, unpack
from moss_jax.stream.sampling import SamplingKind, SlotSampling, sample
from moss_jax.text import SpecialTokens

# Returned instead of a token if the logits hold NaN or an infinity.
NOT_FINITE = -2
# The numeric sampling settings of a slot, as in `TokenSampling`.
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")
# Arrays of `EngineState` other than those of `stream`, in order.
OWN = ("pending", "logits", "said", *(f"sampling.{name}" for name in SETTINGS), "sampling.key")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """The state of all slots between two steps.

    Attributes:
      stream: text cache and memory bank.
      pending: the token that was sampled last, not part of the stream yet.
      logits: that it was sampled from.
      said: mask of the tokens in the current turn, except those exempt from the repetition penalty.
      sampling: how the next token of each slot is sampled.
      kinds: sampling kind of each slot, by which the host chooses a program; programs get a state without it.
    """

    stream: StreamState
    pending: Int[Array, " B"]
    logits: Float[Array, "B V"]
    said: Bool[Array, "B V"]
    sampling: SlotSampling
    kinds: tuple[SamplingKind, ...] = dataclasses.field(default=(), metadata={"static": True})

    def with_kind(self, slot: int, kind: SamplingKind) -> "EngineState":
        """The state with another entry of `kinds`."""
        return dataclasses.replace(self, kinds=(*self.kinds[:slot], kind, *self.kinds[slot + 1 :]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """The outcome of a step.

    Attributes:
      tokens: the next token of each slot; silence where the model would end its turn, since in a stream the
        turn stays open, and NOT_FINITE where the logits are not finite.
      logits: that they were sampled from; they alias the state, so they are donated with the next step.
    """

    tokens: Int[Array, " B"]
    logits: Float[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRules:
    """Sampling masks over the vocabulary, shared by all slots.

    Attributes:
      allowed: tokens that may be sampled.
      exempt: tokens exempt from the repetition penalty.
    """

    allowed: Bool[Array, " V"]
    exempt: Bool[Array, " V"]


def start(model: ModelConfig, dtype: DTypeLike, sampling: TokenSampling, config: EngineConfig) -> EngineState:
    """Returns a state of empty slots with the same sampling settings."""
    slots, vocab = config.slots, model.decoder.vocab_size
    return EngineState(
        stream=init_state(
            model,
            slots,
            text_capacity=config.text_capacity,
            bank_capacity=config.bank_capacity,
            dtype=dtype,
            bank_dtype=DTYPES[config.memory.bank_dtype] if config.memory.bank_dtype else None,
            text_dtype=DTYPES[config.memory.text_dtype] if config.memory.text_dtype else None,
            merges=config.merges,
        ),
        pending=jnp.zeros(slots, jnp.int32),
        logits=jnp.zeros((slots, vocab), jnp.float32),
        said=jnp.zeros((slots, vocab), bool),
        sampling=SlotSampling.of(sampling, slots),
    )


def step(decoder: Decoder, rules: SamplingRules, state: EngineState, arguments: StepArguments) -> EngineState:
    """Appends rows to the slots that take part, and computes the logits of each slot's next token."""
    a: Any = jax.tree.map(jnp.asarray, arguments)  # They may come from the host.
    pending = state.pending
    # A pending token joins what was said in its turn. A comparison with the whole vocabulary fuses with the
    # reset at a new turn into one pass over the mask; a scatter would take another.
    joins = (a.speaks & ~rules.exempt[pending])[:, None]
    joins &= jnp.arange(state.said.shape[1]) == pending[:, None]
    said = (state.said | joins) & ~a.new_turn[:, None]
    rows = []
    for part in (a.decode, a.chunks):
        if part is not None:
            of_rows = pending if part.slots is None else pending[part.slots]
            tokens = jnp.where(part.tokens == PENDING, of_rows[:, None], part.tokens)
            rows.append(Rows(tokens, part.count, part.slots, part.before))
    stream = state.stream
    if (frames := a.frames) is not None:
        start = stream.text.position if frames.slots is None else stream.text.position[frames.slots]
        bank = decoder.remember(
            stream.bank,
            frames.features,
            start[:, None] + frames.offset,
            frames.count,
            frames.slots,
            frames.before,
        )
        stream = dataclasses.replace(stream, bank=bank)
    hidden, stream = decoder.decode_rows(stream, rows)
    last = hidden.reshape(-1, hidden.shape[-1])[a.last]
    logits = decoder.logits(last[:, None])[:, 0]
    if len(pending) > 1:
        logits = jnp.where(a.takes[:, None], logits, state.logits)
    return dataclasses.replace(state, stream=stream, logits=logits, said=said)


def packed_step(
    decoder: Decoder,
    rules: SamplingRules,
    state: EngineState,
    packed: Int[Array, " n"],
    features: Float[Array, "P N D"] | None,
    shape: Shape,
) -> EngineState:
    """Runs a `step` whose arguments are packed in one array; see `rows.pack`.

    Args:
      features: of encoded frames; the packed arguments say which of them belong to the step.
    """
    return step(decoder, rules, state, unpack(packed, features, shape, len(state.pending)))


def sample_pending(
    special: SpecialTokens,
    kind: SamplingKind,
    pending: Int[Array, " B"],
    rules: SamplingRules,
    logits: Float[Array, "B V"],
    said: Bool[Array, "B V"],
    sampling: SlotSampling,
    positions: Int[Array, " B"],
    packed: Int[Array, " n"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Samples the next token of the slots that take part, after a `step`.

    Args:
      kind: at least that of every slot that takes part.
      positions: of the tokens to sample.
      packed: packed arguments of the step.

    Returns:
      The pending tokens of all slots, twice: for the next step and for the host.
    """
    sampled = sample(logits, sampling, kind, positions=positions, allowed=rules.allowed, said=said)
    # A turn that the model ends stays open, so the token to append is the silence that it was trained with.
    sampled = jnp.where(sampled == special.eot, special.silence, sampled)
    # Encoded in the token itself, so that the host reads no other array.
    sampled = jnp.where(jnp.isfinite(logits).all(axis=-1), sampled, NOT_FINITE)
    pending = jnp.where(packed[: len(pending)] > 0, sampled, pending)
    return pending, jnp.copy(pending)


def compact_bank(
    compact: Compact, bank: MemoryBank, slot: Int[Array, ""], budget: Int[Array, " n"]
) -> MemoryBank:
    """Compacts the bank of one slot to a budget of its policy."""
    return _replace_slot(bank, slot, lambda bank: compact(bank, budget))


def compact_text(
    text: TextCache, slot: Int[Array, ""], kept: Int[Array, " C"], length: Int[Array, ""]
) -> TextCache:
    """Evicts all tokens from the text cache of one slot except the first `length` of `kept`."""
    return keep_tokens(text, kept[None], length[None], slots=slot[None])


def set_sampling(state: EngineState, slot: Int[Array, ""], sampling: SlotSampling) -> EngineState:
    """Sets the sampling of one slot to `sampling`, which holds the settings of a single slot."""
    new = _replace_slot(state.sampling, slot, lambda _: sampling)
    return dataclasses.replace(state, sampling=new)


def reset_slot(state: EngineState, slot: Int[Array, ""]) -> EngineState:
    """Empties one slot; stale data in its buffers is out of range and never read; its sampling stays."""
    text, bank = state.stream.text, state.stream.bank
    text = dataclasses.replace(
        text, length=text.length.at[slot].set(0), position=text.position.at[slot].set(0)
    )
    bank = dataclasses.replace(
        bank,
        positions=bank.positions.at[slot].set(NO_POSITION),
        length=bank.length.at[slot].set(0),
        counts=None if bank.counts is None else bank.counts.at[slot].set(0),
    )
    return dataclasses.replace(
        state,
        stream=StreamState(text=text, bank=bank),
        pending=state.pending.at[slot].set(0),
        said=state.said.at[slot].set(False),
    )


def copy_slot(state: EngineState, slot: Int[Array, ""]) -> EngineState:
    """Copies one slot, as a state of one slot."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), state)


def slot_to_host(state: EngineState) -> dict[str, np.ndarray]:
    """Copies all arrays of a state of one slot to the host, by name."""
    own = zip(OWN, _own(state), strict=True)
    return save_slot(state.stream) | {name: np.asarray(x)[0] for name, x in own}


def slot_from_host(state: EngineState, saved: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Pads the arrays of `slot_to_host` to a slot's capacity: [1, ...] each, in state order.

    Args:
      state: has the target capacities; only its shapes and dtypes are read.

    Raises:
      ValueError: naming an array that does not fit.
    """
    for name, x in zip(OWN, jax.eval_shape(_own, state), strict=True):
        if name not in saved or (saved[name].shape, saved[name].dtype) != (x.shape[1:], x.dtype):
            raise ValueError(f"there should be an array {name}, {x.dtype} {list(x.shape[1:])}")
    # Raises on invalid settings.
    TokenSampling(**{name: saved[f"sampling.{name}"].item() for name in SETTINGS})
    stream = load_slot(state.stream, {name: x for name, x in saved.items() if name not in OWN})
    return [*stream.values(), *(saved[name][None] for name in OWN)]


def put_slot(state: EngineState, slot: Int[Array, ""], arrays: Sequence[Array]) -> EngineState:
    """Writes the arrays of `slot_from_host` into one slot."""
    old, structure = jax.tree.flatten(state)
    new = []
    for x, part in zip(old, arrays, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            part = jax.random.wrap_key_data(part)
        new.append(jax.lax.dynamic_update_slice_in_dim(x, part, slot, 0))
    return jax.tree.unflatten(structure, new)


def _own(state: EngineState) -> list[Array]:
    """The arrays of a state that `OWN` names; keys as their data."""
    settings = [getattr(state.sampling, name) for name in SETTINGS]
    return [state.pending, state.logits, state.said, *settings, jax.random.key_data(state.sampling.key)]


def _replace_slot[Tree](tree: Tree, slot: Int[Array, ""], change: Callable[[Tree], Tree]) -> Tree:
    """Updates one slot of a tree of arrays [B, ...] by `change`, which gets it as [1, ...]."""
    changed = change(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), tree))
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0), tree, changed)
