"""The tokenizer of a checkpoint: byte-level BPE and the markers of the stream's language."""

import dataclasses
import importlib.resources
import json
import re
import string
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

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

# A tokenizer.json of Llama 3 has these under reserved names, which differ between its releases.
_LLAMA3_BEGIN_OF_TEXT = 128_000
_LLAMA3_RESERVED = {"silence": 128_011, "ellipsis": 128_012, "video": 128_255}


class TokenizerError(ValueError):
    """A tokenizer, text or token id that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the markers of the stream's language."""

    begin_of_text: int
    start_header: int
    end_header: int
    eot: int
    image: int
    video: int
    silence: int
    ellipsis: int

    def by_text(self) -> dict[str, int]:
        """Id of every marker by its text, such as `<|silence|>`."""
        return {text: getattr(self, name) for name, text in _MARKERS.items()}


class Tokenizer:
    """Byte-level BPE with control tokens. Nothing in it changes, so threads may share one.

    Attributes:
      special: ids of the stream's markers.
      vocab_size: number of tokens that can be predicted, which is the id of `<|image|>`.
      content: the tokenizer.json that it was made from.
      control_ids: every special or added token. Only silence and `<|eot_id|>` of them are ever sampled.
    """

    content: bytes
    special: SpecialTokens
    vocab_size: int
    control_ids: frozenset[int]

    def __init__(self, content: bytes, name: str = TOKENIZER_FILE):
        """Reads the content of a tokenizer.json.

        Raises TokenizerError, which calls it `name`, if it is no byte-level BPE or lacks a marker.
        """
        try:
            data = json.loads(content)
            control = {token["content"]: token["id"] for token in data["added_tokens"]}
            # An encoder that knows no added token cannot turn text into one, whatever a user types.
            plain = data | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
            vocab = data["model"]["vocab"]
        except Exception as error:  # The tokenizers library raises bare Exceptions.
            raise TokenizerError(f"{name} cannot be read as a tokenizer.json: {error!r}") from error
        if not isinstance(self._encoder.decoder, tokenizers.decoders.ByteLevel):
            raise TokenizerError(f"{name} must be a byte-level BPE tokenizer, as Llama 3's is")

        self.special = _find_special(control, name)
        self.vocab_size = self.special.image
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
        self._marker = re.compile("(" + "|".join(map(re.escape, self._by_text)) + ")")
        self.content = content

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a tokenizer.json, or the one of a checkpoint folder.

        Raises TokenizerError if there is none or if it cannot be used.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer at {file}; give a {TOKENIZER_FILE} or a checkpoint folder that holds one"
            )
        return cls(file.read_bytes(), str(file))

    @classmethod
    def moss_tiny(cls) -> "Tokenizer":
        """Loads the small tokenizer of the moss_tiny preset."""
        file = importlib.resources.files("moss_jax.text") / "moss_tiny" / TOKENIZER_FILE
        return cls(file.read_bytes(), f"moss_tiny/{TOKENIZER_FILE}")

    def save(self, folder: str | Path) -> Path:
        """Writes the tokenizer.json that this was loaded from into a checkpoint folder; returns its path."""
        file = Path(folder) / TOKENIZER_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.content)
        return file

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing in it becomes a control token, and none is added.

        Raises TokenizerError if the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text must be valid Unicode, but character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}"
            ) from None
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of training text, in which the markers of `SpecialTokens` are control tokens.

        Raises TokenizerError if the text is not valid Unicode.
        """
        ids = []
        for piece in self._marker.split(text):
            ids += [self._by_text[piece]] if piece in self._by_text else self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens without the control tokens; bytes that are no UTF-8 become U+FFFD.

        Raises TokenizerError if an id is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for, which may end inside a character; none for a control token.

        Raises TokenizerError if the id is not in the vocabulary.
        """
        try:
            return self._bytes[int(token_id)]
        except KeyError:
            raise TokenizerError(
                f"token id {token_id} is not in the vocabulary, whose ids run from 0 to {max(self._bytes)}"
            ) from None

    def penalty_exempt(self) -> np.ndarray:
        """bool[vocab_size]: the tokens that may be repeated freely: control, punctuation and white space."""
        exempt = np.zeros(self.vocab_size, bool)
        for token_id, token in self._bytes.items():
            if token_id < self.vocab_size:
                exempt[token_id] = token_id in self.control_ids or _is_punctuation(token)
        return exempt


def _find_special(control: dict[str, int], name: str) -> SpecialTokens:
    """Finds the markers by their text, in a Llama 3 vocabulary also by id.

    Raises TokenizerError that names every marker that is missing or lies beyond the predictable ids.
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
            f"{name} must give no marker a higher id than the {ids['image']} of <|image|>, but it does so to "
            f"{', '.join(beyond)}"
        )
    return SpecialTokens(**ids)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _is_punctuation(token: bytes) -> bool:
    """Whether a token is a run of whole characters, all of them punctuation or white space."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(c.isspace() or c in string.punctuation or unicodedata.category(c)[0] == "P" for c in text)
