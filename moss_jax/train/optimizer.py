"""The optimizer: AdamW with gradient clipping, linear warm-up and cosine decay."""

import jax.numpy as jnp
import optax

from moss_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule of `steps` steps, counted from 0.

    Linear warm-up to the peak, with a positive rate at the first step already, then cosine decay to the final
    share.
    """
    warmup = min(round(config.warmup_share * steps), steps - 1)
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak * config.final_share,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run, for a dict of parameters by name."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            mu_dtype=jnp.dtype(config.first_moment_dtype),
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(params: dict) -> dict[str, bool]:
    """Returns the weight-decay mask: matrices, found by name, since fused biases have several axes too."""
    return {name: name.endswith("kernel") for name in params}
