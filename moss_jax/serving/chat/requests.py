"""Request types of chat completions, and their parsing."""

import itertools
from typing import Annotated, Literal

import pydantic

from moss_jax.serving.chat.errors import ApiError


class _Object(pydantic.BaseModel):
    """Base of request types; unknown fields are ignored, as OpenAI's own servers ignore new ones."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class TextPart(_Object):
    """A text part."""

    type: Literal["text"]
    text: str


class Url(_Object):
    """A data URL, an allowed `file://` or `https://` URL, or the id of an uploaded file."""

    url: str


class ImagePart(_Object):
    """An image part."""

    type: Literal["image_url"]
    image_url: Url | str


class VideoPart(_Object):
    """A video part."""

    type: Literal["video_url"]
    video_url: Url | str


class FileReference(_Object):
    """An uploaded file, or one inlined in the request."""

    file_id: str | None = None
    file_data: str | None = None


class FilePart(_Object):
    """A file part: an image or a video."""

    type: Literal["file"]
    file: FileReference


type Part = Annotated[TextPart | ImagePart | VideoPart | FilePart, pydantic.Field(discriminator="type")]


class Message(_Object):
    """A turn of the dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(_Object):
    """Options of a streamed answer."""

    include_usage: bool = False


class VideoOptions(_Object):
    """Video sampling options, with the names that vLLM's clients use."""

    num_frames: int | None = pydantic.Field(None, ge=1)
    fps: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)


class MediaOptions(_Object):
    """Media options of a request."""

    video: VideoOptions = pydantic.Field(default_factory=lambda: VideoOptions.model_validate({}))


class ChatRequest(_Object):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message] = pydantic.Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=0)
    repetition_penalty: float | None = pydantic.Field(None, ge=0.1, le=10)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    media_io_kwargs: MediaOptions = MediaOptions()
    # Fields that would change the answer but are not implemented.
    tools: list | None = None
    functions: list | None = None
    logprobs: bool | None = None
    logit_bias: dict | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict | None = None
    modalities: list[str] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self) -> None:
        """Rejects fields that are not implemented.

        Raises:
          ApiError: a field is not implemented; the error names it.
        """
        if self.n not in (None, 1):
            raise ApiError("n must be 1: a request has one answer", param="n", code="unsupported_value")
        if not all(self.stops) or len(self.stops) > 16:
            raise ApiError("stop is up to 16 texts that are not empty", param="stop", code="invalid_value")
        kind = (self.response_format or {}).get("type", "text")
        given = {
            "tools": self.tools,
            "functions": self.functions,
            "logprobs": self.logprobs,
            "logit_bias": self.logit_bias,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "response_format": None if kind == "text" else kind,
            "modalities": None if self.modalities in (None, ["text"]) else self.modalities,
        }
        for name, value in given.items():
            if value:
                raise ApiError(f"{name} is not supported", param=name, code="unsupported_parameter")


def parse_request(body: bytes) -> ChatRequest:
    """Parses the body of a request.

    Raises:
      ApiError: the body is invalid; the error names the field.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        # In a union, the deepest error belongs to the variant that was meant.
        found = error.errors(include_url=False, include_context=False, include_input=False)
        deepest = max(found, key=lambda each: len(each["loc"]))
        # Drops type names from the path, and merges a part's type with the field of the same name.
        names = [str(part) for part in deepest["loc"] if str(part).isidentifier() or isinstance(part, int)]
        place = ".".join(name for name, _ in itertools.groupby(names) if name not in ("str", "Url"))
        where = f"{place}: " if place else ""
        raise ApiError(f"{where}{deepest['msg']}", param=place or None, code=deepest["type"]) from None


def text_length(message: Message) -> int:
    """Total characters of a message's texts."""
    if isinstance(message.content, list):
        return sum(len(part.text) for part in message.content if isinstance(part, TextPart))
    return len(message.content or "")
