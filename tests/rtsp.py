"""An IP camera: a small RTSP server that sends H.264 in RTP packets over the connection of its client."""

import base64
import contextlib
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np

PAYLOAD_TYPE, TICKS_PER_SECOND = 96, 90_000


@dataclass(frozen=True)
class Camera:
    """A stream of pictures that begins anew for each client.

    Attributes:
      pictures: uint8 [H, W, 3] each.
      fps: pictures a second.
      gop: GOP size: pictures from one keyframe to the next.
      first: number of the first picture that is sent, as to a client that joins late.
      damaged: number of a picture of which little arrives.
      silent: for what a client waits in vain: any answer once it has connected, or pictures once it plays.
      then: how the connection ends after the last picture: with FIN, with RST, or not at all.
    """

    pictures: list[np.ndarray]
    fps: int = 10
    gop: int = 10
    first: int = 0
    damaged: int | None = None
    silent: Literal["", "connect", "play"] = ""
    then: Literal["close", "reset", "stall"] = "close"

    def encode(self) -> list[list[bytes]]:
        """Returns the NAL units of each picture, without start codes."""
        codec = av.CodecContext.create("libx264", "w")
        codec.height, codec.width = self.pictures[0].shape[:2]
        codec.pix_fmt, codec.time_base, codec.gop_size = "yuv420p", Fraction(1, self.fps), self.gop
        codec.options = {"preset": "veryfast", "tune": "zerolatency", "x264-params": "scenecut=0"}
        packets = []  # One for each picture, in order.
        for number, rgb in enumerate(self.pictures):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts = number
            packets += codec.encode(frame)
        pictures = [re.split(b"\0{2,3}\1", bytes(packet))[1:] for packet in packets]
        if self.damaged is not None:
            pictures[self.damaged] = [unit[:2] for unit in pictures[self.damaged]]
        return pictures


@contextlib.contextmanager
def filming(camera: Camera) -> Iterator[str]:
    """Runs a camera, and yields the address of its stream."""
    server = _Server(camera)
    # Until shutdown() it looks so often whether to stop.
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    with server:
        try:
            yield f"rtsp://127.0.0.1:{server.server_address[1]}/stream"
        finally:
            server.is_over.set()
            server.shutdown()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, camera: Camera):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.camera, self.pictures = camera, camera.encode()
        self.is_over = threading.Event()

    def shutdown_request(self, request) -> None:
        self.close_request(request)  # Not a FIN before: it may be an RST.


class _Connection(socketserver.StreamRequestHandler):
    """The requests of one client, in whose connection the RTP packets go, too (RFC 2326, 10.12)."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        self._writing = threading.Lock()
        self._sequence = 65_530  # The number is of 16 bits, and soon starts again at 0.

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            if self.server.camera.silent == "connect":
                self.server.is_over.wait()
            while first := self.rfile.read(1):
                if first == b"$":  # The client's RTCP reports.
                    _, length = struct.unpack("!BH", self.rfile.read(3))
                    self.rfile.read(length)
                    continue
                method, url, _ = (first + self.rfile.readline()).decode().split()
                headers = {}
                while field := self.rfile.readline().decode().strip():
                    name, _, value = field.partition(":")
                    headers[name.lower()] = value.strip()
                self._answer(method, url, headers)
                if method == "TEARDOWN":
                    break

    def _answer(self, method: str, url: str, headers: dict[str, str]) -> None:
        status, fields, body = "200 OK", [f"CSeq: {headers['cseq']}", "Session: 1"], ""
        match method:
            case "OPTIONS":
                fields.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
            case "DESCRIBE" if not url.endswith("/stream"):
                status = "404 Not Found"
            case "DESCRIBE":
                sets = [unit for unit in self.server.pictures[0] if unit[0] % 32 in (7, 8)]
                parameters = ",".join(base64.b64encode(unit).decode() for unit in sets)
                body = (
                    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
                    f"m=video 0 RTP/AVP {PAYLOAD_TYPE}\r\na=control:track\r\n"
                    f"a=rtpmap:{PAYLOAD_TYPE} H264/{TICKS_PER_SECOND}\r\n"
                    f"a=fmtp:{PAYLOAD_TYPE} packetization-mode=1;sprop-parameter-sets={parameters}\r\n"
                )
                fields += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
            case "SETUP" if "TCP" not in headers["transport"]:
                status = "461 Unsupported Transport"
            case "SETUP":
                fields.append("Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
        self._write("\r\n".join([f"RTSP/1.0 {status}", *fields, "", body]).encode())
        if method == "PLAY":
            threading.Thread(target=self._play, daemon=True).start()

    def _play(self) -> None:
        camera, is_over = self.server.camera, self.server.is_over
        with contextlib.suppress(OSError):  # The client may leave whenever it wants.
            if camera.silent != "play":
                self._send(camera.first, camera.fps)
            if camera.then == "stall" or camera.silent:
                is_over.wait()
            if camera.then == "reset":
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.shutdown(socket.SHUT_RD)  # So that `handle` returns, and closes.

    def _send(self, first: int, fps: int) -> None:
        begun = time.monotonic()
        for number, units in list(enumerate(self.server.pictures))[first:]:
            if self.server.is_over.wait(max(0.0, begun + (number - first) / fps - time.monotonic())):
                return
            for unit in units:  # RFC 6184, 5.6: one of them in a packet, and the last one has the marker bit.
                kind = PAYLOAD_TYPE | (0x80 if unit is units[-1] else 0)
                ticks = 123_456_789 + number * TICKS_PER_SECOND // fps
                packet = struct.pack("!BBHII", 0x80, kind, self._sequence, ticks, 1) + unit
                self._write(struct.pack("!cBH", b"$", 0, len(packet)) + packet)
                self._sequence = (self._sequence + 1) % 2**16

    def _write(self, data: bytes) -> None:
        with self._writing:
            self.wfile.write(data)
