"""Shared by the benchmarks of whole models: random frames, and a tokenizer for random weights."""

import itertools
import json

import numpy as np
from jaxtyping import UInt8

from moss_jax.text import Tokenizer

FRAME = (1080, 1920, 3)


def random_frames(count: int, shape: tuple[int, int, int] = FRAME) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Frames of noise."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def padded_tokenizer(vocab_size: int) -> Tokenizer:
    """moss_tiny's tokenizer, its vocabulary padded with tokens that never occur in text."""
    tiny = Tokenizer.moss_tiny()
    if tiny.vocab_size == vocab_size:
        return tiny
    data = json.loads(tiny.content)
    vocab = data["model"]["vocab"]
    control = [token for token in data["added_tokens"] if token["content"] != "<|image|>"]
    unused = map("".join, itertools.product(map(chr, range(0x21, 0x7F)), repeat=3))
    while len(vocab) < vocab_size - len(control):
        vocab.setdefault(next(unused), len(vocab))
    for i, token in enumerate(control):
        token["id"] = vocab_size - len(control) + i
    (image,) = (token for token in data["added_tokens"] if token["content"] == "<|image|>")
    image["id"] = vocab_size
    return Tokenizer(json.dumps(data).encode())
