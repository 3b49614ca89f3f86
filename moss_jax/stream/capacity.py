"""Capacity planning: how many slots fit in device memory, computed before anything is allocated."""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from moss_jax.config import ConfigError, EngineConfig, ModelConfig, TokenSampling
from moss_jax.stream.perception import ENCODE_BUCKETS
from moss_jax.stream.step import start


def slot_bytes(model: ModelConfig, engine: EngineConfig, dtype: DTypeLike) -> int:
    """Returns the exact size in bytes of one slot of an engine's state.

    Args:
      engine: capacities and bank dtype; the number of slots does not matter.
      dtype: of the model.
    """

    def state_bytes(slots: int) -> int:
        config = dataclasses.replace(engine, slots=slots)
        state = jax.eval_shape(functools.partial(start, model, dtype, TokenSampling(), config))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    return state_bytes(2) - state_bytes(1)


def workspace_bytes(
    model: ModelConfig,
    engine: EngineConfig,
    dtype: DTypeLike,
    *,
    tokens: int,
    waiting: int = 0,
    copies: int = 0,
) -> int:
    """Bytes to reserve beside parameters and state: for the largest program and for queued frames.

    Programs run one after the other, so the workspace is the largest of three estimates, each from the shapes
    of the arrays that are live at the same time:

    - a step: for each token the residual stream and its branch, the normed input, queries with keys and
      values, the heads' results, the gate and up projections with their product, and float32 logits;
    - encoding: for each position of the largest batch of frames the pixels, the residual stream and its
      branch, the normed input, queries, keys and values, the heads' results, the MLP's hidden layer and the
      intermediate states kept for the compressor, twice, since it stacks them;
    - a compaction: the slot that is compacted, before and after.

    Queued frames hold their features, and copies of streams the bytes of their slots. Not included are the
    compiler's own temporaries, and attention scores where no kernel keeps them on the chip.

    Args:
      tokens: number of tokens in the largest step, over all slots, padding included.
      waiting: number of encoded frames that wait for their step.
      copies: number of streams being saved or resumed at a time; a live server saves one and resumes one.
    """
    decoder, vision, itemsize = model.decoder, model.vision, jnp.dtype(dtype).itemsize
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    per_token = 4 * decoder.hidden_size + heads * decoder.head_dim + 3 * decoder.intermediate_size
    step = tokens * (per_token * itemsize + 4 * decoder.vocab_size)
    per_position = 7 * vision.hidden_size + vision.intermediate_size + 2 * vision.output_size
    per_frame = vision.num_positions * per_position + 3 * vision.image_size**2
    encoding = ENCODE_BUCKETS[-1] * per_frame * itemsize
    features = waiting * model.vectors_per_frame * decoder.hidden_size * itemsize
    slot = slot_bytes(model, engine, dtype)
    return max(step, encoding, 2 * slot) + features + copies * slot


def memory_bytes(device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]
    """Bytes of memory that a device may use; for a CPU, all memory of the machine."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def capacity(
    parameters: int,
    model: ModelConfig,
    engine: EngineConfig,
    dtype: DTypeLike,
    *,
    device_bytes: int,
    reserve: int,
) -> int:
    """Number of slots that fit on a device beside the parameters and the reserve.

    Args:
      parameters: their bytes, including copies in the layout for decoding.
      engine, dtype: as for `slot_bytes`.
      device_bytes: memory of the device, from `memory_bytes`.
      reserve: bytes to keep free, from `workspace_bytes`.

    Raises:
      ConfigError: there is no room for a single slot.
    """
    size = slot_bytes(model, engine, dtype)
    slots = (device_bytes - parameters - reserve) // size
    if slots < 1:
        parts = {"parameters": parameters, "workspace": reserve, "one slot": size}
        needs = ", ".join(f"{name} {math.ceil(part / 1e6):,} MB" for name, part in parts.items())
        raise ConfigError(
            f"a device of {device_bytes // 10**6:,} MB has no room for a stream: {needs}; "
            "lower engine.bank_capacity or engine.text_capacity, or store bank and text cache in 8 bits"
        )
    return slots
