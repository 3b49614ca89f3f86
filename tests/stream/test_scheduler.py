"""The scheduler: streams that come and go over the slots of one engine, each as if it were alone."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from moss_jax.config import (
    EngineConfig,
    MemoryConfig,
    SchedulerConfig,
    SessionConfig,
    TokenSampling,
    moss_tiny,
)
from moss_jax.stream import (
    PENDING,
    End,
    Engine,
    Failed,
    FrameSeen,
    FrameUnseen,
    Interrupted,
    Row,
    Scheduler,
    SessionError,
    Text,
    Turn,
)
from moss_jax.stream.engine import gather
from moss_jax.stream.saved import write_stream

LOCKSTEP = SchedulerConfig(clock="lockstep")
POLICIES = ("window", "pyramid", "merge")
GOES_ON = MemoryConfig("window", text_recent=0.3)


@dataclasses.dataclass(frozen=True)
class Script:
    """One stream: how it is opened, and what is pushed, in order of time."""

    options: dict
    pushes: list


def script(number: int, frames: list[np.ndarray]) -> Script:
    """A stream like no other: its policy, sampling, limits, prompts and frames are drawn by its number."""
    rng = np.random.default_rng(number)
    policy = ("full", *POLICIES)[number % 4]
    samplings = [
        None,
        TokenSampling(temperature=1.0, seed=number),
        TokenSampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=number),
    ]
    options = {
        "config": SessionConfig(tokens_per_second=int(rng.integers(3, 9)), max_tokens_per_turn=12),
        "system": None if rng.random() < 0.5 else "You watch.",
        "prompt": "What is there?" if rng.random() < 0.5 else "",
        "sampling": samplings[number % 3],
        "memory": MemoryConfig(policy, text="window", text_recent=0.3),
        "bank_capacity": 32 if policy == "full" else int(rng.integers(16, 32)),
        "text_capacity": int(rng.integers(120, 240)),
    }
    pushes = []
    for second in range(int(rng.integers(8, 30))):
        if rng.random() < 0.8:
            pushes.append((float(second), frames[int(rng.integers(len(frames)))]))
        if rng.random() < 0.3:
            # Some longer than a chunk, some cut the answer to the one before.
            words = " ".join(
                ["why", "where", "and", "what"][int(i)] for i in rng.integers(0, 4, rng.integers(1, 40))
            )
            pushes += [(second + 0.3, f"{words}?")] + [(second + 0.6, "And?")] * (rng.random() < 0.5)
    return Script(options, pushes)


def play(scheduler: Scheduler, script: Script) -> list[dict]:
    """The events of a stream, without the slot and the time of the wall."""
    stream = scheduler.open(**script.options)
    for at, what in script.pushes:
        push = stream.push_prompt if isinstance(what, str) else stream.push_frame
        assert push(what, at)
    stream.finish()
    events = [event.to_dict() for event in stream]
    return [{k: v for k, v in event.items() if k not in ("slot", "wall_time")} for event in events]


def test_streams_that_come_and_go_say_what_they_say_alone(make_engine, frames):
    """Eight streams over three slots, opened by three threads."""
    scripts = [script(number, frames) for number in range(8)]
    alone = []
    with Scheduler(make_engine(policies=POLICIES), LOCKSTEP) as scheduler:
        alone = [play(scheduler, s) for s in scripts]
    assert all(events[-1]["reason"] == "finished" for events in alone)
    kinds = {event["type"] for events in alone for event in events}
    assert {"text", "interrupted", "turn_limit", "frame", "turn"} <= kinds
    together: dict[int, list[dict]] = {}

    def run(numbers: list[int]) -> None:
        for number in numbers:
            together[number] = play(scheduler, scripts[number])

    with Scheduler(make_engine(slots=3, policies=POLICIES), LOCKSTEP) as scheduler:
        threads = [threading.Thread(target=run, args=(range(k, 8, 3),)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert scheduler.free_slots == 3
    for number, events in enumerate(alone):
        assert together[number] == events, number


def test_close_ends_all_streams(make_engine):
    scheduler = Scheduler(make_engine(slots=2), LOCKSTEP).start()
    with pytest.raises(RuntimeError, match="already running"):
        scheduler.start()
    streams = [scheduler.open(), scheduler.open()]
    scheduler.close()
    for stream in streams:
        assert list(stream)[-1].reason == "stopped"
        assert list(stream)[-1].reason == "stopped"  # Also to who asks again.
        assert not stream.push_prompt("Hello?", 1.0)
    assert not any(thread.name == "scheduler" for thread in threading.enumerate())


def test_a_stream_that_fails_ends_alone(make_engine, frames, monkeypatch):
    for where in ("plan", "on_token", "events"):
        with Scheduler(make_engine(slots=2), LOCKSTEP) as scheduler:
            good, bad = scheduler.open(), scheduler.open()

            def fail(*_, **__):
                raise ZeroDivisionError("of its own")

            def fail_when_read(*_, **__):
                yield from fail()

            monkeypatch.setattr(bad.conversation, where, fail if where == "plan" else fail_when_read)
            bad.push_prompt("Hello?", 0.0)
            bad.finish()
            events = list(bad)
            (failed,) = [event for event in events if isinstance(event, Failed)]
            assert failed.message == "ZeroDivisionError: of its own"
            assert events[-1].reason == "failed"
            good.push_frame(frames[0], 0.0)
            good.finish()
            assert list(good)[-1].reason == "finished"
            assert scheduler.free_slots == 2


def test_a_failing_step_ends_all_and_the_scheduler_starts_again(make_engine, frames, monkeypatch):
    engine = make_engine(slots=2)
    scheduler = Scheduler(engine, LOCKSTEP)
    step = engine.step

    def fail(*_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine, "step", fail)
    streams = [scheduler.open(), scheduler.open()]
    scheduler.start()
    for stream in streams:
        *_, failed, end = stream
        assert failed.message == "RuntimeError: the device is lost"
        assert end.reason == "failed"
        assert not stream.push_prompt("Hello?", 0.0)
    scheduler._thread and scheduler._thread.join(60)
    monkeypatch.setattr(engine, "step", step)
    scheduler.start()
    assert scheduler.free_slots == 2
    stream = scheduler.open()
    stream.push_frame(frames[0], 0.0)
    stream.finish()
    assert list(stream)[-1].reason == "finished"
    scheduler.close()


def test_features_that_are_not_finite_end_their_stream_alone(make_engine, frames, monkeypatch):
    engine = make_engine(slots=3, policies=POLICIES)
    encode = engine.encode
    white = np.full_like(frames[0], 255)

    def poisoned(these):
        features = encode(these)
        for index, frame in enumerate(these):
            if (frame == 255).all():
                features = features.at[index].set(np.nan)
        return features

    scripts = [script(number, frames) for number in (1, 2)]
    with Scheduler(engine, LOCKSTEP) as scheduler:
        alone = [play(scheduler, s) for s in scripts]
        monkeypatch.setattr(engine, "encode", poisoned)
        for _ in range(2):  # Also in a slot that has held NaN.
            bad = scheduler.open()
            bad.push_frame(white, 0.0)
            bad.push_prompt("What is there?", 1.0)
            bad.finish()
            assert [play(scheduler, s) for s in scripts] == alone
            assert list(bad)[-1].reason == "not_finite"


# ----------------------------------------------------------------------------------- realtime


def wait_for(events: list, count: int, kind: type, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while sum(isinstance(event, kind) for event in events) < count:
        assert time.monotonic() < limit, [type(event).__name__ for event in events]
        time.sleep(0.002)


def listen(stream) -> tuple[list, threading.Thread]:
    """The events of a stream as they come."""
    events: list = []

    def follow() -> None:
        for event in stream:
            events.append(event)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    return events, thread


def test_frames_travel_to_the_device_while_a_step_runs(make_engine, frames, monkeypatch):
    engine = make_engine(slots=2)
    calls = []
    for name in ("send", "encode_sent", "step"):
        call = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *a, call=call, name=name: (calls.append(name), call(*a))[1])
    with Scheduler(engine) as scheduler:
        talking, other = scheduler.open(prompt="What is there?"), scheduler.open()
        events, _ = listen(talking)
        wait_for(events, 3, Text)
        seen, _ = listen(other)
        for index in range(4):
            other.push_frame(frames[index])
            wait_for(seen, index + 1, FrameSeen)
    order = "".join({"send": "<", "encode_sent": ">", "step": "."}[name] for name in calls)
    # A batch that is sent is encoded after the next step, or at once where the model has fallen silent.
    assert "<.>" in order
    assert order.count("<.>") + order.count("<>") == order.count("<") == order.count(">"), order


@pytest.mark.slow
def test_live_streams_see_their_frames_and_compile_nothing(model, tokenizer, frames):
    """Frames of four talking streams go through the shared encoder."""
    memory = MemoryConfig("pyramid", text_recent=0.3)
    engine = Engine(model, tokenizer, EngineConfig(4, 256, 16, memory, ("window",)))
    engine.warm_up(frames[0].shape)
    programs = [*engine.programs.values(), gather]
    compiled = [program._cache_size() for program in programs]
    with Scheduler(engine) as scheduler:
        heard = []
        for number in range(10):
            limits = MemoryConfig("window", text_recent=0.3) if number % 2 else None
            sampling = TokenSampling(temperature=0.9, top_k=50, seed=number) if number % 3 else None
            stream = scheduler.open(memory=limits, sampling=sampling)
            events, thread = listen(stream)
            heard.append((stream, events, thread))
            for index in range(24):
                stream.push_frame(frames[index % len(frames)])
                if index % 8 == 0:
                    stream.push_prompt("What is there, and where is it? " * 3)
                time.sleep(0.01)
            if number >= 3:
                # Makes room for the next.
                oldest, said, over = heard[number - 3]
                oldest.finish()
                over.join(60)
                assert isinstance(said[-1], End)
        for stream, _, _ in heard:
            stream.finish()
        for _, events, thread in heard:
            thread.join(60)
            end = events[-1]
            assert end.reason == "finished"
            seen = sum(isinstance(event, FrameSeen) for event in events)
            assert seen + end.counters.frames_dropped == 24
            assert sum(isinstance(event, Turn) for event in events) == 4
            assert end.figures.ttft > 0
            assert end.figures.frame_to_token > 0
            assert end.figures.bytes == engine.slot_bytes > 0
    assert [program._cache_size() for program in programs] == compiled


def test_a_stream_ends_when_idle_and_at_its_age(make_engine, frames):
    with Scheduler(make_engine(slots=2, memory=GOES_ON)) as scheduler:
        idle = scheduler.open(SessionConfig(idle_seconds=0.2))
        old = scheduler.open(SessionConfig(idle_seconds=60, lifetime_seconds=0.5))
        events, _ = listen(old)
        assert list(idle)[-1].reason == "idle"
        while old.push_frame(frames[0]):
            time.sleep(0.02)
        wait_for(events, 1, End)
        assert events[-1].reason == "lifetime"
        assert events[-1].stream_time >= 0.5


def test_an_answer_is_no_faster_than_it_may_be(make_engine):
    with Scheduler(make_engine(slots=2)) as scheduler:
        slow = scheduler.open(SessionConfig(max_tokens_per_second=20), prompt="What is there?")
        events, _ = listen(slow)
        wait_for(events, 5, Text)
        slow.stop()
        wait_for(events, 1, End)
        times = [event.wall_time for event in events if isinstance(event, Text)]
        # A text may be of several tokens, but is of one at least.
        assert min(np.diff(times)) > 1 / 20 - 0.002
        assert events[-1].figures.tokens_per_second < 20.1


def test_frames_beyond_the_rate_are_left_out(make_engine, frames):
    with Scheduler(make_engine(slots=2)) as scheduler:
        stream = scheduler.open(SessionConfig(max_fps=2, inbox_frames=100))
        for i in range(21):
            stream.push_frame(frames[0], i / 10)
        stream.finish()
        events = list(stream)
        seen = [event.time for event in events if isinstance(event, FrameSeen)]
        assert seen == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
        left_out = [event for event in events if isinstance(event, FrameUnseen)]
        assert len(left_out) == 16
        assert {event.reason for event in left_out} == {"rate"}
        assert events[-1].counters.frames_rate == 16


def test_an_interrupted_answer_stops_and_the_stream_goes_on(make_engine):
    with Scheduler(make_engine(slots=2)) as scheduler:
        stream = scheduler.open(prompt="What is there?")
        events, _ = listen(stream)
        wait_for(events, 3, Text)
        stream.interrupt()
        wait_for(events, 1, Interrupted)
        stream.push_prompt("And now?")
        wait_for(events, 2, Turn)
        stream.stop()
        wait_for(events, 1, End)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [None, "int8"])
def test_the_bits_of_a_slot_do_not_depend_on_its_neighbours(random_model, tokenizer, stored):
    """In steps of the same shapes, whatever the others read and see, NaN too."""
    config = moss_tiny()
    model = random_model(config, dtype="bfloat16")
    memory = MemoryConfig("pyramid", bank_dtype=stored)
    engine = Engine(model, tokenizer, EngineConfig(8, 256, 16, memory))
    size = config.vision.image_size
    image = tokenizer.special.image

    def run(seed: int, poison: bool) -> list[np.ndarray]:
        """Logits of slot 3, which always reads and sees the same."""
        own, others = np.random.default_rng(0), np.random.default_rng(seed)
        state, found = engine.start(), []
        for step in range(12):
            rows: list[Row] = []
            frames = []
            for slot in range(8):
                rng = own if slot == 3 else others
                text = rng.integers(0, 1000, 24).tolist()
                frames.append(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
                begin = [PENDING] if step else []
                kinds = [Row([*begin, *text]), Row([*begin, image], [slot]), Row([PENDING])]
                rows.append(kinds[step % 3] if step else kinds[0])
            features = engine.encode(frames)
            if poison:
                features = features.at[5].set(np.nan)
            state, sampled = engine.step(state, rows, features)
            found.append(np.asarray(sampled.logits[3]))
        return found

    expected = run(1, poison=False)
    assert np.isfinite(expected).all()
    for seed, poison in ((2, False), (3, True)):
        for one, other in zip(run(seed, poison), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_ten_thousand_streams_leave_nothing_behind(make_engine, frames):
    slots = 16
    engine = make_engine(slots=slots, text_capacity=128, bank_capacity=8, policies=POLICIES)
    engine.warm_up(frames[0].shape)
    with Scheduler(engine, LOCKSTEP) as scheduler:

        def run(count: int) -> None:
            open_ones = []
            for number in range(count):
                stream = scheduler.open(system=None, sampling=TokenSampling(temperature=0.5, seed=number))
                stream.push_frame(frames[number % len(frames)], 0.0)
                stream.finish()
                open_ones.append(stream)
                if len(open_ones) == slots:
                    for one in open_ones:
                        assert list(one)[-1].reason == "finished"
                    open_ones.clear()

        run(10 * slots)
        programs = [program._cache_size() for program in engine.programs.values()]
        threads, held = threading.active_count(), resident_mb()
        run(10_000 - 10 * slots)
        assert scheduler.free_slots == slots
        assert [program._cache_size() for program in engine.programs.values()] == programs
        assert threading.active_count() == threads
        assert resident_mb() < held + 40


def resident_mb() -> float:
    """Megabytes of the process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def test_a_running_stream_is_saved_and_goes_on_elsewhere(make_engine, frames, tmp_path):
    """Saved in the middle, both the stream and the one that resumes the file say what it says alone."""
    scripts = [script(number, frames) for number in (1, 2)]
    engine = make_engine(slots=3, policies=POLICIES)
    with Scheduler(engine, LOCKSTEP) as scheduler:
        alone = [play(scheduler, s) for s in scripts]
        streams = [scheduler.open(**s.options) for s in scripts]
        half = len(scripts[0].pushes) // 2
        for at, what in scripts[0].pushes[:half]:
            (streams[0].push_prompt if isinstance(what, str) else streams[0].push_frame)(what, at)
        for at, what in scripts[1].pushes:
            (streams[1].push_prompt if isinstance(what, str) else streams[1].push_frame)(what, at)
        future = streams[0].copy_while_running()
        # The copy's place among the events.
        future.add_done_callback(streams[0].inbox.put)
        before = list(iter(streams[0].inbox.get, future))
        write_stream(tmp_path / "saved", future.result().fetch())
        copies = [streams[0], scheduler.open(scripts[0].options["config"], resume=tmp_path / "saved")]
        for stream in copies:
            for at, what in scripts[0].pushes[half:]:
                (stream.push_prompt if isinstance(what, str) else stream.push_frame)(what, at)
            stream.finish()
            events = [event.to_dict() for event in [*before, *stream]]
            events = [{k: v for k, v in e.items() if k not in ("slot", "wall_time")} for e in events]
            assert events == alone[0]
        streams[1].finish()
        assert [e.to_dict()["type"] for e in streams[1]] == [e["type"] for e in alone[1]]
        with pytest.raises(SessionError, match="the stream is over"):
            streams[0].copy_while_running().result(1)
    with pytest.raises(SessionError, match="the stream is over"):
        streams[1].copy_while_running().result(1)


