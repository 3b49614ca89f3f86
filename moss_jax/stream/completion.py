"""Chat completions: a stream that is given a whole dialogue with its frames and answers it once."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from moss_jax.config import EngineConfig, SessionConfig
from moss_jax.memory.eviction import Kind
from moss_jax.stream.contents import SlotContents
from moss_jax.stream.conversation import Conversation, Inbound, Plan
from moss_jax.stream.events import EndReason, Event, FrameSeen, Text
from moss_jax.stream.rows import FRAME_BUCKETS, PENDING
from moss_jax.stream.step import NOT_FINITE
from moss_jax.text import Tokenizer, chat
from moss_jax.video import Frame

# Frames encoded and appended per chunk: chunked prefill, so that other streams get their turn in between.
FRAMES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class DialogueTurn:
    """One turn of a dialogue.

    Attributes:
      role: who speaks.
      content: texts and frames in order; only user turns may have frames.
    """

    role: chat.Role
    content: Sequence[str | Frame]

    @property
    def text(self) -> str:
        """The text of the turn, without the frames."""
        return "".join(part for part in self.content if isinstance(part, str)).strip()


@dataclasses.dataclass
class Part:
    """Tokens that are appended together, or a frame with its token.

    Attributes:
      prompts: of the user turns that end in it.
    """

    tokens: list[int]
    kind: Kind
    frame: Inbound | None = None
    prompts: list[str] = dataclasses.field(default_factory=list)


class NoRoom(Exception):
    """A capacity is exhausted, and compaction cannot free any of it.

    Attributes:
      capacity: name of the field of `EngineConfig`.
    """

    def __init__(self, capacity: EndReason):
        super().__init__(capacity)
        self.capacity: EndReason = capacity


def dialogue_parts(tokenizer: Tokenizer, turns: Sequence[DialogueTurn], order: int = 0) -> list[Part]:
    """Tokenizes a dialogue up to the header of the answer, in the format of training rows.

    Everything before the content of the first turn that is not a system prompt is pinned: never evicted.

    Args:
      order: sequence number of all its frames among the items pushed to a scheduler.

    Raises:
      ValueError: the last turn is not the user's, or a turn that is not the user's has a frame.
      TokenizerError: a text is not valid Unicode.
    """
    if not turns or turns[-1].role != "user":
        raise ValueError("the last turn of a dialogue must be the user's")
    special = tokenizer.special
    frames = iter([part for turn in turns for part in turn.content if isinstance(part, Frame)])
    # Each token with its kind and the prompt that ends with it.
    tokens: list[tuple[int, Kind, str | None]] = [(special.begin_of_text, Kind.PINNED, None)]
    header_kind = Kind.PINNED
    for turn in turns:
        contents = [None if isinstance(part, Frame) else part for part in turn.content]
        if None in contents and turn.role != "user":
            raise ValueError(f"a frame must be in a turn of the user, not of the {turn.role}")
        header, body = chat.header(tokenizer, turn.role), chat.content(tokenizer, turn.role, contents)
        if turn.role == "system":
            whole = [*header, *body, special.eot] if body else []
            tokens += [(token, header_kind, None) for token in whole]
            continue
        kind = Kind.USER if turn.role == "user" else Kind.ASSISTANT
        tokens += [(token, header_kind, None) for token in header]
        tokens += [(token, Kind.FRAME if token == special.image else kind, None) for token in body]
        tokens.append((special.eot, Kind.USER, turn.text if turn.role == "user" else None))
        header_kind = Kind.USER
    tokens += [(token, Kind.USER, None) for token in chat.header(tokenizer, "assistant")]
    parts = []
    for kind, run in itertools.groupby(tokens, key=lambda entry: entry[1]):
        run = list(run)
        if kind is Kind.FRAME:
            for (token, _, _), frame in zip(run, frames, strict=False):
                parts.append(Part([token], kind, Inbound(frame.time, 1, order, rgb=frame.rgb)))
        else:
            prompts = [prompt for _, _, prompt in run if prompt is not None]
            parts.append(Part([token for token, _, _ in run], kind, prompts=prompts))
    return parts


def sizes(capacity: EngineConfig, parts: Sequence[Part]) -> tuple[int, int]:
    """Number of frames, and of other tokens that must be in the text cache at the same time."""
    texts = [len(part.tokens) for part in parts if not part.frame]
    # The first text is the pinned opening; of the others, all but the newest may be evicted.
    tokens = sum(texts) if capacity.memory.text == "full" else texts[0] + max(texts[1:])
    return len(parts) - len(texts), tokens


def misfit(capacity: EngineConfig, num_frames: int | None, tokens: int) -> str | None:
    """Error message if a clip and a prompt are known not to fit the capacity; otherwise None.

    Args:
      num_frames: None if unknown.
      tokens: number of tokens other than those of the frames.
    """
    if num_frames is not None and capacity.memory.policy == "full" and num_frames > capacity.bank_capacity:
        return f"the clip has {num_frames} frames; the bank has room for {capacity.bank_capacity}"
    if capacity.memory.text == "full":
        tokens += num_frames or 0
    if tokens + 1 > capacity.text_capacity:
        return (
            f"clip and prompt take {tokens} tokens, more than the text capacity of "
            f"{capacity.text_capacity} leaves room for"
        )
    return None


def plan_rows(contents: SlotContents, parts: Iterable[Part]) -> Iterator[tuple[Plan, list[Part]]]:
    """Plans parts as one row, or several if memory must be compacted in between; yields each with its parts.

    Raises:
      NoRoom: a capacity is exhausted, and nothing may be forgotten.
    """
    plan, kinds, inside = Plan(), [], []
    for part in parts:
        size, is_frame = len(part.tokens), part.frame is not None
        fit = contents.make_room(plan, len(kinds) + size, is_frame=is_frame)
        if fit != "fits" and inside:
            contents.append(kinds)
            yield plan, inside
            plan, kinds, inside = Plan(), [], []
            fit = contents.make_room(plan, size, is_frame=is_frame)
        if fit != "fits":
            raise NoRoom("text_capacity" if fit == "next_row" else fit)
        plan.tokens += part.tokens
        plan.new_turn |= bool(part.prompts)
        kinds += [part.kind] * size
        inside.append(part)
        if part.frame:
            plan.frames.append(part.frame)
            contents.append([], frames=1)
    contents.append(kinds)
    yield plan, inside


def in_chunks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Cuts parts into chunks of at most the frames of the largest row; each may need its own compaction."""
    chunk, frames = [], 0
    for part in parts:
        if part.frame and frames == FRAME_BUCKETS[-1]:
            yield chunk
            chunk, frames = [], 0
        chunk.append(part)
        frames += part.frame is not None
    yield chunk


