"""Pallas kernels on the CPU, by JAX's interpreters."""

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

from moss_jax.ops.attention import mosaic_tpu
from moss_jax.ops.attention.mosaic_gpu import dense
from moss_jax.ops.keep_rows import mosaic_gpu as keep_rows
from moss_jax.ops.linear.mosaic_gpu import bias_gelu, norm_matmul, weight_only_gemm
from moss_jax.ops.merge_rows import mosaic_gpu as merge_rows
from moss_jax.ops.mosaic_gpu import hopper, skinny_matmul, tiles, upcast
from moss_jax.ops.post_attention import mosaic_gpu as post_attention

# An interpreter calls back for every access to memory, with many small numbers. JAX puts each of them on a
# device first, which takes longer than all else; here they stay NumPy's. Not only inside the contexts below:
# what was traced in one runs later too.
callback.api = types.SimpleNamespace(device_put=lambda arrays, device: [np.array(x) for x in arrays])
shared_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)


def lowering_for(platform: str):
    """Ops choose what they would there, so that programs can be lowered for it without its devices."""
    return mock.patch.object(jax, "default_backend", return_value=platform)


@contextlib.contextmanager
def on_gpu():
    """Mosaic GPU kernels: copies, barriers, warpgroups and shared memory are simulated.

    The interpreter has no wgmma with operands in registers, no inline instructions, no layouts over pieces of
    a head, and no copies to all blocks of a cluster; these are replaced by equivalents. Each block of a
    cluster copies for itself.
    """
    copy, parts = plgpu.copy_gmem_to_smem, dense._parts

    def dot(a, b):
        return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")

    def product(a, b, overlapped=lambda: None):
        overlapped()
        return dot(a, b)

    def products(*pairs):
        return tuple(product(*pair) for pair in pairs)

    def add_product(acc, a, b, overlapped=lambda: None):
        return acc + product(a, b, overlapped)

    def dense_product(a, b, overlapped):
        overlapped()
        return sum(map(dot, a, b))

    def dense_add_products(accs, a, b):
        return tuple(acc + dot(a, x) for acc, x in zip(accs, b, strict=True))

    def dense_products(first, second, between, overlapped, consume, vectors):
        between()
        return dense_add_products(*second), consume(dense_product(*first, overlapped))

    def dense_parts(head_dim, dtype, wide=True):
        """Without zeros from beyond the head, which the interpreter does not copy."""
        return [(0, head_dim)] if dtype.itemsize == 1 else parts(head_dim, dtype, wide)

    def upcast_to(dtype):
        return lambda ref: upcast.permute_columns(ref[...].astype(dtype))

    def add_products(acc, weights_smem, x_smem, previous_done, weights_read):
        """The interpreter multiplies what wgmma refuses: two dtypes."""

        class Wide(type(weights_smem)):
            dtype = x_smem.dtype

        plgpu.wgmma(acc, Wide(weights_smem.ref, weights_smem.transforms), x_smem.transpose((1, 0)))
        weights_read()
        previous_done()

    def multiply(sums, weights, x_ref, start, layout, apart=0):
        warps = weights.astype(jnp.float32).reshape(4, 16, -1)
        if layout is skinny_matmul.INTERLEAVED:
            warps = weights.astype(jnp.float32).reshape(16, 4, -1).swapaxes(0, 1)
        x = jnp.stack([x_ref[:, pl.ds(start + warp * apart, weights.shape[1])] for warp in range(4)])
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, sums.shape[1] - x.shape[1]), (0, 0)), mode="edge")
        return sums + jnp.einsum("wox,wmx->wom", warps, x, precision="highest").reshape(sums.shape)

    def gather(rows, at, layout):
        del layout
        return rows[...][at]

    with (
        mock.patch.object(hopper, "unsupported", return_value=None),
        mock.patch.multiple(tiles, product=product, products=products, add_product=add_product),
        mock.patch.multiple(
            dense,
            product=dense_product,
            products=dense_products,
            add_products=dense_add_products,
            any_thread=jnp.max,
            _parts=dense_parts,
            _buffer=lambda shape, part, head_dim, dtype: plgpu.SMEM((*shape, part[1]), dtype),
        ),
        mock.patch.multiple(upcast, to_float16=upcast_to(jnp.float16), to_bfloat16=upcast_to(jnp.bfloat16)),
        mock.patch.object(skinny_matmul, "multiply", multiply),
        mock.patch.object(weight_only_gemm, "add_products", add_products),
        mock.patch.object(bias_gelu, "upcast", lambda x: x.astype(jnp.float32)),
        mock.patch.multiple(norm_matmul, scaled_factor=scaled_factor, finish=finish),
        mock.patch.multiple(
            post_attention,
            arrive=arrive,
            prefetch=lambda ref: None,
            grid_barrier=lambda counters, blocks: None,
        ),
        mock.patch.object(keep_rows, "gather", gather),
        mock.patch.object(merge_rows, "gather_rows", gather),
        mock.patch.object(plgpu, "copy_gmem_to_smem", lambda *refs, collective_axes=None: copy(*refs)),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
    ):
        yield


def scaled_factor(factor, scale_ref, cols):
    """That of `norm_matmul`."""
    spread = jnp.repeat(scale_ref[...], cols)
    return factor * jnp.pad(spread, (0, factor.size - spread.size))


def finish(sums, sums_ref, factor, y_ref):
    """That of `norm_matmul`."""
    rows, cols = y_ref.shape[0], sums_ref.shape[1]
    sums_ref[...] = sums[:, :cols]
    total = sums_ref[...].reshape(4, 16, cols).sum(axis=0) * factor[: 16 * cols].reshape(16, cols)
    y_ref[...] = total.T[:rows].astype(y_ref.dtype)


def arrive(counters, counter, expected):
    """That of `post_attention`, thread by thread, for blocks of up to 8 units."""

    def one(thread, last):
        at, there = jnp.maximum(counter[thread], 0), counter[thread] >= 0
        old = counters[at]
        counters[at] = jnp.where(there, (old + 1) % expected, old)
        return last.at[thread].set(there & (old + 1 == expected))

    return jax.lax.fori_loop(0, 8, one, jnp.zeros(counter.shape, jnp.int32))


@contextlib.contextmanager
def on_tpu():
    """Mosaic TPU kernels; memory starts as NaN, and so does what is beyond an array."""
    params = pltpu.InterpretParams(out_of_bounds_reads="uninitialized")
    with (
        mock.patch.object(mosaic_tpu, "unsupported_platform", return_value=None),
        pltpu.force_tpu_interpret_mode(params),
    ):
        yield
