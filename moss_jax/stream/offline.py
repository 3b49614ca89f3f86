"""The offline use of a stream: the whole clip first, then the answer."""

import itertools
import time
from collections.abc import Iterator, Sequence

from moss_jax.stream.engine import FRAME_BUCKETS, PENDING, Engine, Row
from moss_jax.stream.events import Counters, End, EndReason, Event, Frame, Text, Turn
from moss_jax.stream.session import SessionError
from moss_jax.text import Detokenizer, chat
from moss_jax.video import Frame as VideoFrame


def answer(
    engine: Engine,
    frames: Sequence[VideoFrame],
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int = 512,
) -> Iterator[Event]:
    """Shows a clip to slot 0 of an engine, then tells the answer to a prompt about it.

    Args:
      frames: of the clip, in order of time.
      system: system prompt; None for none, as offline dialogues are trained.
      max_tokens: at which the answer ends if the model doesn't end it.

    Raises:
      SessionError: the clip and the prompt don't fit the engine's capacities, or there is no frame.
    """
    special = engine.tokenizer.special
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
    return _answer(
        engine, frames, prompt, tokens, min(max_tokens, config.text_capacity - len(tokens)), special
    )


def _answer(engine, frames, prompt, tokens, room, special) -> Iterator[Event]:
    started = time.monotonic()

    def stamp(stream_time: float) -> dict[str, float]:
        return {"stream_time": stream_time, "wall_time": time.monotonic() - started}

    others = [None] * (engine.config.slots - 1)
    state = engine.start()
    appended, begin = 0, tokens.index(special.image)
    chunk = FRAME_BUCKETS[-1]
    for i in range(0, len(frames), chunk):
        part = frames[i : i + chunk]
        pool = engine.encode([frame.rgb for frame in part])
        # What leads up to the frames goes with the first of them, the prompt with the last.
        is_last = i + len(part) == len(frames)
        end = len(tokens) if is_last else begin + i + len(part)
        row = Row(tokens[appended:end], range(len(part)), new_turn=is_last)
        state, drawn = engine.step(state, [row, *others], pool)
        appended = end
        for index, frame in enumerate(part, start=i):
            yield Frame(**stamp(frame.time), index=index, time=frame.time)
    end_time = frames[-1].time
    yield Turn(**stamp(end_time), prompt=prompt)
    detokenizer = Detokenizer(engine.tokenizer)
    reason: EndReason = "token_limit"
    for count in itertools.count():
        # Dispatched before it is known what was drawn, so that the device doesn't wait for the host.
        drawn.tokens.copy_to_host_async()
        state, after = engine.step(state, [Row([PENDING]), *others])
        token, drawn = int(drawn.tokens[0]), after
        if token == special.silence:
            reason = "finished"
            break
        if text := detokenizer.push(token):
            yield Text(**stamp(end_time), text=text)
        if count + 1 >= room:
            count += 1
            break
    yield End(
        **stamp(end_time),
        reason=reason,
        counters=Counters(frames=len(frames), prompts=bool(prompt), tokens=count),
    )