class Completion(Conversation):
    """State of a chat completion: a dialogue that is given as a whole, and its answer.

    It emits the events of `answer_offline`: frames and turns as they enter the context, text, and the end.

    Args:
      capacity: of the stream; see `stream_config`.
      parts: from `dialogue_parts`.
      max_tokens: limit on the answer.

    Attributes:
      prompt_tokens: tokens of the dialogue, including one per frame.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        capacity: EngineConfig,
        config: SessionConfig,
        slot: int,
        *,
        parts: Sequence[Part],
        max_tokens: int,
    ):
        super().__init__(tokenizer, capacity, config, slot, opening=[], prompt="")
        self.finished = True
        self.prompt_tokens = sum(len(part.tokens) for part in parts)
        self._frames = collections.deque(part.frame for part in parts if part.frame)
        self._rows = (row for chunk in in_chunks(parts) for row in plan_rows(self._contents, chunk))
        # The row being appended, and its parts still to append; both are empty once the answer has begun.
        self._row, self._left = Plan(), collections.deque[Part]()
        self._most = max_tokens
        self._most_reason: EndReason = "token_limit"
        self._next_row()

    def save(self, wall: float):
        """Always raises: a completion is not saved, since the client can send the request again."""
        raise ValueError("a completion cannot be saved")

    def unclaimed_frames(self) -> list[Inbound]:
        """The next frames to encode: a few at a time, not far ahead of those being appended."""
        ahead = itertools.islice(self._frames, 2 * FRAMES_AT_ONCE)
        return [frame for frame in ahead if not frame.claimed][:FRAMES_AT_ONCE]

    def plan(
        self, wall: float, in_flight: Plan | None, *, may_continue: bool, perception_async: bool
    ) -> Plan | None:
        """The next move; see `Conversation.plan`."""
        self._wall = wall
        if self.stopped or self.interrupted:
            return self._end("stopped")
        if self._end_reason:
            return self._end(self._end_reason)
        if self._left:
            return self._append_parts(perception_async)
        if not may_continue or self._said_tokens + bool(in_flight) >= self._most:
            return None
        plan = Plan(tokens=[PENDING], speculative=bool(in_flight))
        self._contents.make_room(plan, 1)
        self._contents.append([Kind.ASSISTANT])
        return plan

    def _append_parts(self, perception_async: bool) -> Plan | None:
        """Plans the next tokens, up to a frame that is still being encoded; None if that comes first."""
        row, plan = self._row, Plan(new_turn=self._row.new_turn)
        while self._left:
            part = self._left[0]
            if part.frame:
                can_be_shown = part.frame.can_be_shown(encodes_apart=perception_async)
                if not can_be_shown or len(plan.frames) == FRAMES_AT_ONCE:
                    break
                plan.frames.append(self._frames.popleft())
                self._instant = part.frame.time
                plan.events.append(FrameSeen(**self._stamp(), index=self._counts["frames"], time=self._now()))
                self._counts["frames"] += 1
            plan.tokens += part.tokens
            plan.events += map(self._turn, part.prompts)
            self._left.popleft()
        if not plan.tokens:
            return None
        # Memory is compacted once, before the first chunk of the row.
        plan.compact, plan.kept, row.compact, row.kept = row.compact, row.kept, None, None
        if not self._left:
            self._next_row()
        if not self._left:
            # The request came when the stream began.
            plan.asked_at = 0.0
            room = self.capacity.text_capacity - len(self._contents.kinds)
            if self.capacity.memory.text == "full" and room < self._most:
                self._most, self._most_reason = room, "text_capacity"
        return plan

    def _next_row(self) -> None:
        """Moves to the next row, if any; if there is no room for it, marks the stream as ending."""
        try:
            self._row, parts = next(self._rows, (Plan(), []))
        except NoRoom as error:
            self._end_reason = error.capacity
        else:
            self._left.extend(parts)

    def on_token(self, plan: Plan, token: int, wall: float) -> Iterator[Event]:
        """Processes the token sampled after a plan's row; yields its events."""
        # Only the last row of the prompt samples, and a row dispatched past the end of the answer is dropped.
        if self._end_reason or self.ended or (plan.asked_at is None and plan.tokens != [PENDING]):
            return
        self._wall = wall
        self.speed.on_sample(wall, (), plan.asked_at)
        if token in (self._special.silence, NOT_FINITE):
            self.speaking, self._end_reason = False, "finished" if token != NOT_FINITE else "not_finite"
            return
        self.speed.on_token(wall, is_first=not self._said_tokens)
        self.speaking = True
        self._said_tokens += 1
        self._counts["tokens"] += 1
        if text := self._detokenizer.push(token):
            yield Text(**self._stamp(), text=text)
        if self._said_tokens >= self._most:
            self.speaking, self._end_reason = False, self._most_reason

    def _now(self) -> float:
        """Seconds of the clip: the time of the last frame."""
        return self._instant
