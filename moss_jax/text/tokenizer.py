"""Tokenizer: byte-level BPE with the special tokens of the stream."""

import dataclasses
import json
import os
import re
import string
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import tokenizers

from moss_jax.shipped import shipped

TOKENIZER_FILE = "tokenizer.json"

_MARKERS = {
    "begin_of_text": "<|begin_of_text|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
    "image": "<|image|>",
    "video": "<|video|>",
    "silence": "<|silence|>",
    "ellipsis": "<|...|>",
}

# In a Llama 3 tokenizer.json these have reserved names, which differ between its releases.
_LLAMA3_BEGIN_OF_TEXT = 128_000
_LLAMA3_RESERVED = {"silence": 128_011, "ellipsis": 128_012, "video": 128_255}


class TokenizerError(ValueError):
    """An invalid tokenizer, text or token id; the message says why."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens that the stream uses."""

    begin_of_text: int
    start_header: int
    end_header: int
    eot: int
    image: int
    video: int
    silence: int
    ellipsis: int

    def by_text(self) -> dict[str, int]:
        """Returns the ids by text, such as `<|silence|>`."""
        return {text: getattr(self, name) for name, text in _MARKERS.items()}


class Tokenizer:
    """Byte-level BPE with control tokens. Immutable, so threads may share it.

    Attributes:
      special: ids of the stream's special tokens.
      vocab_size: number of tokens that can be predicted; the id of `<|image|>`.
      content: the tokenizer.json that it was loaded from.
      control: ids of all special or added tokens, by text. Only silence and `<|eot_id|>` are ever sampled.
      control_ids: the same ids as a set.
    """

    content: bytes
    special: SpecialTokens
    vocab_size: int
    control: dict[str, int]
    control_ids: frozenset[int]

    def __init__(self, content: bytes, name: str = TOKENIZER_FILE):
        """Parses the content of a tokenizer.json.

        Args:
          content: content of the file.
          name: name of the file, for error messages.

        Raises:
          TokenizerError: it is not a byte-level BPE tokenizer, or lacks a special token.
        """
        try:
            data = json.loads(content)
            control = {token["content"]: token["id"] for token in data["added_tokens"]}
            # Without added tokens, the encoder cannot turn a user's text into a control token.
            plain = data | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
            vocab = data["model"]["vocab"]
        except Exception as error:  # The tokenizers library raises bare Exceptions.
            raise TokenizerError(f"{name} cannot be read as a tokenizer.json: {error!r}") from error
        if not isinstance(self._encoder.decoder, tokenizers.decoders.ByteLevel):
            raise TokenizerError(f"{name} must be a byte-level BPE tokenizer, as Llama 3's is")

        self.special = _find_special(control, name)
        self.vocab_size = self.special.image
        self.control = control
        self.control_ids = frozenset(control.values())
        byte_of = _byte_alphabet()
        try:
            self._bytes = {i: bytes(byte_of[char] for char in token) for token, i in vocab.items()}
        except KeyError as error:
            raise TokenizerError(
                f"{name} must be a byte-level BPE tokenizer, but {error} in its vocabulary stands for no byte"
            ) from None
        self._bytes |= dict.fromkeys(self.control_ids, b"")
        self._by_text = self.special.by_text()
        self.content = content

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Loads a tokenizer.json, or the one in a checkpoint folder.

        Raises:
          TokenizerError: it does not exist, cannot be read or is invalid.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise TokenizerError(
                f"no tokenizer at {file}; give a {TOKENIZER_FILE} or a checkpoint folder that holds one"
            ) from None
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read ({error}); it must be a {TOKENIZER_FILE}") from error
        return cls(content, str(file))

    @classmethod
    def moss_tiny(cls) -> "Tokenizer":
        """Loads the small tokenizer of the moss_tiny preset."""
        return cls.load(shipped("moss-tiny"))

    def save(self, folder: str | Path) -> Path:
        """Writes the tokenizer.json into a checkpoint folder, unchanged, and returns its path."""
        file = Path(folder) / TOKENIZER_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.content)
        return file

    def encode(self, text: str) -> list[int]:
        """Encodes plain text: nothing in it becomes a control token, and none is added.

        Raises:
          TokenizerError: the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text must be valid Unicode, but character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}"
            ) from None
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str, markers: Collection[str] | None = None) -> list[int]:
        """Encodes text in which markers become control tokens; all else is plain text, as in `encode`.

        Args:
          text: such as `<|silence|><|video|>A red cup.`
          markers: texts of `SpecialTokens`, such as `<|silence|>`; all of them if None.

        Raises:
          TokenizerError: the text is not valid Unicode.
        """
        ids = []
        markers = self._by_text if markers is None else markers
        # With a group in the pattern, every second piece is a marker. `(?!)` matches nothing.
        pieces = re.split(f"({'|'.join(map(re.escape, markers)) or '(?!)'})", text)
        for i, piece in enumerate(pieces):
            ids += [self._by_text[piece]] if i % 2 else self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes tokens, leaving out control tokens; invalid UTF-8 becomes U+FFFD.

        Raises:
          TokenizerError: an id is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token, which may end inside a character; empty for a control token.

        Raises:
          TokenizerError: the id is not in the vocabulary.
        """
        try:
            return self._bytes[int(token_id)]
        except KeyError:
            raise TokenizerError(
                f"token id {token_id} is not in the vocabulary, whose ids run from 0 to {max(self._bytes)}"
            ) from None

    def penalty_exempt(self) -> np.ndarray:
        """Returns bool[vocab_size], true for tokens without repetition penalty: control, punctuation."""
        exempt = np.zeros(self.vocab_size, bool)
        for token_id, token in self._bytes.items():
            if token_id < self.vocab_size:
                exempt[token_id] = token_id in self.control_ids or _is_punctuation(token)
        return exempt


def _find_special(control: dict[str, int], name: str) -> SpecialTokens:
    """Finds the special tokens by text, and in a Llama 3 vocabulary also by id.

    Raises:
      TokenizerError: listing all that are missing or beyond the predictable ids.
    """
    ids = {field: control[text] for field, text in _MARKERS.items() if text in control}
    if ids.get("begin_of_text") == _LLAMA3_BEGIN_OF_TEXT:
        known = set(control.values())
        ids = {field: i for field, i in _LLAMA3_RESERVED.items() if i in known} | ids
    missing = [text for field, text in _MARKERS.items() if field not in ids]
    if missing:
        raise TokenizerError(f"{name} lacks the special tokens {', '.join(missing)}")
    beyond = [_MARKERS[field] for field, i in ids.items() if i > ids["image"]]
    if beyond:
        raise TokenizerError(
            f"{name} must give no special token a higher id than the {ids['image']} of <|image|>, but does "
            f"so to {', '.join(beyond)}"
        )
    return SpecialTokens(**ids)


def _byte_alphabet() -> dict[str, int]:
    """Maps the characters of a byte-level BPE vocabulary to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _is_punctuation(token: bytes) -> bool:
    """Whether a token consists of whole characters that are all punctuation or white space."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(c.isspace() or c in string.punctuation or unicodedata.category(c)[0] == "P" for c in text)
