"""The choice among the implementations of an op."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.contract import refuses

from moss_jax.ops import dispatch
from moss_jax.ops.dispatch import Implementation, Op, Unsupported
from moss_jax.ops.qarray import QArray


def too_long(arguments, platform):
    return f"{arguments} is too long"


OP = Op(
    "op",
    {"fast": Implementation(lambda a, config=1: a * config, too_long), "xla": Implementation(lambda a: -a)},
    {"gpu": ("fast", "xla"), "tpu": ("fast",)},
)
FAST = dataclasses.replace(OP, implementations={"fast": Implementation(OP.implementations["fast"].apply)})


def test_the_first_of_the_order_that_can():
    assert [OP.choose(3, platform=platform) for platform in ("gpu", "cpu")] == ["xla", "xla"]
    assert FAST.choose(3, platform="gpu") == "fast"
    assert (OP(3, implementation="xla"), FAST(3, implementation="fast")) == (-3, 3)


def test_a_config_is_for_a_named_implementation():
    assert FAST(3, implementation="fast", config=5) == 15
    with refuses("a config of op needs the name of the implementation that it is for"):
        FAST(3, config=5)


def test_refusals_say_why():
    for name, platform, message in (
        ("fast", "gpu", "op implementation 'fast' cannot be used: 3 is too long"),
        ("triton", "gpu", "no op implementation 'triton'; there are fast, xla"),
        (None, "tpu", "no op implementation for tpu: not using fast: 3 is too long"),
    ):
        with pytest.raises(Unsupported, match=message):
            OP.choose(3, name, platform)


def test_logs_the_choice_once_with_the_reasons(caplog):
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moss_jax"):
        for _ in range(3):
            OP.choose(3, platform="gpu")
    assert caplog.messages == ["op on gpu: using xla; not using fast: 3 is too long"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    x: jax.Array | QArray
    n: jax.Array
    out_dtype: jnp.dtype = dataclasses.field(metadata={"static": True})


def test_the_reference_is_the_definition_in_float32():
    def define(a):
        assert (a.x.dtype, a.n.dtype, a.out_dtype) == (jnp.float32, jnp.int32, jnp.float32)
        return a.x * a.n / 3, a.n

    reference = dispatch.in_float32(define, lambda a: (a.out_dtype, a.n.dtype))
    for x in (jnp.ones(2, jnp.bfloat16), QArray(jnp.full(2, 4, jnp.int8), jnp.float32(1 / 4))):
        third, n = reference(Arguments(x, jnp.int32(1), jnp.dtype("bfloat16")))
        assert (third.dtype, n.dtype) == (jnp.bfloat16, jnp.int32)
        np.testing.assert_array_equal(third, jnp.full(2, 1 / 3, jnp.bfloat16))
