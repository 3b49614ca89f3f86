"""Offline use of an engine: the whole clip first, then the answer."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from moss_jax.stream.engine import EngineLike
from moss_jax.stream.events import Counters, End, EndReason, Event, FrameSeen, Text, Turn
from moss_jax.stream.rows import FRAME_BUCKETS, PENDING, Row
from moss_jax.stream.session import SessionError
from moss_jax.stream.step import NOT_FINITE
from moss_jax.text import Detokenizer, chat
from moss_jax.video import Frame


def answer_offline(
    engine: EngineLike,
    frames: Sequence[Frame],
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int = 512,
) -> Iterator[Event]:
    """Prefills slot 0 with a clip and a prompt about it, then decodes the answer.

    Args:
      frames: of the clip, in order of time.
      system: system prompt; None for none, as offline dialogues are trained.
      max_tokens: limit on the answer.

    Raises:
      SessionError: the clip and the prompt don't fit the engine's capacities, or there is no frame.
    """
    tokens = chat.offline_opening(engine.tokenizer, system=system, num_frames=len(frames), prompt=prompt)
    config = engine.config
    if not frames:
        raise SessionError("there is no frame to answer about")
    if len(frames) > config.bank_capacity:
        raise SessionError(f"the clip has {len(frames)} frames; the bank has room for {config.bank_capacity}")
    if len(tokens) + 1 > config.text_capacity:
        raise SessionError(
            f"clip and prompt take {len(tokens)} tokens, more than the text capacity of "
            f"{config.text_capacity} leaves room for"
        )
    return _answer(engine, frames, prompt, tokens, max_tokens)


def _answer(
    engine: EngineLike, frames: Sequence[Frame], prompt: str, tokens: list[int], max_tokens: int
) -> Iterator[Event]:
    """The events of an answer whose input fits."""
    room = engine.config.text_capacity - len(tokens)
    started = time.monotonic()

    def stamp(stream_time: float) -> dict[str, Any]:
        return {"stream_time": stream_time, "wall_time": time.monotonic() - started}

    special = engine.tokenizer.special
    other_slots = [None] * (engine.config.slots - 1)
    state, sampled = engine.start(), None
    appended, first_frame = 0, tokens.index(special.image)
    chunk = FRAME_BUCKETS[-1]
    for i in range(0, len(frames), chunk):
        part = frames[i : i + chunk]
        features = engine.encode([frame.rgb for frame in part])
        # The tokens before the frames go with the first chunk, the prompt with the last.
        is_last = i + len(part) == len(frames)
        end = len(tokens) if is_last else first_frame + i + len(part)
        row = Row(tokens[appended:end], range(len(part)), new_turn=is_last)
        state, sampled = engine.step(state, [row, *other_slots], features)
        appended = end
        for index, frame in enumerate(part, start=i):
            yield FrameSeen(**stamp(frame.time), index=index, time=frame.time)
    assert sampled is not None
    end_time = frames[-1].time
    yield Turn(**stamp(end_time), prompt=prompt)
    detokenizer = Detokenizer(engine.tokenizer)
    reason: EndReason = "token_limit" if max_tokens <= room else "text_capacity"
    count = 0
    for count in itertools.count():
        # The next step is dispatched before this token is on the host, so that the device never waits.
        sampled.tokens.copy_to_host_async()
        state, following = engine.step(state, [Row([PENDING]), *other_slots])
        token, sampled = int(sampled.tokens[0]), following
        if token in (special.silence, NOT_FINITE):
            reason = "finished" if token == special.silence else "not_finite"
            break
        if text := detokenizer.push(token):
            yield Text(**stamp(end_time), text=text)
        if count + 1 >= min(max_tokens, room):
            count += 1
            break
    counters = Counters(frames=len(frames), prompts=bool(prompt), tokens=count)
    yield End(**stamp(end_time), reason=reason, counters=counters)
