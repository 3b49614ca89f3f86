"""The benchmarks of many streams: traffic, what is noted of events, floors, steps, and runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_jax.config import ConfigError, EngineConfig, MemoryConfig
from moss_jax.stream import PENDING, Compaction, Counters, End, FrameSeen, Row, Silence, Text, Turn
from moss_jax.stream.scheduler import Scheduler
from moss_jax.stream.stream import Clock
from moss_jax.train.flops import forward_work

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(4, 128, 8, MemoryConfig())
CEILINGS = {"copy_tb_s": 1e-3, "matmul_tflop_s": 1e-1}


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import streams  # pyright: ignore[reportMissingImports]

    return streams


@pytest.fixture
def engine(streams, model, tokenizer):
    engine = streams.StreamsEngine(model, tokenizer, CONFIG)
    engine.fill(4)
    return engine


def frame() -> np.ndarray:
    return np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_same_share_talks_at_any_time(streams, share):
    traffic = streams.random_traffic(32, share, 12.0, 2.0, [frame()], "What is it?")
    talking = list(traffic.talking)
    assert sum(talking) == pytest.approx(32 * share, abs=1)
    prompts, frames = np.zeros(32, int), np.zeros(32, int)
    times = [push.at for push in traffic.pushes]
    assert times == sorted(times)
    for push in traffic.pushes:
        if isinstance(push.what, bool):
            talking[push.stream] = push.what
            assert sum(talking) == pytest.approx(32 * share, abs=2)
        elif isinstance(push.what, str):
            # It may talk before it is asked, or it would answer by silence.
            assert talking[push.stream]
            prompts[push.stream] += 1
        else:
            frames[push.stream] += 1
    assert set(frames) == {24}
    assert set(prompts) <= {2, 3}


def test_figures_of_events(streams):
    listener = streams.Listener(Clock(is_realtime=True), 2)
    # The opening has been asked at 0; later prompts when they are pushed.
    listener.voices[1].asked.append(2.0)

    def stamp(slot):
        return {"slot": slot, "stream_time": 0.0, "wall_time": 0.0}

    for at, event in [
        (0.5, Turn(**stamp(1), prompt="")),
        (1.0, Text(**stamp(1), text="a")),
        (1.1, FrameSeen(**stamp(1), index=0, time=0.9)),
        (1.3, Text(**stamp(1), text="b")),
        (1.4, Silence(**stamp(1))),
        (2.1, Turn(**stamp(1), prompt="?")),
        (2.5, Text(**stamp(1), text="c")),
        (2.6, Text(**stamp(1), text="d")),
        (2.6, FrameSeen(**stamp(0), index=0, time=2.5)),
        (2.7, Silence(**stamp(0))),
        (3.0, End(**stamp(1), reason="stopped", counters=Counters(frames_dropped=3))),
    ]:
        listener.hear(event, at)
    assert [slot for _, slot, _ in listener.ttft] == [1, 1]
    assert [wait for *_, wait in listener.ttft] == pytest.approx([1.0, 0.5])
    # Silence answers a frame too, and a gap is within an answer.
    assert [wait for *_, wait in listener.frame_to_token] == pytest.approx([0.4, 0.2])
    assert [gap for *_, gap in listener.gaps] == pytest.approx([0.3, 0.1])
    assert listener.voices[1].end.counters.frames_dropped == 3
    figures = streams.figures_of(listener, 2.0, 3.0)
    assert figures["tok_s"]["mean"] == pytest.approx(10)
    assert figures["ttft_ms"]["mean"] == pytest.approx(500)
    assert figures["frame_to_token_ms"]["samples"] == 1


def test_floors_follow_what_the_engine_was_called_for(streams, engine):
    floors = streams.Floors(engine, CEILINGS)
    flops = sum(work.matmul for work in forward_work(engine.model_config, tokens=1, frames=0))
    # Many tokens are bound by operations, few by bytes.
    assert floors.step(10**6, 0, 0) == pytest.approx(1e6 * flops / 1e11)
    few = floors.step(1, 0, 0)
    assert few > flops / 1e11
    decoder = engine.model_config.decoder
    token = 2 * decoder.num_kv_heads * decoder.head_dim * engine.dtype.itemsize
    token *= decoder.num_self_attention_layers
    assert floors.step(1, 0, 50) - few == pytest.approx(50 * token / 1e9)
    held, tokens = engine.held, engine.held + engine.said
    compaction = Compaction(CONFIG.memory, 8)
    calls = [
        (0.0, [Row([PENDING]), None, None, None]),
        (1.0, 3),
        (2.0, [Row([PENDING, 1, 2], kept=range(20)), Row([PENDING, 5], [0], compact=compaction), None, None]),
    ]
    assert floors.of(calls, 0.0, 1.0) == pytest.approx(floors.step(1, held[0], tokens[0] + 1))
    assert floors.of(calls, 1.0, 2.0) == pytest.approx(3 * floors.encode)
    appended = floors.step(5, held[0] + 7 + 1, 20 + 3 + tokens[1] + 2)
    assert floors.of(calls, 2.0, 3.0) == pytest.approx(appended)


@pytest.mark.parametrize("bank_dtype", [None, "int8", "fp8"])
def test_host_and_device_agree_on_what_streams_begin_with(streams, model, tokenizer, bank_dtype):
    import streaming  # pyright: ignore[reportMissingImports]

    config = EngineConfig(4, 128, 8, MemoryConfig(bank_dtype=bank_dtype))
    engine = streams.StreamsEngine(model, tokenizer, config)
    engine.fill(4)
    state, scheduler = engine.start().stream, Scheduler(engine)
    opened = [scheduler.open(system=None) for _ in range(4)]
    for stream in opened:
        streams.tell(stream, engine)
    lengths = [stream.conversation.text_length for stream in opened]
    assert lengths == state.text.length.tolist() == [64, 80, 96, 112]
    rooms = [8 - stream.conversation._contents.frame_room for stream in opened]
    assert [model.config.vectors_per_frame * room for room in rooms] == state.bank.length.tolist()
    assert rooms == [4, 5, 6, 7]
    values = state.bank.values[0]
    numbers = np.asarray(values.values if bank_dtype else values, np.float32)
    assert np.isfinite(numbers).all()
    assert 0.9 < numbers.std() / (streaming.SPREAD if bank_dtype else 1) < 1.1


def test_more_slots_than_there_is_memory_for_are_refused(streams, model, monkeypatch):
    monkeypatch.setattr(streams, "memory_bytes", lambda _: 10**9)
    streams.check_room(0, model, CONFIG)
    with pytest.raises(ConfigError, match="no room"):
        streams.check_room(10**9, model, CONFIG)
    monkeypatch.setattr(streams, "capacity", lambda *_, **__: 3)
    with pytest.raises(ConfigError, match="slots can be at most 3"):
        streams.check_room(0, model, CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("talking", ["all", "quarter"])
def test_streams_run_without_a_compilation(streams, engine, talking):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event == streams.COMPILED else None
    )
    pictures = streams.random_frames(2, (28, 28, 3))
    engine.talk([True] * 4)
    engine.warm_up(pictures[0].shape)
    assert compiled
    made = []
    take = engine.step

    def step(state, rows, features=None):
        made.extend(row for row in rows if row)
        return take(state, rows, features)

    engine.step = step
    floors = streams.Floors(engine, CEILINGS)
    traffic = streams.random_traffic(4, streams.SHARES[talking], 4.0, 4.0, pictures, "What is it?")
    scheduling = streams.SchedulerConfig(max_stall_ms=40)
    row = streams.live(engine, floors, traffic, 1.0, 3.0, compiled, scheduling)
    assert row["compiled"] == 0
    assert "failures" not in row
    assert row["frames_pushed"] == 64
    assert row["frames_seen"] > 0
    assert row["tokens"] > 0
    assert row["ttft_ms"]["samples"] > 0
    assert row["share"] > 0
    # Of streams of such an age, banks and texts are compacted.
    assert any(row.compact for row in made)
    assert any(row.kept is not None for row in made)
    assert streams.line({"streams": 4, "measure": "live"} | row)


@pytest.mark.slow
def test_steps_are_timed_from_the_same_caches_which_never_overflow(streams, engine):
    """The last slots are nearly full at first. What compiles does so in the first block of each kind."""
    compiled, begun, blocks, framed = streams.note_compilations(), [], [], []
    start, take = engine.start, engine.step

    def start_noted():
        begun.append(len(compiled))
        blocks.append([])
        framed.append([])
        return start()

    def step_noted(state, rows, features=None):
        assert all(row.kept is row.compact is None for row in rows if row)
        blocks[-1].append([len(row.tokens) if row else 0 for row in rows])
        framed[-1].append([len(row.frames) if row else 0 for row in rows])
        state, sampled = take(state, rows, features)
        text, appended = state.stream.text, np.sum(blocks[-1], 0)
        np.testing.assert_array_equal(text.length, engine.held + engine.said + appended)
        assert (np.asarray(text.length) <= CONFIG.text_capacity).all()
        # Frames beyond the capacity would be dropped.
        held = (engine.held + np.sum(framed[-1], 0)) * engine.model_config.vectors_per_frame
        np.testing.assert_array_equal(state.stream.bank.length, held)
        return state, sampled

    engine.start, engine.step = start_noted, step_noted
    row = streams.micro(engine, "What is it?", streams.random_frames(1, (28, 28, 3))[0], encodes=True)
    assert len(blocks) == 5 * (streams.BLOCKS + 1)
    assert begun[5] == begun[-1]
    decode, changing, with_frame, with_prompt, blocking = (np.array(blocks[i]) for i in range(5))
    assert decode.tolist() == blocking.tolist() == np.ones((streams.STEPS, 4)).tolist()
    assert changing.sum(1).tolist() == [3] * streams.STEPS
    # Each slot pauses.
    assert (changing.sum(0) < streams.STEPS).all()
    assert with_frame.sum(1).tolist() == [5] * streams.STEPS
    assert [np.sum(block) for block in framed[:5]] == [0, 0, streams.STEPS, 0, 0]
    assert with_prompt.sum(1).tolist() == [4 + row["prompt_tokens"]] * streams.STEPS
    # Each slot gets prompts.
    assert (with_prompt.sum(0) > streams.STEPS).all()
    assert row["step_ms"] > 0
    assert row["blocking_ms"] > 0
    assert all(host > 0 for host in row["host_ms"].values())
    assert row["prompt_adds_ms"] == row["with_prompt_ms"] - row["step_ms"]
    assert row["encode_ms"].keys() == row["encode_sent_ms"].keys()
    assert streams.line({"streams": 4, "measure": "micro"} | row)
    with pytest.raises(ConfigError, match="which --text-capacity must hold"):
        streams.micro(engine, "What is it? " * 20, frame(), encodes=False)


@pytest.mark.slow
def test_the_wire_beside_the_scheduler(tmp_path):
    result = tmp_path / "result.json"
    sizes = {"frame-size": "64x36", "fill": 4, "bank-capacity": 8, "text-capacity": 512, "streams": 4}
    flags = {"preset": "moss_tiny", "seconds": 6, "scheduler-seconds": 6, "warm-seconds": 1, "out": result}
    command = [sys.executable, "benchmarks/wire.py", *(f"--{k}={v}" for k, v in (sizes | flags).items())]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=600)
    found = json.loads(result.read_text(encoding="utf-8"))
    rows = {row["measure"]: row for row in found["rows"]}
    assert list(rows) == ["scheduler", "wire"]
    for row in rows.values():
        assert row["frames_pushed"] == 28
        assert row["frames_dropped"] == row["compiled"] == 0
        # Some are pushed just before the end.
        assert row["frames_waiting"] + row["prompts_waiting"] <= 4
        assert row["tokens"] > row["ttft_ms"]["samples"] >= 3
    wire = rows["wire"]
    assert wire["errors"] == []
    assert wire["slow_clients"] == wire["failures"] == 0
    assert wire["frames_waiting"] == wire["prompts_waiting"] == 0
    assert 0 < wire["server_ttft_ms"]["p50"] <= wire["ttft_ms"]["p95"]
    difference = wire["ttft_ms"]["p95"] - rows["scheduler"]["ttft_ms"]["p95"]
    assert found["ttft_p95_difference_ms"] == pytest.approx(difference)
