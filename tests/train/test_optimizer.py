"""The learning-rate schedule, weight decay and gradient clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.config import CompressorConfig, OptimizerConfig
from moss_jax.nn import MossVideo
from moss_jax.train.optimizer import decays, learning_rate, make_optimizer


def test_learning_rate():
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_share=0.1, final_share=0.25), 40)
    rates = np.array([schedule(step) for step in range(41)])
    # The first step has a positive rate.
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert (np.diff(rates[4:]) < 0).all()
    # Half-way down the cosine, and after the last step.
    assert rates[4 + 18] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[40] == pytest.approx(0.5)


@pytest.mark.parametrize(("share", "steps"), [(0.0, 1), (1.0, 1), (0.1, 1), (1.0, 5), (0.0, 5)])
def test_every_step_has_a_positive_rate(share, steps):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_share=share), steps)
    assert all(0 < schedule(step) <= 1 for step in range(steps))


def test_only_matrices_decay(small_config):
    """Biases of several axes, norms, gates and embeddings do not."""
    config = small_config(compressor=CompressorConfig(mode="channelFusion", stride=2))
    params = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: MossVideo(config, rngs=nnx.Rngs(0)))))
    shapes = {"/".join(map(str, path)): variable.shape for path, variable in params}
    mask = decays(shapes)
    assert set(mask) == set(shapes)
    kept = {name for name, decays in mask.items() if not decays}
    assert {name.split("/")[-1] for name in set(mask) - kept} == {"kernel"}
    assert all(len(shapes[name]) > 1 for name in set(mask) - kept)
    assert {"decoder/embedding", "decoder/norm/weight", "decoder/layers/0/mlp_gate", "projector/bias"} < kept
    assert {"vision/position_embedding", "vision/layers/0/mlp/fc1/bias"} < kept
    assert mask["decoder/lm_head/kernel"]
    assert mask["compressor/merger/kernel"]


def test_decay_is_scaled_by_the_learning_rate():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_share=0, weight_decay=0.1), steps=10)
    params = {"a/kernel": jnp.full((2, 2), 3.0), "a/bias": jnp.full((2, 2), 3.0)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], -0.5 * 0.1 * 3.0, rtol=1e-6)
    assert not updates["a/bias"].any()


def test_gradients_are_clipped_by_global_norm():
    """The first moments show the clipped gradient."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, b1=0.9), steps=10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    for gradient, expected in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        gradient = dict(zip("ab", map(jnp.atleast_1d, gradient), strict=True))
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        moments = state[1][0].mu
        np.testing.assert_allclose([float(moments[name][0]) / 0.1 for name in "ab"], expected, rtol=1e-5)


def test_first_moments_in_half_the_bytes():
    """They are rounded, to 8 bits of precision each step; the second moments are not."""
    params = {"a/kernel": jnp.full((2, 2), 3.0)}

    def run(dtype):
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=0.5, warmup_share=0, clip_norm=100, first_moment_dtype=dtype),
            steps=10,
        )
        state, total = optimizer.init(params), jnp.zeros((2, 2))
        for step in range(4):
            gradient = {"a/kernel": jnp.arange(4.0).reshape(2, 2) + step}
            updates, state = optimizer.update(gradient, state, params)
            total += updates["a/kernel"]
        adam = state[1][0]
        return total, adam.mu["a/kernel"].dtype, adam.nu["a/kernel"].dtype

    exact, *dtypes = run("float32")
    assert dtypes == [jnp.float32, jnp.float32]
    rounded, *dtypes = run("bfloat16")
    assert dtypes == [jnp.bfloat16, jnp.float32]
    # Four updates of a learning rate each, at most.
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=4 * 4 * 2.0**-8 * 0.5)
    assert (rounded != exact).any()
