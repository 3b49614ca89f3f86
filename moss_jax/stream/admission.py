"""Admission control: the slots that streams take or reserve, and the checks before they do.

A stream that cannot be served is rejected at once and never queued, so that the caller can try again or
elsewhere. Its limits and its dialogue or file are checked first, without a lock; only then does it take a
slot.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import jax

from moss_jax.config import EngineConfig, MemoryConfig
from moss_jax.stream.completion import DialogueTurn, Part, dialogue_parts, misfit, sizes
from moss_jax.stream.engine import Engine, EngineLike, SlotArrays
from moss_jax.stream.limits import saved_config, stream_config
from moss_jax.stream.saved import SavedStream, SavedStreamError, check_settings, compare_weights, read_stream
from moss_jax.stream.stream import SessionError, Stream, saving_engine


class Refused(RuntimeError):
    """A stream is not admitted; other streams are unaffected."""


class Reservation:
    """A free slot kept for a stream that opens with it, until then or until it is released."""

    def __init__(self, slots: "Slots"):
        self._slots = slots

    def release(self) -> None:
        """Frees the slot for others; does nothing if a stream has it already, or later."""
        with self._slots.changed:
            self._slots.reserved.discard(self)


class Slots:
    """The slots of an engine: the stream in each, and reservations of free ones.

    Any thread admits streams, the loop starts and releases them, and `changed` guards it all. Methods take
    this lock themselves, unless they say that the caller holds it; since it is reentrant, a caller may hold
    it in any case, to do several things at once.

    Args:
      count: number of slots.
      changed: condition of the scheduler; is notified when a stream is admitted.

    Attributes:
      changed: as given.
      reserved: reservations of free slots that no stream has opened with yet.
      is_closed: whether no more streams are admitted.
    """

    def __init__(self, count: int, changed: threading.Condition):
        self.changed = changed
        self.reserved: set[Reservation] = set()
        self.is_closed = False
        self._by_slot: list[Stream | None] = [None] * count
        # Streams that the loop has not started yet.
        self._admitted: list[Stream] = []

    def admit(self, make: Callable[[int], Stream], reservation: Reservation | None = None) -> Stream:
        """Gives a new stream a reserved or a free slot.

        Args:
          make: makes the stream, given its slot. It is called under the lock, so that nobody else gets the
            slot meanwhile; if it raises, no slot is taken, and the reservation stays.
          reservation: of its slot; None for a slot that nobody has reserved.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        with self.changed:
            stream = make(self._free_slot(reservation))
            self.reserved.discard(reservation)
            self._by_slot[stream.slot] = stream
            self._admitted.append(stream)
            self.changed.notify_all()
        return stream

    def reserve(self) -> Reservation:
        """Reserves a free slot.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        with self.changed:
            self._free_slot()
            reservation = Reservation(self)
            self.reserved.add(reservation)
            return reservation

    @contextlib.contextmanager
    def held(self, reservation: Reservation | None = None) -> Iterator[Reservation]:
        """Yields the reservation, or a new one that is released in the end.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        if reservation:
            yield reservation
            return
        reservation = self.reserve()
        try:
            yield reservation
        finally:
            reservation.release()

    def _free_slot(self, reservation: Reservation | None = None) -> int:
        """Finds a slot for a new stream; the caller holds the lock.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        if self.is_closed:
            raise Refused("the scheduler is closed")
        free = [slot for slot, stream in enumerate(self._by_slot) if stream is None]
        if len(free) <= len(self.reserved - {reservation}):
            raise Refused(f"all {len(self._by_slot)} slots are taken; close a stream, or raise engine.slots")
        return free[0]

    @property
    def num_free(self) -> int:
        """Number of slots free for new streams, without those that are reserved."""
        with self.changed:
            return 0 if self.is_closed else self._by_slot.count(None) - len(self.reserved)

    @property
    def streams(self) -> list[Stream]:
        """The streams that have a slot, in order of slot."""
        with self.changed:
            return [stream for stream in self._by_slot if stream]

    @property
    def live(self) -> list[Stream]:
        """The streams that have not ended, in order of slot; the caller holds the lock."""
        return [stream for stream in self._by_slot if stream and not stream.conversation.ended]

    def take_admitted(self) -> list[Stream]:
        """Takes the streams that the loop has not started yet, for it to start; the caller holds the lock."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def release(self, stream: Stream, *, frees_slot: bool) -> None:
        """Forgets a stream that has ended; the caller holds the lock.

        Args:
          frees_slot: whether another stream may have its slot.
        """
        if stream in self._admitted:
            self._admitted.remove(stream)
        if self._by_slot[stream.slot] is stream and frees_slot:
            self._by_slot[stream.slot] = None


def checked_limits(
    engine: EngineLike, memory: MemoryConfig | None, bank_capacity: int | None, text_capacity: int | None
) -> EngineConfig:
    """The `stream_config` of a new stream, checked against the engine's model too.

    Raises:
      ConfigError: the engine has no room or no program for these limits.
    """
    model = engine.model_config if isinstance(engine, Engine) else None
    return stream_config(engine.config, memory, bank_capacity, text_capacity, model=model)


def checked_file(engine: EngineLike, path: str | os.PathLike) -> tuple[SavedStream, EngineConfig, SlotArrays]:
    """Reads a saved stream that the engine can resume, with its limits, and its arrays on the device.

    Raises:
      Refused: the device has no room for a copy.
      SessionError: the engine is a stand-in.
      SavedStreamError: the file cannot be read or does not fit the engine.
    """
    engine = saving_engine(engine)
    saved = read_stream(path)
    limits = saved_config(engine.config, saved.settings)
    check_settings(path, saved.settings, engine.stream_settings(limits))
    compare_weights(path, saved.weights, engine.weights)
    try:
        arrays = engine.upload_slot(saved.arrays)
    except (KeyError, ValueError) as error:
        raise SavedStreamError(f"{path} is not as it was saved: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        raise Refused(f"the device could not take a copy of the stream: {error}") from error
    return saved, limits, arrays


def checked_dialogue(
    engine: EngineLike, limits: EngineConfig, turns: Sequence[DialogueTurn], order: int
) -> list[Part]:
    """The `dialogue_parts` of a dialogue that fits the limits of its stream.

    Raises:
      SessionError: the dialogue does not fit, or cannot be answered.
    """
    try:
        parts = dialogue_parts(engine.tokenizer, turns, order)
    except ValueError as error:
        raise SessionError(str(error)) from error
    if message := misfit(limits, *sizes(limits, parts)):
        raise SessionError(message)
    return parts
