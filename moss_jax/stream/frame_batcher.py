"""Batching of queued frames for the vision encoder: which frames of which streams are encoded when.

There are three ways. In realtime with several slots, the loop encodes the queued frames of all streams in
batches between steps. With a perception device, a thread encodes them there, but only while the model talks.
Frames that neither has encoded are encoded together with the step that appends them.

P encoded frames, N vectors a frame, D width
"""

import math
import threading
from time import monotonic

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import SchedulerConfig
from moss_jax.stream.admission import Slots
from moss_jax.stream.conversation import Inbound
from moss_jax.stream.counters import SchedulerCounters
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.perception import FEW, Strips
from moss_jax.stream.rows import Encoded
from moss_jax.stream.stream import Stream, saving_engine

# Longest time that a frame waits for its batch to fill, in units of `SchedulerConfig.max_stall_ms`.
PATIENCE = 2.0
# Weight of a new measurement in the running mean of the interval between frames.
INTERVAL_WEIGHT = 1 / 16


class FrameBatcher:
    """Selects queued frames of all streams and encodes them, between steps or in a perception thread.

    The lock is `Slots.changed`, which guards the inboxes: frames are selected and get their features under
    it, but are encoded without it. It guards `frame_interval` and `failure`, too; the record of batches
    belongs to the thread of the loop.

    Args:
      slots: with the streams whose frames are encoded.
      counters: of the scheduler; counts the batches.

    Attributes:
      frame_interval: running mean of the seconds between two frames of any streams.
      failure: exception that has ended the perception thread; None if there is none.
    """

    def __init__(
        self, engine: EngineLike, config: SchedulerConfig, slots: Slots, counters: SchedulerCounters
    ):
        self._engine, self._config, self._slots, self._counters = engine, config, slots, counters
        self._changed = slots.changed
        self.frame_interval, self._last_frame = 1.0, monotonic()
        # Whether a batch of frames was started since the last step, and the one in transit to the device.
        self._has_batch = False
        self._sent: tuple[list[Inbound], Strips] | None = None
        # Frames that the device of the decoder has encoded since the last step.
        self._encoded = 0
        self._thread: threading.Thread | None = None
        self._is_running = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begins a run of the loop, with a perception thread if another device encodes frames."""
        self._has_batch, self._sent, self._encoded = False, None, 0
        self._is_running, self.failure, self._thread = True, None, None
        if self._config.clock == "realtime" and self._engine.perception_device is not None:
            self._thread = threading.Thread(target=self._perceive, name="perception", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Makes the perception thread end once `changed` is notified; the caller holds the lock."""
        self._is_running = False

    def join(self) -> None:
        """Waits until the perception thread has ended, if there is one; the caller must not hold the lock."""
        if self._thread is not None:
            self._thread.join()

    def frame_arrived(self, at: float) -> None:
        """Updates the mean interval with the arrival of a frame; the caller holds the lock."""
        self.frame_interval += INTERVAL_WEIGHT * (at - self._last_frame - self.frame_interval)
        self._last_frame = at

    # ------------------------------------------------------------------------- between steps

    @property
    def is_shared(self) -> bool:
        """Whether the loop encodes queued frames of all streams in batches between steps."""
        return (
            self._config.clock == "realtime"
            and self._engine.config.slots > 1
            and self._engine.perception_device is None
        )

    @property
    def encodes_ahead(self) -> bool:
        """Whether frames now wait in the inbox for their features; the caller holds the lock."""
        return self.is_shared or self._encodes_apart()

    def due(self, live: list[Stream]) -> tuple[list[Inbound], float | None]:
        """Selects queued frames to encode now as one batch; none if that would stall text for too long.

        Frames that a prompt is queued behind come first; then streams take turns, oldest frame first. While a
        stream talks, a batch has no padding, and unless a prompt waits for it, it waits briefly to fill if
        more frames are expected soon, since larger batches take less time per frame.

        The caller holds the lock.

        Returns:
          The batch, and seconds until a smaller one is due; None if no frames wait for that.
        """
        if not self.is_shared:
            return [], None
        talking = any(stream.conversation.speaking for stream in live)
        if self._sent or (talking and self._has_batch):
            return [], None
        turns = [
            (not stream.conversation.is_asked, turn, frame.order, frame)
            for stream in live
            for turn, frame in enumerate(sorted(stream.conversation.unclaimed_frames()))
        ]
        waiting = [frame for *_, frame in sorted(turns, key=lambda entry: entry[:3])]
        stall = self._config.max_stall_ms / 1e3
        most = self._batch_limit(stall if talking else math.inf)
        batch = [frame for frame in waiting if frame.shape == waiting[0].shape][:most]
        if talking and 0 < len(batch) < most:
            is_awaited = any(not others for others, *_ in turns)
            wait = min(frame.arrived for frame in batch) + PATIENCE * stall - monotonic()
            if not is_awaited and self.frame_interval < stall and wait > 0:
                return [], wait
            batch = batch[: self._full_batch(len(batch))]
        for frame in batch:
            frame.claimed = True
        return batch, None

    def _batch_limit(self, seconds: float) -> int:
        """Size of the largest batch that is encoded within this time; at least 1."""
        if not isinstance(self._engine, Engine):
            return FEW if seconds == math.inf else 1
        return self._engine.frame_encoder.largest_batch(seconds)

    def _full_batch(self, frames: int) -> int:
        """Size of the largest batch without padding."""
        if not isinstance(self._engine, Engine):
            return frames
        return max(size for size in self._engine.frame_encoder.buckets if size <= frames)

    def begin(self, frames: list[Inbound], *, is_busy: bool) -> None:
        """Encodes a batch now or, with a step in flight, sends it to be encoded after the next step.

        A transfer waits for the programs launched before it. Sent one step ahead, the transfer overlaps with
        that step, and the encoder does not wait for it.
        """
        self._has_batch = True
        if is_busy and isinstance(self._engine, Engine):
            self._sent = frames, self._engine.send(_pixels(frames))
        else:
            self.encode(frames)

    def encode_sent(self) -> None:
        """Encodes the batch that was sent before the last step, if any."""
        if self._sent:
            (frames, sent), self._sent = self._sent, None
            self._encoded += len(frames)
            self._set_encoded(frames, saving_engine(self._engine).encode_sent(sent))

    def encode(self, frames: list[Inbound]) -> None:
        """Queues frames for encoding on the device, after the step in flight."""
        self._encoded += len(frames) * (self._engine.perception_device is None)
        self._set_encoded(frames, self._engine.encode(_pixels(frames)))

    def on_step(self) -> int:
        """Records that a step was dispatched, so that another batch may follow.

        Returns:
          Number of frames that the device of the decoder encodes between the step before and this one.
        """
        encoded, self._encoded, self._has_batch = self._encoded, 0, False
        return encoded

    def _set_encoded(self, frames: list[Inbound], features: Float[Array, "P N D"]) -> None:
        """Assigns frames their features."""
        self._counters.encoded_frames[len(frames)] += 1
        with self._changed:
            for index, frame in enumerate(frames):
                frame.encoded = Encoded(features, index)
            self._changed.notify_all()

    # ------------------------------------------------------------------- the perception thread

    def _encodes_apart(self) -> bool:
        """Whether frames stay in the inbox while the perception thread encodes them on another device.

        A step that waits for features would stall the text. While no stream is talking, it is better to
        dispatch the step at once. The caller holds the lock.
        """
        return (
            self._config.clock == "realtime"
            and self._engine.perception_device is not None
            and any(stream.conversation.speaking for stream in self._slots.live)
        )

    def _perceive(self) -> None:
        """Encodes frames as they arrive while the model talks; body of the perception thread."""
        try:
            while frames := self._claim_frames():
                self._set_encoded(frames, jax.block_until_ready(self._engine.encode(_pixels(frames))))
        except BaseException as error:
            with self._changed:
                self.failure = error
                self._changed.notify_all()

    def _claim_frames(self) -> list[Inbound]:
        """Waits for frames to encode: the oldest and others of its size; none when the loop has ended."""
        with self._changed:
            while self._is_running:
                conversations = [stream.conversation for stream in self._slots.live]
                waiting = sorted(frame for c in conversations for frame in c.unclaimed_frames())
                if waiting and self._encodes_apart():
                    batch = [frame for frame in waiting if frame.shape == waiting[0].shape][:FEW]
                    for frame in batch:
                        frame.claimed = True
                    return batch
                self._changed.wait()
            return []


def _pixels(frames: list[Inbound]) -> list[UInt8[np.ndarray, "H W 3"]]:
    return [frame.rgb for frame in frames if frame.rgb is not None]
