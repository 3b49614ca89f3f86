"""Reads conversations about videos from JSON files, checks them, and turns them into tokens.

A row has turns in `messages` (role, content) or `conversations` (from, value), and its media in `videos` and
`images`. An offline row has a marker for each medium. A real-time row has a marker for each frame of its one
video, whose path and times stand in `videos[0]`, behind `[RealTime QA][INFO]`.
"""

import collections
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from moss_jax.config import ConfigError, ConversationConfig, FrameSampling
from moss_jax.text import Tokenizer, TokenizerError, header
from moss_jax.video import VideoError, VideoInfo, probe

MALFORMED = "malformed row"
MISMATCH = "mismatch of frames and markers"
MISSING = "missing video"
UNREADABLE = "unreadable video"
TOO_MANY = "too many frames"
TOO_LONG = "too long"
NOTHING = "nothing to learn"

_REALTIME = "[RealTime QA][INFO]"
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKERS_IN_FRONT = re.compile(r"(?:\s*(?:<\|video\|>|<\|image\|>))*\s*")
_TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_PROBING_THREADS = 16
# Seconds that a frame may be taken after the end of a video, where its last picture stands.
_PAST_THE_END = 1.0
# A report names all dropped rows up to so many, beyond that a few for each reason.
_NAMED_AT_ALL, _NAMED_OF_MANY = 20, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """A video or image of a row.

    Attributes:
      times: at which frames are taken, in seconds; None if the clip is sampled as a whole.
    """

    path: str
    times: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A conversation as tokens, without its frames.

    Attributes:
      name: file and index.
      tokens: with one `<|image|>` for each medium of an offline row, and for each frame of a real-time one.
      learnt: tokens that are targets.
      movable: indices of the frames inside running text.
      media: in the order of their markers; of a real-time row, the one video that all frames are of.
      max_tokens, max_frames: how many there are at most when every medium has its frames.
    """

    name: str
    tokens: Int[np.ndarray, " T"]
    learnt: Bool[np.ndarray, " T"]
    movable: Int[np.ndarray, " M"]
    media: tuple[Medium, ...]
    realtime: bool
    max_tokens: int
    max_frames: int


@dataclasses.dataclass(frozen=True)
class DropReport:
    """How many rows can be used, and why the others cannot.

    Attributes:
      dropped: number of rows by reason.
      examples: the first rows of each reason, a sentence for each that names it.
    """

    kept: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]

    @property
    def dropped_share(self) -> float:
        """Share of all rows; 0 if there are none."""
        dropped = sum(self.dropped.values())
        return dropped / max(1, self.kept + dropped)

    def __str__(self) -> str:
        total = sum(self.dropped.values())
        lines = [f"{self.kept} of {self.kept + total} rows can be used"]
        shown = _NAMED_AT_ALL if total <= _NAMED_AT_ALL else _NAMED_OF_MANY
        for reason, count in self.dropped.items():
            lines.append(f"{count} dropped, {reason}:")
            lines += [f"  {example}" for example in self.examples[reason][:shown]]
            if count > shown:
                lines.append(f"  and {count - shown} more")
        return "\n".join(lines)


class _Dropped(Exception):
    """A row cannot be used."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A row before its media are looked at."""

    tokens: np.ndarray
    learnt: np.ndarray
    movable: np.ndarray
    media: tuple[Medium, ...]
    num_markers: int
    realtime: bool


def read_rows(
    config: ConversationConfig, sampling: FrameSampling, tokenizer: Tokenizer
) -> tuple[list[Row], DropReport]:
    """Reads the rows of all files and the headers of their media, and drops what cannot be used.

    Raises:
      ConfigError: a file is not there or is no list of rows in JSON.
    """
    drafts: list[tuple[str, _Draft | _Dropped]] = []
    for name, data in _read_files(config.files):
        try:
            drafts.append((name, _parse(data, config.media_root, tokenizer)))
        except _Dropped as dropped:
            drafts.append((name, dropped))
    infos = _probe_all(
        medium.path for _, draft in drafts if isinstance(draft, _Draft) for medium in draft.media
    )
    rows: list[Row] = []
    examples: dict[str, list[str]] = collections.defaultdict(list)
    dropped: collections.Counter[str] = collections.Counter()
    for name, draft in drafts:
        try:
            if isinstance(draft, _Dropped):
                raise draft
            rows.append(_finish(name, draft, infos, config, sampling))
        except _Dropped as error:
            dropped[error.reason] += 1
            if len(examples[error.reason]) < _NAMED_AT_ALL:
                examples[error.reason].append(f"{name}: {error}")
    return rows, DropReport(len(rows), dict(dropped.most_common()), dict(examples))


