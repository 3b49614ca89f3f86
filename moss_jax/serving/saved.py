"""Files of saved sessions in the state folder: a description with the dialogue, and the stream."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from moss_jax.stream.saved import SavedStream, write_stream


@dataclasses.dataclass(frozen=True)
class SavedSession:
    """A session in the state folder: its stream's file and its dialogue."""

    stream: Path
    token_hash: str
    dialogue: dict[str, Any]


def token_hash(token: str) -> str:
    """The hash of a token that is stored in a file."""
    return hashlib.sha256(token.encode()).hexdigest()


def prepare_folder(folder: Path, keep_seconds: float) -> None:
    """Creates the state folder and removes expired files from it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.glob("sess_*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > keep_seconds:
                path.unlink()


def write_session(folder: Path, session_id: str, token: str, saved: SavedStream, dialogue: dict) -> None:
    """Writes a session; on failure the files of its previous save stay intact.

    Raises:
      OSError: a file cannot be written.
    """
    stream = folder / f"{session_id}.{secrets.token_hex(4)}.stream"
    description = folder / f"{session_id}.json"
    part = folder / f"{session_id}.json.part"
    try:
        write_stream(stream, saved)
        content = {"stream": stream.name, "token": token_hash(token), "dialogue": dialogue}
        with open(part, "w", encoding="utf-8", opener=_private) as file:
            json.dump(content, file)
        part.replace(description)
    except OSError:
        for path in (stream, part):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    for old in folder.glob(f"{session_id}.*.stream"):
        if old != stream:
            old.unlink(missing_ok=True)


def read_session(folder: Path, session_id: str) -> SavedSession:
    """Reads a session's description; the stream is read by `Scheduler.open`."""
    content = json.loads((folder / f"{session_id}.json").read_text(encoding="utf-8"))
    return SavedSession(folder / content["stream"], content["token"], content["dialogue"])


def remove_session(folder: Path, session_id: str) -> None:
    """Removes the files of a session."""
    for path in folder.glob(f"{session_id}.*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
