"""Availability of Pallas kernels for NVIDIA's Hopper GPUs (Mosaic GPU)."""

import jax


def unsupported(platform: str, *, whole: bool = True) -> str | None:
    """Why such a kernel cannot run here; None if it can.

    Args:
      whole: whether it needs unsharded arrays: the compiler cannot partition it over the current mesh.
    """
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is {platform}"
    if (capability := compute_capability()) not in (None, "9.0"):
        return f"it is written for Hopper (compute capability 9.0), and this is {capability}"
    mesh = jax.sharding.get_abstract_mesh()
    if whole and mesh.size > 1 and not mesh.are_all_axes_manual:
        return "the compiler cannot spread it over a mesh"
    return None


def compute_capability() -> str | None:
    """Compute capability of the GPU that kernels run on, such as "9.0".

    None on a machine without a GPU, which may still compile for one.
    """
    return getattr(jax.devices()[0], "compute_capability", None)
