"""Settings of the live server."""

import dataclasses

from moss_jax.config.fields import (
    convert_fields,
    require,
    require_at_least,
)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The live server.

    Attributes:
      grace_seconds: how long the stream of a lost connection waits to be resumed.
      replay_events: events that a session keeps, to send them again after a lost connection.
      queue_events: events that may wait for a client that reads slowly, before its connection is closed.
      max_message_bytes: of a message of a client.
      max_image_pixels: of a frame as it comes; all are scaled to fit the model.
      history_items: items of the conversation that can be asked for.
      decode_threads: threads that decode images.
      counters_seconds: between two `moss.counters` events.
      save_seconds: between two saves of a running stream, where there is a folder for them.
      keep_seconds: how long a saved stream that nobody resumes is kept.
      restart_seconds: after which streams can be opened again when a step has failed.
      drain_seconds: how long running streams may take to be told and saved at the end of the server.
      correction: the words by which the model begins to take back what it was saying; empty for none.
    """

    grace_seconds: float = 60.0
    replay_events: int = 4096
    queue_events: int = 1024
    max_message_bytes: int = 8 * 2**20
    max_image_pixels: int = 16 * 2**20
    history_items: int = 256
    decode_threads: int = 2
    counters_seconds: float = 1.0
    save_seconds: float = 30.0
    keep_seconds: float = 86400.0
    restart_seconds: float = 0.5
    drain_seconds: float = 10.0
    correction: str = " - wait, "

    def __post_init__(self):
        convert_fields(self)
        for name in ("counters_seconds", "save_seconds", "restart_seconds", "drain_seconds"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("grace_seconds", "keep_seconds"):
            require(getattr(self, name) >= 0, f"{name} must not be negative; got {getattr(self, name)}")
        require_at_least(
            1,
            self,
            "replay_events",
            "queue_events",
            "max_message_bytes",
            "max_image_pixels",
            "history_items",
            "decode_threads",
        )


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Chat completions of the live server.

    Attributes:
      max_tokens: of an answer whose request says nothing.
      max_streams: completions at once, so that live streams find free slots; 0 for as many as there are.
      queue: requests that may wait in line.
      queue_seconds: how long each may wait there, and then for a free stream.
      max_body_bytes: of a request, with its data URLs.
      max_image_bytes, max_video_bytes: of an image and of a video.
      max_video_seconds: of a video.
      max_frames: of all images and videos of a request; longer videos are sampled more sparsely.
      decode_seconds: that the decoding of a video may take.
      decode_threads: threads that decode videos.
      file_bytes, files: that uploads may have together, and their number.
      keep_seconds: how long an upload is kept.
      file_roots: folders below which `file://` URLs are allowed.
      fetch_hosts: from which media are fetched, each with `:port` if that is not the scheme's own.
      fetch_seconds: that it may take to fetch one.
    """

    max_tokens: int = 512
    max_streams: int = 0
    queue: int = 64
    queue_seconds: float = 30.0
    max_body_bytes: int = 64 * 2**20
    max_image_bytes: int = 16 * 2**20
    max_video_bytes: int = 200 * 2**20
    max_video_seconds: float = 3600.0
    max_frames: int = 256
    decode_seconds: float = 120.0
    decode_threads: int = 2
    file_bytes: int = 2 * 2**30
    files: int = 1024
    keep_seconds: float = 86400.0
    file_roots: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    fetch_seconds: float = 20.0

    def __post_init__(self):
        convert_fields(self)
        for name in ("queue_seconds", "max_video_seconds", "decode_seconds", "keep_seconds", "fetch_seconds"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require_at_least(
            1,
            self,
            "max_tokens",
            "max_body_bytes",
            "max_image_bytes",
            "max_video_bytes",
            "max_frames",
            "decode_threads",
            "file_bytes",
            "files",
        )
        require_at_least(0, self, "queue", "max_streams")


@dataclasses.dataclass(frozen=True)
class SecurityConfig:
    """Access control and rate limits of the live server; `ServerConfig` limits the size of a message.

    Attributes:
      max_connections: connections and requests at once, of all.
      max_connections_per_address: of one address.
      connections_per_second: new connections and requests of one address, on average.
      connection_burst: those that may come at once.
      messages_per_second: of a WebSocket; what comes faster is read later.
      message_burst: those that are read at once.
      max_body_bytes: of a request that is no WebSocket.
    """

    max_connections: int = 1024
    max_connections_per_address: int = 128
    connections_per_second: float = 50.0
    connection_burst: int = 200
    messages_per_second: float = 100.0
    message_burst: int = 200
    max_body_bytes: int = 256 * 2**20

    def __post_init__(self):
        convert_fields(self)
        for name in ("connections_per_second", "messages_per_second"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require_at_least(
            1,
            self,
            "max_connections",
            "max_connections_per_address",
            "connection_burst",
            "message_burst",
            "max_body_bytes",
        )
