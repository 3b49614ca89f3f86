"""Counts the changes on the page's playground that the shipped model reports correctly.

    python benchmarks/playground.py --out benchmarks/results/playground_moss_tiny.json

Headless Chromium opens the page of `moss_jax/serving/web`. Worlds are drawn as for training, and each change
of them is made on the page, in turn by mouse, by tapping and by keys; digits are drawn with the strokes of
`HANDS`, bent a little differently each time. Once a simulated second the JPEG that the page would send is
captured, and the stream is played to the model in lockstep, with `--prompt`. A change is reported correctly
if a sentence with its facts begins within 3 seconds.
"""

import argparse
import contextlib
import functools
import http.server
import math
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from playwright.sync_api import Page, sync_playwright
from report import add_out, make_parser, publish, say

from moss_jax.command import at_least
from moss_jax.config import EngineConfig, SessionConfig
from moss_jax.convert import open_model
from moss_jax.eval.tabletop.scores import REACT, transcribe
from moss_jax.serving.media import MediaLimits, decode_image
from moss_jax.stream import Engine, Session
from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.answers import narrate
from moss_jax.worlds.tabletop.render import COLOURS
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.world import CARD, Table, TableEvent, World, generate

WEB = Path(__file__).parents[1] / "moss_jax" / "serving" / "web"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PROMPT = "Describe what is happening."
# Time of the prompt, and minimum time between two changes, in seconds.
ASKED, GAP = 2.5, 5

# How people write digits: the points x,y of each stroke in a box of 100 by 100; a / begins another stroke.
HANDS: dict[int, tuple[str, ...]] = {
    0: (
        "54,6 38,10 27,28 24,52 30,78 44,94 60,92 72,74 76,48 70,22 56,6",
        "50,8 62,14 70,34 69,62 60,86 48,93 36,84 30,58 33,28 44,10 53,9",
    ),
    1: (
        "38,26 48,16 56,6 56,34 55,64 54,94",
        "51,5 51,28 50,52 50,76 49,95",
        "34,30 46,18 54,8 54,40 53,70 53,92 / 38,93 54,93 70,92",
    ),
    2: (
        "28,26 36,12 50,7 64,13 69,28 62,46 48,62 36,78 28,92 48,91 74,90",
        "30,20 44,8 62,10 68,26 58,48 42,68 30,86 38,92 56,88 72,94",
    ),
    3: (
        "30,14 46,6 63,10 69,24 60,40 46,47 63,52 72,68 66,86 48,94 29,88",
        "32,8 52,7 70,8 58,26 48,42 64,48 71,66 64,86 46,94 30,86",
    ),
    4: (
        "46,6 38,28 28,56 46,58 74,56 / 60,34 58,62 56,95",
        "60,94 61,60 62,8 46,32 28,64 50,66 78,64",
    ),
    5: (
        "68,8 52,8 36,9 34,26 32,44 48,40 64,48 70,64 63,84 47,93 29,87",
        "36,8 34,28 32,46 50,42 66,50 70,70 58,90 40,94 28,86 / 36,8 54,8 70,7",
    ),
    6: (
        "62,8 48,20 37,40 30,64 34,84 48,94 63,88 70,72 62,58 48,56 34,66",
        "56,6 42,24 33,48 31,74 42,92 58,92 67,78 60,63 46,62 34,74",
    ),
    7: (
        "28,10 50,9 72,8 64,30 56,54 50,76 46,95 / 36,52 52,51 68,50",
        "30,12 48,10 70,10 62,32 54,56 47,78 43,94",
    ),
    8: (
        "62,18 50,7 37,14 36,30 50,45 64,62 68,80 54,94 38,90 32,74 42,56 58,42 66,26 60,14",
        "50,48 38,36 38,18 50,8 62,16 62,34 50,48 36,62 33,82 50,94 66,84 65,64 50,48",
    ),
    9: (
        "67,20 54,7 39,12 32,29 40,46 56,46 66,32 68,18 68,46 64,72 56,94",
        "66,24 56,9 40,11 33,28 42,45 58,43 67,26 68,52 62,80 48,93 34,89",
    ),
}


@dataclass(frozen=True)
class Told:
    """A change, and whether the model reported it.

    Attributes:
      change: the change in the words of the world's ideal assistant.
      kind: kind of change.
      right: whether it was reported in time.
      said: the sentences that began in that time.
    """

    change: str
    kind: str
    right: bool
    said: tuple[str, ...]


def main() -> None:
    """Runs the benchmark."""
    args = parse_arguments()
    opened = open_model(None)
    engine = Engine(opened.model, opened.tokenizer, EngineConfig(1, 4096, 256))
    told: list[Told] = []
    with open_page() as page:
        for number in range(args.worlds):
            rng = np.random.default_rng([args.seed, number])
            world = draw_world(rng, args.changes)
            frames = film(page, world, rng)
            found = judge(engine, world, frames, args.prompt)
            told += found
            for change in found:
                if args.verbose or not change.right:
                    say(
                        f"{'right' if change.right else 'WRONG'}  {change.change}  <- {' '.join(change.said)}"
                    )
            say(f"{sum(t.right for t in told)} of {len(told)}")
    kinds = sorted({t.kind for t in told})
    result = {
        "checkpoint": opened.name,
        "prompt": args.prompt,
        "seed": args.seed,
        "changes": len(told),
        "told": sum(t.right for t in told) / len(told),
        "by_kind": {
            kind: [sum(t.right for t in told if t.kind == kind), sum(t.kind == kind for t in told)]
            for kind in kinds
        },
    }
    publish("playground.py", args, result)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--worlds", type=at_least(1), default=10, help="number of tables")
    parser.add_argument("--changes", type=at_least(1), default=20, help="changes on each table")
    parser.add_argument("--seed", type=int, default=0, help="seed of the worlds and of the handwriting")
    parser.add_argument("--prompt", default=PROMPT, help="what the model is asked")
    parser.add_argument(
        "--verbose", action="store_true", help="show all changes, not only those reported wrongly"
    )
    add_out(parser)
    return parser.parse_args()


def draw_world(rng: np.random.Generator, changes: int) -> World:
    """Samples a world with this many changes."""
    seconds = int(ASKED) + 2 + (changes + 1) * GAP
    while True:
        world = generate(
            rng,
            seconds,
            digit_indices=digits.held_out_indices(),
            rate=[0.0] * (int(ASKED) + 2) + [1.0] * seconds,
            gap=GAP,
        )
        if len(world.events) >= changes:
            events = world.events[:changes]
            # Nothing happens after the last one.
            last = events[-1].frame
            tables = tuple(world.tables[min(second, last)] for second in range(last + REACT + 2))
            return World(tables, events)


# ------------------------------------------------------------------------------------ on the page


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    """Opens the page in headless Chromium, without a model."""
    handler = functools.partial(Files, directory=str(WEB))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        yield page
        browser.close()
        server.shutdown()


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging requests."""

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


def chromium() -> str | None:
    """The path of Chromium, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def film(page: Page, world: World, rng: np.random.Generator) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Makes the changes of a world on the page, and captures a frame each second."""
    hand = Hand(page, rng)
    hand.clear()
    for thing in world.tables[0].things:
        hand.lay(thing.kind, thing.cell, thing.colour, thing.label if thing.kind == CARD else "")
    changes = {event.frame: event for event in world.events}
    frames = []
    for second in range(world.seconds):
        if second == 0 or second in changes:
            if second:
                hand.change(changes[second], world.tables[second - 1], world.tables[second])
            frame = take(page)
        frames.append(frame)
    return frames


def take(page: Page) -> UInt8[np.ndarray, "H W 3"]:
    """The frame that the page would send now."""
    content = page.evaluate(
        """async () => {
          const { takeFrame } = await import("./sources.js");
          return Array.from(new Uint8Array(await takeFrame(document.getElementById("table"))));
        }"""
    )
    return decode_image(bytes(content), limits=MediaLimits())


class Hand:
    """A user of the playground, who alternates between mouse, tapping and keys."""

    def __init__(self, page: Page, rng: np.random.Generator):
        self.page, self.rng = page, rng
        self.turn = 0

    def cell(self, cell: tuple[int, int]) -> str:
        """The selector of a place."""
        return f'.cell[data-cell="{cell[0]},{cell[1]}"]'

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element, in pixels."""
        box = self.page.locator(selector).bounding_box()
        assert box is not None
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drags with the mouse."""
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move(*end, steps=4)
        mouse.up()
        self.page.wait_for_timeout(20)  # The end of the drag is announced a moment later.

    def choose(self, cell: tuple[int, int]) -> None:
        """Selects the thing in a place."""
        self.page.keyboard.press("Escape")
        place = self.page.locator(self.cell(cell))
        if place.get_attribute("aria-pressed") != "true":
            place.click()

    def unchoose(self) -> None:
        """Clears the selection."""
        self.page.locator(".cell").first.focus()
        self.page.keyboard.press("Escape")

    def clear(self) -> None:
        """Empties the table."""
        for place in self.page.locator(".cell").all():
            place.focus()
            if "under" in (place.get_attribute("aria-label") or ""):
                self.page.keyboard.press("v")
            self.page.keyboard.press("Delete")

    def lay(self, kind: str, cell: tuple[int, int], colour: str, digit: str) -> None:
        """Puts a new thing on the table."""
        self.unchoose()
        if colour:
            self.page.locator(f'#swatches [data-colour="{colour}"]').click()
        tray = f'#tray [data-kind="{kind}"]'
        if self.turn % 2:
            self.drag(self.middle(tray), self.middle(self.cell(cell)))
        else:
            self.choose(cell)
            self.page.locator(tray).click()
        if kind == CARD:
            self.draw(digit)

    def draw(self, digit: str) -> None:
        """Draws a digit on the enlarged card."""
        box = self.page.locator("#paper").bounding_box()
        assert box is not None
        self.page.locator("#pad-clear").click()
        for stroke in bent(HANDS[int(digit)][self.rng.integers(len(HANDS[int(digit)]))], self.rng):
            points = [
                (box["x"] + box["width"] / 2 + (x - 50) * box["height"] * 0.007,
                 box["y"] + box["height"] / 2 + (y - 50) * box["height"] * 0.007)
                for x, y in stroke
            ]  # fmt: skip
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*point, steps=3)
            self.page.mouse.up()
        self.page.locator("#pad-done").click()

    def change(self, event: TableEvent, before: Table, after: Table) -> None:
        """Makes a change."""
        self.turn += 1
        keys = self.turn % 3 == 0
        old, thing = before.find(event.kind), after.find(event.kind)
        old, thing = old or thing, thing or old
        assert old
        assert thing
        place = self.page.locator(self.cell(old.cell))
        match event.change:
            case "appear":
                self.lay(event.kind, thing.cell, thing.colour, thing.label if event.kind == CARD else "")
            case "leave" if keys:
                place.focus()
                self.page.keyboard.press("Delete")
            case "leave" if self.turn % 2:
                x, y = self.middle("#sees-title")
                self.drag(self.middle(self.cell(old.cell)), (x, y))
            case "leave":
                self.choose(old.cell)
                self.page.locator("#remove").click()
            case "move" if keys:
                self.unchoose()
                place.focus()
                self.page.keyboard.press("Enter")
                self.page.locator(self.cell(thing.cell)).focus()
                self.page.keyboard.press("Enter")
            case "move" if self.turn % 2:
                self.drag(self.middle(self.cell(old.cell)), self.middle(self.cell(thing.cell)))
            case "move":
                self.choose(old.cell)
                self.page.locator(self.cell(thing.cell)).click()
            case "colour" if keys:
                place.focus()
                for _ in range((COLOURS.index(event.value) - COLOURS.index(old.colour)) % len(COLOURS)):
                    self.page.keyboard.press("c")
            case "colour":
                self.choose(old.cell)
                self.page.locator(f'#swatches [data-colour="{event.value}"]').click()
            case "digit":
                self.choose(old.cell)
                self.page.locator("#write").click()
                self.draw(event.value)
            case "cover" | "uncover" if keys:
                place.focus()
                self.page.keyboard.press("v")
            case "cover" if self.turn % 2:
                self.drag(self.middle('#tray [data-kind="cover"]'), self.middle(self.cell(old.cell)))
            case _:
                self.choose(old.cell)
                self.page.locator("#cover").click()


def bent(strokes: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Strokes of `HANDS` as another hand would draw them, [points, 2] each."""
    slant, wide, turn = rng.uniform(-0.15, 0.2), rng.uniform(0.8, 1.25), rng.uniform(-0.1, 0.1)
    phases = rng.uniform(0, 2 * math.pi, 4)
    found = []
    for stroke in strokes.split("/"):
        x, y = np.array([point.split(",") for point in stroke.split()], float).T - 50
        x = x * wide - slant * y
        x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
        x = x + 1.5 * np.sin(y / 14 + phases[0]) + 0.8 * np.sin(y / 6 + phases[1])
        y = y + 1.5 * np.sin(x / 14 + phases[2]) + 0.8 * np.sin(x / 6 + phases[3])
        found.append(np.stack([x, y], 1) + 50)
    return found


# ------------------------------------------------------------------------------------ to the model


def judge(
    engine: Engine, world: World, frames: Sequence[UInt8[np.ndarray, "H W 3"]], prompt: str
) -> list[Told]:
    """Plays the frames to the model, and compares what it says with the changes of the world."""
    request = Request(ASKED, prompt, "narrate")
    session = Session(engine, SessionConfig(clock="lockstep", tail_seconds=2.0))
    for second, rgb in enumerate(frames):
        if second > ASKED > second - 1:
            session.push_prompt(prompt, ASKED)
        session.push_frame(rgb, float(second))
    session.finish()
    said = transcribe(list(session), (request,)).statements
    told = []
    for event in world.events:
        sentence = narrate(event, world.truth[event.frame])
        near = [s for s in said if event.frame <= s.frame and s.time <= event.frame + REACT]
        right = any(dict(s.facts) == dict(sentence.facts) for s in near)
        kind = "card" if event.change == "appear" and event.kind == CARD else event.change
        told.append(Told(sentence.text(), kind, right, tuple(s.text for s in near)))
    return told


if __name__ == "__main__":
    main()
