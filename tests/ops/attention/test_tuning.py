"""The table of kernel configurations: what is found, what is refused, what is shipped."""

import dataclasses
import json
import re

import jax
import pytest

from moss_jax.ops.attention import Arguments, tuning

CONFIGS = {
    "mosaic_gpu.decode": ("moss_jax.ops.attention.mosaic_gpu.decode", "DecodeConfig"),
    "mosaic_gpu.staircase": ("moss_jax.ops.attention.mosaic_gpu.staircase", "StaircaseConfig"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 1
    stages: int = 2


def entry(block, *, device="H", kernel="k", dtype="bfloat16", head_dim=128, keys=1000, queries=1):
    shape = {"dtype": dtype, "head_dim": head_dim, "keys": keys, "queries": queries}
    return tuning.Entry(device, kernel, shape, {"block": block}, {"forward": 1.5})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """`table(entries)` is the table from then on."""
    monkeypatch.setattr(tuning, "FILE", tmp_path / "tuning.json")

    def write(entries):
        tuning.FILE.write_text(json.dumps([dataclasses.asdict(e) for e in entries]), encoding="utf-8")
        tuning.entries.cache_clear()

    write([])
    return write


def lookup(device="H", dtype="bfloat16", head_dim=128, **shape):
    return tuning.lookup("k", Config(), device, dtype=dtype, head_dim=head_dim, **shape)


def test_the_nearest_shape_by_ratio(table):
    table([entry(10, keys=1000), entry(20, keys=16000), entry(30, keys=1000, queries=64)])
    assert lookup(keys=1000, queries=1) == Config(block=10, stages=2)
    assert lookup(keys=3900, queries=1).block == 10
    assert lookup(keys=4100, queries=1).block == 20
    assert lookup(keys=1000, queries=9).block == 30
    assert lookup(keys=0, queries=1).block == 10


@pytest.mark.parametrize("other", [{"device": "A"}, {"dtype": "int8"}, {"head_dim": 64}])
def test_another_device_dtype_or_head_dim_is_the_default(table, other):
    table([entry(10), entry(20, kernel="another")])
    assert lookup(keys=1000, queries=1).block == 10
    assert lookup(keys=1000, queries=1, **other) == Config()


def test_an_entry_that_does_not_fit_the_config_names_the_file(table):
    table([dataclasses.replace(entry(10), config={"blok": 10})])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tuning.FILE))}: Config has no blok, .* block, stage"
    ):
        lookup(keys=1000, queries=1)


@pytest.mark.parametrize("text", ["", "{}x", '[{"device": "H"}]', '[{"devise": "H"}]', "[1]"])
def test_a_broken_table_names_the_file(table, text):
    tuning.FILE.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tuning.FILE))} is not a list of tuning entries"):
        lookup(keys=1000, queries=1)


def test_records_in_place_of_the_same_shape(table):
    table([entry(10), entry(20, keys=16000)])
    tuning.record(entry(11))
    tuning.record(entry(30, device="A"))
    assert sorted(e.config["block"] for e in tuning.entries(tuning.FILE)) == [11, 20, 30]
    assert lookup(keys=1000, queries=1).block == 11


def test_the_shape_of_a_call():
    kv = jax.ShapeDtypeStruct((2, 3, 40, 64), "int8")
    scale = jax.ShapeDtypeStruct((2, 3, 40), "float32")
    q = jax.ShapeDtypeStruct((2, 5, 12, 64), "bfloat16")
    assert tuning.shape_of(Arguments(q, kv, kv, None, None, 1.0, False, scale, scale)) == {
        "dtype": "int8",
        "head_dim": 64,
        "rows": 2,
        "queries": 5,
        "keys": 40,
        "heads": 12,
        "kv_heads": 3,
    }


def test_every_shipped_entry_builds_its_config():
    for shipped in tuning.entries(tuning.FILE):
        module, name = CONFIGS[shipped.kernel]
        config = getattr(pytest.importorskip(module, exc_type=ImportError), name)
        assert dataclasses.asdict(config(**shipped.config)) == dict(shipped.config), shipped
        assert {"dtype", "head_dim"} <= shipped.shape.keys()
        assert shipped.microseconds
