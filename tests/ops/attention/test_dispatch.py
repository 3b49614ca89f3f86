"""The choice among implementations of the attention ops, its log, and calls that are refused."""

import logging
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.ops import dispatch
from moss_jax.ops.attention import (
    APPEND,
    ATTENTION,
    SELF_ATTENTION,
    Arguments,
    KeyRange,
    Unsupported,
    attention,
)
from moss_jax.ops.attention.base import AppendArguments, SelfAttentionArguments
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig, StaircaseConfig
from moss_jax.ops.qarray import QArray, quantize
from moss_jax.ops.rotary import Rotation


def abstract(
    dtype="bfloat16",
    *,
    queries=4,
    keys=4,
    head_dim=64,
    ranges=False,
    causal=False,
    bias=False,
    slots=False,
):
    bound = jax.ShapeDtypeStruct((1, queries), jnp.int32)
    kv = jax.ShapeDtypeStruct((1, 1, keys, head_dim), dtype)
    return Arguments(
        q=jax.ShapeDtypeStruct((1, queries, 2, head_dim), dtype),
        k=kv,
        v=kv,
        kv_range=KeyRange(bound, bound) if ranges else None,
        bias=jax.ShapeDtypeStruct((1, keys), jnp.float32) if bias else None,
        scale=1.0,
        causal=causal,
        slots=jax.ShapeDtypeStruct((1,), jnp.int32) if slots else None,
    )


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float16"}, "cudnn"),
        ("gpu", {"causal": True}, "cudnn"),
        ("gpu", {"head_dim": 80}, "cudnn"),
        ("gpu", {"keys": 41}, "mosaic_gpu"),
        ("gpu", {"head_dim": 84}, "xla"),
        ("gpu", {"head_dim": 136}, "xla"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"ranges": True}, "mosaic_gpu"),
        ("gpu", {"bias": True}, "mosaic_gpu"),
        ("gpu", {"slots": True}, "mosaic_gpu"),
        ("gpu", {"slots": True, "dtype": "float32"}, "xla"),
        ("gpu", {"ranges": True, "dtype": "float32"}, "xla"),
        ("gpu", {"ranges": True, "head_dim": 136}, "xla"),
        ("cpu", {}, "xla"),
        ("tpu", {}, "mosaic_tpu"),
        ("tpu", {"slots": True}, "mosaic_tpu"),
        ("tpu", {"dtype": "float16"}, "xla"),
        ("some new platform", {}, "xla"),
    ],
)
def test_attention_takes_the_first_that_can(platform, arguments, expected):
    assert ATTENTION.choose(abstract(**arguments), platform=platform) == expected


def self_attention_call(dtype="bfloat16", *, positions=1608, head_dim=80, attention=None):
    projection = jax.ShapeDtypeStruct((1, positions, 3, 16, head_dim), dtype)
    return SelfAttentionArguments(projection, out_dtype=jnp.dtype(dtype), attention=attention)


def append_call(
    dtype="bfloat16", *, tokens=1, head_dim=128, group=4, rows=1, slots=False, attention=None, stored=None
):
    array = jax.ShapeDtypeStruct
    angles = array((rows, tokens, head_dim // 2), jnp.float32)
    kv, number = array((1, 8, 65, head_dim), stored or dtype), array((rows,), jnp.int32)
    if stored is not None:
        kv = QArray(kv, array(kv.shape[:3], jnp.float32))
    qkv = array((rows, tokens, 8, group + 2, head_dim), dtype)
    rotation, named = Rotation(angles, angles), number if slots else None
    return AppendArguments(qkv, rotation, kv, kv, number, number, named, capacity=64, attention=attention)


@pytest.mark.parametrize(
    ("op", "call", "kernel"),
    [
        (SELF_ATTENTION, self_attention_call(), True),
        (SELF_ATTENTION, self_attention_call(attention="mosaic_gpu"), True),
        (SELF_ATTENTION, self_attention_call(attention="cudnn"), False),
        (SELF_ATTENTION, self_attention_call("float32"), False),
        (SELF_ATTENTION, self_attention_call(positions=1601), False),
        (APPEND, append_call(), True),
        (APPEND, append_call(tokens=64, attention="mosaic_gpu"), True),
        (APPEND, append_call(rows=3, slots=True), True),
        (APPEND, append_call(tokens=65), False),
        (APPEND, append_call(head_dim=32), False),
        (APPEND, append_call(attention="xla"), False),
        (APPEND, append_call(stored=jnp.int8), True),
        (APPEND, append_call(stored=jnp.int8, tokens=17), False),
        (APPEND, append_call(stored=jnp.int8, head_dim=64), False),
        (APPEND, append_call("float32"), False),
    ],
)
def test_fused_kernels_take_what_they_can(op, call, kernel):
    assert op.choose(call, platform="gpu") == ("mosaic_gpu" if kernel else "xla")
    assert op.choose(call, platform="cpu") == op.choose(call, platform="tpu") == "xla"


def test_the_append_kernel_is_not_used_on_a_mesh():
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("tensor",))):
        assert APPEND.choose(append_call(), platform="gpu") == "xla"
        assert SELF_ATTENTION.choose(self_attention_call(), platform="gpu") == "mosaic_gpu"


@pytest.mark.parametrize("op", [ATTENTION, SELF_ATTENTION, APPEND])
def test_orders_name_implementations_that_exist(op):
    assert {name for order in op.orders.values() for name in order} <= set(op.implementations)


