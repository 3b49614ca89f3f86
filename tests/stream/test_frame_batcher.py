"""Which queued frames are encoded when."""

from moss_jax.stream import Scheduler, Stream


def test_what_is_encoded_while_a_stream_talks(make_engine, frames, monkeypatch):
    """First what a prompt waits behind, then in turns; a batch that is likely to grow waits a little."""
    engine = make_engine(slots=3)
    monkeypatch.setattr(engine.frame_encoder, "largest_batch", lambda seconds: 4 if seconds < 1 else 32)
    scheduler = Scheduler(engine)
    first, second, third = (scheduler.open() for _ in range(3))

    def due(*, interval: float) -> tuple[list[Stream], float | None]:
        scheduler.frame_batcher.frame_interval = interval
        batch, wait = scheduler.frame_batcher.due(scheduler.streams)
        return [shown[frame.order] for frame in batch], wait

    shown = {}
    for stream in (first, first, second, third):
        stream.push_frame(frames[0])
        shown[max(frame.order for frame in stream.conversation.unclaimed_frames())] = stream
    third.push_prompt("And now?")
    first.conversation.speaking = True
    assert due(interval=0.001) == ([third, first, second, first], None)
    second.push_frame(frames[0])
    shown[second.conversation.unclaimed_frames()[0].order] = second
    batch, wait = due(interval=0.001)
    assert batch == []
    assert 0 < wait <= 0.05
    assert due(interval=1.0) == ([second], None)
    assert due(interval=1.0) == ([], None)
    # A prompt doesn't wait for a batch to fill; it is cut to a size without padding.
    for stream in (first, second, third):
        stream.push_frame(frames[0])
        shown[max(frame.order for frame in stream.conversation.unclaimed_frames())] = stream
    assert due(interval=0.001) == ([third, first], None)
