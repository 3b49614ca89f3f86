"""The events on the table, and the ground truth of each second.

Things lie in the cells of a grid of three columns and two rows: at most one of each shape, and one card.
Changes happen only between two whole seconds, so the frame of second k, the first to show a change, shows it
complete.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES, Cover, Item, Scene

CARD = "card"
PLACES = ("left", "middle", "right")
ROWS = 2
CELLS = tuple(itertools.product(range(len(PLACES)), range(ROWS)))
MAX_SHAPES = 4
# Seconds before the first frame that shows a change at which its motion begins and ends.
BEGINS, ENDS = 0.85, 0.15
# Maximum number of appearances that is counted; more are "many".
MOST_TIMES = 9

EventKind = Literal["appear", "leave", "move", "colour", "digit", "cover", "uncover"]
ImpairmentKind = Literal["black", "blurred", "overexposed", "frozen"]
IMPAIRMENTS = get_args(ImpairmentKind)


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape or a card on the table.

    Attributes:
      kind: a shape, or CARD.
      cell: column and row.
      colour: colour of a shape.
      digit: for a card, the index of its image.
      offset: offset from the centre of its cell, in table units.
      angle: angle of its rotation, in radians.
    """

    kind: str
    cell: tuple[int, int]
    colour: str = ""
    digit: int = -1
    offset: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0

    @property
    def place(self) -> str:
        """Its column, as a word."""
        return PLACES[self.cell[0]]

    @property
    def label(self) -> str:
        """The number on a card, as a digit."""
        return str(digits.label(self.digit))

    @property
    def centre(self) -> tuple[float, float]:
        """Its centre (x, y), in table units."""
        column, row = self.cell
        x, y = (column + 0.5) / len(PLACES), (row + 0.5) / ROWS
        return x + self.offset[0], y + self.offset[1]


@dataclasses.dataclass(frozen=True)
class Table:
    """The state of the table at one second.

    Attributes:
      things: everything on the table, covered or not.
      covered: kind of the thing under the cover; None without a cover.
      cover_angle: angle of the cover's rotation, in radians.
    """

    things: tuple[Thing, ...] = ()
    covered: str | None = None
    cover_angle: float = 0.0

    def find(self, kind: str) -> Thing | None:
        """The thing of a kind, if it is there."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    @property
    def hidden(self) -> Thing | None:
        """The thing under the cover."""
        return self.find(self.covered) if self.covered else None

    @property
    def visible(self) -> tuple[Thing, ...]:
        """The things that no cover hides."""
        return tuple(thing for thing in self.things if thing.kind != self.covered)

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The visible shapes."""
        return tuple(thing for thing in self.visible if thing.kind != CARD)


@dataclasses.dataclass(frozen=True)
class TableEvent:
    """A change on the table.

    Attributes:
      frame: the first that shows it.
      change: kind of change.
      kind: kind of the thing that changes.
      value: the new place, colour or number, if the change is one of those.
    """

    frame: int
    change: EventKind
    kind: str
    value: str = ""


