"""Text: tokenizer, streaming detokenizer, and the chat template."""

from moss_jax.text.chat import SYSTEM_PROMPT, header, interjection, offline_opening, opening
from moss_jax.text.detokenizer import Detokenizer
from moss_jax.text.tokenizer import SpecialTokens, Tokenizer, TokenizerError

__all__ = [
    "SYSTEM_PROMPT",
    "Detokenizer",
    "SpecialTokens",
    "Tokenizer",
    "TokenizerError",
    "header",
    "interjection",
    "offline_opening",
    "opening",
]
