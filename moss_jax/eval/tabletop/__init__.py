"""Evaluation on the tabletop world: live answers, alerts, silence, revisions, and narration."""

from moss_jax.eval.tabletop.evaluation import EvaluationConfig, evaluate, ideal_dialogue

__all__ = ["EvaluationConfig", "evaluate", "ideal_dialogue"]
