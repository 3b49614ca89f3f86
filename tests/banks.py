"""Memory banks for tests."""

from moss_jax.config import MemoryConfig, ModelConfig
from moss_jax.memory import MemoryBank, init_state
from moss_jax.ops.qarray import DTYPES


def empty_bank(
    model: ModelConfig, memory: MemoryConfig, frames: int, *, slots: int = 1, dtype: str = "float32"
) -> MemoryBank:
    """An empty bank with room for that many whole frames."""
    return init_state(
        model,
        slots,
        text_capacity=8,
        bank_capacity=frames,
        dtype=dtype,
        bank_dtype=DTYPES[memory.bank_dtype] if memory.bank_dtype else None,
        merges=memory.merges,
    ).bank
