"""Text of a token stream as it arrives."""

import codecs

from moss_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one reply into text, whole characters at a time.

    A character may be spread over several tokens, even with a control token between them. What has been
    pushed comes out as `Tokenizer.decode` would give it, and U+FFFD only where no further token could have
    completed a character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Takes a token and returns the text that it completes, which may be empty.

        Raises TokenizerError if the id is not in the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the run, drops a character that is still incomplete and returns the remaining text."""
        # Complete characters never wait, so an incomplete one is all that can be left.
        self._decoder.reset()
        return ""
