"""Cases of benchmarks/attention.py: shapes, inputs, bytes, FLOPs, and the error of a result.

B row, T query tokens, S keys, K kv heads, H query heads, D head
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.ops.attention import Arguments, KeyRange, attention
from moss_jax.ops.qarray import QUANTIZED, QArray, quantize

FRAME = 101  # Keys of a frame.
CHECKED_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the op, or of the op and its gradients.

    Attributes:
      kind: "decode": few queries that see every key. "staircase": the range grows evenly from query to query,
        by whole frames; with `causal`, by one key.
      stored: dtype of K and V.
      gradients: whether the backward pass is timed too.
    """

    name: str
    kind: str
    rows: int
    queries: int
    keys: int
    stored: str = "bfloat16"
    bias: bool = False
    causal: bool = False
    gradients: bool = False
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def quantized(self) -> bool:
        return self.stored in QUANTIZED

    @property
    def scale(self) -> float:
        """Factor of the scores.

        A decode case feeds the output, about 1 / sqrt(S) in size, back as the next query. This factor keeps
        the standard deviation of the scores at about 0.6.
        """
        return 0.5 * math.sqrt(self.keys / self.head_dim) if self.kind == "decode" else self.head_dim**-0.5

    @property
    def end(self) -> np.ndarray:
        """End of each query's key range, int32 [T]; all ranges start at 0."""
        query = np.arange(1, self.queries + 1)
        if self.kind == "decode":
            return np.full(self.queries, self.keys, np.int32)
        if self.causal:
            return query.astype(np.int32)
        return (np.ceil(query * (self.keys // FRAME) / self.queries) * FRAME).astype(np.int32)

    @property
    def score_bytes(self) -> int:
        """Size of the score matrix in float32."""
        return 4 * self.rows * self.heads * self.queries * self.keys

    @property
    def bank_bytes(self) -> int:
        """Size of K, V and their scales."""
        vectors = self.rows * self.kv_heads * self.keys * 2
        return vectors * (self.head_dim * jnp.dtype(self.stored).itemsize + 4 * self.quantized)

    @property
    def bytes_read(self) -> int:
        """Minimum that the op must read: queries, and K, V and bias of the keys that any query sees."""
        seen = int(self.end.max()) / self.keys
        q = 2 * self.rows * self.queries * self.heads * self.head_dim
        return int(q + seen * (self.bank_bytes + 4 * self.rows * self.keys * self.bias))

    @property
    def flops(self) -> float:
        """FLOPs of the two GEMMs over visible (query, key) pairs, and of five more in the backward pass."""
        forward = 4.0 * self.head_dim * self.heads * self.rows * int(self.end.sum(dtype=np.int64))
        return forward * (3.5 if self.gradients else 1)

    @property
    def banks(self) -> int:
        """Number of (K, V) pairs that calls rotate over, to exceed L2; 8 for 256 frames, as in the model."""
        if self.kind != "decode":
            return 1
        return min(max(math.ceil(800e6 / self.bank_bytes), 2), 40)

    def tiny(self) -> "Case":
        """A small version of the case, for a CPU."""
        queries = 64 if self.queries > 64 else self.queries
        sizes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "rows": min(self.rows, 2), "queries": queries}
        return dataclasses.replace(self, keys=queries if self.causal else 4 * FRAME, **sizes)


def _cases() -> list[Case]:
    decode = [
        Case("decode_1x1616", "decode", 1, 1, 16 * FRAME),
        Case("decode_1x25856", "decode", 1, 1, 256 * FRAME),
        Case("decode_1x25856_bias", "decode", 1, 1, 256 * FRAME, bias=True),
        Case("decode_1x25856_q16", "decode", 1, 16, 256 * FRAME),
        Case("decode_32x8080", "decode", 32, 1, 80 * FRAME),
        Case("decode_1x413696", "decode", 1, 1, 4096 * FRAME),
        Case("decode_1x413696_int8", "decode", 1, 1, 4096 * FRAME, stored="int8"),
        Case("decode_1x413696_fp8", "decode", 1, 1, 4096 * FRAME, stored="float8_e4m3fn"),
    ]
    staircase = [
        Case("staircase_1024x6464", "staircase", 1, 1024, 64 * FRAME),
        Case("staircase_4096x25856", "staircase", 1, 4096, 256 * FRAME),
        Case("causal_4096", "staircase", 1, 4096, 4096, causal=True),
    ]
    return decode + [
        dataclasses.replace(case, name=case.name + suffix, gradients=gradients)
        for case in staircase
        for suffix, gradients in (("", False), ("_gradients", True))
    ]


CASES = {case.name: case for case in _cases()}


class Bank(NamedTuple):
    """K and V, [B, K, S, D] unless stated otherwise."""

    k: jax.Array | QArray
    v: jax.Array | QArray


class Rest(NamedTuple):
    """Arguments other than q, K and V."""

    start: jax.Array
    end: jax.Array
    bias: jax.Array | None
    d_out: jax.Array | None


def make_inputs(case: Case) -> tuple[jax.Array, list[Bank], Rest]:
    """Draws queries, banks and the other arguments."""
    size = (case.rows, case.queries, case.heads, case.head_dim)
    keys = jax.random.split(jax.random.key(0), case.banks + 3)
    q = jax.random.normal(keys[-1], size)
    q = (q * case.keys**-0.5 if case.kind == "decode" else q).astype(jnp.bfloat16)
    end = jnp.broadcast_to(case.end, size[:2])
    rest = Rest(
        start=jnp.zeros_like(end),
        end=end,
        bias=0.5 * jax.random.normal(keys[-2], (case.rows, case.keys)) if case.bias else None,
        d_out=jax.random.normal(keys[-3], size, jnp.bfloat16) if case.gradients else None,
    )
    return q, [_make_bank(case, key) for key in keys[: case.banks]], rest


@functools.partial(jax.jit, static_argnums=0)
def _make_bank(case: Case, key: jax.Array) -> Bank:
    shape = (2, case.rows, case.kv_heads, case.keys, case.head_dim)
    k, v = jax.random.normal(key, shape, jnp.float32 if case.quantized else case.stored)
    return Bank(*(quantize(x, case.stored, axes=3) if case.quantized else x for x in (k, v)))


def arguments(case: Case, q, bank: Bank, rest: Rest) -> Arguments:
    """Returns the call as the `Arguments` of the op."""
    return Arguments(
        q=q,
        k=bank.k,
        v=bank.v,
        kv_range=None if case.causal else KeyRange(rest.start, rest.end),
        bias=rest.bias,
        scale=case.scale,
        causal=case.causal,
    )


class Checker:
    """Relative errors of results against float32.

    Outputs and gradients of q are compared with the reference, on a sample of the queries if there are many;
    gradients of K and V, which need all queries, with the blockwise XLA implementation.
    """

    def __init__(self, case: Case, q: jax.Array, bank: Bank, rest: Rest):
        self.case = case
        number = min(case.queries, CHECKED_QUERIES)
        self.sample = np.sort(np.random.default_rng(0).choice(case.queries, number, replace=False))
        start, end, d_out = (
            None if x is None else x[:, self.sample] for x in (rest.start, rest.end, rest.d_out)
        )
        q, q_all = q[:, self.sample].astype(jnp.float32), q.astype(jnp.float32)
        if not case.gradients:
            self.expected = (jax.jit(self._attend)(q, bank, start, end, rest.bias),)
            return
        bank = Bank(bank.k.astype(jnp.float32), bank.v.astype(jnp.float32))
        d_q, _, _ = self._gradients("reference", q, bank, start, end, d_out)
        _, d_k, d_v = self._gradients("xla", q_all, bank, rest.start, rest.end, rest.d_out)
        self.expected = (d_q, d_k, d_v)

    def _attend(self, q, bank, start, end, bias, implementation="reference"):
        return attention(
            q,
            bank.k,
            bank.v,
            KeyRange(start, end),
            bias=bias,
            scale=self.case.scale,
            implementation=implementation,
        )

    def _gradients(self, implementation, q, bank, start, end, d_out):
        @jax.jit
        def run(q, k, v, start, end, d_out):
            def call(q, k, v):
                return self._attend(q, Bank(k, v), start, end, None, implementation)

            return jax.vjp(call, q, k, v)[1](d_out)

        with jax.default_matmul_precision("highest"):
            return run(q, bank.k, bank.v, start, end, d_out.astype(jnp.float32))

    def __call__(self, result: tuple[jax.Array, ...]) -> list[float]:
        """||x - expected|| / ||expected|| of the output, or of the gradients of q, K and V."""
        first, *others = result
        found = (first[:, self.sample], *others)
        return [float(_relative(x, y)) for x, y in zip(found, self.expected, strict=True)]


@jax.jit
def _relative(x: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
