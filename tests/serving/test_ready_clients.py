"""Clients that others have written, unchanged."""

import asyncio
import base64
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from openai import AsyncOpenAI
from servers import data_url

GREY = np.full((24, 32, 3), 128, np.uint8)
LIVEKIT = Path(__file__).parent / "livekit_client.py"


def test_the_realtime_client_of_openai(served):
    async def talk() -> None:
        client = AsyncOpenAI(
            api_key="none", base_url=f"{served.url}/v1", websocket_base_url=f"ws{served.url[4:]}/v1"
        )
        async with client.realtime.connect(model="moss") as connection:
            created = await connection.recv()
            assert created.type == "session.created"
            await connection.session.update(
                session={
                    "type": "realtime",
                    "output_modalities": ["text"],
                    "instructions": "You watch birds.",
                }
            )
            assert (await connection.recv()).session.instructions == "You watch birds."
            image = {"type": "input_image", "image_url": data_url(GREY)}
            question = {"type": "input_text", "text": "Tell me a story."}
            item = {"type": "message", "role": "user", "content": [image, question]}
            await connection.conversation.item.create(item=item)
            await connection.response.create()
            said, statuses = "", []
            async for event in connection:
                # Every event is one that the client knows.
                assert type(event).__module__.startswith("openai.types.realtime"), event
                if event.type == "response.output_text.delta":
                    said += event.delta
                    if len(said) > 50 and not statuses:
                        statuses.append("cancel")
                        await connection.response.cancel()
                if event.type == "response.done":
                    statuses.append(event.response.status)
                    if event.response.status == "cancelled":
                        assert event.response.status_details.reason == "client_cancelled"
                        text = {"type": "input_text", "text": "Is there a cat?"}
                        item = {"type": "message", "role": "user", "content": [text]}
                        await connection.conversation.item.create(item=item)
                        await connection.response.create()
                    else:
                        assert event.response.output[0].content[0].text == "A cat. It sleeps."
                        assert event.response.usage.output_tokens > 0
                        break
            assert statuses == ["cancel", "cancelled", "completed"]
            await connection.input_audio_buffer.append(audio=base64.b64encode(b"\0\0").decode())
            event = await connection.recv()
            while event.type != "error":
                event = await connection.recv()
            assert (event.error.type, event.error.message) == (
                "invalid_request_error",
                "audio is not supported",
            )

    asyncio.run(talk())


@pytest.fixture(scope="module")
def livekit_python(tmp_path_factory) -> str:
    """Python of an environment with LiveKit Agents: that of LIVEKIT_PYTHON, or one made for the test."""
    if python := os.environ.get("LIVEKIT_PYTHON"):
        return python
    folder = tmp_path_factory.mktemp("livekit")
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "livekit-agents[openai]>=1.8,<2"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("livekit-agents cannot be installed here")
    return python


@pytest.mark.slow
def test_livekit_agents_push_video(served, livekit_python):
    command = [livekit_python, LIVEKIT, served.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["A cat. It sleeps."] * 2
    assert "error" not in done.stderr
    assert served.hub.counters.frames_by_fate["received"] == 3
