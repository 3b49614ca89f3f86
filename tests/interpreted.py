"""Pallas kernels on the CPU, by interpretation."""

import contextlib
import types
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental.pallas import tpu as pltpu

from moss_jax.ops.attention import mosaic_gpu, mosaic_tpu
from moss_jax.ops.mosaic_gpu import skinny_matmul, tiles, upcast

# An interpreter calls back for every access to memory, with many small numbers. JAX puts each of them on a
# device before, which takes longer than all else; here they stay numpy's. Not only while one of the contexts
# below is open: what was traced in it runs later too.
callback.api = types.SimpleNamespace(device_put=lambda arrays, device: [np.array(x) for x in arrays])
shared_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)


@contextlib.contextmanager
def on_gpu():
    """Mosaic GPU kernels: copies, barriers, warpgroups and shared memory are simulated.

    The interpreter has no tensor core that takes operands from registers, no inline instructions, and no
    copies to all blocks of a cluster, so these are replaced by what they mean; each block copies for itself.
    """
    copy = plgpu.copy_gmem_to_smem

    def product(a, b, meanwhile=lambda: None):
        meanwhile()
        return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")

    def products(*pairs):
        return tuple(product(*pair) for pair in pairs)

    def add_product(total, a, b, meanwhile=lambda: None):
        return total + product(a, b, meanwhile)

    def upcast_to(dtype):
        return lambda ref: upcast.permute_columns(ref[...].astype(dtype))

    def multiply(sums, weights, x_ref, start, layout, apart=0):
        warps = weights.astype(jnp.float32).reshape(4, 16, -1)
        if layout is skinny_matmul.INTERLEAVED:
            warps = weights.astype(jnp.float32).reshape(16, 4, -1).swapaxes(0, 1)
        x = jnp.stack([x_ref[:, pl.ds(start + warp * apart, weights.shape[1])] for warp in range(4)])
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, sums.shape[1] - x.shape[1]), (0, 0)), mode="edge")
        return sums + jnp.einsum("wox,wmx->wom", warps, x, precision="highest").reshape(sums.shape)

    with (
        mock.patch.multiple(tiles, product=product, products=products, add_product=add_product),
        mock.patch.multiple(upcast, to_float16=upcast_to(jnp.float16), to_bfloat16=upcast_to(jnp.bfloat16)),
        mock.patch.object(skinny_matmul, "multiply", multiply),
        mock.patch.object(plgpu, "copy_gmem_to_smem", lambda *refs, collective_axes=None: copy(*refs)),
        _as_if_on("gpu", mosaic_gpu),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
        yield


@contextlib.contextmanager
def kernel_on_gpu(module, **replaced):
    """The kernel of another op than attention.

    Args:
      replaced: functions of its module that the interpreter has no instructions for.
    """
    refuses = module.unsupported
    replaced["unsupported"] = lambda arguments, _: refuses(arguments, "gpu")
    with on_gpu(), mock.patch.multiple(module, **replaced):
        yield


@contextlib.contextmanager
def on_tpu():
    """Mosaic TPU kernels; memory starts as NaN, and what lies beyond an array is NaN too."""
    params = pltpu.InterpretParams(out_of_bounds_reads="uninitialized")
    with _as_if_on("tpu", mosaic_tpu), pltpu.force_tpu_interpret_mode(params):
        yield


def _as_if_on(platform: str, module):
    refuses = module.unsupported
    return mock.patch.object(module, "unsupported", lambda arguments, _: refuses(arguments, platform))
