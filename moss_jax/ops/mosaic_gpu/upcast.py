"""temporary"""

import jax.experimental.pallas.mosaic_gpu as plgpu

NARROW = plgpu.Layout.WGMMA_UPCAST_2X


def shuffle(x):
    return x.reshape(*x.shape[:-1], -1, 2, 2, 2, 2).swapaxes(-4, -2).reshape(x.shape)
