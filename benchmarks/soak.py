"""Soak test of the live server: streams at one frame a second over the network, for any duration.

`python benchmarks/soak.py --streams 4 --seconds 3600 --output soak` starts `serve.py` in a separate process,
shows every stream a changing table, asks a question now and then, and writes soak.json and soak.png: dropped
frames, the server's resident memory over time, and answer latencies. With --url it uses a server that is
already running.
"""

import argparse
import asyncio
import dataclasses
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import websockets
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from moss_jax.worlds.tabletop import evaluation_stream

ROOT = Path(__file__).parents[1]
QUESTION = "What is on the table?"


@dataclasses.dataclass
class Figures:
    """Measurements of one stream; times in seconds."""

    sent: int = 0
    fates: dict[str, int] = dataclasses.field(default_factory=dict)
    ttft: list[float] = dataclasses.field(default_factory=list)
    latency: list[float] = dataclasses.field(default_factory=list)
    characters: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)


async def stream(url: str, frames: list[bytes], args: argparse.Namespace, number: int) -> Figures:
    """Runs one stream to its end."""
    figures, asked, answers = Figures(), None, False
    sent: dict[int, float] = {}
    async with websockets.connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", max_size=None) as client:
        negotiation = {"type": "realtime", "moss": {"version": 1, "frames": "binary"}}
        await client.send(json.dumps({"type": "session.update", "session": negotiation}))

        async def receive() -> None:
            nonlocal asked, answers
            async for text in client:
                event = json.loads(text)
                now = time.monotonic()
                if (
                    event["type"] == "conversation.item.done"
                    and "moss" in event
                    and event["moss"].get("frame")
                ):
                    frame = event["moss"]["frame"]
                    figures.fates[frame["fate"]] = figures.fates.get(frame["fate"], 0) + 1
                    figures.latency.append(now - sent.pop(frame["index"]))
                elif event["type"] == "response.output_text.delta":
                    figures.characters += len(event["delta"])
                    if asked is not None and answers:
                        figures.ttft.append(now - asked)
                        asked = None
                elif event["type"] == "response.created":
                    # Unprompted text is not an answer.
                    answers = event["moss"]["asked"]
                elif event["type"] == "error":
                    figures.errors.append(event["error"]["code"])
                elif event["type"] == "moss.end":
                    return

        receiving = asyncio.create_task(receive())
        # Streams are staggered, so that frames do not arrive at the same time.
        begin = time.monotonic() + number / args.streams / args.fps
        for index in range(int(args.seconds * args.fps)):
            await asyncio.sleep(max(0.0, begin + index / args.fps - time.monotonic()))
            if receiving.done():
                figures.errors.append("the connection is over")
                break
            sent[index] = time.monotonic()
            figures.sent += 1
            await client.send(struct.pack(">d", float("nan")) + frames[index % len(frames)])
            if index % args.ask_every == args.ask_every // 2:
                content = [{"type": "input_text", "text": QUESTION}]
                item = {"type": "message", "role": "user", "content": content}
                await client.send(json.dumps({"type": "conversation.item.create", "item": item}))
                asked = time.monotonic()
                await client.send(json.dumps({"type": "response.create"}))
        await client.send(json.dumps({"type": "moss.finish"}))
        await asyncio.wait_for(receiving, 60)
    return figures


async def watch(url: str, samples: list[dict[str, float]], seconds: float) -> None:
    """Polls the server's memory and its counters."""
    begin = time.monotonic()
    async with httpx.AsyncClient() as client:
        while True:
            text = (await client.get(f"{url}/metrics")).text
            values = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
            samples.append(
                {
                    "time": round(time.monotonic() - begin, 1),
                    "resident": values["process_resident_memory_bytes"],
                    "files": values["process_open_fds"],
                    "text_tokens": values["moss_text_tokens"],
                }
            )
            await asyncio.sleep(seconds)


def tables(size: int, count: int) -> list[bytes]:
    """Renders frames of a changing table, as JPEG files."""
    files = []
    for rgb in evaluation_stream(0, 0, count).frames(size):
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


