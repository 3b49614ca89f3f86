"""Attention on a mesh: each device computes its rows of the batch and its heads; the result is the same."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from unittest import mock
import jax, jax.numpy as jnp, numpy as np
from moss_jax.ops.attention import KeyRange, api, attention
from moss_jax.sharding import make_mesh, named_sharding

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal(s, np.float32) for s in ((4, 6, 8, 16), (4, 4, 40, 16), (4, 4, 40, 16)))
bias = rng.standard_normal((4, 40)).astype(np.float32)
end = np.sort(rng.integers(0, 41, (4, 6)), axis=1).astype(np.int32)

def call(q, k, v, bias):
    return attention(q, k, v, KeyRange(0 * end, end), bias=bias, implementation="xla")

def loss(*arrays):
    return (call(*arrays) ** 2).sum()

expected, gradients = call(q, k, v, bias), jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)
for shape in ((2, 1, 4), (1, 4, 2), (8, 1, 1), (1, 1, 8)):
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh), mock.patch.object(api, "SPREAD_BY_HAND", ("xla",)):
        compiled = jax.jit(call).lower(q, k, v, bias).compile()
        np.testing.assert_allclose(compiled(q, k, v, bias), expected, atol=1e-5)
        for a, b in zip(jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias), gradients):
            np.testing.assert_allclose(a, b, atol=1e-4)
        # What does not divide stays whole: 4 rows on 8 devices, 4 kv heads on 8.
        spread = {(2, 1, 4): 8, (1, 4, 2): 8, (8, 1, 1): 1, (1, 1, 8): 1}[shape]
        out = compiled(q, k, v, bias)
        assert len({s.index for s in out.addressable_shards}) == spread, (shape, out.sharding)
print("held")
"""


def test_each_device_computes_its_part():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "held", found.stderr[-2000:]
