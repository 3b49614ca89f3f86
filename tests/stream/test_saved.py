"""Streams that are saved and resumed: they go on as if nothing had happened, or are refused with a reason."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from stream.test_session import Watcher

from moss_jax.config import EngineConfig, MemoryConfig, SelectionConfig, SessionConfig
from moss_jax.memory import NO_POSITION, init_state, load_slot, save_slot
from moss_jax.memory.eviction import Kind
from moss_jax.nn import quantize
from moss_jax.stream import (
    End,
    Engine,
    FrameSeen,
    Session,
    SessionError,
    Text,
    Turn,
)
from moss_jax.stream.conversation import Conversation, Inbound
from moss_jax.stream.saved import SavedStream, SavedStreamError, _checksum, read_stream, write_stream

WINDOW = MemoryConfig("window", low_water=0.75, text_recent=0.4)
CONFIG = SessionConfig(tokens_per_second=6)


def push(session, frames, seconds, prompts=(), *, slot=0):
    """Pushes a frame a second and prompts, in order of time."""
    timed = [(float(s), 1, frames[s % len(frames)]) for s in seconds] + [
        (at, 0, text) for at, text in prompts
    ]
    for at, is_frame, item in sorted(timed, key=lambda x: x[:2]):
        (session.push_frame if is_frame else session.push_prompt)(item, at, slot=slot)


def told(events, slot=0) -> list[dict]:
    """What the events of a slot tell, whatever its number and the wall's clock."""
    return [e.to_dict() | {"wall_time": 0, "slot": 0} for e in events if e.slot == slot]


def until(session, is_enough) -> list:
    """The events of a session that is paused after the first for which `is_enough`."""
    events = []
    for event in session:
        events.append(event)
        if is_enough(event, events):
            session.pause()
    return events


def finished(engine, frames, seconds, prompts) -> Session:
    """A session that has been given all frames and prompts, and is still to be played."""
    session = Session(engine, CONFIG, system="Watch.", prompt="Hello?")
    push(session, frames, seconds, prompts)
    session.finish()
    return session


# At the beginning, in mid-answer, before a compaction, and after several.
CUTS = (
    lambda event, events: True,
    lambda event, events: sum(e["type"] == "text" for e in events) == 9,
    lambda event, events: isinstance(event, FrameSeen) and event.index == 7,
    lambda event, events: isinstance(event, FrameSeen) and event.index == 21,
)


@pytest.mark.parametrize(
    "memory",
    [
        WINDOW,
        MemoryConfig("pyramid", low_water=0.75, pyramid_shares=(0.5, 0.25, 0.25), bank_dtype="int8"),
        MemoryConfig("merge", low_water=0.75, bank_dtype="fp8", text_dtype="int8"),
    ],
    ids=lambda memory: memory.policy,
)
def test_a_resumed_stream_goes_on_as_one_that_was_never_cut(make_engine, frames, tmp_path, memory):
    """Event for event and token for token, sampled and penalised; for a while in a larger engine."""
    settings = {"text_capacity": 96, "bank_capacity": 8, "memory": memory}
    settings |= {"temperature": 0.9, "repetition_penalty": 1.2}
    engine, larger = make_engine(**settings), make_engine(slots=2, **settings)
    path = tmp_path / "stream"

    def start() -> Session:
        return finished(engine, frames, range(30), [(2.5, "What is it?"), (11.25, "And now?")])

    expected = told(start())
    assert sum(e["type"] == "text" for e in expected) > 30
    session, slot, events = start(), 0, []
    for number, is_cut in enumerate(CUTS):
        before, is_paused = len(events), False
        for event in session:
            events += told([event], slot)
            if event.slot == slot and not is_paused and is_cut(event, events):
                session.pause()
                is_paused = True
        assert is_paused
        assert events[-1]["type"] != "end"
        assert len(events) > before
        session.save(path, slot)
        if number == 1:
            slot, session = 1, Session(larger, CONFIG, system=None, prompt="Who?", resume={1: path})
            push(session, frames, range(30))
        else:
            slot, session = 0, Session(engine, CONFIG, resume={0: path})
        session.finish()
    assert events + told(session) == expected