def test_a_talking_stream_is_copied_and_talks_on(make_engine, frames):
    """In realtime, where a step of it is always under way."""
    config = SessionConfig(max_tokens_per_turn=400)
    with Scheduler(make_engine(slots=2)) as scheduler:
        stream, other = scheduler.open(config), scheduler.open(config)
        for each in (stream, other):
            each.push_frame(frames[0])
            each.push_prompt("Well?")
        copied = [stream.copy_while_running().result(60).fetch() for _ in range(5)]
        counts = [copy.dialogue["counts"]["tokens"] for copy in copied]
        assert counts == sorted(counts)
        assert all(len(c.arrays["text.keys.0"][0]) == len(c.dialogue["kinds"]) for c in copied)
        for each in (stream, other):
            each.stop()
            assert list(each)[-1].reason == "stopped"


def test_a_copy_is_fetched_while_its_stream_goes_on(make_engine, frames):
    with Scheduler(make_engine(slots=2), LOCKSTEP) as scheduler:
        stream = scheduler.open()
        stream.push_frame(frames[0], 0.0)
        stream.push_frame(frames[1], 1.0)
        assert any(isinstance(event, FrameSeen) for event in iter(stream.inbox.get, None))
        copied = stream.copy_while_running().result(60)
        expected = copied.fetch()
        for second in range(2, 6):
            stream.push_frame(frames[second], float(second))
        stream.finish()
        assert sum(isinstance(event, FrameSeen) for event in stream) >= 4
        # Later steps are given the state's buffers, not those of the copy.
        again = copied.fetch()
        for name, x in expected.arrays.items():
            np.testing.assert_array_equal(again.arrays[name], x)
        assert again.dialogue == expected.dialogue


