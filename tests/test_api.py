"""`moss_jax.ask` and `moss_jax.watch`: the small model on the demo clip."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import moss_jax
from moss_jax.config import EngineConfig, FrameSampling, SessionConfig
from moss_jax.stream import End, Engine, FrameSeen, FramesSkipped, SessionError, Text, Turn, answer_offline
from moss_jax.video import VideoError, fit_frame, sample_clip

DEMO = Path(__file__).resolve().parents[1] / "assets" / "demo.mp4"
EIGHT_SECONDS = FrameSampling(max_frames=8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The small model."""
    return moss_jax.open_engine(config=EngineConfig(text_capacity=1024, bank_capacity=16))


def test_ask_answers_about_the_clip(engine):
    answer = moss_jax.ask(DEMO, "What do you see?", engine=engine, frames=EIGHT_SECONDS)
    assert "ring" in answer
    assert answer == moss_jax.ask(str(DEMO), "What do you see?", engine=engine, frames=EIGHT_SECONDS)
    assert len(moss_jax.ask(DEMO, "What do you see?", engine=engine, max_tokens=2)) < len(answer)


def test_ask_holds_a_clip_at_the_size_of_the_tile(engine, monkeypatch):
    clips = []

    def answer(engine, frames, *args, **kwargs):
        clips.append(list(frames))
        return answer_offline(engine, clips[-1], *args, **kwargs)

    monkeypatch.setattr(moss_jax.api, "answer_offline", answer)
    answered = moss_jax.ask(DEMO, "What do you see?", engine=engine, frames=EIGHT_SECONDS)
    size = engine.model_config.vision.image_size
    full = sample_clip(DEMO, EIGHT_SECONDS)
    assert full[0].rgb.shape[0] > size
    for frame, other in zip(clips[0], full, strict=True):
        assert frame.time == other.time
        np.testing.assert_array_equal(frame.rgb, fit_frame(other.rgb, size))
    # What is said is the same as with frames that the device resizes.
    events = answer_offline(engine, full, "What do you see?")
    assert answered == "".join(event.text for event in events if isinstance(event, Text))


def test_frames_that_cannot_be_decoded_are_told(engine, tmp_path, caplog):
    with av.open(str(DEMO)) as container:
        wreck = [packet for packet in container.demux(video=0) if packet.size][30]
    path = tmp_path / "damaged.mp4"
    path.write_bytes(DEMO.read_bytes().replace(bytes(wreck), bytes(wreck.size)))
    frames = FrameSampling(fps=0.5, max_frames=16)
    events = list(moss_jax.watch(path, engine=engine, frames=frames, session=SessionConfig(tail_seconds=0)))
    (skipped,) = [event for event in events if isinstance(event, FramesSkipped)]
    assert (skipped.time, skipped.count) == (pytest.approx(float(wreck.pts * wreck.time_base)), 1)
    assert sum(isinstance(event, FrameSeen) for event in events) == 15
    assert "damaged.mp4 is damaged: skipped 1 frame" in caplog.text
    caplog.clear()
    moss_jax.ask(path, "What do you see?", engine=engine, frames=frames, max_tokens=1)
    assert "damaged.mp4 is damaged: skipped 1 frame" in caplog.text


def test_ask_refuses_to_answer_from_logits_that_are_not_finite(engine, monkeypatch):
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda frames: encode(frames) * float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        moss_jax.ask(DEMO, "What do you see?", engine=engine, frames=EIGHT_SECONDS)


def test_watch_yields_the_events_of_a_lockstep_session(engine):
    prompts = ["What number is on the card?", (4.0, "What do you see?")]
    every_other_second = FrameSampling(fps=0.5)
    events = list(moss_jax.watch(DEMO, prompts, engine=engine, frames=every_other_second))
    assert [(e.prompt, e.stream_time) for e in events if isinstance(e, Turn)] == [
        ("What number is on the card?", 0.0),
        ("What do you see?", 4.0),
    ]
    assert [e.index for e in events if isinstance(e, FrameSeen)] == list(range(15))
    assert "ring" in "".join(e.text for e in events if isinstance(e, Text) and e.stream_time >= 4)
    assert isinstance(events[-1], End)
    again = moss_jax.watch(DEMO, prompts, engine=engine, frames=every_other_second)
    assert [e.to_dict() | {"wall_time": 0} for e in again] == [e.to_dict() | {"wall_time": 0} for e in events]


def test_watch_takes_one_prompt_or_none(engine):
    config = SessionConfig(tokens_per_second=4, tail_seconds=0)
    options = {"engine": engine, "frames": FrameSampling(fps=0.1), "session": config}
    assert next(moss_jax.watch(DEMO, "What do you see?", **options)).prompt == "What do you see?"
    assert next(moss_jax.watch(DEMO, **options)).prompt == ""


def test_a_prompt_after_the_end_of_the_video_is_named(engine):
    config = SessionConfig(tokens_per_second=4, tail_seconds=0)
    prompts = [(12.0, "What do you see?"), (500.0, "And now?")]
    *events, late, end = moss_jax.watch(
        DEMO, prompts, engine=engine, frames=FrameSampling(fps=0.1), session=config
    )
    assert [e.prompt for e in events if isinstance(e, Turn)] == ["", "What do you see?"]
    assert (late.type, late.prompt, late.time) == ("not_asked", "And now?", 500.0)
    assert end.reason == "finished"


def test_bad_input_is_refused_before_the_first_event(engine, tmp_path):
    with pytest.raises(VideoError):
        moss_jax.watch(tmp_path / "missing.mp4")
    with pytest.raises(VideoError):
        moss_jax.ask(tmp_path / "missing.mp4", "What do you see?")
    with pytest.raises(SessionError, match="text capacity"):
        moss_jax.watch(DEMO, "what " * 2000, engine=engine)


def test_a_checkpoint_is_loaded(model, tokenizer, tmp_path):
    folder = moss_jax.save(tmp_path / "small", model)
    tokenizer.save(folder)
    events = moss_jax.watch(DEMO, checkpoint=folder, frames=FrameSampling(fps=0.1))
    assert isinstance(list(events)[-1], End)


def test_the_functions_are_imported_when_used_whatever_was_imported_before():
    code = """
import sys
import moss_jax
assert not {"av", "gin", "huggingface_hub", "matplotlib"} & set(sys.modules)
import moss_jax.terminal.feed, moss_jax.api, moss_jax.serve
from moss_jax import ask, watch
assert moss_jax.watch is watch is moss_jax.api.watch
assert moss_jax.ask is ask is moss_jax.api.ask
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_distribution():
    assert moss_jax.__version__ == importlib.metadata.version("moss_jax")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moss_jax.nothing
