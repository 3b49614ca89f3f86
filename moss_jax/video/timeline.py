"""The timeline of a video stream: when each of its packets is shown, in seconds since the first.

It is derived from the packets alone, so that decoding a file and demuxing it give the same times.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
from av.container import InputContainer

# Seconds. A larger jump of the timestamps starts a new piece, which is appended to the previous one: a jump
# backwards in any file, forwards in formats that are made to be cut and joined. In other formats a gap is
# kept, unless it is absurdly long. The limits are those of ffmpeg.
_BACKWARDS, _FORWARDS, _ABSURD = 0.1, 10.0, 30 * 3600.0
_AVFMT_TS_DISCONT = 0x0200
# Packets by which presentation order may differ from decoding order.
_MAX_REORDERING = 16
# Packets to look through for a keyframe.
_MAX_LEAD_IN = 1000


@dataclasses.dataclass(frozen=True)
class Span:
    """Presentation time and duration of a frame, in seconds; see `Frame`."""

    time: float
    duration: float | None


class Stamp(NamedTuple):
    """Presentation time of a packet; sorts in presentation order.

    Attributes:
      time: in units of the stream, continuous over the whole file.
      index: index of the packet.
      ticks: duration in units of the stream, if it is known.
    """

    time: int
    index: int
    ticks: int | None


def stamped_packets(
    container: InputContainer, stream: av.VideoStream
) -> Iterator[tuple[av.Packet, Stamp | None]]:
    """Demuxes a stream from its first keyframe on, and makes its timestamps continuous.

    The timestamps in the packets are changed accordingly, so that those of the decoded frames are continuous
    too.

    Yields:
      Packets in decoding order, with the stamp of those that are shown: others are skipped by an edit list,
      depend on what comes before the first keyframe, or flush the decoder.
    """
    unit, typical = float(stream.time_base), _typical_ticks(stream)
    forwards = _FORWARDS if int(container.format.flags) & _AVFMT_TS_DISCONT else _ABSURD
    # AVI has decoding timestamps only; presentation timestamps that libav derives are wrong with B-frames.
    # Then frames come without timestamps and take the stamps in order.
    is_avi, reorders = container.format.name == "avi", stream.codec_context.has_b_frames
    has_pts = not (is_avi and reorders)
    offset = 0
    # Of the packets so far: the latest timestamps and the ends, in decoding and in presentation order.
    latest_dts = latest_pts = first = None
    end_dts = end_pts = 0
    recent_pts = collections.deque(maxlen=_MAX_REORDERING)
    for index, packet in enumerate(_from_keyframe(container.demux(stream))):
        if not packet.size:
            yield packet, None
            continue
        dts, pts = packet.dts, packet.dts if is_avi else packet.pts
        if pts is None and not reorders:
            pts = dts
        # Where libav does not know the decoding timestamps, they are missing or copies of the others.
        clock = None if reorders and dts == pts and not is_avi else dts
        if clock is not None:
            if latest_dts is not None and not -_BACKWARDS <= (clock + offset - latest_dts) * unit <= forwards:
                offset = end_dts - clock
        elif pts is not None and latest_pts is not None:
            is_back = len(recent_pts) == _MAX_REORDERING and pts + offset < min(recent_pts)
            if is_back or (pts + offset - latest_pts) * unit > forwards:
                offset = end_pts - pts
        ticks = packet.duration or typical
        if clock is not None:
            latest_dts = _later(latest_dts, clock + offset)
            end_dts = latest_dts + ticks
        time = end_pts
        if pts is not None:
            time = pts + offset
            latest_pts = _later(latest_pts, time)
            recent_pts.append(time)
        end_pts = max(end_pts, time + ticks)
        first = time if first is None else first
        packet.dts = None if dts is None else dts + offset
        packet.pts = time if has_pts and pts is not None else None
        is_shown = not packet.is_discard and (time >= first or not has_pts)
        yield packet, Stamp(time, index, packet.duration or None) if is_shown else None


def spans[Item](stamped: Iterable[tuple[Stamp, Item]], stream: av.VideoStream) -> Iterator[tuple[Span, Item]]:
    """Converts stamps in presentation order to times and durations in seconds; the first time is 0."""
    unit, typical = float(stream.time_base), _typical_ticks(stream) * float(stream.time_base)
    total = stream.duration * unit if stream.duration else math.inf
    origin, time, end = None, 0.0, 0.0
    for stamp, item in stamped:
        origin = stamp.time if origin is None else origin
        elapsed = (stamp.time - origin) * unit
        time = elapsed if elapsed >= time else end
        duration = stamp.ticks * unit if stamp.ticks else None
        if duration and time < total:
            # MP4 stores durations in decoding order: with B-frames the last one may be another frame's.
            duration = min(duration, total - time)
        yield Span(time, duration), item
        end = time + (duration or typical)


def _from_keyframe(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Skips the packets before the first keyframe, which cannot be decoded, unless no packet is marked so."""
    lead_in = []
    for packet in packets:
        if packet.is_keyframe:
            return itertools.chain([packet], packets)
        lead_in.append(packet)
        if len(lead_in) == _MAX_LEAD_IN:
            break
    return itertools.chain(lead_in, packets)


def _typical_ticks(stream: av.VideoStream) -> int:
    """Duration of a frame whose packet has none, in units of the stream."""
    rate = float(stream.average_rate) if stream.average_rate else 25.0
    return max(1, round(1 / (rate * float(stream.time_base))))


def _later(known: int | None, other: int) -> int:
    return other if known is None else max(known, other)
