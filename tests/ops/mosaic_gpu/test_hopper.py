"""Where kernels for Hopper GPUs run, and that all of them ask."""

from unittest import mock

import jax
import pytest

from moss_jax.ops.attention import mosaic_gpu as attention
from moss_jax.ops.keep_rows import mosaic_gpu as keep_rows
from moss_jax.ops.linear.mosaic_gpu import (
    bias_gelu,
    matmul_epilogue,
    norm_matmul,
    weight_only,
    weight_only_gemm,
)
from moss_jax.ops.mosaic_gpu import hopper
from moss_jax.ops.norm import mosaic_gpu as norm
from moss_jax.ops.post_attention import mosaic_gpu as post_attention

# Under `shard_map` on a mesh; the others need their arrays whole.
PARTITIONED = [attention.unsupported, attention.unsupported_self_attention]
WHOLE = [attention.unsupported_append] + [
    module.unsupported
    for module in (
        keep_rows,
        post_attention,
        weight_only,
        weight_only_gemm,
        matmul_epilogue,
        norm_matmul,
        bias_gelu,
        norm,
    )
]


def gpu(capability):
    """A machine with a GPU of this compute capability; None for one without."""
    return mock.patch.object(hopper, "compute_capability", return_value=capability)


def mesh(devices):
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("model",)))


@pytest.mark.parametrize(
    ("capability", "platform", "reason"),
    [
        ("9.0", "gpu", None),
        (None, "gpu", None),  # It may compile for one.
        ("10.0", "gpu", "it is written for Hopper (compute capability 9.0), and this is 10.0"),
        (None, "cpu", "it needs an NVIDIA GPU, and this is cpu"),
    ],
)
def test_on_hopper_and_where_one_is_compiled_for(capability, platform, reason):
    with gpu(capability):
        assert hopper.unsupported(platform) == reason


@pytest.mark.parametrize(("devices", "reason"), [(2, "the compiler cannot spread it over a mesh"), (1, None)])
def test_on_a_mesh_only_what_does_not_need_its_arrays_whole(devices, reason):
    with gpu("9.0"), mesh(devices):
        assert hopper.unsupported("gpu") == reason
        assert hopper.unsupported("gpu", whole=False) is None


def name(unsupported):
    return f"{unsupported.__module__.removeprefix('moss_jax.ops.')}.{unsupported.__name__}"


@pytest.mark.parametrize("unsupported", [*WHOLE, *PARTITIONED], ids=name)
def test_every_kernel_asks(unsupported):
    """Before it looks at the arguments, of which there are none here."""
    with gpu("10.0"):
        for platform in ("cpu", "gpu"):
            assert unsupported(None, platform) == hopper.unsupported(platform) is not None
    with gpu("9.0"), mesh(2):
        if unsupported in WHOLE:
            assert unsupported(None, "gpu") == hopper.unsupported("gpu") is not None
        else:
            with pytest.raises(AttributeError):  # It goes on to the arguments.
                unsupported(None, "gpu")