def test_selection_goes_on_where_it_was(make_engine, frames, tmp_path):
    """All frames are pushed before the first cut: those that are not shown are told, or wait in the file."""
    engine, path = make_engine(text_capacity=96, bank_capacity=8, memory=WINDOW), tmp_path / "stream"
    selection = SelectionConfig(enabled=True, min_distance=0.05, max_gap=6.0, max_fps=1.0)
    config = dataclasses.replace(CONFIG, selection=selection)

    def start() -> Session:
        session = Session(engine, config, system=None)
        for half in range(60):
            # Each picture three times, of two a second.
            session.push_frame(frames[half // 3 % len(frames)], half / 2)
        session.finish()
        return session

    expected = told(start())
    assert {e["reason"] for e in expected if e["type"] == "unseen"} >= {"still", "rate"}
    session, events = start(), []
    for index in (3, 4, 11, 30):
        events += told(until(session, lambda event, _, i=index: getattr(event, "index", 0) >= i))
        session.save(path)
        session = Session(engine, config, resume={0: path})
        session.finish()
    assert events + told(session) == expected


@pytest.mark.parametrize(
    ("reason", "selection"),
    [
        ("still", SelectionConfig(enabled=True)),
        ("alike", SelectionConfig(enabled=True, min_change=0.0, min_distance=1e-6)),
        ("rate", SelectionConfig(enabled=True, max_fps=1.0)),
    ],
)
def test_frames_after_the_cut_are_compared_with_those_before(
    make_engine, frames, tmp_path, reason, selection
):
    """Cut between frames that are alike; those after it are pushed only when the stream has been resumed."""
    engine, path = make_engine(text_capacity=96, bank_capacity=8, memory=WINDOW), tmp_path / "stream"
    config = dataclasses.replace(CONFIG, selection=selection)

    def push_halves(session: Session, halves: range) -> None:
        for half in halves:
            session.push_frame(frames[half // 5 % len(frames)], half / 2)

    whole = Session(engine, config, system=None)
    push_halves(whole, range(40))
    whole.finish()
    expected = told(whole)
    assert reason in {e.get("reason") for e in expected}
    session, events, begin = Session(engine, config, system=None), [], 0
    for end in (8, 14, 23, 31):
        push_halves(session, range(begin, end))
        # The last frames wait until it is known what comes next.
        events += told(until(session, lambda event, _, n=end - 3: getattr(event, "index", 0) >= n))
        session.save(path)
        session, begin = Session(engine, config, resume={0: path}), end
    push_halves(session, range(begin, 40))
    session.finish()
    assert events + told(session) == expected


@pytest.mark.parametrize(
    "selection",
    [SelectionConfig(enabled=True), SelectionConfig(enabled=True, min_change=0.0, min_distance=1e-6)],
    ids=["still", "alike"],
)
def test_nothing_is_compared_with_a_frame_from_before_selection_was_off(
    make_engine, frames, tmp_path, selection
):
    engine, path = make_engine(), tmp_path / "stream"
    reasons = []
    for begin, frame, selects in ((0.0, 0, selection), (1.0, 1, SelectionConfig()), (2.0, 0, selection)):
        resume = {0: path} if begin else None
        config = dataclasses.replace(CONFIG, selection=selects, tail_seconds=0)
        session = Session(engine, config, system=None, resume=resume)
        for time in (begin, begin + 0.5):
            session.push_frame(frames[frame], time)
        session.finish()
        reasons += [e.get("reason", "seen") for e in told(session) if e["type"] in ("frame", "unseen")]
        session.save(path)
    unseen = reasons[1]
    assert unseen in ("still", "alike")
    assert reasons == ["seen", unseen, "seen", "seen", "seen", unseen]


def test_input_may_come_after_the_cut(make_engine, frames, tmp_path):
    """A stream that waits for input is paused, saved twice over, and goes on with what is pushed then."""
    engine = make_engine(temperature=1.0, top_k=50)
    whole = Session(engine, CONFIG, system=None)
    push(whole, frames, range(9), [(4.0, "And now?")])
    whole.finish()
    session, seen, path = Session(engine, CONFIG, system=None), [], tmp_path / "stream"
    for seconds, prompts in (([0, 1, 2], []), ([3, 4, 5], [(4.0, "And now?")]), ([6, 7, 8], [])):
        push(session, frames, seconds, prompts)
        if seconds[-1] == 8:
            session.finish()
            seen += told(session)
            break
        watcher = Watcher(session)
        watcher.wait_for(FrameSeen, 2)
        session.pause()
        watcher.join(60)
        seen += told(watcher.events)
        # The last frame waits until it is known that nothing else happens at its instant.
        session.save(path)
        assert read_stream(path).frames
        session = Session(engine, CONFIG, resume={0: path})
        assert session.start_time >= seconds[-1]
    assert seen == told(whole)


def test_a_realtime_stream_is_resumed_with_its_clock_and_its_inbox(make_engine, frames, tmp_path):
    engine = make_engine(temperature=1.0, top_k=50)
    config = SessionConfig(clock="realtime")
    session = Session(engine, config, system=None)
    watcher = Watcher(session)
    session.push_frame(frames[0])
    watcher.wait_for(FrameSeen, 1)
    watcher.wait_for(Text, 3)
    session.pause()
    watcher.join(60)
    assert not [e for e in watcher.events if isinstance(e, End)]
    assert not session.push_frame(frames[1])
    at = session.save(tmp_path / "stream")
    assert at >= watcher.events[-1].stream_time
    resumed = Session(engine, config, resume={0: tmp_path / "stream"})
    assert resumed.now() == resumed.start_time == at
    resumed.push_frame(frames[1])
    resumed.finish()
    first, *_, end = resumed
    assert first.stream_time >= at
    assert end.counters.frames == 2
    texts = [e for e in watcher.events if isinstance(e, Text)]
    assert end.counters.tokens >= len(texts)
    # On another clock, too, from the same time on.
    lockstep = Session(engine, CONFIG, resume={0: tmp_path / "stream"})
    assert lockstep.start_time == at
    lockstep.push_frame(frames[1], at + 0.5)
    lockstep.finish()
    assert [e.time for e in lockstep if isinstance(e, FrameSeen)] == [at + 0.5]


def test_a_stream_goes_on_with_its_own_sampling(make_engine, frames, tmp_path):
    """On an engine whose slots sample otherwise, beside another stream of it."""
    own = make_engine(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=9)
    session = Session(own, CONFIG, system=None)
    push(session, frames, range(3))
    session.finish()
    until(session, lambda event, events: sum(e["type"] == "text" for e in (e.to_dict() for e in events)) == 5)
    at = session.save(tmp_path / "stream")

    def go_on(engine, slot):
        resumed = Session(engine, CONFIG, system=None, resume={slot: tmp_path / "stream"})
        for second in range(4):
            for to in range(engine.config.slots):
                resumed.push_frame(frames[second], at + second if to == slot else float(second), slot=to)
        resumed.finish()
        return told(list(resumed), slot)

    expected = go_on(own, 0)
    assert sum(e["type"] == "text" for e in expected) > 8
    assert go_on(make_engine(slots=2), 1) == expected


def test_a_stream_that_has_ended_is_resumed_as_well(make_engine, frames, tmp_path):
    """Its input lasts for as long as the last frame is shown, so no frame comes before that."""
    engine = make_engine()
    session = Session(engine, CONFIG, system=None)
    push(session, frames, range(3))
    session.finish(time=3.0)
    *_, end = session
    assert end.reason == "finished"
    assert session.save(tmp_path / "stream") >= 3.0
    resumed = Session(engine, CONFIG, resume={0: tmp_path / "stream"})
    with pytest.raises(SessionError, match="in order of time"):
        resumed.push_frame(frames[3], 2.0)
    resumed.push_frame(frames[3], resumed.start_time)
    resumed.push_prompt("And?", resumed.start_time + 1)
    resumed.finish()
    events = list(resumed)
    assert [e.index for e in events if isinstance(e, FrameSeen)] == [3]
    assert [e.prompt for e in events if isinstance(e, Turn)] == ["And?"]
    assert events[-1].counters.frames == 4


def test_a_stream_is_saved_when_its_iteration_is_over(make_engine, scripted, frames, tmp_path, monkeypatch):
    engine = make_engine()
    session = Session(engine, CONFIG, system=None)
    with pytest.raises(SessionError, match="pause it, and read all events"):
        session.save(tmp_path / "stream")
    session.push_frame(frames[0], 0.0)
    session.finish()
    for event in session:
        if isinstance(event, FrameSeen):
            break  # In the middle of it.
    with pytest.raises(SessionError, match="pause it, and read all events"):
        session.save(tmp_path / "stream")
    other = Session(scripted(), CONFIG)
    other.finish()
    list(other)
    with pytest.raises(SessionError, match="ScriptedEngine cannot be saved"):
        other.save(tmp_path / "stream")
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda frames: encode(frames) * float("nan"))
    spoilt = Session(engine, CONFIG, system=None)
    spoilt.push_frame(frames[0], 0.0)
    spoilt.finish()
    *_, end = spoilt
    assert end.reason == "not_finite"
    with pytest.raises(SessionError, match="not finite"):
        spoilt.save(tmp_path / "stream")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- errors


@pytest.fixture
def saved(make_engine, frames, tmp_path):
    """An engine, and the file of a stream of it."""
    engine = make_engine(bank_capacity=8, memory=WINDOW)
    session = Session(engine, CONFIG, system=None)
    push(session, frames, range(10))
    session.finish()
    until(session, lambda event, events: isinstance(event, FrameSeen) and event.index == 5)
    session.save(tmp_path / "stream")
    return engine, tmp_path / "stream"


def test_settings_that_differ_are_named(saved, make_engine, model, tokenizer):
    _, path = saved

    def refusal(engine) -> str:
        with pytest.raises(SavedStreamError, match="does not fit this engine") as refused:
            Session(engine, CONFIG, resume={0: path})
        return str(refused.value)

    assert "engine.bank_capacity is 8 there and 4 here" in refusal(
        make_engine(bank_capacity=4, memory=WINDOW)
    )
    other = dataclasses.replace(WINDOW, policy="merge", bank_dtype="int8")
    message = refusal(make_engine(bank_capacity=8, memory=other))
    assert "memory.bank_dtype is None there and 'int8' here" in message
    assert "memory.policy is 'window' there and 'merge' here" in message
    assert "give the settings that it was saved with" in message


@pytest.mark.parametrize(
    "memory", [WINDOW, MemoryConfig("pyramid", low_water=0.75)], ids=lambda memory: memory.policy
)
def test_a_stream_keeps_its_limits_in_a_larger_engine(make_engine, frames, tmp_path, memory):
    """Also where the engine has another policy of its own, and a bank with counts."""
    path = tmp_path / "stream"
    small = make_engine(text_capacity=96, bank_capacity=8, memory=memory)
    larger = make_engine(
        slots=2,
        text_capacity=160,
        bank_capacity=12,
        memory=dataclasses.replace(WINDOW, low_water=0.6),
        policies=("pyramid", "window"),
    )

    def start() -> Session:
        return finished(small, frames, range(40), [(2.5, "What is it?"), (31.25, "And now?")])

    expected = told(start())
    session = start()
    events = told(until(session, lambda event, events: isinstance(event, FrameSeen) and event.index == 11))
    session.save(path)
    # To the larger engine, and, as it keeps its limits, from there to another of that size.
    session = Session(larger, CONFIG, resume={1: path})
    session.finish()
    rest = told(
        until(session, lambda event, events: isinstance(event, FrameSeen) and event.index == 25), slot=1
    )
    assert {"frame"} < {event["type"] for event in rest}
    with pytest.raises(SessionError, match="the text capacity is 96"):
        session.check_prompt(" a" * 90)
    session.save(path, 1)
    settings = read_stream(path).settings
    assert (settings["engine.text_capacity"], settings["engine.bank_capacity"]) == (96, 8)
    assert (settings["memory.policy"], settings["memory.low_water"]) == (memory.policy, 0.75)
    again = make_engine(text_capacity=96, bank_capacity=8, memory=memory, policies=("pyramid",))
    session = Session(again, CONFIG, resume={0: path})
    session.finish()
    last = told(session)
    assert events + rest + last == expected


def test_a_file_from_before_the_first_tokens_were_kept_goes_on_as_it_began(make_engine, frames, tmp_path):
    path, settings = tmp_path / "stream", {"text_capacity": 96, "bank_capacity": 8}
    engine = make_engine(**settings, memory=dataclasses.replace(WINDOW, text_first=0))

    def start() -> Session:
        return finished(engine, frames, range(40), [(2.5, "What is it?"), (31.25, "And now?")])

    expected = told(start())
    session = start()
    events = told(until(session, lambda event, events: isinstance(event, FrameSeen) and event.index == 11))
    session.save(path)
    stream = read_stream(path)
    del stream.settings["memory.text_first"]
    write_stream(path, stream)
    session = Session(make_engine(**settings, memory=WINDOW), CONFIG, resume={0: path})
    session.finish()
    assert events + told(session) == expected


def test_a_stream_of_another_model_is_refused(saved, model, tokenizer, random_model):
    engine, path = saved
    capacity = EngineConfig(1, 512, 8, WINDOW)
    for changed, message in (
        (random_model(model.config, seed=1), "model.weights differs"),
        (random_model(model.config, dtype="bfloat16"), "model.dtype is 'float32' there and 'bfloat16' here"),
    ):
        with pytest.raises(SavedStreamError, match=message) as refused:
            Session(Engine(changed, tokenizer, capacity), CONFIG, resume={0: path})
        assert "open the checkpoint that it was saved with" in str(refused.value)
    with pytest.raises(SessionError, match="there is no slot 1"):
        Session(engine, CONFIG, resume={1: path})


def test_a_stream_may_continue_with_weights_in_another_dtype(saved, model, tokenizer, tmp_path, caplog):
    engine, path = saved
    plain = {"decoder": "float32", "encoder": "float32"}
    assert read_stream(path).weights == plain
    Session(engine, CONFIG, resume={0: path})
    assert not caplog.records
    small = quantize(nnx.clone(model), decoder="int8", encoder="fp8")
    quantized = Engine(small, tokenizer, EngineConfig(1, 512, 8, WINDOW))
    Session(quantized, CONFIG, resume={0: path})
    assert caplog.messages == [
        f"{path} was saved with decoder weights in float32 and encoder weights in float32 and continues with "
        "decoder weights in int8 and encoder weights in fp8"
    ]
    caplog.clear()
    # The reverse, and a file of an earlier version, which does not say.
    stream = dataclasses.replace(read_stream(path), weights=quantized.weights)
    write_stream(tmp_path / "quantized", stream)
    Session(engine, CONFIG, resume={0: tmp_path / "quantized"})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.clear()
    (tmp_path / "before").write_bytes(without_weights(path))
    assert read_stream(tmp_path / "before").weights == {}
    Session(quantized, CONFIG, resume={0: tmp_path / "before"})
    assert not caplog.records


def without_weights(path) -> bytes:
    """The file of a stream as versions wrote it that did not record how weights are stored."""
    content, stream = path.read_bytes(), read_stream(path)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header["__metadata__"]
    del metadata["weights"], metadata["checksum"]
    tensors = dict(stream.arrays) | {f"inbox.{i}": frame for i, frame in enumerate(stream.frames)}
    tensors |= {f"compared.{name}": x for name, x in stream.compared.items()}
    metadata["checksum"] = _checksum(metadata, tensors)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + content[start:]


def test_files_that_are_no_stream(saved, tmp_path):
    engine, path = saved
    content = path.read_bytes()

    def refusal(content: bytes | None) -> str:
        other = tmp_path / "other"
        other.unlink(missing_ok=True)
        if content is not None:
            other.write_bytes(content)
        with pytest.raises(SavedStreamError) as refused:
            Session(engine, CONFIG, resume={0: other})
        return str(refused.value)

    assert "No such file" in refusal(None)
    assert "truncated or damaged" in refusal(b"")
    assert "truncated or damaged" in refusal(content[: len(content) // 2])
    for at in (len(content) - 5, len(content) // 2):
        assert "damaged" in refusal(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    # A dialogue that was edited, and another format.
    assert "damaged" in refusal(content.replace(b'\\"ticks\\": ', b'\\"ticks\\":1'))
    assert "this version reads" in refusal(content.replace(b"moss_jax stream 2", b"moss_jax stream 9"))
    model = tmp_path.joinpath("model.safetensors")
    model.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert "is not a saved stream" in refusal(model.read_bytes())


def test_a_dialogue_that_does_not_belong_to_its_arrays(saved):
    engine, path = saved
    good = read_stream(path)

    def refusal(**changes) -> str:
        write_stream(path, dataclasses.replace(good, **changes))
        with pytest.raises(SavedStreamError) as refused:
            Session(engine, CONFIG, resume={0: path})
        return str(refused.value)

    assert "pending_kinds is missing" in refusal(
        dialogue={name: value for name, value in good.dialogue.items() if name != "pending_kinds"}
    )
    assert "of which" in refusal(dialogue=good.dialogue | {"kinds": good.dialogue["kinds"][1:]})
    assert "frame_room cannot be 9" in refusal(dialogue=good.dialogue | {"frame_room": 9})
    assert "should not hold" in refusal(frames=good.frames[1:])
    arrays = dict(good.arrays)
    assert "pending" in refusal(arrays={n: x for n, x in arrays.items() if n != "pending"})
    assert "bank.keys.0" in refusal(arrays=arrays | {"bank.keys.0": arrays["bank.keys.0"][:, 1:]})
    assert "bank.values.1" in refusal(arrays={n: x for n, x in arrays.items() if n != "bank.values.1"})
    assert "text.length" in refusal(arrays=arrays | {"text.length": np.int32(513)})
    assert "sampling.key, uint32 [2]" in refusal(arrays={n: arrays[n] for n in arrays if n != "sampling.key"})
    assert "top_p 0.0 must be in (0, 1]" in refusal(arrays=arrays | {"sampling.top_p": np.float32(0)})


# -------------------------------------------------------------------------------------- the file


def test_the_file_is_as_any_safetensors_file(saved):
    _, path = saved
    stream = read_stream(path)
    with safe_open(path, framework="numpy") as file:
        inbox = (f"inbox.{i}" for i in range(len(stream.frames)))
        assert set(file.keys()) == {*stream.arrays, *inbox, *(f"compared.{name}" for name in stream.compared)}
        assert json.loads(file.metadata()["dialogue"]) == stream.dialogue
        for name, x in stream.arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), x)
    assert stream.frames[0].dtype == np.uint8
    # No more of the caches than what is in use.
    assert stream.arrays["text.keys.0"].shape[1] == int(stream.arrays["text.length"]) < 100
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int32", "float8_e4m3fn", "bfloat16", "float32"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {
        "scalar": rng.integers(0, 2, ()).astype(jnp.dtype(dtype)),
        "none": np.zeros((3, 0, 2), jnp.dtype(dtype)),
        "odd": rng.integers(-100, 100, (3, 7)).astype(jnp.dtype(dtype))[:, ::2],
    }
    write_stream(tmp_path / "stream", SavedStream({"a": 1}, {"b": ["ü", 0.1]}, arrays, []))
    read = read_stream(tmp_path / "stream")
    assert (read.settings, read.dialogue) == ({"a": 1}, {"b": ["ü", 0.1]})
    for name, x in arrays.items():
        assert read.arrays[name].dtype == x.dtype
        assert read.arrays[name].shape == x.shape
        assert read.arrays[name].tobytes() == x.tobytes()


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "stream"
    first = SavedStream({}, {"number": 1}, {"x": np.zeros(10, np.float32)}, [])
    write_stream(path, first)
    (tmp_path / "link").symlink_to(path)
    large = dataclasses.replace(first, arrays={"x": np.zeros(10_000_000, np.float32)})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            write_stream(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert failed.value.filename == str(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "stream"]
    assert read_stream(path).dialogue == {"number": 1}
    write_stream(tmp_path / "link", dataclasses.replace(first, dialogue={"number": 2}))
    assert (tmp_path / "link").is_symlink()
    assert read_stream(path).dialogue == {"number": 2}


def test_a_kill_during_a_write_leaves_the_old_file(tmp_path):
    """The process is killed between two tensors, when a part of the new file has been written."""
    path = tmp_path / "stream"
    write_stream(path, SavedStream({}, {"number": 1}, {"x": np.zeros(10, np.float32)}, []))
    script = """
        import os, signal, sys
        import numpy as np
        from moss_jax.stream import saved

        of = saved._bytes
        count = 0

        def killing(x):
            global count
            count += 1
            if count == 6:  # Two passes: the checksum of four, then the write.
                os.kill(os.getpid(), signal.SIGKILL)
            return of(x)

        saved._bytes = killing
        arrays = {str(i): np.full(1_000_000, i, np.float32) for i in range(4)}
        saved.write_stream(sys.argv[1], saved.SavedStream({}, {"number": 2}, arrays, []))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (draft,) = [file for file in tmp_path.iterdir() if file != path]
    assert draft.stat().st_size > 3_000_000
    assert read_stream(path).dialogue == {"number": 1}
    write_stream(path, SavedStream({}, {"number": 3}, {}, []))
    assert os.listdir(tmp_path) == ["stream"]


# ------------------------------------------------------------------------------------ properties


@given(st.data())
def test_what_a_slot_holds_comes_back(model, data):
    """Whatever it is: rows in use, counts and positions are the same, and behind them the slot is empty."""
    stored = data.draw(st.sampled_from([None, "int8", "float8_e4m3fn"]))
    merges = data.draw(st.booleans())
    settings = {"text_capacity": 20, "bank_capacity": 4, "bank_dtype": stored, "merges": merges}
    settings["text_dtype"] = data.draw(st.sampled_from([None, "int8"]))
    state = init_state(model.config, 2, dtype="bfloat16", **settings)
    tokens, vectors = data.draw(st.integers(0, 20)), data.draw(st.integers(0, state.bank.capacity))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))

    def random(x):
        values = rng.standard_normal(x.shape) * 9
        return jnp.asarray(np.abs(values) if jnp.issubdtype(x.dtype, jnp.integer) else values).astype(x.dtype)

    state = jax.tree.map(random, state)
    state = dataclasses.replace(
        state,
        text=dataclasses.replace(state.text, length=jnp.array([3, tokens], jnp.int32)),
        bank=dataclasses.replace(
            state.bank,
            length=jnp.array([1, vectors], jnp.int32),
            positions=jnp.sort(state.bank.positions, axis=1),
        ),
    )
    saved = save_slot(jax.tree.map(lambda x: x[1:], state))
    loaded = load_slot(jax.eval_shape(lambda: state), saved)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x[1])
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    assert list(loaded) == list(named)
    for name, x in named.items():
        length = tokens if name.startswith("text.") else vectors
        rows = (*[slice(None)] * (x.ndim > 1), *[slice(length)] * (x.ndim > 0))
        assert loaded[name].shape == (1, *x.shape)
        assert loaded[name].dtype == x.dtype
        np.testing.assert_array_equal(loaded[name][0][rows], x[rows])
        if name == "bank.positions":
            assert (loaded[name][0, vectors:] == NO_POSITION).all()


@given(
    st.lists(st.sampled_from([[7, -2], [-2], [7, 8, 9, -2]]), max_size=12),
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6),
)
def test_a_dialogue_comes_back(tokenizer, answers, inbox):
    capacity, opening = EngineConfig(1, 96, 8, WINDOW), [1015, 5, 6]

    def make() -> Conversation:
        return Conversation(tokenizer, capacity, CONFIG, 0, opening=opening, prompt="Hello?")

    def inbound(time, text=None) -> Inbound:
        if text is None:
            return Inbound(time, 1, 0, rgb=np.full((2, 2, 3), int(time), np.uint8))
        return Inbound(time, 0, 0, prompt=text, tokens=[7, 8])

    conversation, second = make(), 0.0
    for answer in answers:
        conversation.receive(inbound(second))
        conversation.finish(0.0)
        for token in answer:
            plan = conversation.plan(0.0, None, may_continue=True, perception_async=False)
            if plan is None or plan.end:
                break
            list(conversation.events(plan))
            list(conversation.on_token(plan, tokenizer.special.silence if token == -2 else token, 0.0))
        second += 1
    for after, is_prompt in inbox:
        conversation.receive(inbound(second + after, "Well?" if is_prompt else None))
    dialogue, frames, thumbnail = conversation.save(0.0)
    dialogue = json.loads(json.dumps(dialogue))
    again = make()

    def frame(time, rgb, unseen) -> Inbound:
        return dataclasses.replace(inbound(time), rgb=rgb, unseen=unseen)

    again.resume(dialogue, frames, thumbnail, inbound, frame)
    other, other_frames, _ = again.save(0.0)
    assert other == dialogue
    assert [x.tolist() for x in other_frames] == [x.tolist() for x in frames]
    assert again.opening_length == 3
    assert again.text_length == len(dialogue["kinds"])
    if dialogue["kinds"]:
        assert [Kind[k] for k in dialogue["kinds"][:3]] == [Kind.PINNED] * 3


def test_nothing_of_a_dialogue_is_forgotten(tokenizer):
    """A new attribute has to be saved, or be named here as one that says nothing about the stream so far."""
    conversation = Conversation(tokenizer, EngineConfig(), CONFIG, 0, opening=[1], prompt="")
    # Of the session, or only until the step in flight is over.
    passing = {"slot", "finished", "stopped", "ended", "latest", "config", "capacity", "special", "unknown"}
    passing |= {"finished_at", "end_reason", "wall", "passed", "has_failed"}
    # Of the wall clock, which goes on.
    passing |= {"next_token", "next_frame", "speed"}
    # With the arrays: see `Moments.save`.
    passing |= {"moments"}
    kept = {"detokenizer": "incomplete", "contents": "kinds"}
    names = {name.lstrip("_") for name in vars(conversation)} - passing
    assert {kept.get(name, name) for name in names} <= set(conversation.save(0.0)[0])
