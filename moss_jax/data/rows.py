"""Reads, validates and tokenizes conversations about videos from JSON and JSON-lines files.

A row has turns in `messages` (role, content) or `conversations` (from, value), and its media in `videos` and
`images`. An offline row has a marker for each medium. A real-time row has a marker for each frame of its only
video, whose path and frame times are JSON in `videos[0]`, after `[RealTime QA][INFO]`. `chat.MARKERS` has the
markers of each role; all else in a row, `<|eot_id|>` included, is text. docs/data.md shows rows of each form.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from moss_jax.config import ConfigError, ConversationConfig, FrameSampling
from moss_jax.text import Tokenizer, TokenizerError, header
from moss_jax.text.chat import MARKERS, Role
from moss_jax.video import VideoError, clip_times, probe

MALFORMED = "malformed row"
MISMATCH = "mismatch of frames and markers"
MISSING = "missing video"
UNREADABLE = "unreadable video"
TOO_MANY = "too many frames"
TOO_LONG = "too long"
NOTHING = "no targets"

_REALTIME = "[RealTime QA][INFO]"
_MESSAGES = ("messages", "conversations")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_LEADING_MARKERS = re.compile(r"(?:\s*(?:<\|video\|>|<\|image\|>))*\s*")
_TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_READING_THREADS = 16
# Seconds after the end of a video at which its last picture may still be sampled.
_MAX_OVERRUN = 1.0
# A report names every dropped row if there are at most _MAX_NAMED, otherwise the first few of each reason.
_MAX_NAMED, _NAMED_PER_REASON = 20, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """A video or image of a row.

    Attributes:
      path: path of the file.
      times: sampling times of its frames, in seconds.
    """

    path: str
    times: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRow:
    """A tokenized conversation, without its frames.

    Attributes:
      name: file and index.
      tokens: with one `<|image|>` for each medium of an offline row, and for each frame of a real-time one.
      is_target: mask of the tokens that are targets.
      swappable: indices of the frames inside running text.
      media: in the order of their markers; a real-time row has one video.
      realtime: whether it is a real-time row.
      num_tokens: number of tokens once every medium is expanded to its frames.
    """

    name: str
    tokens: Int[np.ndarray, " T"]
    is_target: Bool[np.ndarray, " T"]
    swappable: Int[np.ndarray, " M"]
    media: tuple[Medium, ...]
    realtime: bool
    num_tokens: int

    @property
    def num_frames(self) -> int:
        """Number of frames of all media."""
        return sum(len(medium.times) for medium in self.media)


@dataclasses.dataclass(frozen=True)
class DropReport:
    """Numbers of usable and dropped rows.

    Attributes:
      kept: number of usable rows.
      dropped: number of dropped rows by reason.
      examples: for each reason, one sentence for each of the first rows.
    """

    kept: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]

    @property
    def dropped_share(self) -> float:
        """Dropped rows as a share of all; 0 if there are no rows."""
        dropped = sum(self.dropped.values())
        return dropped / max(1, self.kept + dropped)

    def __str__(self) -> str:
        total = sum(self.dropped.values())
        lines = [f"{self.kept} of {self.kept + total} rows are usable"]
        shown = _MAX_NAMED if total <= _MAX_NAMED else _NAMED_PER_REASON
        for reason, count in self.dropped.items():
            lines.append(f"{count} dropped, {reason}:")
            lines += [f"  {example}" for example in self.examples[reason][:shown]]
            if count > shown:
                lines.append(f"  and {count - shown} more")
        return "\n".join(lines)


class _Dropped(Exception):
    """A row is unusable."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