async def soak(url: str, args: argparse.Namespace) -> dict:
    """Runs the streams; returns the result, JSON-ready."""
    samples: list[dict[str, float]] = []
    frames = tables(args.size, 60)
    watching = asyncio.create_task(watch(url, samples, args.sample_seconds))
    begin = time.monotonic()
    try:
        all_figures = await asyncio.gather(*(stream(url, frames, args, n) for n in range(args.streams)))
    finally:
        watching.cancel()
    ttft, latency = ([x for f in all_figures for x in getattr(f, name)] for name in ("ttft", "latency"))
    fates: dict[str, int] = {}
    for figures in all_figures:
        for fate, count in figures.fates.items():
            fates[fate] = fates.get(fate, 0) + count
    # The first tenth is warm-up, which fills caches.
    settled = [s["resident"] for s in samples if s["time"] >= samples[-1]["time"] / 10]
    return {
        "streams": args.streams,
        "seconds": round(time.monotonic() - begin, 1),
        "fps": args.fps,
        "frames": {"sent": sum(f.sent for f in all_figures), **fates},
        "questions": len(ttft),
        "ttft_seconds": percentiles(ttft),
        "frame_latency_seconds": percentiles(latency),
        "characters": sum(f.characters for f in all_figures),
        "errors": [error for f in all_figures for error in f.errors],
        "resident_mib": {"begin": mib(settled[0]), "end": mib(settled[-1]), "most": mib(max(settled))},
        "resident_growth": round(settled[-1] / settled[0] - 1, 4),
        "files": {"begin": samples[0]["files"], "end": samples[-1]["files"]},
        "samples": samples,
        "ttft": [round(x, 4) for x in ttft],
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and tail percentiles of the values."""
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (50, 95, 99)} if values else {}


def mib(size: float) -> float:
    """Bytes as MiB."""
    return round(size / 2**20, 1)


def draw(result: dict, path: Path) -> None:
    """Draws memory over time, and answer latencies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    memory, waits = figure.subplots(1, 2)
    minutes = [sample["time"] / 60 for sample in result["samples"]]
    sizes = [sample["resident"] / 2**20 for sample in result["samples"]]
    memory.plot(minutes, sizes)
    memory.set(xlabel="minutes", ylabel="resident memory of the server, MiB", ylim=(0, 1.1 * max(sizes)))
    waits.hist(result["ttft"], bins=40)
    waits.axvline(result["ttft_seconds"].get("p95", 0), linestyle="--", label="95 %")
    waits.set(xlabel="question to first text, seconds", ylabel="questions", xlim=(0, None))
    waits.legend()
    dropped = result["frames"].get("dropped", 0)
    figure.suptitle(
        f"{result['streams']} streams, {result['seconds'] / 60:.0f} minutes, "
        f"{result['frames']['sent']} frames, {dropped} dropped"
    )
    figure.savefig(path, dpi=120)


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    """Starts a server; returns it once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moss_jax.serve", "--port", str(port), "--slots", str(args.streams)]
    server = subprocess.Popen([*command, *args.server], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    url = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode}")
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return server, url
        except httpx.HTTPError:
            pass
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--streams", type=int, default=4)
    add("--seconds", type=float, default=3600)
    add("--fps", type=float, default=1.0)
    add("--ask-every", type=int, default=20, help="frames between two questions of a stream")
    add("--size", type=int, default=112, help="side of the frames in pixels")
    add("--sample-seconds", type=float, default=5.0, help="between two looks at the server's memory")
    add("--url", help="of a server that runs, as http://127.0.0.1:8765 (default: one is started)")
    add("--output", default="soak", help="path of the result, without .json and .png")
    add("server", nargs="*", help="flags of the server that is started, after --")
    args = parser.parse_args()
    server, url = (None, args.url) if args.url else start(args)
    try:
        result = asyncio.run(soak(url, args))
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, Path(f"{args.output}.png"))
    print(json.dumps({k: v for k, v in result.items() if k not in ("samples", "ttft")}, indent=1))


if __name__ == "__main__":
    main()
