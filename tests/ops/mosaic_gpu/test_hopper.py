"""Where kernels for Hopper GPUs say that they run, and that all of them ask."""

from unittest import mock

import jax
import pytest
from moss_jax.ops.fused_linear import mosaic_gpu as fused_linear
from moss_jax.ops.gelu import mosaic_gpu as gelu
from moss_jax.ops.norm_linear import mosaic_gpu as norm_linear

from moss_jax.ops.attention import mosaic_gpu as attention
from moss_jax.ops.linear import mosaic_gpu as linear
from moss_jax.ops.mosaic_gpu import hopper
from moss_jax.ops.norm import mosaic_gpu as norm
from moss_jax.ops.post_attention import mosaic_gpu as post_attention


@pytest.fixture
def capability(request):
    with mock.patch.object(hopper, "compute_capability", return_value=request.param):
        yield request.param


@pytest.mark.parametrize("capability", ["9.0", None], indirect=True)
def test_on_hopper_and_where_one_is_compiled_for(capability):
    del capability
    assert hopper.unsupported("gpu") is None


@pytest.mark.parametrize("capability", ["10.0"], indirect=True)
def test_not_on_another_gpu(capability):
    assert "9.0), and this is 10.0" in hopper.unsupported("gpu")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_not_on_another_platform(platform):
    assert hopper.unsupported(platform) == f"it needs an NVIDIA GPU, and this is {platform}"


@pytest.mark.parametrize("capability", ["9.0"], indirect=True)
def test_on_a_mesh_only_what_is_spread_by_hand(capability):
    del capability
    mesh = jax.sharding.AbstractMesh((2,), ("model",))
    with jax.sharding.use_abstract_mesh(mesh):
        assert hopper.unsupported("gpu") == "the compiler cannot spread it over a mesh"
        assert hopper.unsupported("gpu", whole=False) is None
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("model",))):
        assert hopper.unsupported("gpu") is None


@pytest.mark.parametrize("kernel", [post_attention, attention, fused_linear, gelu, linear, norm, norm_linear])
def test_every_kernel_asks(kernel):
    with mock.patch.object(hopper, "unsupported", return_value="not here") as asked:
        assert kernel.unsupported(None, "gpu") == "not here"
    # Attention alone is spread over a mesh by hand.
    assert asked.call_args == mock.call("gpu", **({"whole": False} if kernel is attention else {}))
