"""The device mesh, and the sharding rules from logical axes to mesh axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moss_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Other axes are replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp` and `tensor`.

    Raises:
      ValueError: the product of their sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, tensor)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"a mesh of {data} x {fsdp} x {tensor} needs {math.prod(shape)} devices, not {len(devices)}"
        )
    # Automatic axes: the compiler chooses the shardings of intermediate values.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def parse_mesh(axes: str) -> Mesh:
    """Returns the mesh that a text such as "tensor=2" describes, over the first devices.

    Raises:
      ConfigError: it describes none, or there are too few devices.
    """
    sizes: dict[str, int] = {}
    for part in axes.split(","):
        name, _, number = part.partition("=")
        sizes[name] = int(number) if number.isdecimal() else 0
    if not sizes.keys() <= set(MESH_AXES) or not all(sizes.values()):
        raise ConfigError(
            f"--mesh names axes ({', '.join(MESH_AXES)}) and devices, as tensor=2, not {axes!r}"
        )
    devices, needed = jax.devices(), math.prod(sizes.values())
    if needed > len(devices):
        raise ConfigError(f"--mesh {axes} needs {needed} devices; there are {len(devices)}")
    return make_mesh(**sizes, devices=devices[:needed])


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of this process's share of a batch's rows, and the number of shares.

    Processes whose devices differ only in their position along `tensor` load the same share.

    Raises:
      ConfigError: the rows of two processes overlap only partly.
    """
    rows = NamedSharding(mesh, PartitionSpec(RULES["batch"])).devices_indices_map((mesh.size,))
    starts: dict[int, set[int]] = {}
    for device, (part,) in rows.items():
        starts.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({tuple(sorted(own)) for own in starts.values()})
    if sum(map(len, shares)) > len(set().union(*shares)):
        raise ConfigError(
            f"mesh.tensor = {mesh.shape['tensor']} must divide the number of devices of a process, or be a "
            "multiple of it"
        )
    return shares.index(tuple(sorted(starts[jax.process_index()]))), len(shares)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns the sharding of an array with these logical axes.

    Axes whose size the mesh doesn't divide evenly are replicated, and each mesh axis is used at most once.
    """
    taken: set[str] = set()
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        places = tuple(a for a in RULES.get(axis or "", ()) if a not in taken)
        if not places or size % math.prod(mesh.shape[a] for a in places):
            spec.append(None)
            continue
        taken.update(places)
        spec.append(places)
    return PartitionSpec(*spec)


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns `partition_spec` on a mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def pinned(x: jax.Array) -> np.ndarray:
    """Copies an array to pinned host memory.

    While an array is transferred from a GPU to pageable memory, launches by other threads wait.
    """
    return np.asarray(jax.device_put(x, x.sharding.with_memory_kind("pinned_host")))


def gather(x: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """Inside `shard_map`, gathers an array from its shards; the gradient is reduced and scattered."""
    for dimension, places in enumerate(spec):
        for axis in _names(places):
            if mesh.shape[axis] > 1:
                x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x


def sum_replicas(x: jax.Array, spec: PartitionSpec, axes: Sequence[str]) -> jax.Array:
    """Inside `shard_map`, sums the shards over those of the mesh axes that do not shard the array."""
    taken = {axis for places in spec for axis in _names(places)}
    return jax.lax.psum(x, tuple(axis for axis in axes if axis not in taken))


def _names(places) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (places,) if isinstance(places, str) else tuple(places or ())


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of an array with these logical axes on the current mesh, if there is one.

    Inside `shard_map` over the whole mesh it changes nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
