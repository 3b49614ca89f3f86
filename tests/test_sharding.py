"""Sharding rules from logical axes to mesh axes."""

from typing import NamedTuple

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax import sharding
from moss_jax.config import ConfigError
from moss_jax.sharding import MESH_AXES, RULES, constrain, make_mesh, named_sharding, partition_spec

MESH = AbstractMesh((2, 4, 2), MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (16, 8), P("fsdp", "tensor")),
        (("mlp", "embed"), (8, 16), P("tensor", "fsdp")),
        (("embed", "kv_heads", "group_and_kv", "head_dim"), (16, 2, 6, 4), P("fsdp", "tensor", None, None)),
        (("heads", "head_dim", "embed"), (4, 8, 16), P("tensor", None, "fsdp")),
        (("embed", "vocab"), (16, 10), P("fsdp", "tensor")),
        (("batch", None), (16, 3), P(("data", "fsdp"), None)),
        ((None,), (5,), P(None)),
        ((), (), P()),
    ],
)
def test_specs(axes, shape, expected):
    assert partition_spec(axes, shape, MESH) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (6, 8), P(None, "tensor")),
        (("embed", "mlp"), (16, 7), P("fsdp", None)),
        # Data x fsdp are 8 devices; an axis of 4 is replicated, not sharded over a part of them.
        (("batch",), (4,), P(None)),
    ],
)
def test_indivisible_axes_are_replicated(axes, shape, expected):
    assert partition_spec(axes, shape, MESH) == expected


def test_a_mesh_axis_is_used_once():
    assert partition_spec(("embed", "embed"), (16, 16), MESH) == P("fsdp", None)
    assert partition_spec(("heads", "mlp"), (4, 4), MESH) == P("tensor", None)
    assert partition_spec(("batch", "embed"), (16, 16), MESH) == P(("data", "fsdp"), None)
    # The first axis that it divides gets it.
    assert partition_spec(("heads", "mlp"), (3, 4), MESH) == P(None, "tensor")


def test_axes_and_shape_must_agree():
    with pytest.raises(ValueError, match="longer than argument"):
        partition_spec(("embed",), (16, 8), MESH)


def test_rules_name_axes_of_the_mesh():
    assert {axis for places in RULES.values() for axis in places} <= set(MESH_AXES)


def test_a_mesh_of_one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    # With explicit axes, operations on sharded arrays would have to name the sharding of their results.
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert named_sharding(("embed",), (4,), mesh) == NamedSharding(mesh, P("fsdp"))


def test_a_mesh_needs_its_number_of_devices():
    with pytest.raises(ValueError, match=r"a mesh of 2 x 3 x 1 needs 6 devices, not 5"):
        make_mesh(data=2, fsdp=3, devices=[None] * 5)


def test_constrain_uses_the_current_mesh():
    x = jax.numpy.ones((4, 8))
    assert constrain(x, ("embed", "mlp")) is x
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert constrain(2 * x, ("embed", "mlp")).sharding == NamedSharding(mesh, P("fsdp", "tensor"))


class Device(NamedTuple):
    id: int
    process_index: int


@pytest.mark.parametrize(
    ("data", "tensor", "local", "shares"),
    [
        (4, 1, 2, [(0, 2), (1, 2)]),  # Two hosts of two devices.
        (2, 2, 2, [(0, 2), (1, 2)]),
        (1, 4, 2, [(0, 1), (0, 1)]),  # A row needs both hosts.
        (2, 2, 1, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # One process for each device.
    ],
)
def test_row_shares(monkeypatch, data, tensor, local, shares):
    mesh = processes(monkeypatch, data, tensor, local)
    found = []
    for process in range(len(shares)):
        monkeypatch.setattr(sharding.jax, "process_index", lambda process=process: process)
        found.append(sharding.row_share(mesh))
    assert found == shares


def test_rows_that_overlap_are_refused(monkeypatch):
    mesh = processes(monkeypatch, 3, 2, 3)
    with pytest.raises(ConfigError, match=r"mesh.tensor = 2 must divide the number of devices of a process"):
        sharding.row_share(mesh)


def processes(monkeypatch, data: int, tensor: int, local: int) -> AbstractMesh:
    """A mesh whose devices belong to processes with `local` devices each."""
    ids = range(data * tensor)
    rows = {Device(i, i // local): (slice(i // tensor, i // tensor + 1),) for i in ids}
    monkeypatch.setattr(sharding.NamedSharding, "devices_indices_map", lambda self, shape: rows)
    return AbstractMesh((data, 1, tensor), MESH_AXES)
