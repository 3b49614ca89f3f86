"""The autotuning table: lookup, malformed files, the entries that are shipped."""

import dataclasses
import json
import re

import jax
import pytest

from moss_jax.ops.attention import Arguments, tuning
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig, StaircaseConfig
from moss_jax.ops.qarray import QArray

CONFIGS = {"mosaic_gpu.decode": DecodeConfig, "mosaic_gpu.staircase": StaircaseConfig}


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 1
    stages: int = 2


def entry(block, *, device="H", kernel="k", dtype="bfloat16", head_dim=128, keys=1000, queries=1):
    shape = {"dtype": dtype, "head_dim": head_dim, "keys": keys, "queries": queries}
    return tuning.Entry(device, kernel, shape, {"block": block}, {"forward": 1.5})


@pytest.fixture
def file(tmp_path):
    """A path for a table, which nothing has read before."""
    tuning.entries.cache_clear()
    return tmp_path / "tuning.json"


def write(file, *entries):
    file.write_text(json.dumps([dataclasses.asdict(e) for e in entries]), encoding="utf-8")


def lookup(file, device="H", dtype="bfloat16", head_dim=128, keys=1000, queries=1):
    shape = {"dtype": dtype, "head_dim": head_dim, "keys": keys, "queries": queries}
    return tuning.lookup("k", Config(), device, file=file, **shape)


def test_the_nearest_shape_by_ratio(file):
    write(file, entry(10, keys=1000), entry(20, keys=16000), entry(30, keys=1000, queries=64))
    assert lookup(file, keys=1000) == Config(block=10, stages=2)
    assert lookup(file, keys=3900).block == 10
    assert lookup(file, keys=4100).block == 20
    assert lookup(file, queries=9).block == 30
    assert lookup(file, keys=0).block == 10


@pytest.mark.parametrize("other", [{"device": "A"}, {"dtype": "int8"}, {"head_dim": 64}])
def test_another_device_dtype_or_head_dim_is_the_default(file, other):
    write(file, entry(10), entry(20, kernel="another"))
    assert lookup(file).block == 10
    assert lookup(file, **other) == Config()


def test_an_entry_that_does_not_fit_the_config_names_the_file(file):
    write(file, dataclasses.replace(entry(10), config={"blok": 10}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: Config has no blok, .* block, stage"):
        lookup(file)


@pytest.mark.parametrize("text", ["", '[{"device": "H"}]', '[{"devise": "H"}]', "[1]"])
def test_a_broken_table_names_the_file(file, text):
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is not a list of tuning entries"):
        lookup(file)


def test_records_in_place_of_the_same_shape(file):
    write(file, entry(10), entry(20, keys=16000))
    tuning.record(entry(11), file=file)
    tuning.record(entry(30, device="A"), file=file)
    assert sorted(e.config["block"] for e in tuning.entries(file)) == [11, 20, 30]
    assert lookup(file).block == 11


def test_the_shape_of_a_call():
    values = jax.ShapeDtypeStruct((2, 3, 40, 64), "int8")
    kv = QArray(values, jax.ShapeDtypeStruct((2, 3, 40), "float32"))
    q = jax.ShapeDtypeStruct((2, 5, 12, 64), "bfloat16")
    assert tuning.shape_of(Arguments(q, kv, kv, None, None, 1.0)) == {
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
        config = CONFIGS[shipped.kernel](**shipped.config)
        assert dataclasses.asdict(config) == dict(shipped.config), shipped
        assert {"dtype", "head_dim"} <= shipped.shape.keys()
        assert shipped.microseconds
