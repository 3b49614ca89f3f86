"""The engines that these tests run on."""

from engines import frames, make_engine, model, scripted, tokenizer

__all__ = ["frames", "make_engine", "model", "scripted", "tokenizer"]
