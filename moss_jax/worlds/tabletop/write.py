"""Writes streams of the tabletop world as video files with their truth."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from moss_jax.text import Tokenizer
from moss_jax.worlds.tabletop.dialogue import Dialogue
from moss_jax.worlds.tabletop.render import paint, photograph
from moss_jax.worlds.tabletop.stream import TabletopStream

FPS = 15
# Noise of more levels than this would be most of an encoded file.
MAX_NOISE = 1.5


def write_video(stream: TabletopStream, path: Path, *, size: int) -> None:
    """Writes the stream as H.264, `size` pixels wide and high, 15 frames a second, changes in motion."""
    rng = np.random.default_rng(stream.noise)
    look = dataclasses.replace(stream.look, noise=min(stream.look.noise, MAX_NOISE))
    # The same stream is the same file. The encoder's output depends on the number of threads, and that of its
    # macroblock tree, where the processor has AVX-512, on what else is in memory.
    options = {"crf": "28", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        scene, picture = None, None
        # The last second stays in sight for as long as the others do.
        for i in range(FPS * stream.world.seconds):
            now = stream.world.scene(i / FPS)
            if now != scene:
                scene, picture = now, paint(now, look, size)
            frame = av.VideoFrame.from_ndarray(photograph(picture, look, rng, size), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def to_row(dialogue: Dialogue, tokenizer: Tokenizer, video: str) -> dict[str, Any]:
    """A dialogue as a real-time row in ShareGPT form, `<|video|>` for each frame.

    Args:
      video: path that the row names.
    """
    special = tokenizer.special
    marker = {special.silence: b"<|silence|>", special.image: b"<|video|>"}
    messages: list[dict[str, str]] = []
    # Bytes, as a character may be spread over several tokens.
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
    """What happens, what is asked, what is true at each second, and what is due when."""
    return {
        "seconds": stream.world.seconds,
        "events": [dataclasses.asdict(event) for event in stream.world.events],
        "facts": list(stream.world.truth),
        "requests": [
            {
                "time": r.time,
                "text": r.text,
                "kind": r.kind,
                "subject": r.subject,
                "awaited": dict(r.awaited.facts) if r.awaited else None,
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
