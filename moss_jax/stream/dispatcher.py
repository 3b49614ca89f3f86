"""Batching of the pending rows of all streams into steps, and the dispatch of those."""

from collections.abc import Mapping
from typing import Any

from moss_jax.config import SchedulerConfig
from moss_jax.stream.conversation import Plan
from moss_jax.stream.counters import SchedulerCounters
from moss_jax.stream.dispatch_timer import DECODE, DispatchTimer, Kind, StepInFlight
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.frame_batcher import FrameBatcher
from moss_jax.stream.rows import Encoded, Row, features_of, first_step
from moss_jax.stream.stream import Stream, min_distance


class StepDispatcher:
    """Batches pending rows into steps and dispatches them, for one run of the loop.

    A row longer than the chunks of a step continues in the next one. No lock guards it, since only the
    thread of the loop uses it.

    Args:
      batcher: encodes the frames that have no features yet.
      counters: of the scheduler; counts the steps.

    Attributes:
      rows: remainders of the rows being appended, by stream; longest wait first.
    """

    def __init__(
        self,
        engine: EngineLike,
        config: SchedulerConfig,
        batcher: FrameBatcher,
        counters: SchedulerCounters,
    ):
        self._engine, self._config, self._batcher, self._counters = engine, config, batcher, counters
        self._timer = DispatchTimer()
        self.rows: dict[Stream, Row[Encoded]] = {}
        # The plans that the rows were made from.
        self._plans: dict[Stream, Plan] = {}

    def add(self, plans: Mapping[Stream, Plan]) -> None:
        """Turns plans into rows for the next steps."""
        fresh = [frame for plan in plans.values() for frame in plan.seen if frame.encoded is None]
        if fresh:
            self._batcher.encode(fresh)
        for stream, plan in plans.items():
            frames = [None if frame.unseen else frame.encoded for frame in plan.frames]
            self._withdraw_alike(stream, plan, frames)
            self.rows[stream] = Row(plan.tokens, frames, plan.new_turn, plan.compact, plan.kept)
            self._plans[stream] = plan

    def drop(self, stream: Stream) -> None:
        """Forgets the row of a stream that has ended."""
        self.rows.pop(stream, None)
        self._plans.pop(stream, None)

    def dispatch(self, state: Any, started: float) -> tuple[Any, StepInFlight[Stream] | None]:
        """Dispatches one step with as many rows as fit; None if there is no row.

        Args:
          state: of the engine; is donated.
          started: when the host started to plan the step, by `time.monotonic`.
        """
        rows = self._next_rows()
        if not rows:
            return state, None
        slots = self._engine.config.slots
        batches, indexed = features_of({stream.slot: row for stream, row in rows.items()})
        features = batches[0] if len(batches) == 1 else batches or None
        by_slot = [indexed.get(slot) for slot in range(slots)]
        state, sampled = self._engine.step(state, by_slot, features)
        # A row with a remainder has no sample yet.
        plans = {stream: self._plans.pop(stream) for stream in rows if stream not in self.rows}
        kind = Kind(
            max(len(row.tokens) for row in rows.values()),
            sum(len(row.frames) for row in rows.values()),
            self._batcher.on_step(),
        )
        self._counters.step_rows[len(rows)] += 1
        self._counters.step_frames[kind.frames] += 1
        # A single stream's steps with prompts and frames are rare, and dispatched as soon as they are needed.
        is_typical = self._batcher.is_shared or kind == DECODE
        return state, StepInFlight(plans, kind, sampled.tokens, self._timer, started if is_typical else None)

    def _next_rows(self) -> dict[Stream, Row[Encoded]]:
        """Takes the rows of the next step, longest wait first; remainders stay queued."""
        if not self.rows:
            return {}
        slots = self._engine.config.slots
        # An engine given whole rows splits them itself, but then no other stream gets a token meanwhile.
        if self._config.clock == "lockstep" or slots == 1 or not isinstance(self._engine, Engine):
            now, later = self.rows, {}
        else:
            by_slot = {stream.slot: stream for stream in self.rows}
            rows = {stream.slot: row for stream, row in self.rows.items()}
            image = self._engine.tokenizer.special.image
            parts = first_step(rows, slots, image)
            now, later = ({by_slot[slot]: row for slot, row in part.items()} for part in parts)
        self.rows = later
        return now

    def _withdraw_alike(self, stream: Stream, plan: Plan, frames: list[Encoded | None]) -> None:
        """Sets to None the frames of a row whose features are similar to those of the last remembered frame.

        Blocks until the features are ready, and so for the step in flight before them.
        """
        threshold = min_distance(stream)
        if threshold is None:
            return
        for place, now in enumerate(frames):
            if now is None:
                continue
            before = stream.remembered
            if before and (
                self._engine.distance(before.features, before.index, now.features, now.index) < threshold
            ):
                stream.conversation.withdraw(plan, plan.frames[place])
                frames[place] = None
            else:
                stream.remembered = now
