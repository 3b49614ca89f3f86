"""Which implementation takes a call, what is said about it, and what is refused."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.ops import dispatch
from moss_jax.ops.attention import IMPLEMENTATIONS, Arguments, KeyRange, Unsupported, api, attention, choose


def abstract(dtype="bfloat16", *, queries=4, keys=4, head_dim=64, ranges=False, causal=False, bias=False):
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
        ("gpu", {"ranges": True, "dtype": "float32"}, "xla"),
        ("gpu", {"ranges": True, "head_dim": 136}, "xla"),
        ("cpu", {}, "xla"),
        ("tpu", {}, "mosaic_tpu"),
        ("tpu", {"dtype": "float16"}, "xla"),
        ("some new platform", {}, "xla"),
    ],
)
def test_the_first_of_the_platforms_order_that_can(platform, arguments, expected):
    assert choose(abstract(**arguments), platform=platform) == expected


def test_the_order_names_implementations_that_are_there():
    assert {name for order in api.ORDER.values() for name in order} <= set(IMPLEMENTATIONS)


def test_logs_the_choice_once_with_the_reasons(caplog):
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moss_jax"):
        for _ in range(3):
            choose(abstract(ranges=True), platform="gpu")
            choose(abstract("float32"), platform="gpu")
    assert caplog.messages == [
        "attention on gpu: using mosaic_gpu; not using cudnn: it has no range of keys per query",
        "attention on gpu: using xla; not using cudnn: it takes bfloat16 and float16, not float32; "
        "not using mosaic_gpu: it takes bfloat16 and float16, not float32",
    ]


def test_a_forced_name_is_used_and_no_other(monkeypatch):
    q, kv = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 1, 3, 8))
    monkeypatch.setattr(api.reference, "attend", lambda a: "the reference")
    assert attention(q, kv, kv, implementation="reference") == "the reference"
    monkeypatch.setattr(api.xla, "attend", lambda a: "xla")
    monkeypatch.setattr(api, "ORDER", {})
    assert attention(q, kv, kv) == "xla"


def test_a_forced_name_that_cannot_fails_with_the_reason():
    with pytest.raises(Unsupported, match=r"'cudnn' cannot be used: it needs an NVIDIA GPU, and this is cpu"):
        choose(abstract(), "cudnn", platform="cpu")
    with pytest.raises(Unsupported, match=r"no range of keys"):
        choose(abstract(ranges=True), "cudnn", platform="gpu")


def test_an_unknown_name_fails_with_those_there_are():
    with pytest.raises(Unsupported, match=r"no attention implementation 'flash'; there are cudnn"):
        choose(abstract(), "flash")


def test_no_implementation_at_all_fails_with_all_reasons(monkeypatch):
    monkeypatch.setattr(api, "ORDER", {"tpu": ("cudnn",)})
    with pytest.raises(Unsupported, match=r"no attention implementation for tpu: not using cudnn: it needs"):
        choose(abstract(), platform="tpu")


Q, KV, BOUND = (2, 3, 4, 8), (2, 2, 5, 8), (2, 3)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"q": Q[1:]}, {}, "q [B, T, H, D] and k, v [B, K, S, D]; got q (3, 4, 8)"),
        ({"v": (2, 2, 6, 8)}, {}, "v (2, 2, 6, 8)"),
        ({"q": (1, 3, 4, 8)}, {}, "must share B and D"),
        ({"q": (2, 3, 4, 16)}, {}, "must share B and D"),
        ({"q": (2, 3, 3, 8)}, {}, "H must be a multiple of K"),
        ({}, {"causal": True}, "causal attention needs T == S and no kv_range; got T=3, S=5"),
        ({"q": (2, 5, 4, 8)}, {"causal": True, "bound": (2, 5)}, "no kv_range"),
        ({}, {"bound": (2,)}, "[B, T] = (2, 3) bounds; got (2,)"),
        ({}, {"bound": (1, 3)}, "[B, T] = (2, 3) bounds; got (1, 3)"),
        ({}, {"bias": (2, 3, 5)}, "[B, S] = (2, 5); got (2, 3, 5)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, options, message):
    q, k, v = (jnp.zeros(shapes.get(name, KV if name in "kv" else Q)) for name in "qkv")
    bound = jnp.zeros(options["bound"], jnp.int32) if "bound" in options else None
    bias = jnp.zeros(options["bias"]) if "bias" in options else None
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(
            q,
            k,
            v,
            None if bound is None else (bound, bound),
            causal=options.get("causal", False),
            bias=bias,
        )


def test_no_keys_at_all_give_zeros():
    out = attention(jnp.ones(Q, jnp.bfloat16), *[jnp.ones((2, 2, 0, 8), jnp.bfloat16)] * 2)
    assert out.shape == Q
    assert out.dtype == jnp.bfloat16
    assert not np.asarray(out).any()
