"""What an application of LiveKit Agents does: shows a frame by `push_video`, asks, and prints the answer.

Run by a test in an environment of its own, with the server's address.
"""

import asyncio
import sys

from livekit import rtc
from livekit.agents import llm
from livekit.plugins import openai


async def main(url: str) -> None:
    model = openai.realtime.RealtimeModel(
        model="moss", modalities=["text"], base_url=f"{url}/v1", api_key="none", turn_detection=None
    )
    session = model.session()
    session.on("error", lambda error: print("error:", error, file=sys.stderr))
    await session.update_instructions("You watch birds.")
    for _ in range(3):
        frame = rtc.VideoFrame(32, 24, rtc.VideoBufferType.RGBA, bytes([128, 128, 128, 255]) * 32 * 24)
        session.push_video(frame)
        await asyncio.sleep(0.05)
    context = session.chat_ctx.copy()
    context.add_message(role="user", content="Is there a cat?")
    await session.update_chat_ctx(context)
    for instructions in (None, "Is there a cat, really?"):
        options = {} if instructions is None else {"instructions": instructions}
        generation: llm.GenerationCreatedEvent = await session.generate_reply(**options)
        async for message in generation.message_stream:
            print("".join([piece async for piece in message.text_stream]))
    await session.aclose()
    await model.aclose()


asyncio.run(main(sys.argv[1]))
