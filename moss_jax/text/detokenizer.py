"""Streaming detokenizer."""

import codecs

from moss_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes the tokens of one reply incrementally, in whole characters.

    A character may span several tokens, even with control tokens between them. The concatenated output equals
    `Tokenizer.decode` of all tokens, except for an incomplete character at the end; U+FFFD is emitted only
    where no further token could complete a character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that it completes, which may be empty.

        Raises:
          TokenizerError: the id is not in the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Resets the decoder, dropping an incomplete character, and returns the remaining text: always ""."""
        # Complete characters are emitted immediately, so only an incomplete one can be left.
        self._decoder.reset()
        return ""

    @property
    def incomplete(self) -> bytes:
        """Bytes of a character that is not complete yet; setting it replaces them."""
        return self._decoder.getstate()[0]

    @incomplete.setter
    def incomplete(self, rest: bytes) -> None:
        self._decoder.reset()
        self._decoder.decode(rest)
