"""The optimizer: AdamW behind clipping, with a linear warm-up and a cosine decay."""

import optax

from moss_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each of `steps` steps, counted from 0.

    It rises from 0 to its peak in equal parts, the first of which the first step already has; from there a
    cosine takes it to its final share.
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
    """The optimizer of a run, for parameters as a dict from their names."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(params: dict) -> dict[str, bool]:
    """Which parameters weight decay applies to: the matrices, whatever the number of their axes.

    Not by that number: the bias of a fused map has several axes too.
    """
    return {name: name.endswith("kernel") for name in params}