# Path and sampling times of a medium; None for a clip, whose times depend on its length.
type _MediumDraft = tuple[str, tuple[float, ...] | None]


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A row before its media are read."""

    tokens: np.ndarray
    is_target: np.ndarray
    swappable: np.ndarray
    media: tuple[_MediumDraft, ...]
    num_markers: int
    realtime: bool


def read_rows(
    config: ConversationConfig, sampling: FrameSampling, tokenizer: Tokenizer
) -> tuple[list[TrainingRow], DropReport]:
    """Reads the rows of all files and the packets of their media, and drops unusable rows.

    Times come from packets, because the duration in a file's header may be missing or wrong; only the first
    frame is decoded.

    Raises:
      ConfigError: a file cannot be read or holds no rows.
    """
    drafts: list[tuple[str, _Draft | _Dropped]] = []
    for name, data in _read_files(config.files):
        try:
            drafts.append((name, _parse(data, config.media_root, tokenizer)))
        except _Dropped as error:
            drafts.append((name, error))
    media = [medium for _, draft in drafts if isinstance(draft, _Draft) for medium in draft.media]
    lengths = _for_each(_length, (path for path, times in media if times is not None))
    clips = _for_each(
        functools.partial(clip_times, sampling=sampling), (path for path, times in media if times is None)
    )
    rows: list[TrainingRow] = []
    examples: dict[str, list[str]] = collections.defaultdict(list)
    dropped: collections.Counter[str] = collections.Counter()
    for name, draft in drafts:
        try:
            if isinstance(draft, _Dropped):
                raise draft
            rows.append(_finish(name, draft, lengths, clips, config, sampling))
        except _Dropped as error:
            dropped[error.reason] += 1
            if len(examples[error.reason]) < _MAX_NAMED:
                examples[error.reason].append(f"{name}: {error}")
    return rows, DropReport(len(rows), dict(dropped.most_common()), dict(examples))


def _read_files(files: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for file in files:
        try:
            with open(file, "rb") as stream:
                rows = _parse_rows(stream.read())
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is not valid JSON or JSON lines: {error}") from error
        if not isinstance(rows, list):
            raise ConfigError(f"{file} must hold a list of rows, not {type(rows).__name__}")
        yield from ((f"{file}[{i}]", row) for i, row in enumerate(rows))


def _parse_rows(content: bytes) -> Any:
    """Parses a JSON array or JSON lines, one row a line, in UTF-8, UTF-16 or UTF-32, with or without BOM.

    Raises:
      ValueError: it is neither.
    """
    text = content.decode(json.detect_encoding(content))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
    else:
        # A single line of JSON lines is a valid JSON text, too.
        return [value] if isinstance(value, dict) and any(key in value for key in _MESSAGES) else value
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


# --------------------------------------------------------------------------------- from JSON to tokens


def _parse(data: Any, media_root: str, tokenizer: Tokenizer) -> _Draft:
    turns = list(_turns(data))
    videos, images = _paths(data, "videos"), _paths(data, "images")
    realtime = bool(videos) and videos[0].startswith(_REALTIME)
    try:
        tokens, is_target, swappable = _tokenize(turns, tokenizer, realtime=realtime)
    except TokenizerError as error:
        raise _Dropped(MALFORMED, str(error)) from error

    special = tokenizer.special
    markers = tokens[(tokens == special.video) | (tokens == special.image)].tolist()
    tokens[tokens == special.video] = special.image  # as in a live session
    num_videos, num_images = markers.count(special.video), markers.count(special.image)
    if num_images != len(images):
        raise _Dropped(MISMATCH, f"it has {num_images} <|image|> for {len(images)} images")
    if realtime:
        if images:
            raise _Dropped(
                MALFORMED, "it is a real-time row, whose frames must all be of its video, but has images"
            )
        path, times = _realtime_video(videos[0].removeprefix(_REALTIME), media_root)
        if num_videos != len(times):
            raise _Dropped(MISMATCH, f"it has {num_videos} <|video|> for {len(times)} frame times")
        return _Draft(tokens, is_target, swappable, ((path, times),), num_videos, realtime)
    if num_videos != len(videos):
        raise _Dropped(MISMATCH, f"it has {num_videos} <|video|> for {len(videos)} videos")
    clips = ((os.path.join(media_root, path), None) for path in videos)
    stills = ((os.path.join(media_root, path), (0.0,)) for path in images)
    media = tuple(next(clips if marker == special.video else stills) for marker in markers)
    return _Draft(tokens, is_target, swappable[:0], media, len(markers), realtime)


def _turns(data: Any) -> Iterator[tuple[Role, str]]:
    """Yields role and content of each turn."""
    if not isinstance(data, dict):
        raise _Dropped(MALFORMED, f"it must be an object with messages, not {type(data).__name__}")
    messages = next((data[key] for key in _MESSAGES if key in data), None)
    if not isinstance(messages, list) or not messages:
        raise _Dropped(MALFORMED, "it has no messages")
    if data.get("system"):
        messages = [{"role": "system", "content": data["system"]}, *messages]
    for message in messages:
        if not isinstance(message, dict):
            raise _Dropped(MALFORMED, f"a message must be an object, not {type(message).__name__}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _Dropped(MALFORMED, f"a message has the unknown role {role!r}")
        if not isinstance(content, str):
            raise _Dropped(MALFORMED, f"the content of a message must be text, not {type(content).__name__}")
        yield _ROLES[role], content


def _paths(data: dict, key: str) -> list[str]:
    paths = data.get(key) or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise _Dropped(MALFORMED, f"its {key} must be a list of paths")
    return paths


def _tokenize(
    turns: list[tuple[Role, str]], tokenizer: Tokenizer, *, realtime: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, the mask of targets, and the indices of frames inside running text."""
    special = tokenizer.special
    tokens, is_target, swappable = [special.begin_of_text], [False], []
    for role, content in turns:
        opening = header(tokenizer, role)
        body = tokenizer.encode_marked(_strip(role, content), MARKERS[role])
        start, speaks = len(tokens) + len(opening), role == "assistant"
        tokens += [*opening, *body, special.eot]
        is_target += [False] * len(opening)
        is_target += [speaks and token not in (special.video, special.image) for token in body]
        # In a stream the turn stays open; only a user's prompt ends it.
        is_target += [speaks and not realtime]
        if speaks:
            is_text = [token not in tokenizer.control_ids for token in body]
            swappable += [
                start + i
                for i, token in enumerate(body[1:-1], start=1)
                if token == special.video and is_text[i - 1] and is_text[i + 1]
            ]
    tokens, is_target = np.array(tokens, np.int32), np.array(is_target, bool)
    if not is_target[tokens != special.eot].any():
        raise _Dropped(NOTHING, "its assistant says nothing")
    return tokens, is_target, np.array(swappable, np.int32)


