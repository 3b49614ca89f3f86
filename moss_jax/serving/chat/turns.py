"""Decodes the images and videos of a request into the frames of its turns."""

import asyncio
import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moss_jax.api import frames_that_fit
from moss_jax.config import ChatConfig, FrameSampling
from moss_jax.serving.chat.errors import ApiError, no_file
from moss_jax.serving.chat.requests import ChatRequest, FilePart, ImagePart, TextPart, VideoOptions, VideoPart
from moss_jax.serving.files import FileStore
from moss_jax.serving.hub import Hub
from moss_jax.serving.media import (
    MediaError,
    MediaLimits,
    decode_clip,
    decode_image,
    is_image,
    parse_data_url,
)
from moss_jax.serving.sources import fetch, local_path
from moss_jax.stream import DialogueTurn
from moss_jax.video import Frame, fit_frame


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a video of a request, as content or as a file.

    Attributes:
      param: path of the part in the request.
      is_temporary: whether the file is deleted with the request.
    """

    param: str
    content: bytes | None = None
    path: Path | None = None
    is_temporary: bool = False

    def head(self) -> bytes:
        """Its first bytes, for detecting the format."""
        if self.content is not None:
            return self.content[:16]
        assert self.path is not None
        with open(self.path, "rb") as file:
            return file.read(16)


class TurnReader:
    """Reads the turns of requests, with frames replacing images and videos.

    Args:
      hub: hub whose model gets the frames.
      config: limits of the endpoints.
      sampling: default frame sampling of videos.
      files: uploads that requests may refer to.
    """

    def __init__(self, hub: Hub, config: ChatConfig, sampling: FrameSampling, files: FileStore):
        self._hub, self._config, self._sampling, self._files = hub, config, sampling, files
        self._limits = MediaLimits(
            max_bytes=config.max_image_bytes,
            max_pixels=hub.config.max_image_pixels,
            max_seconds=config.max_video_seconds,
            decode_seconds=config.decode_seconds,
        )
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="clips")

    async def read(self, request: ChatRequest, owner: str) -> list[DialogueTurn]:
        """Decodes a request into dialogue turns.

        Args:
          owner: the client, whose uploads the request may refer to.
        """
        media: list[Medium] = []
        try:
            for number, message in enumerate(request.messages):
                for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                    if not isinstance(part, TextPart):
                        param = f"messages.{number}.content.{place}"
                        if message.role != "user":
                            raise ApiError("only the user shows images and videos", param=param)
                        if len(media) == self._config.max_frames:
                            raise ApiError(
                                f"a request has at most {self._config.max_frames} images", param=param
                            )
                        media.append(await self._medium(part, param, owner))
            frames = await self._decode(media, request.media_io_kwargs.video)
        finally:
            for medium in media:
                if medium.is_temporary and medium.path:
                    medium.path.unlink(missing_ok=True)
        clips = iter(frames)
        turns = []
        for message in request.messages:
            content: list[str | Frame] = []
            parts = message.content if isinstance(message.content, list) else [message.content or ""]
            for part in parts:
                text = part.text if isinstance(part, TextPart) else part if isinstance(part, str) else None
                if text is None:
                    content += next(clips)
                elif content and isinstance(content[-1], str):
                    content[-1] += f"\n{text}"
                else:
                    content.append(text)
            turns.append(DialogueTurn("system" if message.role == "developer" else message.role, content))
        return turns

    async def _medium(self, part: ImagePart | VideoPart | FilePart, param: str, owner: str) -> Medium:
        """Resolves a part to its content or file."""
        limit = self._config.max_image_bytes if isinstance(part, ImagePart) else self._config.max_video_bytes
        try:
            if isinstance(part, FilePart):
                if (part.file.file_id is None) == (part.file.file_data is None):
                    raise MediaError("a file has either a file_id or file_data")
                url = part.file.file_id or part.file.file_data or ""
            else:
                given = part.image_url if isinstance(part, ImagePart) else part.video_url
                url = given if isinstance(given, str) else given.url
            scheme = url[:8].partition(":")[0].lower()
            if scheme == "data":
                content = (await asyncio.to_thread(parse_data_url, url, max_bytes=limit))[1]
            elif scheme == "file":
                path = await asyncio.to_thread(local_path, url, self._config.file_roots)
                return Medium(param, path=path)
            elif scheme in ("http", "https"):
                load = functools.partial(
                    fetch,
                    url,
                    hosts=self._config.fetch_hosts,
                    max_bytes=limit,
                    seconds=self._config.fetch_seconds,
                )
                content = await asyncio.to_thread(load)
            elif url.startswith("file-"):
                if (stored := self._files.get(url, owner)) is None:
                    raise no_file("file_id")
                return Medium(param, path=stored.path)
            else:
                raise MediaError(
                    "a URL is a data: URL, one that this server allows, or an uploaded file's id"
                )
        except MediaError as error:
            raise ApiError(str(error), code="invalid_media", param=param) from None
        if is_image(content[:16]):
            return Medium(param, content=content)
        # The video decoder needs a file.
        path = self._files.new_path()
        medium = Medium(param, path=path, is_temporary=True)
        try:
            await asyncio.to_thread(path.write_bytes, content)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise ApiError("the disk is full", status=507, code="storage_full") from None
            raise
        return medium

    def _clip_sampling(self, options: VideoOptions, images: int, videos: int) -> FrameSampling:
        """Frame sampling of each video, such that all media of the request fit in the context."""
        own, most = (
            frames_that_fit(self._sampling, self._hub.scheduler.engine.config),
            self._config.max_frames,
        )
        share = max(1, (min(most, own.max_frames or most) - images) // max(1, videos))
        return FrameSampling(
            fps=options.fps or own.fps,
            min_frames=min(share, options.num_frames or own.min_frames),
            max_frames=min(share, options.num_frames or share),
        )

    async def _decode(self, media: list[Medium], options: VideoOptions) -> list[list[Frame]]:
        """Decodes all media in worker threads; returns the frames of each."""
        stopped = threading.Event()
        loop = asyncio.get_running_loop()
        pending: list[asyncio.Future[list[Frame]]] = []
        try:
            heads = await asyncio.gather(*(asyncio.to_thread(medium.head) for medium in media))
        except OSError:
            raise ApiError("a file is gone or cannot be read", code="invalid_media") from None
        images = sum(map(is_image, heads))
        sampling = self._clip_sampling(options, images, len(media) - images)

        def on_frame() -> None:
            if stopped.is_set() or self._hub.is_closing:
                raise MediaError("the request is over")

        def decode(medium: Medium, head: bytes) -> list[Frame]:
            on_frame()
            size = self._hub.image_size
            if is_image(head):
                return [Frame(fit_frame(self._image(medium), size), 0.0)]
            assert medium.path is not None
            if medium.path.stat().st_size > self._config.max_video_bytes:
                raise MediaError(f"the video has more than {self._config.max_video_bytes} bytes")
            return decode_clip(medium.path, sampling, size, limits=self._limits, on_frame=on_frame)

        try:
            for medium, head in zip(media, heads, strict=True):
                pending.append(loop.run_in_executor(self._decoders, decode, medium, head))
            frames = []
            for medium, future in zip(media, pending, strict=True):
                try:
                    frames.append(await future)
                except (MediaError, OSError) as error:
                    message = str(error) if isinstance(error, MediaError) else "the file cannot be read"
                    raise ApiError(message, code="invalid_media", param=medium.param) from None
            return frames
        finally:
            stopped.set()
            for future in pending:
                future.cancel()
            # Worker threads may still be reading files that are about to be deleted.
            await asyncio.gather(*pending, return_exceptions=True)

    def _image(self, medium: Medium) -> np.ndarray:
        content = medium.content
        if content is None:
            assert medium.path is not None
            if medium.path.stat().st_size > self._limits.max_bytes:
                raise MediaError(f"the image has more than {self._limits.max_bytes} bytes")
            content = medium.path.read_bytes()
        return decode_image(content, limits=self._limits)
