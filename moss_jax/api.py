"""One-call API for notebooks and scripts: ask about a video, or watch it as a stream.

Each process compiles its programs, unless JAX_COMPILATION_CACHE_DIR enables JAX's persistent cache.
"""

import dataclasses
import os
from collections.abc import Generator, Iterable

from moss_jax.config import (
    DecoderWeights,
    EncoderWeights,
    EngineConfig,
    FrameSampling,
    SessionConfig,
    TokenSampling,
)
from moss_jax.convert import open_model
from moss_jax.memory.policies import FULL
from moss_jax.stream import End, Engine, Event, Text, answer_offline
from moss_jax.terminal.feed import adapt_rate, open_session, report_skipped, run_session
from moss_jax.terminal.transcript import ENDINGS
from moss_jax.text import chat
from moss_jax.video import clip_times, fit_frames, sample_at, sample_file


def open_engine(
    checkpoint: str | os.PathLike | None = None,
    *,
    weights: DecoderWeights | None = None,
    encoder_weights: EncoderWeights | None = None,
    config: EngineConfig | None = None,
    sampling: TokenSampling | None = None,
) -> Engine:
    """Loads a checkpoint into an engine of one stream, for several calls of `ask` and `watch`.

    Args:
      checkpoint: folder in Hugging Face layout or repo id; None for the small model that ships with the
        package.
      weights, encoder_weights: quantisation of the decoder and of the vision encoder.
      config: capacities.
      sampling: how tokens are sampled.

    Raises:
      CheckpointError, TokenizerError: the checkpoint cannot be used.
    """
    opened = open_model(checkpoint, weights=weights, encoder_weights=encoder_weights)
    return Engine(opened.model, opened.tokenizer, config, sampling)


def ask(
    video: str | os.PathLike,
    prompt: str,
    *,
    checkpoint: str | os.PathLike | None = None,
    engine: Engine | None = None,
    frames: FrameSampling | None = None,
    system: str | None = None,
    max_tokens: int = 512,
) -> str:
    """Answers a prompt about a whole video or image.

        moss_jax.ask("clip.mp4", "What is on the table?")

    Args:
      checkpoint: see `open_engine`; it is loaded and compiled at each call.
      engine: takes the place of the checkpoint.
      frames: which frames of the video the model sees; one a second by default, however long it is.
      system: system prompt; None for none, as offline dialogues are trained.
      max_tokens: limit on the answer.

    Raises:
      CheckpointError, TokenizerError: the checkpoint cannot be used.
      SessionError: the prompt does not fit.
      VideoError: the video cannot be read.
      FloatingPointError: the model's logits are not finite.
    """
    capacity = engine.config if engine else EngineConfig()
    # Before a model is loaded, to reject a bad file immediately.
    times = clip_times(video, frames_that_fit(frames or FrameSampling(max_frames=None), capacity))
    engine = engine or open_engine(checkpoint)
    # Resized while they are read: at full size, a chunk of 4K frames may exceed the memory.
    clip = fit_frames(sample_at(video, times), engine.model_config.vision.image_size)
    *events, end = answer_offline(
        engine, clip, prompt, num_frames=len(times), system=system, max_tokens=max_tokens
    )
    if isinstance(end, End) and end.reason == "not_finite":
        raise FloatingPointError(ENDINGS[end.reason])
    return "".join(event.text for event in events if isinstance(event, Text))


def watch(
    video: str | os.PathLike,
    prompts: str | Iterable[str | tuple[float, str]] = (),
    *,
    checkpoint: str | os.PathLike | None = None,
    engine: Engine | None = None,
    frames: FrameSampling | None = None,
    session: SessionConfig | None = None,
    system: str | None = chat.SYSTEM_PROMPT,
) -> Generator[Event]:
    """Watches a video or image as a live stream; yields the events as they happen.

        for event in moss_jax.watch("clip.mp4", [(4.0, "What do you see?")]):
            print(event)

    Args:
      prompts: texts asked at the beginning, or (seconds, text) pairs; without any, the model watches unasked.
        A prompt that is due after the end of the stream yields an event `NotAsked`.
      checkpoint: see `open_engine`; it is loaded and compiled at each call.
      engine: takes the place of the checkpoint.
      frames: their rate; with the session's `selection.max_fps`, the rate while nothing changes. The bounds
        on their number apply to `ask` alone.
      session: clock and limits; by default lockstep, in which events depend only on the input, with 10 s for
        the last answer.
      system: system prompt; None for none.

    Raises:
      CheckpointError, TokenizerError: the checkpoint cannot be used.
      SessionError: a prompt does not fit.
      VideoError: the video cannot be read.
    """
    skipped: list[float] = []
    session, frames = adapt_rate(session or SessionConfig(tail_seconds=10.0), frames or FrameSampling())
    shown = sample_file(video, frames, skipped.append)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    timed = [(0.0, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    engine = engine or open_engine(checkpoint)
    opened, later = open_session(engine, timed, session, system=system)
    return report_skipped(run_session(opened, shown, later), skipped)


def frames_that_fit(frames: FrameSampling, capacity: EngineConfig) -> FrameSampling:
    """Limits the frames of a clip to the capacity of the bank, if its policy evicts none."""
    if capacity.memory.policy != FULL:
        return frames
    most = (
        capacity.bank_capacity
        if frames.max_frames is None
        else min(frames.max_frames, capacity.bank_capacity)
    )
    return dataclasses.replace(frames, max_frames=most)