def test_a_call_that_nobody_waits_for_harms_nothing(make_engine, frames):
    with Scheduler(make_engine(slots=2), LOCKSTEP) as scheduler:
        stream = scheduler.open()
        with scheduler.changed:  # So that the loop cannot come before.
            copy, look = stream.copy_while_running(), scheduler.look_at_banks()
            assert copy.cancel()
            assert look.cancel()
        stream.push_frame(frames[0], 0.0)
        assert len(stream.copy_while_running().result(60).dialogue["inbox"]) == 1
        stream.stop()
        with scheduler.changed:
            late = stream.copy_while_running()
            late.cancel()
        assert list(stream)[-1].reason == "stopped"
    assert scheduler.free_slots == 0


def test_a_stream_that_cannot_be_copied_goes_on(make_engine, frames, monkeypatch):
    engine = make_engine(slots=2)
    with Scheduler(engine, LOCKSTEP) as scheduler:
        stream = scheduler.open()

        def fail(*_):
            raise MemoryError("no room on the host")

        def fill(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room on the device")

        monkeypatch.setattr(engine, "copy_slot", fill)
        with pytest.raises(SessionError, match=r"could not copy the stream: .*no room on the device"):
            stream.copy_while_running().result(60)
        monkeypatch.setattr(engine, "copy_slot", fail)
        with pytest.raises(MemoryError, match="no room"):
            stream.copy_while_running().result(60)
        stream.push_frame(frames[0], 0.0)
        stream.finish()
        assert list(stream)[-1].reason == "finished"
