"""Serving on a mesh: a session says there what it says on one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moss_jax
from moss_jax.config import EngineConfig
from moss_jax.sharding import make_mesh
from moss_jax.stream import PENDING, Engine, Row

ROOT = Path(__file__).parents[2]

SCRIPT = """
import dataclasses, os, tempfile
import jax, numpy as np
import moss_jax
from moss_jax.config import EngineConfig, MemoryConfig, SessionConfig
from moss_jax.sharding import make_mesh
from moss_jax.stream import Engine, Row, Session, Text
from moss_jax.text import Tokenizer

checkpoint = "checkpoints/moss-tiny"
tokenizer = Tokenizer.load(checkpoint)
frames = np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)
rows = [Row([1, 2, tokenizer.special.image], [slot]) for slot in range(4)]

def run(mesh):
    model = moss_jax.load(checkpoint, dtype="float32", mesh=mesh)
    engine = Engine(model, tokenizer, EngineConfig(slots=4, text_capacity=192, bank_capacity=4))
    session = Session(engine, SessionConfig(tokens_per_second=4), system=None, prompt="What do you see?")
    for i, frame in enumerate(frames):
        session.push_frame(frame, float(i // 4), slot=i % 4)
    session.finish()
    events = [dataclasses.replace(event, wall_time=0) for event in session]
    features = engine.encode(list(frames[:4]))
    state, sampled = engine.step(engine.start(), rows, features)
    return engine, session, events, state, np.asarray(sampled.logits)

single, _, expected, _, alone = run(None)
engine, session, events, state, logits = run(make_mesh(2, 2, 2))
assert sum(isinstance(event, Text) for event in events) > 8
assert events == expected
# float32 sums of 768 products at most, in another order, of logits up to 30.
np.testing.assert_allclose(logits, alone, atol=1e-3)

# A stream that is saved there goes on there and on one device.
path = os.path.join(tempfile.mkdtemp(), "stream")
at = session.save(path, slot=2)

def go_on(engine):
    session = Session(engine, SessionConfig(tokens_per_second=4), system=None, resume={1: path})
    for i, frame in enumerate(frames[:6]):
        session.push_frame(frame, at + i, slot=1)
    session.finish()
    return [dataclasses.replace(event, wall_time=0) for event in session if event.slot == 1]

found = go_on(engine)
assert found == go_on(single)
assert sum(isinstance(event, Text) for event in found) > 2

def parts(x):
    return len({str(shard.index) for shard in x.addressable_shards})

assert parts(state.stream.text.keys[0]) == parts(state.stream.bank.values[0]) == 8
assert parts(state.pending) == 4
assert max(parts(x) for x in engine.parameters) == 4
assert jax.eval_shape(engine.start).pending.shape == (4,)
# A state that comes out of a step is split like the first, so no program compiles twice.
mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
memory = MemoryConfig(bank_dtype="int8", text_dtype="int8")
model = moss_jax.load(checkpoint, mesh=mesh)
engine = Engine(model, tokenizer, EngineConfig(text_capacity=192, bank_capacity=8, memory=memory))
for part in (state := engine.start()).stream.text, state.stream.bank:
    assert parts(part.keys[0].values) == parts(part.keys[0].scale) == 2
state, _ = engine.step(engine.start(), [Row([1, 2])])
engine.step(state, [Row([1, 2])])
assert engine.programs["step"]._cache_size() == 1
print("held")
"""


@pytest.mark.slow
def test_a_session_on_a_mesh_says_what_it_says_on_one_device():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "held", found.stderr[-2000:]


@pytest.mark.gpu
def test_rows_of_any_length_give_the_logits_of_one_pass_on_two_gpus(tokenizer, frames):
    """Kernels, transfers and reductions between real devices, at the precision of matrix products there."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    the_law_holds_on(make_mesh(1, 1, 2, devices=jax.devices()[:2]), tokenizer, frames)


def the_law_holds_on(mesh, tokenizer, frames):
    image = tokenizer.special.image
    row = Row([1, 2, image, *range(300, 320), image, 7, 8, 9, 10], [0, 1])

    def logits(mesh, lengths):
        model = moss_jax.load("checkpoints/moss-tiny", dtype="float32", mesh=mesh)
        engine = Engine(model, tokenizer, EngineConfig(text_capacity=192, bank_capacity=4))
        state, rest, features = engine.start(), row, engine.encode(frames[:2])
        for length in lengths:
            now, rest = rest.cut(length, image)
            state, sampled = engine.step(state, [now], features)
        last = np.asarray(sampled.logits)  # Donated with the next step.
        _, following = engine.step(state, [Row([PENDING])])
        return np.stack([last, following.logits])

    with jax.default_matmul_precision("highest"):
        whole = logits(mesh, [len(row.tokens)])
        # float32 sums of 768 products at most, in another order, of logits up to 30.
        np.testing.assert_allclose(logits(mesh, [3, 1, 17, len(row.tokens) - 21]), whole, atol=1e-3)
        np.testing.assert_allclose(logits(None, [len(row.tokens)]), whole, atol=1e-3)
