"""Where kernels for Hopper GPUs say that they run, and that all of them ask."""

from unittest import mock

import jax
import pytest

from moss_jax.ops.attention import mosaic_gpu as attention
from moss_jax.ops.linear.mosaic_gpu import bias_gelu, matmul_epilogue, norm_matmul, weight_only
from moss_jax.ops.mosaic_gpu import hopper
from moss_jax.ops.norm import mosaic_gpu as norm
from moss_jax.ops.post_attention import mosaic_gpu as post_attention


@pytest.mark.parametrize(
    ("capability", "platform", "reason"),
    [
        ("9.0", "gpu", None),
        (None, "gpu", None),  # One is compiled for.
        ("10.0", "gpu", "it is written for Hopper (compute capability 9.0), and this is 10.0"),
        (None, "cpu", "it needs an NVIDIA GPU, and this is cpu"),
    ],
)
def test_on_hopper_and_where_one_is_compiled_for(capability, platform, reason):
    with mock.patch.object(hopper, "compute_capability", return_value=capability):
        assert hopper.unsupported(platform) == reason


def test_on_a_mesh_only_what_is_spread_by_hand():
    for devices, reason in ((2, "the compiler cannot spread it over a mesh"), (1, None)):
        mesh = jax.sharding.AbstractMesh((devices,), ("model",))
        with (
            jax.sharding.use_abstract_mesh(mesh),
            mock.patch.object(hopper, "compute_capability", return_value="9.0"),
        ):
            assert hopper.unsupported("gpu") == reason
            assert hopper.unsupported("gpu", whole=False) is None


@pytest.mark.parametrize(
    "kernel", [post_attention, attention, weight_only, matmul_epilogue, norm_matmul, bias_gelu, norm], ids=str
)
def test_every_kernel_asks(kernel):
    with mock.patch.object(hopper, "unsupported", return_value="not here") as asked:
        assert kernel.unsupported(None, "gpu") == "not here"
    # Attention alone is spread over a mesh by hand.
    assert asked.call_args == mock.call("gpu", **({"whole": False} if kernel is attention else {}))
