"""The choice among the implementations of an op."""

import logging
from types import SimpleNamespace

import pytest

from moss_jax.ops import dispatch
from moss_jax.ops.dispatch import Unsupported


def implementation(reason: str | None):
    return SimpleNamespace(unsupported=lambda arguments, platform: reason)


IMPLEMENTATIONS = {"fast": implementation("it is too long"), "xla": implementation(None)}
ORDERS = {"gpu": ("fast", "xla"), "tpu": ("fast",)}


def choose(named=None, platform="gpu"):
    return dispatch.choose("op", IMPLEMENTATIONS, ORDERS, None, named, platform)


def test_the_first_of_the_order_that_can():
    assert choose() == "xla"
    assert choose(platform="cpu") == "xla"


def test_a_name_is_taken_or_refused():
    assert choose("xla") == "xla"
    with pytest.raises(Unsupported, match="op implementation 'fast' cannot be used: it is too long"):
        choose("fast")
    with pytest.raises(Unsupported, match="no op implementation 'triton'; there are fast, xla"):
        choose("triton")


def test_if_none_can_the_reasons_are_told():
    with pytest.raises(Unsupported, match="no op implementation for tpu: not using fast: it is too long"):
        choose(platform="tpu")


def test_logs_the_choice_once_with_the_reasons(caplog):
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moss_jax"):
        for _ in range(3):
            choose()
    assert caplog.messages == ["op on gpu: using xla; not using fast: it is too long"]
