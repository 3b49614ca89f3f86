"""Who gets a slot, and who is refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from moss_jax.config import ConfigError, MemoryConfig, SchedulerConfig
from moss_jax.stream import End, FrameSeen, Refused, Scheduler, SessionError, Stream
from moss_jax.stream.admission import Slots
from moss_jax.stream.saved import SavedStreamError, write_stream

LOCKSTEP = SchedulerConfig(clock="lockstep")


def test_a_stream_that_does_not_fit_is_refused_and_the_others_go_on(make_engine, frames):
    with Scheduler(make_engine(slots=2, policies=("window", "pyramid", "merge")), LOCKSTEP) as scheduler:
        first, second = scheduler.open(), scheduler.open()
        assert scheduler.free_slots == 0
        with pytest.raises(Refused, match=r"all 2 slots are taken; close a stream, or raise engine\.slots"):
            scheduler.open()
        second.finish()
        assert [type(event) for event in second][-1] is End
        assert scheduler.free_slots == 1
        with pytest.raises(ConfigError, match="bank_capacity can be at most 32, the engine's, not 64"):
            scheduler.open(bank_capacity=64)
        with pytest.raises(SessionError, match="the prompt takes"):
            scheduler.open(prompt="word " * 600)
        with pytest.raises(ConfigError, match="too small for a pyramid"):
            scheduler.open(memory=MemoryConfig("pyramid"), bank_capacity=2)
        assert scheduler.free_slots == 1
        first.push_frame(frames[0], 0.0)
        first.finish()
        assert any(isinstance(event, FrameSeen) for event in first)
    with pytest.raises(Refused, match="the scheduler is closed"):
        scheduler.open()


def test_a_reserved_slot_is_kept_for_the_stream_that_opens_with_it(make_engine):
    scheduler = Scheduler(make_engine(slots=2), LOCKSTEP)
    reservation = scheduler.reserve()
    assert scheduler.free_slots == 1
    other = scheduler.open()
    for take in (scheduler.open, scheduler.reserve):
        with pytest.raises(Refused, match="all 2 slots are taken"):
            take()
    # A stream that is not opened after all leaves its reservation as it was.
    with pytest.raises(SessionError, match="the prompt takes"):
        scheduler.open(prompt="word " * 600, reservation=reservation)
    assert scheduler.reserved == {reservation}
    stream = scheduler.open(reservation=reservation)
    assert scheduler.streams == [other, stream]
    assert not scheduler.reserved
    reservation.release()  # Too late, so it frees nothing.
    assert scheduler.free_slots == 0


def test_a_released_reservation_frees_its_slot_once(make_engine):
    scheduler = Scheduler(make_engine(slots=2), LOCKSTEP)
    reservation = scheduler.reserve()
    for _ in range(2):
        reservation.release()
        assert scheduler.free_slots == 2


def test_others_go_on_while_a_saved_stream_is_copied_to_the_device(
    make_engine, frames, tmp_path, monkeypatch
):
    engine = make_engine(slots=2)
    with Scheduler(engine, LOCKSTEP) as scheduler:
        saved, other = scheduler.open(), scheduler.open()
        saved.push_frame(frames[0], 0.0)
        write_stream(tmp_path / "saved", saved.copy_while_running().result(60).fetch())
        saved.finish()
        assert [type(event) for event in saved][-1] is End
        upload, goes_on, uploading = engine.upload_slot, threading.Event(), threading.Event()

        def slowly(arrays):
            uploading.set()
            assert goes_on.wait(60)
            return upload(arrays)

        monkeypatch.setattr(engine, "upload_slot", slowly)
        with ThreadPoolExecutor() as threads:
            resumed = threads.submit(scheduler.open, resume=tmp_path / "saved")
            assert uploading.wait(60)
            assert scheduler.free_slots == 0  # Its slot is reserved.
            with pytest.raises(Refused, match="all 2 slots are taken"):
                scheduler.open(resume=tmp_path / "saved")
            other.push_frame(frames[1], 0.0)
            other.finish()
            assert any(isinstance(event, FrameSeen) for event in other)
            goes_on.set()
            stream = resumed.result(60)
        stream.finish()
        assert [type(event) for event in stream][-1] is End


def test_a_stream_that_the_device_has_no_room_to_resume_is_refused(
    make_engine, frames, tmp_path, monkeypatch
):
    engine = make_engine(slots=1)
    with Scheduler(engine, LOCKSTEP) as scheduler:
        stream = scheduler.open()
        write_stream(tmp_path / "saved", stream.copy_while_running().result(60).fetch())
        stream.finish()
        assert [type(event) for event in stream][-1] is End

        def fill(_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

        with monkeypatch.context() as patch:
            patch.setattr(engine, "upload_slot", fill)
            with pytest.raises(Refused, match=r"could not take a copy of the stream: .*no room"):
                scheduler.open(resume=tmp_path / "saved")
        assert scheduler.free_slots == 1
        again = scheduler.open(resume=tmp_path / "saved")
        again.push_frame(frames[0], 1.0)
        again.finish()
        assert any(isinstance(event, FrameSeen) for event in again)


def test_a_file_that_does_not_fit_takes_no_slot(make_engine, tmp_path):
    (tmp_path / "other").write_bytes(b"something else")
    with Scheduler(make_engine(slots=1), LOCKSTEP) as scheduler:
        with pytest.raises(SavedStreamError, match="is not a saved stream"):
            scheduler.open(resume=tmp_path / "other")
        assert scheduler.free_slots == 1
        assert not scheduler.reserved


def test_a_stream_that_cannot_be_made_takes_no_slot():
    slots = Slots(1, threading.Condition())
    reservation = slots.reserve()

    def fail(slot: int) -> Stream:
        raise SessionError(f"nothing fits slot {slot}")

    with pytest.raises(SessionError, match="nothing fits slot 0"):
        slots.admit(fail, reservation)
    assert slots.reserved == {reservation}
    assert slots.streams == slots.take_admitted() == []