@dataclasses.dataclass(frozen=True)
class Impairment:
    """An interval in which the camera shows nothing, or a frozen image.

    Nothing changes on the table meanwhile.

    Attributes:
      start: its first second; at least 1, so that what is on the table has been seen.
      stop: the first second after it.
      kind: kind of impairment; "frozen" repeats the image of the first second.
    """

    start: int
    stop: int
    kind: ImpairmentKind

    def __post_init__(self):
        if not 1 <= self.start < self.stop:
            raise ValueError(f"an impairment needs 1 <= start < stop, not {self.start} and {self.stop}")
        if self.kind not in IMPAIRMENTS:
            raise ValueError(f"kind must be one of {', '.join(IMPAIRMENTS)}; got {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class World:
    """The states of the table over a stretch of time, and when the camera on it is impaired.

    Attributes:
      tables: the state at each whole second.
      events: in order of time.
      impairments: in order of time, disjoint, without events in them.
    """

    tables: tuple[Table, ...]
    events: tuple[TableEvent, ...]
    impairments: tuple[Impairment, ...] = ()

    @property
    def seconds(self) -> int:
        """The length of the stretch."""
        return len(self.tables)

    def impairment(self, second: int) -> Impairment | None:
        """The impairment of the camera at a second, if any."""
        return next((i for i in self.impairments if i.start <= second < i.stop), None)

    @functools.cached_property
    def clear(self) -> tuple[bool, ...]:
        """For each second, whether the camera shows the table."""
        found = [True] * self.seconds
        for impairment in self.impairments:
            if impairment.kind != "frozen":
                seconds = range(impairment.start, min(impairment.stop, self.seconds))
                found[impairment.start : impairment.stop] = [False] * len(seconds)
        return tuple(found)

    @functools.cached_property
    def sightings(self) -> dict[str, tuple[int, ...]]:
        """For each kind of thing, the seconds at which the camera shows it, in order."""
        found: dict[str, list[int]] = {kind: [] for kind in (*SHAPES, CARD)}
        for second, (table, clear) in enumerate(zip(self.tables, self.clear, strict=True)):
            for thing in table.visible if clear else ():
                found[thing.kind].append(second)
        return {kind: tuple(seconds) for kind, seconds in found.items()}

    def last_sighting(self, kind: str, second: int) -> int | None:
        """The last second up to this one at which a kind of thing was visible."""
        seconds = self.sightings[kind]
        number = bisect.bisect_right(seconds, second)
        return seconds[number - 1] if number else None

    def events_between(self, start: int, stop: int) -> tuple[TableEvent, ...]:
        """The events with start <= frame < stop."""
        first = bisect.bisect_left(self.events, start, key=lambda event: event.frame)
        last = bisect.bisect_left(self.events, stop, key=lambda event: event.frame)
        return self.events[first:last]

    @functools.cached_property
    def truth(self) -> tuple[dict[str, str], ...]:
        """The facts of each second; see `_truth`."""
        return tuple(_truth(self))

    def scene(self, time: float) -> Scene:
        """The scene at any time, including changes in progress."""
        # The change of frame k takes from k - BEGINS to k - ENDS.
        frame = min(math.ceil(time - 1e-9), self.seconds - 1)
        progress = 1 - (frame - time - ENDS) / (BEGINS - ENDS)
        if frame == 0 or progress >= 1:
            return _scene(self.tables[frame])
        if progress <= 0:
            return _scene(self.tables[frame - 1])
        return _blend(self.tables[frame - 1], self.tables[frame], progress * progress * (3 - 2 * progress))


def generate(
    rng: np.random.Generator,
    seconds: int,
    *,
    digit_indices: np.ndarray,
    rate: float | Sequence[float],
    gap: int,
    impairments: tuple[Impairment, ...] = (),
) -> World:
    """Samples a world.

    Args:
      rng: the source of randomness.
      seconds: length of the world, with one state a second.
      digit_indices: indices of the digit images that its cards may show.
      rate: probability of a change in a second, one for all or one for each.
      gap: minimum number of seconds between two changes.
      impairments: impairments of the camera, in order of time; nothing changes in them.
    """
    rates = itertools.repeat(rate, seconds) if isinstance(rate, int | float) else rate
    still = {second for i in impairments for second in range(i.start, i.stop)}
    table = _first_table(rng, digit_indices)
    tables, events, last = [table], [], 0
    for frame, chance in enumerate(rates):
        if frame == 0:
            continue
        if frame - last >= gap and frame not in still and rng.random() < chance:
            table, event = _change(rng, table, frame, digit_indices)
            events.append(event)
            last = frame
        tables.append(table)
    return World(tuple(tables), tuple(events), impairments)


def pick[T](rng: np.random.Generator, options: Sequence[T]) -> T:
    """Samples one of the options."""
    return options[int(rng.integers(len(options)))]


def _first_table(rng: np.random.Generator, digit_indices: np.ndarray) -> Table:
    table = Table()
    if rng.random() < 0.15:
        return table
    for _ in range(rng.integers(0, MAX_SHAPES)):
        table = _with(table, _new_shape(rng, table))
    if rng.random() < 0.5:
        table = _with(table, _new_card(rng, table, digit_indices))
    return table


def _with(table: Table, thing: Thing) -> Table:
    """Puts a thing on the table, replacing the one of its kind."""
    others = tuple(t for t in table.things if t.kind != thing.kind)
    return dataclasses.replace(table, things=(*others, thing))


def _free_cells(table: Table) -> list[tuple[int, int]]:
    taken = {thing.cell for thing in table.things}
    return [cell for cell in CELLS if cell not in taken]


def _new_shape(rng: np.random.Generator, table: Table) -> Thing:
    return Thing(
        kind=pick(rng, [shape for shape in SHAPES if table.find(shape) is None]),
        cell=pick(rng, _free_cells(table)),
        colour=pick(rng, COLOURS),
        **_pose(rng),
    )


def _new_card(rng: np.random.Generator, table: Table, digit_indices: np.ndarray) -> Thing:
    return Thing(CARD, pick(rng, _free_cells(table)), digit=int(rng.choice(digit_indices)), **_pose(rng))


def _pose(rng: np.random.Generator) -> dict[str, Any]:
    """Samples how a thing lies in its cell: fields of `Thing`."""
    offset = rng.uniform(-0.03, 0.03, 2)
    return {"offset": (float(offset[0]), float(offset[1])), "angle": float(rng.uniform(-0.3, 0.3))}


def _change(
    rng: np.random.Generator, table: Table, frame: int, digit_indices: np.ndarray
) -> tuple[Table, TableEvent]:
    """Samples a change: the next state, and the event that leads to it."""
    card = table.find(CARD)
    shapes = len(table.things) - (card is not None)
    visible = table.visible
    weights = {
        "appear": 1.6 * (shapes < MAX_SHAPES),
        "leave": 1.2 * bool(table.shapes),
        "move": 1.0 * bool(visible),
        "colour": 1.0 * bool(table.shapes),
        "card": 1.6 * (card is None),
        "no card": 0.5 * (card in visible),
        "digit": 2.0 * (card in visible),
        "cover": 1.0 * (table.covered is None and bool(visible)),
        "uncover": 1.5 * (table.covered is not None),
    }
    names = [name for name, weight in weights.items() if weight]
    odds = np.array([weights[name] for name in names])
    name = names[rng.choice(len(names), p=odds / odds.sum())]

    match name:
        case "appear":
            thing = _new_shape(rng, table)
            return _with(table, thing), TableEvent(frame, "appear", thing.kind)
        case "card":
            thing = _new_card(rng, table, digit_indices)
            return _with(table, thing), TableEvent(frame, "appear", CARD)
        case "leave" | "no card":
            kind = CARD if name == "no card" else pick(rng, table.shapes).kind
            rest = tuple(t for t in table.things if t.kind != kind)
            return dataclasses.replace(table, things=rest), TableEvent(frame, "leave", kind)
        case "move":
            thing = pick(rng, visible)
            elsewhere = [cell for cell in _free_cells(table) if cell[0] != thing.cell[0]]
            if not elsewhere:
                return _change(rng, table, frame, digit_indices)
            moved = dataclasses.replace(thing, cell=pick(rng, elsewhere), **_pose(rng))
            return _with(table, moved), TableEvent(frame, "move", thing.kind, moved.place)
        case "colour":
            thing = pick(rng, table.shapes)
            colour = pick(rng, [c for c in COLOURS if c != thing.colour])
            turned = dataclasses.replace(thing, colour=colour)
            return _with(table, turned), TableEvent(frame, "colour", thing.kind, colour)
        case "digit":
            assert card
            changed = card
            while changed.label == card.label:
                changed = dataclasses.replace(card, digit=int(pick(rng, digit_indices.tolist())))
            return _with(table, changed), TableEvent(frame, "digit", CARD, changed.label)
        case "cover":
            thing = card if card in visible and rng.random() < 0.4 else pick(rng, visible)
            angle = thing.angle + float(rng.uniform(-0.1, 0.1))
            covered = dataclasses.replace(table, covered=thing.kind, cover_angle=angle)
            return covered, TableEvent(frame, "cover", thing.kind)
        case _:  # "uncover"
            assert table.covered
            return dataclasses.replace(table, covered=None), TableEvent(frame, "uncover", table.covered)


def _truth(world: World) -> Iterator[dict[str, str]]:
    """Yields the facts of each second, which sentences are about, as strings.

    there:KIND         yes, covered or none
    colour:SHAPE       a colour, covered or none
    place:KIND         left, middle or right, covered or none
    digit              what the card shows, covered or none
    count              number of visible shapes
    under              the kind of the thing under the cover, or none
    was under          the kind of the thing under the cover before, or none
    first              the first number that was visible, or none
    previous           the number before the one that is or was last visible, or none
    seen:KIND          yes if it has been visible, or none
    last place:KIND    where it was when last visible, or none
    last colour:SHAPE  the colour it had when last visible, or none
    times:KIND         how many times it appeared: a number, or many
    event              the last change as CHANGE:KIND:VALUE, or none
    view               clear, or none while the camera shows nothing

    Seconds without a change share one dictionary.
    """
    events = {event.frame: event for event in world.events}
    shown: list[str] = []
    # Facts that stay until something changes them.
    history = {"was under": "none", "event": "none"}
    for kind in (*SHAPES, CARD):
        history |= {f"seen:{kind}": "none", f"last place:{kind}": "none"}
        if kind != CARD:
            history[f"last colour:{kind}"] = "none"
    appeared = dict.fromkeys((*SHAPES, CARD), 0)
    facts: dict[str, str] = {}
    before: Table | None = None
    for frame, table in enumerate(world.tables):
        event = events.get(frame)
        view = "clear" if world.clear[frame] else "none"
        if table is before and event is None and view == facts["view"]:
            yield facts
            continue
        if event:
            history["event"] = f"{event.change}:{event.kind}:{event.value}"
            appeared[event.kind] += event.change == "appear"
        if before and before.covered and before.covered != table.covered:
            history["was under"] = before.covered
        facts = {"count": str(len(table.shapes)), "under": table.covered or "none", "view": view}
        for kind in (*SHAPES, CARD):
            thing = table.find(kind)
            state = "none" if thing is None else "covered" if kind == table.covered else "yes"
            visible = thing if state == "yes" else None
            facts[f"there:{kind}"] = state
            facts[f"place:{kind}"] = visible.place if visible else state
            facts[f"times:{kind}"] = str(appeared[kind]) if appeared[kind] <= MOST_TIMES else "many"
            if visible:
                history |= {f"seen:{kind}": "yes", f"last place:{kind}": visible.place}
            if kind == CARD:
                facts["digit"] = visible.label if visible else state
                if visible and (not shown or shown[-1] != visible.label):
                    shown.append(visible.label)
            else:
                facts[f"colour:{kind}"] = visible.colour if visible else state
                if visible:
                    history[f"last colour:{kind}"] = visible.colour
        facts["first"] = shown[0] if shown else "none"
        facts["previous"] = shown[-2] if len(shown) > 1 else "none"
        facts |= history
        before = table
        yield facts


def _item(thing: Thing) -> Item:
    x, y = thing.centre
    return Item(thing.kind, x, y, colour=thing.colour, digit=thing.digit, angle=thing.angle)


def _scene(table: Table) -> Scene:
    cover = None
    if hidden := table.hidden:
        x, y = hidden.centre
        cover = Cover(x=x, y=y, angle=table.cover_angle)
    return Scene(tuple(_item(thing) for thing in table.things), cover)


def _blend(before: Table, after: Table, share: float) -> Scene:
    """Interpolates: what comes or goes slides over the nearer edge, the rest glides or fades."""
    items = []
    for kind in dict.fromkeys(thing.kind for thing in (*before.things, *after.things)):
        old, new = before.find(kind), after.find(kind)
        if old and new:
            if old == new:
                items.append(_item(new))
            elif old.cell != new.cell:
                (x0, y0), (x1, y1) = old.centre, new.centre
                moving = dataclasses.replace(
                    _item(new),
                    x=x0 + (x1 - x0) * share,
                    y=y0 + (y1 - y0) * share,
                    angle=old.angle + (new.angle - old.angle) * share,
                )
                items.append(moving)
            else:
                items += [_item(old), dataclasses.replace(_item(new), opacity=share)]
        elif thing := new or old:
            outside = 1 - share if new else share
            item = _item(thing)
            edge = -0.3 if item.y < 0.5 else 1.3
            items.append(dataclasses.replace(item, y=item.y + (edge - item.y) * outside))
    cover = None
    table = after if after.covered else before
    if hidden := table.hidden:
        x, y = hidden.centre
        outside = 0.0 if before.covered == after.covered else 1 - share if after.covered else share
        edge = -0.4 if x < 0.5 else 1.4
        cover = Cover(x=x + (edge - x) * outside, y=y, angle=table.cover_angle)
    return Scene(tuple(items), cover)