def _strip(role: Role, content: str) -> str:
    """Strips whitespace as a live session does: in a prompt also around the leading frame markers."""
    content = content.strip()
    if role == "user" and (leading := _LEADING_MARKERS.match(content)):
        content = "".join(leading.group().split()) + content[leading.end() :]
    return content


def _realtime_video(text: str, media_root: str) -> tuple[str, tuple[float, ...]]:
    """Parses the path and the frame times of a real-time row's video."""
    try:
        info = json.loads(text)
        path, stamps = info["video_path"], info["time_info"]
        times = tuple(_seconds(stamp) for stamp in stamps)
        path = os.path.join(media_root, path)
    except (ValueError, TypeError, KeyError) as error:
        raise _Dropped(MALFORMED, f"the JSON after {_REALTIME} is invalid: {error!r}") from error
    if any(a > b for a, b in itertools.pairwise(times)):
        raise _Dropped(MALFORMED, "its frame times do not ascend")
    return path, times


def _seconds(stamp: str) -> float:
    match = _TIME.fullmatch(stamp)
    if not match:
        raise ValueError(f"{stamp!r} is not a time such as 01:30")
    hours, minutes, seconds = match.groups(default="0")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


# ---------------------------------------------------------------------------------------------- media


def _for_each[Result](read: Callable[[str], Result], paths: Iterable[str]) -> dict[str, Result | _Dropped]:
    """Reads each file once; returns the result, or why it is unusable, by path."""

    def attempt(path: str) -> Result | _Dropped:
        try:
            return read(path)
        except VideoError as error:
            missing = isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)
            return _Dropped(MISSING if missing else UNREADABLE, str(error))

    unique = list(dict.fromkeys(paths))
    with futures.ThreadPoolExecutor(_READING_THREADS) as threads:
        return dict(zip(unique, threads.map(attempt, unique), strict=True))


def _length(path: str) -> float:
    return probe(path).duration


def _finish(
    name: str,
    draft: _Draft,
    lengths: dict[str, float | _Dropped],
    clips: dict[str, list[float] | _Dropped],
    config: ConversationConfig,
    sampling: FrameSampling,
) -> TrainingRow:
    media = []
    for path, times in draft.media:
        if times is None:
            times = tuple(_found(clips[path]))
        else:
            _check_times(path, times, _found(lengths[path]), sampling)
        media.append(Medium(path, times))
    num_frames = sum(len(medium.times) for medium in media)
    limit = config.frame_buckets[-1]
    if num_frames > limit:
        raise _Dropped(TOO_MANY, f"it has {num_frames} frames; the largest of frame_buckets is {limit}")
    num_tokens = len(draft.tokens) - draft.num_markers + num_frames
    if num_tokens > config.max_tokens:
        raise _Dropped(TOO_LONG, f"it has {num_tokens} tokens; max_tokens is {config.max_tokens}")
    return TrainingRow(
        name, draft.tokens, draft.is_target, draft.swappable, tuple(media), draft.realtime, num_tokens
    )


def _found[Result](result: Result | _Dropped) -> Result:
    if isinstance(result, _Dropped):
        raise result
    return result


def _check_times(path: str, times: tuple[float, ...], length: float, sampling: FrameSampling) -> None:
    """Checks the frame times of a real-time row."""
    if sampling.max_frames is not None and len(times) > sampling.max_frames:
        raise _Dropped(TOO_MANY, f"it has {len(times)} frames; max_frames is {sampling.max_frames}")
    if times and times[-1] > length + _MAX_OVERRUN:
        raise _Dropped(MISMATCH, f"it has a frame at {times[-1]:g} s, but {path} ends at {length:.1f} s")
