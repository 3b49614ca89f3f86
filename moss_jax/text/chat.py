r"""Chat template: token sequences of prompts.

A turn is `<|start_header_id|>ROLE<|end_header_id|>\n\nCONTENT<|eot_id|>`, and `<|begin_of_text|>` opens the
sequence. The assistant's turn is left open: frames and generated tokens follow its header.
"""

from collections.abc import Sequence
from typing import Literal

from moss_jax.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

SYSTEM_PROMPT = """\
You are a helpful assistant that watches the world through a live camera and talks with the user. \
You watch all the time, also when nobody asks anything.

- Answer only from what you see now or have seen before, and never guess.
- When the scene changes in a way that matters to the user's question, correct or update your answer at once.
- When you cannot answer yet or have nothing more to say, output `<|silence|>`."""


# Texts that become control tokens in the content of a turn. All else is plain text, so no content can end its
# turn or begin another. Media markers are for training rows: the prompts of a session are plain text.
MARKERS: dict[Role, tuple[str, ...]] = {
    "system": ("<|silence|>",),
    "user": ("<|image|>", "<|video|>"),
    "assistant": ("<|image|>", "<|video|>", "<|silence|>", "<|...|>"),
}


def header(tokenizer: Tokenizer, role: Role) -> list[int]:
    """Returns the tokens that open a turn of `role`."""
    special = tokenizer.special
    return [special.start_header, *tokenizer.encode(role), special.end_header, *tokenizer.encode("\n\n")]


def opening(tokenizer: Tokenizer, *, system: str | None, prompt: str = "") -> list[int]:
    """Returns the prompt of a live session: system turn unless None or empty, user turn, assistant header.

    `<|silence|>` in the system prompt is the control token, as in the training data; all else is plain text.

    Raises:
      TokenizerError: a text is not valid Unicode.
    """
    return offline_opening(tokenizer, system=system, num_frames=0, prompt=prompt)


def interjection(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens that end the assistant's open turn, add a user turn and open the next reply.

    Raises:
      TokenizerError: the prompt is not valid Unicode.
    """
    return [tokenizer.special.eot, *_user_turn(tokenizer, prompt), *header(tokenizer, "assistant")]


def offline_opening(tokenizer: Tokenizer, *, system: str | None, num_frames: int, prompt: str) -> list[int]:
    """Returns the prompt about a whole clip: that of `opening`, with all frames before the user's text.

    Raises:
      ValueError: `num_frames` is negative.
      TokenizerError: a text is not valid Unicode.
    """
    if num_frames < 0:
        raise ValueError(f"num_frames must not be negative, but is {num_frames}")
    return [
        tokenizer.special.begin_of_text,
        *_system_turn(tokenizer, system),
        *_user_turn(tokenizer, prompt, num_frames=num_frames),
        *header(tokenizer, "assistant"),
    ]


def content(tokenizer: Tokenizer, role: Role, parts: Sequence[str | None]) -> list[int]:
    """Returns the tokens of a turn's content, between its header and its end.

    White space around it, and after leading frames, is stripped.

    Args:
      parts: texts, and None for each frame, in their order; in a system prompt, `<|silence|>` is the control
        token.

    Raises:
      TokenizerError: a text is not valid Unicode.
    """
    texts = list(parts)
    for index, part in enumerate(texts):
        if part is not None:
            texts[index] = part = part.lstrip()
            if part:
                break
    for index in reversed(range(len(texts))):
        if (part := texts[index]) is None:
            break
        texts[index] = part = part.rstrip()
        if part:
            break
    marked = MARKERS["system"] if role == "system" else ()
    tokens = []
    for part in texts:
        tokens += [tokenizer.special.image] if part is None else tokenizer.encode_marked(part, marked)
    return tokens


def _system_turn(tokenizer: Tokenizer, system: str | None) -> list[int]:
    tokens = content(tokenizer, "system", [system or ""])
    return [*header(tokenizer, "system"), *tokens, tokenizer.special.eot] if tokens else []


def _user_turn(tokenizer: Tokenizer, prompt: str, *, num_frames: int = 0) -> list[int]:
    tokens = content(tokenizer, "user", [None] * num_frames + [prompt])
    return [*header(tokenizer, "user"), *tokens, tokenizer.special.eot]
