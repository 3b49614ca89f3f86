"""Evaluation of memory: accuracy by the age of the evidence, under each memory policy."""

from moss_jax.eval.memory.evaluation import MemoryEvaluationConfig, evaluate

__all__ = ["MemoryEvaluationConfig", "evaluate"]