def test_logs_the_reasons(caplog):
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moss_jax"):
        ATTENTION.choose(abstract(ranges=True), platform="gpu")
        ATTENTION.choose(abstract("float32"), platform="gpu")
    assert caplog.messages == [
        "attention on gpu: using mosaic_gpu; not using cudnn: it has no range of keys per query",
        "attention on gpu: using xla; not using cudnn: it takes bfloat16 and float16, not float32; "
        "not using mosaic_gpu: it takes bfloat16 and float16, not float32",
    ]


def test_a_forced_name_that_cannot_fails_with_the_reason():
    with pytest.raises(Unsupported, match=r"'cudnn' cannot be used: it needs an NVIDIA GPU, and this is cpu"):
        ATTENTION.choose(abstract(), "cudnn", platform="cpu")
    with pytest.raises(Unsupported, match=r"not those of a slot that it names"):
        ATTENTION.choose(abstract(slots=True), "cudnn", platform="gpu")
    with pytest.raises(Unsupported, match=r"no range of keys"):
        ATTENTION.choose(abstract(ranges=True), "cudnn", platform="gpu")


def test_the_class_of_a_config_names_the_kernel():
    q, wide = jnp.ones((1, 1, 1, 64), jnp.bfloat16), jnp.ones((1, 1, 64, 64), jnp.bfloat16)
    kv = quantize(wide, "int8", axes=3)
    with interpreted.on_gpu():
        with pytest.raises(Unsupported, match="staircase kernel takes K and V in q's dtype, not in int8"):
            attention(q, kv, kv, implementation="mosaic_gpu", config=StaircaseConfig())
        out = [
            attention(q, wide, wide, implementation="mosaic_gpu", config=config)
            for config in (DecodeConfig(), StaircaseConfig())
        ]
    np.testing.assert_array_equal(np.float32(out), 1)


Q, KV = (2, 3, 4, 8), (2, 2, 5, 8)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"q": Q[1:]}, {}, "q [B, T, H, D] and k, v [B, K, S, D]; got q (3, 4, 8)"),
        ({"v": (2, 2, 6, 8)}, {}, "v (2, 2, 6, 8)"),
        ({"q": (1, 3, 4, 8)}, {}, "must share B and D"),
        ({"q": (2, 3, 3, 8)}, {}, "H must be a multiple of K"),
        ({}, {"causal": True}, "causal attention needs T == S and no kv_range; got T=3, S=5"),
        ({"q": (2, 5, 4, 8)}, {"causal": True, "bound": (2, 5)}, "no kv_range"),
        ({}, {"bound": (2,)}, "[R, T] = (2, 3) bounds; got (2,)"),
        ({}, {"bias": (2, 3, 5)}, "[B, S] = (2, 5); got (2, 3, 5)"),
        ({}, {"slots": (3,)}, "slots holds an integer a row, [R] = (2,); got int32 (3,)"),
        ({}, {"slots": (2, 1)}, "[R] = (2,); got int32 (2, 1)"),
        ({}, {"slots": (2,), "slots_dtype": "float32"}, "[R] = (2,); got float32 (2,)"),
        ({"q": (2, 3, 4, 16)}, {"slots": (2,)}, "must share D"),
        ({"q": (7, 3, 4, 8)}, {"slots": (7,), "bound": (2, 3)}, "[R, T] = (7, 3) bounds; got (2, 3)"),
        ({"q": (7, 3, 4, 8)}, {"slots": (7,), "bias": (7, 5)}, "[B, S] = (2, 5); got (7, 5)"),
        ({"q": (2, 5, 4, 8)}, {"slots": (2,), "causal": True}, "not over those of slots"),
    ],
)
def test_shapes_that_do_not_fit(shapes, options, message):
    q, k, v = (jax.ShapeDtypeStruct(shapes.get(x, KV if x in "kv" else Q), "float32") for x in "qkv")
    bound = jax.ShapeDtypeStruct(options["bound"], "int32") if "bound" in options else None
    bias = jax.ShapeDtypeStruct(options["bias"], "float32") if "bias" in options else None
    slots_dtype = options.get("slots_dtype", "int32")
    slots = jax.ShapeDtypeStruct(options["slots"], slots_dtype) if "slots" in options else None
    kv_range = None if bound is None else KeyRange(bound, bound)
    with pytest.raises(ValueError, match=re.escape(message)):
        Arguments(q, k, v, kv_range, bias, 1.0, options.get("causal", False), slots)


def test_quantised_keys_and_values_have_a_scale_per_vector():
    q, kv = (jax.ShapeDtypeStruct(shape, "float32") for shape in (Q, KV))
    stored = jax.ShapeDtypeStruct(KV, "int8")
    scaled, by_head = (QArray(stored, jax.ShapeDtypeStruct(KV[:n], "float32")) for n in (3, 2))
    Arguments(q, scaled, scaled, None, None, 1.0)
    for k, v, message in (
        (stored, stored, "k in int8 must be a QArray"),
        (scaled, by_head, "v has one scale per vector, (2, 2, 5); got (2, 2)"),
        (kv, scaled, "both of k and v are QArrays or neither; got float32 and int8"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Arguments(q, k, v, None, None, 1.0)


def test_no_keys_at_all_give_zeros():
    out = attention(jnp.ones(Q, jnp.bfloat16), *[jnp.ones((2, 2, 0, 8), jnp.bfloat16)] * 2)
    assert out.shape == Q
    assert out.dtype == jnp.bfloat16
    assert not np.asarray(out).any()
