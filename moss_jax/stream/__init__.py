"""Live streams: the jitted steps, the session around them, and what it tells."""

from moss_jax.stream.engine import PENDING, Drawn, Engine, EngineState, Row
from moss_jax.stream.events import Counters, End, Event, Frame, Interrupted, Silence, Text, Turn
from moss_jax.stream.offline import answer
from moss_jax.stream.session import Session, SessionError

__all__ = [
    "PENDING",
    "Counters",
    "Drawn",
    "End",
    "Engine",
    "EngineState",
    "Event",
    "Frame",
    "Interrupted",
    "Row",
    "Session",
    "SessionError",
    "Silence",
    "Text",
    "Turn",
    "answer",
]
