"""A real server in a thread of the test's process, and a small client that checks nothing."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from moss_jax.serving.app import Server, make_app, make_server
from moss_jax.serving.hub import Hub


@dataclass
class Running:
    """A server that answers at `host` and `port`."""

    hub: Hub
    server: Server
    loop: asyncio.AbstractEventLoop
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def realtime(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime"

    def call(self, function: Callable, *arguments):
        """Calls a function in the server's event loop."""

        async def call():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(60)


@contextlib.contextmanager
def running(hub: Hub, port: int = 0, **options) -> Iterator[Running]:
    """Runs a server, by default on a free port; `options` of `make_app`."""
    app = make_app(hub, **{"warm_up": False} | options)
    server = make_server(app, hub, port=port)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server", daemon=True)
    thread.start()
    wait_for(lambda: server.started and hub.is_ready)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(hub, server, loops[0], port)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 60.0, every: float = 0.005) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)


class Link:
    """A way to a port of this machine that can be cut."""

    def __init__(self, port: int):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._is_cut = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends all connections, and takes no more."""
        self._is_cut = True
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def mend(self) -> None:
        """Takes connections again."""
        self._is_cut = False

    def close(self) -> None:
        """Is no more."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class Client:
    """A connection: what is sent and received, as dicts."""

    def __init__(self, url: str, **options):
        self._connect = connect(url, max_size=None, **options)
        self.socket: ClientConnection
        self.events: list[dict] = []

    def __enter__(self) -> "Client":
        self.socket = self._connect.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._connect.__exit__(*error)

    def lose(self) -> None:
        """Cuts the connection, as a network does that fails."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    def send(self, event: str, **fields) -> None:
        self.socket.send(json.dumps({"type": event, **fields}))

    def negotiate(self, **moss) -> dict:
        self.send("session.update", session={"type": "realtime", "moss": {"version": 1, **moss}})
        return self.until("session.updated")["session"]

    def show(self, rgb: np.ndarray, **fields) -> None:
        content = [{"type": "input_image", "image_url": data_url(rgb)}]
        item = {"type": "message", "role": "user", "content": content}
        self.send("conversation.item.create", item=item, **fields)

    def say(self, text: str, **fields) -> None:
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        self.send("conversation.item.create", item=item, **fields)

    def ask(self, text: str, **fields) -> None:
        self.say(text)
        self.send("response.create", **fields)

    def receive(self, timeout: float = 60.0) -> dict:
        event = json.loads(self.socket.recv(timeout))
        self.events.append(event)
        return event

    def until_closed(self, timeout: float = 60.0) -> int | None:
        """Receives up to the end of the connection; the code that it was closed with, if it was."""
        try:
            while True:
                self.receive(timeout)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else None

    def until(self, *types: str, timeout: float = 60.0) -> dict:
        """Receives up to an event of one of these types, for `timeout` seconds in all."""
        # Others, such as counters, may come for ever.
        deadline = time.monotonic() + timeout
        while (event := self.receive(deadline - time.monotonic()))["type"] not in types:
            pass
        return event


def png(rgb: np.ndarray) -> bytes:
    """A frame as a file, without loss."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()


def data_url(rgb: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(rgb)).decode()}"
