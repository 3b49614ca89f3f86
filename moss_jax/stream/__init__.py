"""Live streams: the engine, the scheduler and session that drive it, and the events they emit."""

from moss_jax.stream.admission import Refused, Reservation
from moss_jax.stream.completion import DialogueTurn
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.events import (
    Counters,
    End,
    Event,
    Failed,
    Figures,
    FrameDropped,
    FrameSeen,
    FramesSkipped,
    FrameUnseen,
    Interrupted,
    NearCapacity,
    NotAsked,
    Silence,
    Text,
    Turn,
    TurnLimit,
)
from moss_jax.stream.limits import stream_config
from moss_jax.stream.offline import answer_offline
from moss_jax.stream.rows import PENDING, Compaction, Row
from moss_jax.stream.saved import SavedStreamError
from moss_jax.stream.scheduler import Scheduler
from moss_jax.stream.session import Session
from moss_jax.stream.step import NOT_FINITE, EngineState, Sampled
from moss_jax.stream.stream import SessionError, Stream

__all__ = [
    "NOT_FINITE",
    "PENDING",
    "Compaction",
    "Counters",
    "DialogueTurn",
    "End",
    "Engine",
    "EngineLike",
    "EngineState",
    "Event",
    "Failed",
    "Figures",
    "FrameDropped",
    "FrameSeen",
    "FrameUnseen",
    "FramesSkipped",
    "Interrupted",
    "NearCapacity",
    "NotAsked",
    "Refused",
    "Reservation",
    "Row",
    "Sampled",
    "SavedStreamError",
    "Scheduler",
    "Session",
    "SessionError",
    "Silence",
    "Stream",
    "Text",
    "Turn",
    "TurnLimit",
    "answer_offline",
    "stream_config",
]
