"""Attention on a mesh: each device computes its heads, and its rows unless they have slots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from moss_jax.ops.attention import Arguments, KeyRange, QuantizedProjection, api, base, xla
from moss_jax.ops.attention.base import AppendArguments, SelfAttentionArguments
from moss_jax.ops.qarray import QArray, quantize
from moss_jax.ops.rotary import Rotation
from moss_jax.sharding import make_mesh, named_sharding

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal(s, np.float32) for s in ((4, 6, 8, 16), (4, 4, 40, 16), (4, 4, 40, 16)))
bias = rng.standard_normal((4, 40)).astype(np.float32)
end = np.sort(rng.integers(0, 41, (4, 6)), axis=1).astype(np.int32)
exact = Arguments(q, k, v, KeyRange(0 * end, end), bias, 0.25)
stored = dataclasses.replace(exact, k=quantize(k, "int8", axes=3), v=quantize(v, "int8", axes=3))
# More rows than slots, which share one and leave one out.
slots, order = jnp.int32([2, 0, 2, 2, 3, 0]), np.array([0, 3, 1, 2, 2, 1])
ranges = KeyRange(0 * end[order], end[order])
by_slot = Arguments(q[order], k, v, ranges, bias, 0.25, slots=slots)

angles = rng.uniform(0, 6, (6, 3, 8)).astype(np.float32)
rows = rng.standard_normal((6, 3, 4, 4, 16)).astype(np.float32)
rotation = Rotation(np.cos(angles), np.sin(angles))
start, count = jnp.int32([5, 9, 8, 11, 0, 12]), jnp.int32([3, 3, 3, 2, 0, 1])

def append(k, v):
    a = AppendArguments(rows, rotation, k, v, start, count, slots, capacity=32)
    appended = api._append(a)
    return appended.attend(appended.keys, appended.values), appended.keys, appended.values


qkv = rng.standard_normal((4, 24, 3, 4, 16)).astype(np.float32)
qk = QArray(jnp.asarray(qkv[:, :, :2], "float8_e4m3fn"), jnp.float32(0.5))
fused = [
    SelfAttentionArguments(projection, out_dtype=jnp.dtype("float32"), attention="reference")
    for projection in (qkv, QuantizedProjection(qk, qkv[:, :, 2]))
]

on_mesh = api.sharded(xla.apply, api.attention_specs)
fused_on_mesh = api.sharded(api._attend_to_slices, api.self_attention_specs)

def gradients(apply):
    def loss(q, k, v, bias):
        return (apply(dataclasses.replace(exact, q=q, k=k, v=v, bias=bias)) ** 2).sum()
    return jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

def close(actual, expected):
    # A device sums over the same keys in another order at most: some roundings of numbers up to 10.
    np.testing.assert_allclose(actual, expected, atol=10 * 40 * 2.0**-23)

appended = jax.jit(append)(k, v)

# What does not divide stays whole: 4 rows on 8 devices, 4 kv heads on 8.
for shape, parts in {(2, 1, 4): 8, (1, 4, 2): 8, (8, 1, 1): 1, (1, 1, 8): 1}.items():
    with jax.set_mesh(make_mesh(*shape)):
        for a in (exact, stored):
            out = jax.jit(on_mesh)(a)
            close(out, xla.apply(a))
            assert len({s.index for s in out.addressable_shards}) == parts, (shape, out.sharding)
        out = jax.jit(on_mesh)(by_slot)
        close(out, xla.apply(by_slot))
        # Heads alone are split.
        heads = shape[2] if 4 % shape[2] == 0 else 1
        assert len({s.index for s in out.addressable_shards}) == heads, (shape, out.sharding)
        placed = named_sharding(("batch", "kv_heads", None, None), k.shape, jax.sharding.get_mesh())
        for a, b in zip(jax.jit(append)(*jax.device_put((k, v), placed)), appended, strict=True):
            close(a, b)
        for a, b in zip(jax.jit(lambda: gradients(on_mesh))(), gradients(xla.apply), strict=True):
            close(a / np.abs(b).max(), b / np.abs(b).max())
        for a in fused:
            out = jax.jit(fused_on_mesh)(a)
            close(out, api._attend_to_slices(a))
            assert len({s.index for s in out.addressable_shards}) == parts, (shape, out.sharding)
print("held")
"""


@pytest.mark.slow
def test_each_device_computes_its_part():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "held", found.stderr[-2000:]
