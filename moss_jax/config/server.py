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
      grace_seconds: how long a stream outlives a lost connection, waiting to be resumed.
      replay_events: size of a session's replay buffer, from which events are resent after a reconnect.
      queue_events: queue depth of outgoing events at which the connection of a slow client is closed.
      max_message_bytes: maximum size of a client message.
      max_image_pixels: maximum size of a frame as received; frames are then scaled to fit the model.
      history_items: number of conversation items that can be retrieved.
      decode_threads: threads that decode images.
      counters_seconds: interval between two `moss.counters` events.
      save_seconds: interval between two saves of a running stream, if a folder for them is set.
      keep_seconds: retention of a saved stream that is not resumed.
      restart_seconds: delay before streams can be opened again after a failed step.
      drain_seconds: how long a graceful shutdown may take to notify and save running streams.
      correction: words with which the model starts to retract what it was saying; empty for none.
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
      max_tokens: limit on an answer if the request sets none.
      max_streams: concurrent completions, so that slots stay free for live streams; 0 for all slots.
      queue: queue depth: requests that may wait.
      queue_seconds: timeout of a request in the queue, and then for a free stream.
      max_body_bytes: maximum size of a request, including its data URLs.
      max_image_bytes, max_video_bytes: maximum size of an image and of a video.
      max_video_seconds: maximum duration of a video.
      max_frames: over all images and videos of a request; longer videos are sampled more sparsely.
      decode_seconds: timeout for decoding a video.
      decode_threads: threads that decode videos.
      file_bytes, files: maximum total size of uploads, and their maximum number.
      keep_seconds: retention of an upload.
      file_roots: allow-list of folders below which `file://` URLs may point.
      fetch_hosts: allow-list of hosts to fetch media from, each with `:port` if not the scheme's default.
      fetch_seconds: timeout for fetching one.
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
      max_connections: concurrent connections and requests, in total.
      max_connections_per_address: concurrent connections and requests per address.
      connections_per_second: rate limit on new connections and requests per address.
      connection_burst: burst allowed above that rate.
      messages_per_second: rate limit per WebSocket; messages beyond it are read later (backpressure).
      message_burst: burst allowed above that rate.
      max_body_bytes: maximum body size of an HTTP request, as opposed to a WebSocket.
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