def _read_files(files: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for file in files:
        try:
            with open(file, encoding="utf-8") as stream:
                rows = json.load(stream)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{file} is no JSON: {error}") from error
        if not isinstance(rows, list):
            raise ConfigError(f"{file} must hold a list of rows, not {type(rows).__name__}")
        yield from ((f"{file}[{i}]", row) for i, row in enumerate(rows))


# --------------------------------------------------------------------------------- from JSON to tokens


def _parse(data: Any, media_root: str, tokenizer: Tokenizer) -> _Draft:
    turns = list(_turns(data))
    videos, images = _paths(data, "videos"), _paths(data, "images")
    realtime = bool(videos) and videos[0].startswith(_REALTIME)
    try:
        tokens, learnt, movable = _tokenize(turns, tokenizer, realtime=realtime)
    except TokenizerError as error:
        raise _Dropped(MALFORMED, str(error)) from error

    special = tokenizer.special
    markers = tokens[(tokens == special.video) | (tokens == special.image)].tolist()
    tokens[tokens == special.video] = special.image  # as a live session has it
    num_videos, num_images = markers.count(special.video), markers.count(special.image)
    if num_images != len(images):
        raise _Dropped(MISMATCH, f"it has {num_images} <|image|> for {len(images)} images")
    if realtime:
        if images:
            raise _Dropped(
                MALFORMED, "it is a real-time row, whose frames all come from its video, with images"
            )
        medium = _realtime_medium(videos[0].removeprefix(_REALTIME), media_root)
        if num_videos != len(medium.times):
            raise _Dropped(MISMATCH, f"it has {num_videos} <|video|> for {len(medium.times)} times of frames")
        return _Draft(tokens, learnt, movable, (medium,), num_videos, realtime)
    if num_videos != len(videos):
        raise _Dropped(MISMATCH, f"it has {num_videos} <|video|> for {len(videos)} videos")
    clips = (Medium(os.path.join(media_root, path)) for path in videos)
    stills = (Medium(os.path.join(media_root, path), times=(0.0,)) for path in images)
    media = tuple(next(clips if marker == special.video else stills) for marker in markers)
    return _Draft(tokens, learnt, movable[:0], media, len(markers), realtime)


def _turns(data: Any) -> Iterator[tuple[str, str]]:
    """Role and content of each turn."""
    if not isinstance(data, dict):
        raise _Dropped(MALFORMED, f"it is no object with messages, but {type(data).__name__}")
    messages = data.get("messages", data.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise _Dropped(MALFORMED, "it has no messages")
    if data.get("system"):
        messages = [{"role": "system", "content": data["system"]}, *messages]
    for message in messages:
        if not isinstance(message, dict):
            raise _Dropped(MALFORMED, f"a message is no object, but {type(message).__name__}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _Dropped(MALFORMED, f"a message has the unknown role {role!r}")
        if not isinstance(content, str):
            raise _Dropped(MALFORMED, f"the content of a message is no text, but {type(content).__name__}")
        yield _ROLES[role], content


def _paths(data: dict, key: str) -> list[str]:
    paths = data.get(key) or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise _Dropped(MALFORMED, f"its {key} are no list of paths")
    return paths


def _tokenize(
    turns: list[tuple[str, str]], tokenizer: Tokenizer, *, realtime: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, which of them are learnt, and the frames inside running text."""
    special = tokenizer.special
    tokens, learnt, movable = [special.begin_of_text], [False], []
    for role, content in turns:
        opening, body = header(tokenizer, role), tokenizer.encode_marked(_tidy(role, content))
        start, speaks = len(tokens) + len(opening), role == "assistant"
        tokens += [*opening, *body, special.eot]
        learnt += [False] * len(opening)
        learnt += [speaks and token not in (special.video, special.image) for token in body]
        # In a stream the turn stays open; only a user's prompt ends it.
        learnt += [speaks and not realtime]
        if speaks:
            is_text = [token not in tokenizer.control_ids for token in body]
            movable += [
                start + i
                for i, token in enumerate(body[1:-1], start=1)
                if token == special.video and is_text[i - 1] and is_text[i + 1]
            ]
    tokens, learnt = np.array(tokens, np.int32), np.array(learnt, bool)
    if not learnt[tokens != special.eot].any():
        raise _Dropped(NOTHING, "its assistant says nothing")
    return tokens, learnt, np.array(movable, np.int32)


def _tidy(role: str, content: str) -> str:
    """Strips the text, a prompt's also between the frames in front of it, as a live session does."""
    content = content.strip()
    if role == "user":
        in_front = _MARKERS_IN_FRONT.match(content).group()
        content = "".join(in_front.split()) + content[len(in_front) :]
    return content


def _realtime_medium(text: str, media_root: str) -> Medium:
    try:
        info = json.loads(text)
        path, stamps = info["video_path"], info["time_info"]
        times = tuple(_seconds(stamp) for stamp in stamps)
        path = os.path.join(media_root, path)
    except (ValueError, TypeError, KeyError) as error:
        raise _Dropped(MALFORMED, f"what follows {_REALTIME} cannot be read: {error!r}") from error
    if any(a > b for a, b in itertools.pairwise(times)):
        raise _Dropped(MALFORMED, "the times of its frames go back")
    return Medium(path, times)


def _seconds(stamp: str) -> float:
    match = _TIME.fullmatch(stamp)
    if not match:
        raise ValueError(f"{stamp!r} is no time such as 01:30")
    hours, minutes, seconds = match.groups(default="0")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


# ---------------------------------------------------------------------------------------------- media


def _probe_all(paths: Iterable[str]) -> dict[str, VideoInfo | _Dropped]:
    unique = list(dict.fromkeys(paths))
    with futures.ThreadPoolExecutor(_PROBING_THREADS) as threads:
        return dict(zip(unique, threads.map(_probe, unique), strict=True))


def _probe(path: str) -> VideoInfo | _Dropped:
    try:
        return probe(path)
    except VideoError as error:
        return _Dropped(UNREADABLE if os.path.exists(path) else MISSING, str(error))


def _finish(
    name: str,
    draft: _Draft,
    infos: dict[str, VideoInfo | _Dropped],
    config: ConversationConfig,
    sampling: FrameSampling,
) -> Row:
    num_frames = sum(_frames_at_most(medium, infos[medium.path], sampling) for medium in draft.media)
    limit = config.frame_buckets[-1]
    if num_frames > limit:
        raise _Dropped(TOO_MANY, f"it has up to {num_frames} frames; the largest of frame_buckets is {limit}")
    num_tokens = len(draft.tokens) - draft.num_markers + num_frames
    if num_tokens > config.max_tokens:
        raise _Dropped(TOO_LONG, f"it has up to {num_tokens} tokens; max_tokens is {config.max_tokens}")
    return Row(
        name, draft.tokens, draft.learnt, draft.movable, draft.media, draft.realtime, num_tokens, num_frames
    )


def _frames_at_most(medium: Medium, info: VideoInfo | _Dropped, sampling: FrameSampling) -> int:
    if isinstance(info, _Dropped):
        raise info
    if medium.times is None:
        if info.is_image:
            return 1
        if info.duration is None:
            return sampling.max_frames
        # One more, because the header's duration is not to be trusted to the last frame.
        count = math.ceil(info.duration * sampling.fps) + 1
        return min(max(count, sampling.min_frames), sampling.max_frames)
    if len(medium.times) > sampling.max_frames:
        raise _Dropped(TOO_MANY, f"it has {len(medium.times)} frames; max_frames is {sampling.max_frames}")
    if medium.times and info.duration is not None and medium.times[-1] > info.duration + _PAST_THE_END:
        raise _Dropped(
            MISMATCH,
            f"it has a frame at {medium.times[-1]:g} s, but {medium.path} ends at {info.duration:.1f} s",
        )
    return len(medium.times)
