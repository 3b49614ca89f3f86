"""Placement of an engine's arrays: on one device, or on a mesh by the axes of `sharding.RULES`.

B slots, K kv heads, D head
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from moss_jax.sharding import named_sharding


def placement_of(parameters: Sequence[jax.Array]) -> SingleDeviceSharding | NamedSharding:
    """The device of these parameters or, if they are on a mesh, a replicated sharding over it."""
    sharding = parameters[0].sharding
    if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
        return NamedSharding(sharding.mesh, PartitionSpec())
    (device,) = parameters[0].devices()
    return SingleDeviceSharding(device)


def mesh_of(placement: Sharding) -> Mesh | None:
    """The mesh of a placement; None if it is one device."""
    mesh = placement.mesh if isinstance(placement, NamedSharding) else None
    assert not isinstance(mesh, jax.sharding.AbstractMesh)
    return mesh


def place(parameters: Sequence[jax.Array], placement: Sharding) -> Sequence[jax.Array]:
    """Moves parameters to a device; on a mesh they keep their sharding."""
    return parameters if mesh_of(placement) else jax.device_put(parameters, placement)


def traced_on[**Arguments, Result](
    placement: Sharding, function: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """Wraps a function for jit so that it is traced under the placement's mesh; callers need not set it."""
    mesh = mesh_of(placement)
    if not mesh:
        return function

    def on_mesh(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh


def abstract(tree, placement: Sharding):
    """Abstract arrays of the same shapes and dtypes with one placement, for lowering programs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree)


def state_sharding(x: jax.Array | np.ndarray, placement: Sharding) -> Sharding:
    """Sharding of a state array [B, ...]: by slot, and by head for keys, values and their scales.

    Those are the only ones of three or more axes: [B, K, rows, D] and [B, K, rows].
    """
    axes = ("batch", "kv_heads" if x.ndim > 2 else None, None, None)[: x.ndim]
    mesh = mesh_of(placement)
    return named_sharding(axes, x.shape, mesh) if mesh else placement
