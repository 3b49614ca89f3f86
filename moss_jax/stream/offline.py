"""Offline inference: prefill a whole clip, then decode the answer."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from moss_jax.memory.eviction import Kind
from moss_jax.stream.completion import NoRoom, Part, misfit, plan_rows
from moss_jax.stream.contents import SlotContents
from moss_jax.stream.conversation import Inbound, Plan
from moss_jax.stream.engine import EngineLike
from moss_jax.stream.events import Counters, End, EndReason, Event, FrameSeen, Text, Turn
from moss_jax.stream.rows import FRAME_BUCKETS, PENDING, Row
from moss_jax.stream.session import SessionError
from moss_jax.stream.step import NOT_FINITE
from moss_jax.text import Detokenizer, chat
from moss_jax.video import Frame


def answer_offline(
    engine: EngineLike,
    frames: Iterable[Frame],
    prompt: str,
    *,
    num_frames: int | None = None,
    system: str | None = None,
    max_tokens: int = 512,
) -> Iterator[Event]:
    """Prefills slot 0 with a clip and a prompt about it, then decodes the answer.

    A clip beyond the capacities is handled as in a live stream: the bank is compacted and tokens are evicted
    according to the engine's `MemoryConfig`.

    Args:
      frames: of the clip, in order of time. They are read as the clip is encoded, so that a long one from an
        iterator is never in memory as a whole.
      num_frames: length of an iterator, if known, so that a clip that cannot fit is refused at once.
      system: system prompt; None for none, as offline dialogues are trained.
      max_tokens: limit on the answer.

    Raises:
      SessionError: the clip and the prompt exceed capacities and nothing may be forgotten, the prompt alone
        doesn't fit, or there is no frame.
    """
    special = engine.tokenizer.special
    opening = chat.offline_opening(engine.tokenizer, system=system, num_frames=1, prompt=prompt)
    at = opening.index(special.image)
    before, after = opening[:at], opening[at + 1 :]
    num_frames = len(frames) if isinstance(frames, Sized) else num_frames
    if num_frames == 0:
        raise SessionError("there is no frame to answer about")
    if message := misfit(engine.config, num_frames, len(before) + len(after)):
        raise SessionError(message)
    return _answer(engine, frames, prompt, before, after, max_tokens)


def _answer(
    engine: EngineLike,
    frames: Iterable[Frame],
    prompt: str,
    before: list[int],
    after: list[int],
    max_tokens: int,
) -> Iterator[Event]:
    """Yields the events of an answer.

    Args:
      before, after: tokens around the frames.
    """
    started = time.monotonic()

    def stamp(stream_time: float) -> dict[str, Any]:
        return {"stream_time": stream_time, "wall_time": time.monotonic() - started}

    special, capacity = engine.tokenizer.special, engine.config
    other_slots = [None] * (capacity.slots - 1)
    contents = SlotContents(capacity)
    state, sampled, end_time, num_frames = engine.start(), None, 0.0, 0
    for part, is_last in _in_chunks(frames, FRAME_BUCKETS[-1]):
        # The previous chunk, which is awaited while this one is in flight: frames are read while the device
        # encodes, but never far ahead of it.
        waited = sampled
        features = engine.encode([frame.rgb for frame in part])
        parts = [] if num_frames else [Part(before, Kind.PINNED)]
        parts += [
            Part([special.image], Kind.FRAME, Inbound(x.time, 1, i, rgb=x.rgb)) for i, x in enumerate(part)
        ]
        parts += [Part(after, Kind.USER, prompts=[prompt])] if is_last else []
        for plan in _plans(contents, parts):
            row = Row(plan.tokens, [x.order for x in plan.frames], plan.new_turn, plan.compact, plan.kept)
            state, sampled = engine.step(state, [row, *other_slots], features)
            for inbound in plan.frames:
                end_time = inbound.time
                yield FrameSeen(**stamp(end_time), index=num_frames, time=end_time)
                num_frames += 1
        if waited:
            waited.tokens.block_until_ready()
    if sampled is None:
        raise SessionError("there is no frame to answer about")
    yield Turn(**stamp(end_time), prompt=prompt)
    room = capacity.text_capacity - len(contents.kinds) if capacity.memory.text == "full" else max_tokens
    detokenizer = Detokenizer(engine.tokenizer)
    reason: EndReason = "token_limit" if max_tokens <= room else "text_capacity"
    count = 0
    for count in itertools.count():
        # The next step is dispatched before this token is on the host, so that the device never waits.
        sampled.tokens.copy_to_host_async()
        plan = Plan()
        contents.make_room(plan, 1)
        contents.append([Kind.ASSISTANT])
        state, following = engine.step(state, [Row([PENDING], kept=plan.kept), *other_slots])
        token, sampled = int(sampled.tokens[0]), following
        if token in (special.silence, NOT_FINITE):
            reason = "finished" if token == special.silence else "not_finite"
            break
        if text := detokenizer.push(token):
            yield Text(**stamp(end_time), text=text)
        if count + 1 >= min(max_tokens, room):
            count += 1
            break
    counters = Counters(frames=num_frames, prompts=bool(prompt), tokens=count)
    yield End(**stamp(end_time), reason=reason, counters=counters)


def _in_chunks(frames: Iterable[Frame], size: int) -> Iterator[tuple[list[Frame], bool]]:
    """Yields chunks of frames, each with whether it is the last."""
    frames = iter(frames)
    following = next(frames, None)
    while following is not None:
        chunk = [following, *itertools.islice(frames, size - 1)]
        following = next(frames, None)
        yield chunk, following is None


def _plans(contents: SlotContents, parts: list[Part]) -> Iterator[Plan]:
    """Plans the rows of frames that are encoded together, and of the tokens around them.

    Raises:
      SessionError: there is no room, and nothing may be forgotten.
    """
    try:
        for plan, _ in plan_rows(contents, parts):
            yield plan
    except NoRoom as error:
        raise SessionError(
            f"the clip is longer than engine.{error.capacity} has room for; with the memory policy and text "
            '"full" nothing is forgotten: sample fewer frames, or choose another (memory.policy, memory.text)'
        ) from None
