"""The page in headless Firefox, which is driven by its own protocol, WebDriver BiDi."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import wait_for
from websockets.sync.client import ClientConnection, connect

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
# A camera with a coloured picture, which no one has to allow.
PREFERENCES = {"media.navigator.streams.fake": True, "media.navigator.permission.disabled": True}
# The whole page, so that nothing scrolls.
WIDTH, HEIGHT = 1280, 1600
# Until the model has seen a frame and said something about it, on a slow machine, in seconds.
PATIENCE = 120.0
ENTER = "\ue007"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FIREFOX is None, reason="there is no Firefox: apt-get install firefox-esr"),
]


class Page:
    """The one tab of a Firefox."""

    def __init__(self, socket: ClientConnection):
        self._socket = socket
        self._ids = itertools.count()
        self.errors: list[str] = []
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["log.entryAdded"])
        self._tab = {"context": self.call("browsingContext.getTree")["contexts"][0]["context"]}
        self.call("browsingContext.setViewport", **self._tab, viewport={"width": WIDTH, "height": HEIGHT})

    def call(self, method: str, **params) -> dict:
        """The result of a command; the errors that the page logs meanwhile are kept."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self._socket.recv(PATIENCE))).get("id") != number:
            if message["method"] == "log.entryAdded" and message["params"]["level"] == "error":
                self.errors.append(message["params"]["text"])
        assert message["type"] == "success", message
        return message["result"]

    def open(self, url: str) -> None:
        self.call("browsingContext.navigate", **self._tab, url=url, wait="complete")

    def reload(self) -> None:
        self.call("browsingContext.reload", **self._tab, wait="complete")

    def evaluate(self, expression: str):
        """The value of an expression, a string, a number or a truth value."""
        answer = self.call("script.evaluate", expression=expression, target=self._tab, awaitPromise=False)
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true."""
        wait_for(lambda: self.evaluate(f"Boolean({expression})"), PATIENCE, every=0.1)

    def middle(self, selector: str) -> tuple[int, int]:
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = (
            self.evaluate(f"{box}.{start} + {box}.{size} / 2")
            for start, size in (("x", "width"), ("y", "height"))
        )
        return round(x), round(y)

    def drag(self, *points: tuple[int, int]) -> None:
        """Presses the pointer at the first point and lets go at the last; a click, if there is one."""
        first, *others = ({"type": "pointerMove", "x": x, "y": y} for x, y in points)
        down, up = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
        actions = [first, down, *(move | {"duration": 50} for move in others), up]
        self.call(
            "input.performActions",
            **self._tab,
            actions=[{"type": "pointer", "id": "mouse", "actions": actions}],
        )

    def click(self, selector: str) -> None:
        self.drag(self.middle(selector))

    def ask(self, text: str) -> None:
        self.click("#prompt")
        keys = [{"type": kind, "value": key} for key in text + ENTER for kind in ("keyDown", "keyUp")]
        self.call(
            "input.performActions", **self._tab, actions=[{"type": "key", "id": "keys", "actions": keys}]
        )


@pytest.fixture
def page(tmp_path) -> Iterator[Page]:
    """A page that logs no error."""
    lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in PREFERENCES.items()]
    profile, log = tmp_path / "profile", tmp_path / "log"
    profile.mkdir()
    (profile / "user.js").write_text("\n".join(lines))
    command = [FIREFOX, "--headless", "--no-remote", "--remote-debugging-port", "0", "--profile", profile]
    with log.open("wb") as file:
        process = subprocess.Popen([*map(str, command), "about:blank"], stdout=file, stderr=file)
    try:
        with connect(f"{address(log, process.poll)}/session", max_size=None) as socket:
            page = Page(socket)
            yield page
            assert not page.errors
    finally:
        process.kill()
        process.wait()


def address(log: Path, ended: Callable[[], int | None]) -> str:
    """Where a Firefox that starts takes commands."""
    said: list[str] = []

    def is_listening() -> bool:
        assert ended() is None, log.read_text()
        said[:] = re.findall(r"listening on (ws://\S+)\n", log.read_text())
        return bool(said)

    wait_for(is_listening, PATIENCE, every=0.1)
    return said[0]


SESSION = "dispatchEvent(new Event('pagehide')), JSON.parse(sessionStorage['moss.session']).id"
CONNECTED = "document.querySelector('#link').textContent === 'Connected'"
LISTENING = "document.querySelector('#mood').textContent.includes('Listening')"


def thing(cell: str) -> str:
    """Expression for the label of a cell of the table, which names the thing in it."""
    return f"document.querySelector('.cell[data-cell=\"{cell}\"]').ariaLabel"


def seen(count: int) -> str:
    return f"Number(document.querySelector('[data-figure=seen]').textContent) >= {count}"


def answer(k: int) -> str:
    return f"document.querySelectorAll('.entry.answer')[{k}]"


def answered(text: str) -> str:
    """Expression for the answer with this text; the engine may remark on frames of the camera, too."""
    answers = "[...document.querySelectorAll('.entry.answer')]"
    return f"{answers}.find(answer => answer.textContent.includes({json.dumps(text)}))"


def test_what_is_laid_on_the_table_is_told_and_a_reload_goes_on(page, link):
    page.open(f"http://127.0.0.1:{link.port}/")
    page.click("[data-source=playground]")
    # A new thing, one that is moved, and a card that is drawn on.
    page.drag(page.middle("#tray [data-kind=ring]"), page.middle('.cell[data-cell="1,0"]'))
    assert page.evaluate(thing("1,0")).endswith(": red ring")
    page.drag(page.middle('.cell[data-cell="2,1"]'), page.middle('.cell[data-cell="0,1"]'))
    assert page.evaluate(thing("0,1")).endswith(": blue star")
    page.click("#tray [data-kind=card]")
    x, y = page.middle("#paper")
    page.drag((x - 60, y - 80), (x + 60, y - 80), (x, y + 90))
    page.click("#pad-done")
    assert page.evaluate(thing("2,0")).endswith(": card")

    page.click("#start")
    page.wait(seen(2))
    page.ask("What is on the table?")
    page.wait(f"{answer(0)}?.dataset.status === 'done'")
    said = page.evaluate(f"{answer(0)}.textContent")
    assert all(name in said for name in ("red circle", "ring", "blue star")), said
    page.wait(LISTENING)

    link.cut()
    page.wait("document.querySelector('#link').textContent.includes('Trying again')")
    link.mend()
    page.wait(CONNECTED)
    before = page.evaluate(SESSION)
    page.reload()
    page.wait(CONNECTED)
    assert page.evaluate(thing("0,1")).endswith(": blue star")
    assert page.evaluate(f"{answer(0)}.textContent") == said
    page.wait(seen(4))
    assert page.evaluate(SESSION) == before
    page.ask("Was there a star?")
    page.wait(f"{answer(1)}?.textContent.includes('Yes')")
    # The session is given back.
    page.click("#start")
    page.click("#new")


def test_a_camera_is_watched_and_an_answer_interrupted(page, served):
    page.open(served.url)
    page.click("[data-source=camera]")
    page.click("#start")
    page.wait("document.querySelector('#video').videoWidth > 0")
    page.wait(seen(2))
    page.ask("Tell me a story.")
    page.wait(answered("And then"))
    page.click("#stop")
    page.wait(f"{answered('And then')}.dataset.status === 'cut'")
    page.wait(LISTENING)
    page.ask("Is there a cat?")
    page.wait(answered("It sleeps."))
