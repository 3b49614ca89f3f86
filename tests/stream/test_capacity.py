"""How many slots fit: their bytes are those of the real arrays."""

import dataclasses

import jax
import pytest

from moss_jax.config import ConfigError, EngineConfig, MemoryConfig, moss_video_11b
from moss_jax.stream.capacity import capacity, memory_bytes, slot_bytes, workspace_bytes

MB = 10**6


@pytest.mark.parametrize("stored", [None, "int8"])
@pytest.mark.parametrize(("policy", "policies"), [("window", ()), ("window", ("merge",)), ("pyramid", ())])
def test_bytes_of_a_slot_are_those_of_its_arrays(make_engine, stored, policy, policies):
    memory = MemoryConfig(policy, bank_dtype=stored, text_dtype=stored)
    engine = make_engine(slots=3, text_capacity=40, bank_capacity=8, memory=memory, policies=policies)
    held = sum(x.nbytes for x in jax.tree.leaves(engine.start()))
    assert 3 * slot_bytes(engine.model_config, engine.config, engine.dtype) == held


def test_slots_fill_what_is_left():
    model, engine = moss_video_11b(), EngineConfig(text_capacity=664, bank_capacity=128)
    one = slot_bytes(model, engine, "bfloat16")

    def slots(device_bytes):
        return capacity(100 * MB, model, engine, "bfloat16", device_bytes=device_bytes, reserve=10 * MB)

    assert slots(110 * MB + 3 * one) == 3
    assert slots(110 * MB + 4 * one - 1) == 3
    with pytest.raises(ConfigError, match=r"has no room for a stream: parameters 100 MB, workspace 10 MB"):
        slots(110 * MB + one - 1)


def test_the_workspace_grows_with_what_runs_and_what_waits():
    model, engine = moss_video_11b(), EngineConfig(bank_capacity=8, text_capacity=64)

    def reserve(**sizes):
        return workspace_bytes(model, engine, "bfloat16", **sizes)

    # Few tokens need less than a batch of frames; many need at least their logits and what the MLP holds.
    assert reserve(tokens=1) == reserve(tokens=320)
    decoder = model.decoder
    assert reserve(tokens=32_000) > 32_000 * (4 * decoder.vocab_size + 3 * 2 * decoder.intermediate_size)
    frame = model.vectors_per_frame * decoder.hidden_size * 2
    assert reserve(tokens=1, waiting=7) - reserve(tokens=1) == 7 * frame
    assert reserve(tokens=1, copies=2) - reserve(tokens=1) == 2 * slot_bytes(model, engine, "bfloat16")
    # A large slot is copied by its compaction.
    large = dataclasses.replace(engine, bank_capacity=4096)
    copies = 2 * slot_bytes(model, large, "bfloat16")
    assert workspace_bytes(model, large, "bfloat16", tokens=1) == copies > reserve(tokens=1)


def test_memory_of_this_machine():
    assert memory_bytes(jax.devices()[0]) > 100 * MB
