"""Soak of the live server: streams at one frame a second over the wire, for as long as one likes.

`python benchmarks/soak.py --streams 4 --seconds 3600 --output soak` starts `serve.py` in a process of its own,
shows every stream a table that changes, asks now and then, and writes soak.json and soak.png: frames that were
dropped, the server's resident memory over time, and how long answers took. With --url it takes a server that
runs, whose memory is then read from its /metrics.
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

from moss_jax.worlds.tabletop import make_scene, render

ROOT = Path(__file__).parents[1]
QUESTION = "What is on the table?"


@dataclasses.dataclass
class Figures:
    """What one stream has gone through; times in seconds."""

    sent: int = 0
    fates: dict[str, int] = dataclasses.field(default_factory=dict)
    ttft: list[float] = dataclasses.field(default_factory=list)
    latency: list[float] = dataclasses.field(default_factory=list)
    characters: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)


async def stream(url: str, frames: list[bytes], args: argparse.Namespace, number: int) -> Figures:
    """Runs one stream to its end."""
    figures, asked = Figures(), None
    sent: dict[int, float] = {}
    async with websockets.connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", max_size=None) as client:
        negotiation = {"type": "realtime", "moss": {"version": 1, "frames": "binary"}}
        await client.send(json.dumps({"type": "session.update", "session": negotiation}))

        async def receive() -> None:
            nonlocal asked
            async for text in client:
                event = json.loads(text)
                now = time.monotonic()
                if event["type"] == "conversation.item.done" and "moss" in event and event["moss"].get("frame"):
                    frame = event["moss"]["frame"]
                    figures.fates[frame["fate"]] = figures.fates.get(frame["fate"], 0) + 1
                    figures.latency.append(now - sent.pop(frame["index"]))
                elif event["type"] == "response.output_text.delta":
                    figures.characters += len(event["delta"])
                    if asked is not None:
                        figures.ttft.append(now - asked)
                        asked = None
                elif event["type"] == "response.created" and not event["moss"]["asked"]:
                    # The text that comes is not of the question.
                    continue
                elif event["type"] == "error":
                    figures.errors.append(event["error"]["code"])
                elif event["type"] == "moss.end":
                    return

        receiving = asyncio.create_task(receive())
        # The streams do not beat at once.
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
    """Reads the server's memory and its counters again and again."""
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
