"""Model FLOPs against XLA's own count, and peak FLOPS."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moss_jax.config import MODEL_PARTS, CompressorConfig, moss_tiny, moss_video_11b
from moss_jax.nn import MossVideo
from moss_jax.train.flops import forward_work, peak_flops, train_flops

TOKENS, FRAMES = 96, 3


@pytest.fixture(scope="module")
def config():
    """`moss_tiny` with fewer layers, one of them before the first cross-attention layer."""
    tiny = moss_tiny()
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(tiny.vision, num_layers=2, num_global_layers=1, intermediate_layers=(1,)),
        compressor=CompressorConfig(mode="channelFusion", stride=2),
        decoder=dataclasses.replace(tiny.decoder, num_layers=3, cross_attention_layers=(1,)),
    )


@pytest.fixture(scope="module")
def counted(config):
    """`counted(trained)` is XLA's count for the gradient of these parts; without any, of the forward pass."""
    graph, params = nnx.split(nnx.eval_shape(lambda: MossVideo(config, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(params)
    size = config.vision.image_size
    arguments = [
        jax.ShapeDtypeStruct((1, TOKENS), jnp.int32),
        jax.ShapeDtypeStruct((1, FRAMES, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, FRAMES), jnp.int32),
    ]

    def count(trained):
        def split(inside):
            return {path: variable for path, variable in flat if (path[0] in trained) == inside}

        def loss(learned, others, *arguments):
            variables = {path: variable.replace((learned | others)[path]) for path, variable in flat}
            return nnx.merge(graph, nnx.from_flat_state(list(variables.items())))(*arguments).sum()

        shapes = [
            {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in split(inside).items()}
            for inside in (True, False)
        ]
        function = jax.grad(loss) if trained else loss
        return jax.jit(function).lower(*shapes, *arguments).cost_analysis()["flops"]

    return count


def test_forward(config, counted):
    work = forward_work(config, tokens=TOKENS, frames=FRAMES)
    assert [part for part, *_ in work] == ["decoder", *MODEL_PARTS]
    assert all(matmul > 0 for _, matmul, _ in work)
    assert sum(matmul + attention for _, matmul, attention in work) == pytest.approx(counted(()), rel=0.1)


@pytest.mark.parametrize("trained", [MODEL_PARTS, ("decoder",), ("projector",), ("compressor", "decoder")])
def test_training(config, counted, trained):
    flops = train_flops(config, batch=1, tokens=TOKENS, frames=FRAMES, trained=trained)
    assert flops == pytest.approx(counted(trained), rel=0.1)
    assert train_flops(config, batch=6, tokens=TOKENS, frames=FRAMES, trained=trained) == 6 * flops


def test_pooling_without_parameters_has_no_backward_pass():
    """Nothing is trained before the projector, so no gradient propagates there."""
    config, size = moss_tiny(), {"batch": 1, "tokens": TOKENS, "frames": FRAMES}
    without = train_flops(config, trained=("projector",), **size)
    assert train_flops(config, trained=("compressor", "projector"), **size) == without


def test_of_the_11b():
    """A token takes two FLOPs per parameter, a frame some 3.06 TFLOP in the vision encoder."""
    before, vision, _, _, after = forward_work(moss_video_11b(), tokens=1000, frames=1)
    assert (before.matmul + after.matmul) / 1000 == pytest.approx(2 * 9.25e9, rel=0.01)
    assert vision.matmul + vision.attention == pytest.approx(3.06e12, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak
