"""What happens on the table, and what is true when.

Things lie in the cells of a grid of three columns and two rows, no two alike: at most one of each shape and
one card. Something changes only between two whole seconds, so the frame of second k, the first to show a
change, shows it complete.
"""

import dataclasses
import functools
import itertools
import math
from typing import Literal

import numpy as np

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES, Cover, Item, Scene

CARD = "card"
PLACES = ("left", "middle", "right")
ROWS = 2
CELLS = tuple(itertools.product(range(len(PLACES)), range(ROWS)))
MAX_SHAPES = 4
# Seconds before its first frame at which a change begins and ends.
BEGINS, ENDS = 0.85, 0.15

EventKind = Literal["appear", "leave", "move", "colour", "digit", "cover", "uncover"]


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape or a card as it lies on the table.

    Attributes:
      kind: a shape, or CARD.
      colour: of a shape.
      digit: of a card, the index of its image.
      cell: column and row.
      offset, angle: how it lies in its cell, in table units and radians.
    """

    kind: str
    cell: tuple[int, int]
    colour: str = ""
    digit: int = -1
    offset: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0

    @property
    def place(self) -> str:
        return PLACES[self.cell[0]]

    @property
    def label(self) -> str:
        """The number on a card."""
        return str(digits.label(self.digit))

    @property
    def centre(self) -> tuple[float, float]:
        column, row = self.cell
        x, y = (column + 0.5) / len(PLACES), (row + 0.5) / ROWS
        return x + self.offset[0], y + self.offset[1]


@dataclasses.dataclass(frozen=True)
class Table:
    """The state of the table at one second; `covered` is the kind of the thing beneath the paper."""

    things: tuple[Thing, ...] = ()
    covered: str | None = None
    cover_angle: float = 0.0

    def find(self, kind: str) -> Thing | None:
        return next((thing for thing in self.things if thing.kind == kind), None)

    @property
    def visible(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind != self.covered)

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The visible shapes."""
        return tuple(thing for thing in self.visible if thing.kind != CARD)


@dataclasses.dataclass(frozen=True)
class TableEvent:
    """A change, first to be seen on `frame`.

    Attributes:
      kind: of the thing.
      value: the new place, colour or number, if the change is one of those.
    """

    frame: int
    change: EventKind
    kind: str
    value: str = ""


@dataclasses.dataclass(frozen=True)
class World:
    """A stretch of time on the table.

    Attributes:
      tables: the state at each whole second.
      events: in order of time.
    """

    tables: tuple[Table, ...]
    events: tuple[TableEvent, ...]

    @property
    def seconds(self) -> int:
        return len(self.tables)

    @functools.cached_property
    def truth(self) -> tuple[dict[str, str], ...]:
        """What is true at each second; see `facts`."""
        return tuple(_truth(self))

    def scene(self, time: float) -> Scene:
        """What is to be seen at any time, changes in progress included."""
        # The change of frame k is in progress between k - BEGINS and k - ENDS.
        frame = min(math.ceil(time - 1e-9), self.seconds - 1)
        progress = 1 - (frame - time - ENDS) / (BEGINS - ENDS)
        if frame == 0 or progress >= 1:
            return _scene(self.tables[frame])
        if progress <= 0:
            return _scene(self.tables[frame - 1])
        return _blend(self.tables[frame - 1], self.tables[frame], progress * progress * (3 - 2 * progress))


def generate(
    rng: np.random.Generator, seconds: int, *, digit_indices: np.ndarray, rate: float, gap: int
) -> World:
    """Draws a world.

    Args:
      seconds: its length; there is one state for each second.
      digit_indices: the digit images that its cards may show.
      rate: probability of a change in a second.
      gap: seconds that lie at least between two changes.
    """
    table = _first_table(rng, digit_indices)
    tables, events, last = [table], [], 0
    for frame in range(1, seconds):
        if frame - last >= gap and rng.random() < rate:
            table, event = _change(rng, table, frame, digit_indices)
            events.append(event)
            last = frame
        tables.append(table)
    return World(tuple(tables), tuple(events))


def _first_table(rng, digit_indices):
    table = Table()
    if rng.random() < 0.15:
        return table
    for _ in range(rng.integers(0, MAX_SHAPES)):
        table = _with(table, _new_shape(rng, table))
    if rng.random() < 0.5:
        table = _with(table, _new_card(rng, table, digit_indices))
    return table


def _with(table, thing):
    """The table with a thing put on it, or in the place of its kind."""
    others = tuple(t for t in table.things if t.kind != thing.kind)
    return dataclasses.replace(table, things=(*others, thing))


def _free_cell(rng, table, not_in_column=None):
    taken = {thing.cell for thing in table.things}
    free = [cell for cell in CELLS if cell not in taken and cell[0] != not_in_column]
    return free[rng.integers(len(free))] if free else None


def _new_shape(rng, table):
    absent = [shape for shape in SHAPES if table.find(shape) is None]
    return Thing(
        kind=absent[rng.integers(len(absent))],
        cell=_free_cell(rng, table),
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        **_lying(rng),
    )


def _new_card(rng, table, digit_indices):
    return Thing(CARD, _free_cell(rng, table), digit=int(rng.choice(digit_indices)), **_lying(rng))


def _lying(rng):
    offset = rng.uniform(-0.03, 0.03, 2)
    return {"offset": (float(offset[0]), float(offset[1])), "angle": float(rng.uniform(-0.3, 0.3))}


def _change(rng, table, frame, digit_indices):
    """The next state and the event that led to it."""
    card = table.find(CARD)
    shapes = len(table.things) - (card is not None)
    open_things = table.visible
    weights = {
        "appear": 1.6 * (shapes < MAX_SHAPES),
        "leave": 1.2 * bool(table.shapes),
        "move": 1.0 * bool(open_things),
        "colour": 1.0 * bool(table.shapes),
        "card": 1.6 * (card is None),
        "no card": 0.5 * (card in open_things),
        "digit": 2.0 * (card in open_things),
        "cover": 1.0 * (table.covered is None and bool(open_things)),
        "uncover": 1.5 * (table.covered is not None),
    }
    names = [name for name, weight in weights.items() if weight]
    odds = np.array([weights[name] for name in names])
    name = names[rng.choice(len(names), p=odds / odds.sum())]

    def pick(things):
        return things[rng.integers(len(things))]

    match name:
        case "appear":
            thing = _new_shape(rng, table)
            return _with(table, thing), TableEvent(frame, "appear", thing.kind)
        case "card":
            thing = _new_card(rng, table, digit_indices)
            return _with(table, thing), TableEvent(frame, "appear", CARD)
        case "leave" | "no card":
            thing = card if name == "no card" else pick(table.shapes)
            rest = tuple(t for t in table.things if t is not thing)
            return dataclasses.replace(table, things=rest), TableEvent(frame, "leave", thing.kind)
        case "move":
            thing = pick(open_things)
            cell = _free_cell(rng, table, not_in_column=thing.cell[0])
            if cell is None:
                return _change(rng, table, frame, digit_indices)
            moved = dataclasses.replace(thing, cell=cell, **_lying(rng))
            return _with(table, moved), TableEvent(frame, "move", thing.kind, moved.place)
        case "colour":
            thing = pick(table.shapes)
            colour = pick([c for c in COLOURS if c != thing.colour])
            return _with(table, dataclasses.replace(thing, colour=colour)), TableEvent(
                frame, "colour", thing.kind, colour
            )
        case "digit":
            changed = card
            while changed.label == card.label:
                changed = dataclasses.replace(card, digit=int(pick(digit_indices)))
            return _with(table, changed), TableEvent(frame, "digit", CARD, changed.label)
        case "cover":
            kind = CARD if card in open_things and rng.random() < 0.4 else pick(open_things).kind
            angle = table.find(kind).angle + float(rng.uniform(-0.1, 0.1))
            return dataclasses.replace(table, covered=kind, cover_angle=angle), TableEvent(
                frame, "cover", kind
            )
        case "uncover":
            return dataclasses.replace(table, covered=None), TableEvent(frame, "uncover", table.covered)


def _truth(world):
    """For each second, the facts that sentences are about, as strings.

    there:KIND   yes, covered or none
    colour:SHAPE a colour, covered or none
    place:KIND   left, middle or right, covered or none
    digit        what the card shows, covered or none
    count        number of visible shapes
    under        what lies beneath the paper, or none
    previous     the number that was seen before the one that is seen now or was seen last, or none
    seen:SHAPE   yes if it has been visible, or none
    event        the last change as CHANGE:KIND:VALUE, or none
    """
    events = {event.frame: event for event in world.events}
    shown: list[str] = []
    seen: set[str] = set()
    last = "none"
    for frame, table in enumerate(world.tables):
        if event := events.get(frame):
            last = f"{event.change}:{event.kind}:{event.value}"
        facts = {"count": str(len(table.shapes)), "under": table.covered or "none", "event": last}
        for kind in (*SHAPES, CARD):
            thing = table.find(kind)
            state = "none" if thing is None else "covered" if kind == table.covered else "yes"
            visible = state == "yes"
            facts[f"there:{kind}"] = state
            facts[f"place:{kind}"] = thing.place if visible else state
            if kind == CARD:
                facts["digit"] = thing.label if visible else state
                if visible and (not shown or shown[-1] != thing.label):
                    shown.append(thing.label)
            else:
                facts[f"colour:{kind}"] = thing.colour if visible else state
                seen |= {kind} if visible else set()
                facts[f"seen:{kind}"] = "yes" if kind in seen else "none"
        facts["previous"] = shown[-2] if len(shown) > 1 else "none"
        yield facts


def _item(thing: Thing, **changes) -> Item:
    x, y = thing.centre
    return Item(
        **{
            "kind": thing.kind,
            "x": x,
            "y": y,
            "colour": thing.colour,
            "digit": thing.digit,
            "angle": thing.angle,
        }
        | changes
    )


def _scene(table):
    cover = None
    if table.covered:
        x, y = table.find(table.covered).centre
        cover = Cover(x=x, y=y, angle=table.cover_angle)
    return Scene(tuple(_item(thing) for thing in table.things), cover)


def _blend(before, after, share):
    """Between two states: what comes and goes slides over the nearer edge, the rest glides or fades."""
    items = []
    for kind in dict.fromkeys(thing.kind for thing in (*before.things, *after.things)):
        old, new = before.find(kind), after.find(kind)
        if old == new:
            items.append(_item(new))
        elif old is None or new is None:
            x, y = (new or old).centre
            outside = share if new is None else 1 - share
            edge = -0.3 if y < 0.5 else 1.3
            items.append(_item(new or old, y=y + (edge - y) * outside))
        elif old.cell != new.cell:
            (x0, y0), (x1, y1) = old.centre, new.centre
            items.append(
                _item(
                    new,
                    x=x0 + (x1 - x0) * share,
                    y=y0 + (y1 - y0) * share,
                    angle=old.angle + (new.angle - old.angle) * share,
                )
            )
        else:
            items += [_item(old), _item(new, opacity=share)]
    cover = None
    if before.covered or after.covered:
        table = after if after.covered else before
        x, y = table.find(table.covered).centre
        outside = 0.0 if before.covered == after.covered else 1 - share if after.covered else share
        edge = -0.4 if x < 0.5 else 1.4
        cover = Cover(x=x + (edge - x) * outside, y=y, angle=table.cover_angle)
    return Scene(tuple(items), cover)
