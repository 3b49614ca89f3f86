"""Export of tabletop streams: as video files, as training rows, and with their ground truth."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from moss_jax.text import Tokenizer
from moss_jax.worlds.tabletop.dialogue import Dialogue
from moss_jax.worlds.tabletop.stream import TabletopStream, take_photographs

FPS = 15
# Stronger noise, in 8-bit levels, would take up most of an encoded file.
MAX_NOISE = 1.5


def write_video(stream: TabletopStream, path: Path, *, size: int) -> None:
    """Writes a stream as H.264, `size` pixels wide and high, at 15 frames a second with changes in motion."""
    look = dataclasses.replace(stream.look, noise=min(stream.look.noise, MAX_NOISE))
    stream = dataclasses.replace(stream, look=look)
    # For reproducible files: the encoder's output depends on the number of threads, and, with its macroblock
    # tree on processors with AVX-512, on the contents of memory.
    options = {"crf": "28", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        # The last frame is shown for a second, like the others.
        photographs = take_photographs(stream, size=size, start=0, stop=stream.world.seconds, fps=FPS)
        for i, rgb in enumerate(photographs):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def to_row(dialogue: Dialogue, tokenizer: Tokenizer, video: str) -> dict[str, Any]:
    """Converts a dialogue to a real-time row in ShareGPT form, with `<|video|>` for each frame.

    Args:
      dialogue: to be converted.
      tokenizer: the tokenizer of the dialogue's tokens.
      video: path of the video in the row.
    """
    special = tokenizer.special
    marker = {special.silence: b"<|silence|>", special.image: b"<|video|>"}
    messages: list[dict[str, str]] = []
    # Bytes, since a character may take several tokens.
    content, role = b"", b""

    def close():
        if role:
            text = content.decode("utf-8", errors="replace").removeprefix("\n\n")
            messages.append({"role": role.decode(), "content": text})

    # A turn is header start, role, header end, blank line, content, end of turn.
    for token in dialogue.tokens[1:]:
        if token in (special.start_header, special.eot):
            close()
            content, role = b"", b""
        elif token == special.end_header:
            content, role = b"", content
        else:
            content += marker.get(token) or tokenizer.token_bytes(token)
    close()
    times = [f"{second // 60:02d}:{second % 60:02d}" for second in range(len(dialogue.frame_positions))]
    info = json.dumps({"video_path": video, "time_info": times})
    videos = [f"[RealTime QA][INFO]{info}", *["[RealTime QA][PLACEHOLDER]"] * (len(times) - 1)]
    return {"messages": messages, "images": [], "videos": videos}


def ground_truth(stream: TabletopStream, dialogue: Dialogue) -> dict[str, Any]:
    """The ground truth of a stream, JSON-ready: events, facts of each second, requests, ideal utterances."""
    return {
        "seconds": stream.world.seconds,
        "events": [dataclasses.asdict(event) for event in stream.world.events],
        "impairments": [dataclasses.asdict(impairment) for impairment in stream.impairments],
        "facts": list(stream.world.truth),
        "requests": [
            {
                "time": r.time,
                "text": r.text,
                "kind": r.kind,
                "subject": r.subject,
                "awaited": dict(r.awaited.facts) if r.awaited else None,
                "other": r.other,
                "span": r.span,
            }
            for r in stream.requests
        ],
        "utterances": [
            {
                "time": round(u.time, 3),
                "frame": u.frame,
                "due": u.due,
                "request": u.request,
                "text": u.sentence.text(),
                "facts": dict(u.sentence.facts),
                "cut": u.cut,
            }
            for u in dialogue.utterances
        ],
    }
