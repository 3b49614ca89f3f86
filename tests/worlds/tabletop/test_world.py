"""The events on the table, and the ground truth."""

import collections
import dataclasses
import itertools
import math
from typing import get_args

import numpy as np
import pytest

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES, TABLES, Look, paint
from moss_jax.worlds.tabletop.world import (
    BEGINS,
    CARD,
    CELLS,
    ENDS,
    MAX_SHAPES,
    PLACES,
    EventKind,
    Impairment,
    Table,
    TableEvent,
    Thing,
    World,
    generate,
)

SECONDS = 60
CHANGES = set(get_args(EventKind))


def draw(seed: int, *, seconds: int = SECONDS, rate: float = 0.7, gap: int = 1) -> World:
    rng = np.random.default_rng(seed)
    return generate(rng, seconds, digit_indices=digits.training_indices(), rate=rate, gap=gap)


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [draw(seed) for seed in range(60)]


def digit_image(number: int) -> int:
    """Index of an image of this number."""
    return next(i for i in range(100) if digits.label(i) == number)


# -------------------------------------------------------------------------------------- events


def test_every_table_is_valid(worlds):
    trained = set(digits.training_indices().tolist())
    for table in itertools.chain.from_iterable(world.tables for world in worlds):
        kinds = [thing.kind for thing in table.things]
        cells = [thing.cell for thing in table.things]
        assert len(set(kinds)) == len(kinds)
        assert len(set(cells)) == len(cells)
        assert set(kinds) <= {*SHAPES, CARD}
        assert set(cells) <= set(CELLS)
        assert len(set(kinds) - {CARD}) <= MAX_SHAPES
        assert table.covered is None or table.covered in kinds
        for thing in table.things:
            if thing.kind == CARD:
                assert thing.digit in trained
            else:
                assert thing.colour in COLOURS
            # It lies in its cell, nearly upright.
            column, row = thing.cell
            assert math.dist(thing.centre, ((column + 0.5) / 3, (row + 0.5) / 2)) < 0.05
            assert abs(thing.angle) <= 0.3
            assert thing.place == PLACES[column]


def test_many_tables_are_drawn(worlds):
    first = [world.tables[0] for world in worlds]
    assert len(set(first)) > 40
    assert any(not table.things for table in first)
    tables = [table for world in worlds for table in world.tables]
    assert {len(table.things) for table in tables} == set(range(MAX_SHAPES + 2))
    things = {thing for table in tables for thing in table.things}
    assert {(thing.kind, thing.colour) for thing in things if thing.kind != CARD} == set(
        itertools.product(SHAPES, COLOURS)
    )
    assert {(thing.kind, thing.cell) for thing in things} == set(itertools.product((*SHAPES, CARD), CELLS))
    assert {thing.label for thing in things if thing.kind == CARD} == set("0123456789")


def difference(before: Table, after: Table) -> list[tuple[str, str, str]]:
    """The changes between two tables."""
    found = []
    for kind in (*SHAPES, CARD):
        old, new = before.find(kind), after.find(kind)
        if old is None and new is None:
            continue
        if old is None:
            found.append(("appear", kind, ""))
        elif new is None:
            found.append(("leave", kind, ""))
        else:
            # A move changes offset and angle too; other events change only the attribute that they name.
            moved = {"cell": new.cell, "offset": new.offset, "angle": new.angle}
            if old.cell != new.cell:
                assert old.place != new.place
                found.append(("move", kind, new.place))
                old = dataclasses.replace(old, **moved)
            if old.colour != new.colour:
                found.append(("colour", kind, new.colour))
            if kind == CARD and old.label != new.label:
                found.append(("digit", kind, new.label))
            assert dataclasses.replace(old, colour=new.colour, digit=new.digit) == new
    if before.covered != after.covered:
        if before.covered:
            found.append(("uncover", before.covered, ""))
        if after.covered:
            found.append(("cover", after.covered, ""))
    return found


def test_events_are_the_differences_between_tables(worlds):
    for world in worlds:
        events = {event.frame: event for event in world.events}
        assert len(events) == len(world.events)
        assert [event.frame for event in world.events] == sorted(events)
        for frame in range(1, world.seconds):
            event = events.get(frame)
            told = [] if event is None else [(event.change, event.kind, event.value)]
            assert difference(world.tables[frame - 1], world.tables[frame]) == told
        assert 0 not in events


def test_covered_things_do_not_change(worlds):
    seen = 0
    for world in worlds:
        for before, after in itertools.pairwise(world.tables):
            kind = before.covered
            if kind and after.covered == kind:
                assert after.find(kind) == before.find(kind)
                assert after.cover_angle == before.cover_angle
                seen += before != after
            elif kind:
                assert after.covered is None
                assert after.find(kind) == before.find(kind)
    assert seen > 100  # other things changed meanwhile


def test_all_kinds_of_events_occur(worlds):
    happened = collections.Counter((e.change, e.kind == CARD) for world in worlds for e in world.events)
    expected = set(itertools.product(CHANGES, (False, True))) - {("colour", True), ("digit", False)}
    assert set(happened) == expected
    assert min(happened.values()) > 20


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_the_gap_between_changes_is_kept(gap):
    for seed in range(10):
        frames = [event.frame for event in draw(seed, rate=0.6, gap=gap).events]
        assert len(frames) > 5
        assert all(b - a >= gap for a, b in itertools.pairwise([0, *frames]))
    # At rate 1 nothing but the gap delays a change.
    frames = [event.frame for event in draw(0, rate=1.0, gap=gap).events]
    assert frames == list(range(gap, SECONDS, gap))


def test_nothing_happens_at_rate_0():
    world = draw(4, rate=0.0)
    assert world.events == ()
    assert set(world.tables) == {world.tables[0]}


def test_a_seed_determines_a_world_of_the_given_length():
    for seconds in (1, 2, 17):
        world = draw(5, seconds=seconds)
        assert world.seconds == len(world.tables) == len(world.truth) == seconds
        assert world == draw(5, seconds=seconds)
    assert draw(5).tables != draw(6).tables


# ----------------------------------------------------------------------------------- the truth


def truth_of(tables: tuple[Table, ...]) -> dict[str, str]:
    """The truth after these tables, without events."""
    now = {thing.kind: thing for thing in tables[-1].things}
    hidden = tables[-1].covered
    in_sight = [{t.kind: t for t in table.things if t.kind != table.covered} for table in tables]
    numbers = [str(digits.label(sight[CARD].digit)) for sight in in_sight if CARD in sight]
    numbers = [number for number, _ in itertools.groupby(numbers)]

    def of(kind, value):
        return "covered" if kind == hidden else value(now[kind]) if kind in now else "none"

    truth = {
        "count": str(len(in_sight[-1].keys() - {CARD})),
        "digit": of(CARD, lambda card: str(digits.label(card.digit))),
        "under": hidden or "none",
        "previous": numbers[-2] if len(numbers) > 1 else "none",
        "first": numbers[0] if numbers else "none",
        "view": "clear",
    }
    covers = [kind for kind, _ in itertools.groupby(table.covered for table in tables)]
    covers = [kind for kind in covers[:-1] if kind]
    truth["was under"] = covers[-1] if covers else "none"
    for kind in (*SHAPES, CARD):
        truth[f"there:{kind}"] = of(kind, lambda _: "yes")
        truth[f"place:{kind}"] = of(kind, lambda thing: ("left", "middle", "right")[thing.cell[0]])
        last = next((sight[kind] for sight in reversed(in_sight) if kind in sight), None)
        truth[f"seen:{kind}"] = "yes" if last else "none"
        truth[f"last place:{kind}"] = ("left", "middle", "right")[last.cell[0]] if last else "none"
        if kind != CARD:
            truth[f"last colour:{kind}"] = last.colour if last else "none"
    for shape in SHAPES:
        truth[f"colour:{shape}"] = of(shape, lambda thing: thing.colour)
    return truth


def test_truth_follows_from_the_tables(worlds):
    for world in worlds[:25]:
        last = "none"
        events = {event.frame: f"{event.change}:{event.kind}:{event.value}" for event in world.events}
        for frame, facts in enumerate(world.truth):
            last = events.get(frame, last)
            times = collections.Counter(
                event.kind for event in world.events if event.frame <= frame and event.change == "appear"
            )
            expected = truth_of(world.tables[: frame + 1]) | {"event": last}
            for kind in (*SHAPES, CARD):
                expected[f"times:{kind}"] = str(times[kind]) if times[kind] < 10 else "many"
            assert facts == expected


def test_truth_of_a_short_story():
    """A card with a 3 is covered, uncovered, becomes a 5 and leaves; a red star appears meanwhile."""
    star = Thing("star", (2, 0), "red")
    three, five = (Thing(CARD, (0, 1), digit=digit_image(number)) for number in (3, 5))
    tables = (
        Table(),
        Table((three,)),
        Table((three,), covered=CARD),
        Table((three,)),
        Table((five,)),
        Table((five, star)),
        Table((star,)),
        Table((star,), covered="star"),
    )
    events = (
        TableEvent(1, "appear", CARD),
        TableEvent(2, "cover", CARD),
        TableEvent(3, "uncover", CARD),
        TableEvent(4, "digit", CARD, "5"),
        TableEvent(5, "appear", "star"),
        TableEvent(6, "leave", CARD),
        TableEvent(7, "cover", "star"),
    )
    truth = World(tables, events).truth

    def over_time(key):
        return [facts[key] for facts in truth]

    assert over_time("digit") == ["none", "3", "covered", "3", "5", "5", "none", "none"]
    assert over_time("previous") == ["none", "none", "none", "none", "3", "3", "3", "3"]
    assert over_time("place:card") == ["none", "left", "covered", "left", "left", "left", "none", "none"]
    assert over_time("there:star") == ["none"] * 5 + ["yes", "yes", "covered"]
    assert over_time("colour:star") == ["none"] * 5 + ["red", "red", "covered"]
    assert over_time("seen:star") == ["none"] * 5 + ["yes"] * 3
    assert over_time("count") == ["0"] * 5 + ["1", "1", "0"]
    assert over_time("under") == ["none", "none", "card", "none", "none", "none", "none", "star"]
    assert over_time("event")[:5] == ["none", "appear:card:", "cover:card:", "uncover:card:", "digit:card:5"]


def test_a_thing_covered_from_the_beginning_has_not_been_seen():
    star = Thing("star", (0, 0), "red")
    truth = World((Table((star,), covered="star"), Table((star,))), (TableEvent(1, "uncover", "star"),)).truth
    assert [facts["seen:star"] for facts in truth] == ["none", "yes"]


# ------------------------------------------------------------------------------------ the scene


def test_scenes_of_whole_seconds_show_the_tables(worlds):
    for world in worlds[:20]:
        for second, table in enumerate(world.tables):
            scene = world.scene(float(second))
            assert [item.kind for item in scene.items] == [thing.kind for thing in table.things]
            for item, thing in zip(scene.items, table.things, strict=True):
                assert (item.x, item.y) == thing.centre
                assert (item.colour, item.digit, item.angle) == (thing.colour, thing.digit, thing.angle)
                assert (item.opacity, item.scale) == (1, 1)
            if table.covered:
                # The cover is centred on the thing that it hides.
                assert (scene.cover.x, scene.cover.y) == table.find(table.covered).centre
                assert scene.cover.opacity == 1
            else:
                assert scene.cover is None


def test_a_change_is_in_progress_only_between_two_seconds(worlds):
    for world in worlds[:20]:
        events = {event.frame for event in world.events}
        for frame in range(1, world.seconds):
            before, after = world.scene(frame - 1.0), world.scene(float(frame))
            for share in (0.01, 0.1, 0.149):
                assert world.scene(frame - 1 + share) == before
                assert world.scene(frame - share) == after
            for share in (0.16, 0.5, 0.84):
                between = world.scene(frame - share)
                assert (between not in (before, after)) == (frame in events)


def test_the_last_table_stays(worlds):
    world = worlds[0]
    last = world.scene(world.seconds - 1.0)
    assert all(world.scene(world.seconds - 1 + t) == last for t in (0.2, 0.5, 0.99, 3.0))


def out_of_sight(item) -> bool:
    return max(abs(item.x - 0.5), abs(item.y - 0.5)) > 0.5 + 0.24


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_motion_is_continuous(worlds, change):
    """Things glide, fade, and enter and leave outside the picture."""
    step, least = 0.01, 0.002
    happened = ((world, event) for world in worlds for event in world.events if event.change == change)
    for world, event in itertools.islice(happened, 12):
        times = np.arange(event.frame - BEGINS - step, event.frame - ENDS + step, step)
        for before, after in itertools.pairwise(world.scene(float(t)) for t in times):
            for one, other in ((before, after), (after, before)):
                for item in one.items:
                    same = [o for o in other.items if (o.kind, o.colour, o.digit) == _same(item)]
                    if not same:
                        # It enters or leaves: invisible, outside, or entirely beneath its successor.
                        above = [o for o in other.items if o.kind == item.kind and o.opacity == 1]
                        assert item.opacity < least or out_of_sight(item) or _hides(above, item)
                        continue
                    (moved,) = same
                    assert math.dist((item.x, item.y), (moved.x, moved.y)) < 4 * step
                    assert abs(item.angle - moved.angle) < 4 * step
                    assert abs(item.opacity - moved.opacity) < 4 * step
                if one.cover and other.cover:
                    assert math.dist((one.cover.x, one.cover.y), (other.cover.x, other.cover.y)) < 4 * step
                elif one.cover:
                    assert out_of_sight(one.cover)


def _same(item):
    return item.kind, item.colour, item.digit


def _hides(above, item) -> bool:
    return any((o.x, o.y, o.angle) == (item.x, item.y, item.angle) for o in above)


def test_the_first_and_last_picture_of_a_change_are_those_of_the_tables(worlds):
    look = Look(seed=3, wood=TABLES[1])
    for world in worlds[:3]:
        for event in world.events:
            begin, end = event.frame - BEGINS, event.frame - ENDS
            times = (begin - 1e-3, begin + 1e-3, end - 1e-3, end + 1e-3)
            a, b, c, d = (paint(world.scene(t), look, 32) for t in times)
            whole = np.abs(d - a).mean()
            assert whole > 0.5
            assert np.abs(b - a).mean() < 0.01 * whole
            # While the old thing is still there, the one that fades in casts a second shadow.
            assert np.abs(d - c).mean() < (0.4 if event.change in ("colour", "digit") else 0.01) * whole


def test_motion_is_monotonic_and_symmetric():
    """Half-way in time, a thing that moves is half-way there."""
    star = Thing("star", (0, 0), "red")
    moved = dataclasses.replace(star, cell=(2, 1))
    world = World((Table((star,)), Table((moved,))), (TableEvent(1, "move", "star", "right"),))
    (item,) = world.scene(1 - (BEGINS + ENDS) / 2).items
    assert (item.x, item.y) == pytest.approx((0.5, 0.5))
    xs = [world.scene(t).items[0].x for t in np.linspace(0, 1, 101)]
    assert xs == sorted(xs)
    assert (xs[0], xs[-1]) == pytest.approx((1 / 6, 5 / 6))


# ------------------------------------------------------------- sightings, rates and impairments


def test_seconds_at_which_things_were_visible(worlds):
    for world in worlds[:10]:
        for kind in (*SHAPES, CARD):
            seconds = [f for f, table in enumerate(world.tables) if kind in {t.kind for t in table.visible}]
            assert world.sightings[kind] == tuple(seconds)
            for second in range(world.seconds):
                before = [s for s in seconds if s <= second]
                assert world.last_sighting(kind, second) == (before[-1] if before else None)


def test_events_between_two_seconds(worlds):
    world = max(worlds, key=lambda world: len(world.events))
    for start, stop in itertools.combinations(range(world.seconds + 1), 2):
        assert world.events_between(start, stop) == tuple(
            event for event in world.events if start <= event.frame < stop
        )


def test_the_rate_may_change_from_second_to_second():
    rates = [0.0] * 50 + [1.0] * 10 + [0.0] * 40
    world = generate(
        np.random.default_rng(0), 100, digit_indices=digits.training_indices(), rate=rates, gap=1
    )
    assert [event.frame for event in world.events] == list(range(50, 60))


def test_nothing_changes_while_the_camera_is_impaired():
    impairments = (Impairment(3, 6, "black"), Impairment(9, 12, "frozen"))
    world = generate(
        np.random.default_rng(0),
        15,
        digit_indices=digits.training_indices(),
        rate=1.0,
        gap=1,
        impairments=impairments,
    )
    assert [event.frame for event in world.events] == [1, 2, 6, 7, 8, 12, 13, 14]
    assert [world.impairment(second) for second in (2, 3, 5, 6, 11, 14)] == [
        None, impairments[0], impairments[0], None, impairments[1], None,
    ]  # fmt: skip
    # A frozen camera shows a table.
    assert world.clear == (*[True] * 3, *[False] * 3, *[True] * 9)
    assert [facts["view"] for facts in world.truth] == ["clear" if c else "none" for c in world.clear]
    # Nothing is seen meanwhile, and nothing else is different afterwards.
    assert not {3, 4, 5} & set().union(*world.sightings.values())
    assert world.truth[4] == world.truth[2] | {"view": "none"}
    assert dataclasses.replace(world, impairments=()).truth[6:] == world.truth[6:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, "black"), "1 <= start < stop, not 0 and 3"),
        ((4, 4, "black"), "1 <= start < stop, not 4 and 4"),
        ((1, 2, "dirty"), "kind must be one of black, blurred, overexposed, frozen; got 'dirty'"),
    ],
)
def test_impairments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Impairment(*arguments)


def test_the_history_of_a_short_story():
    """A star comes and leaves three times under changing covers, and a card shows two numbers."""
    star, moved = Thing("star", (0, 0), "red"), Thing("star", (2, 0), "blue")
    card, other = (Thing(CARD, (1, 1), digit=digit_image(number)) for number in (3, 5))
    tables = (
        Table(),
        Table((star,)),
        Table((star, card)),
        Table((star, card), covered="star"),
        Table((star, card)),
        Table((card,)),
        Table((card, moved)),
        Table((card, moved), covered=CARD),
        Table((card, moved)),
        Table((other, moved)),
    )
    events = tuple(TableEvent(frame, "appear", kind) for frame, kind in ((1, "star"), (2, CARD), (6, "star")))
    truth = World(tables, events).truth

    def of(key):
        return [facts[key] for facts in truth]

    assert of("first") == ["none"] * 2 + ["3"] * 8
    assert of("times:star") == ["0"] + ["1"] * 5 + ["2"] * 4
    assert of("times:ring") == ["0"] * 10
    assert of("last place:star") == ["none"] + ["left"] * 5 + ["right"] * 4
    assert of("last colour:star") == ["none"] + ["red"] * 5 + ["blue"] * 4
    assert of("was under") == ["none"] * 4 + ["star"] * 4 + [CARD] * 2


def test_appearances_beyond_nine_are_many():
    star = Table((Thing("star", (0, 0), "red"),))
    events = tuple(TableEvent(frame, "appear", "star") for frame in range(1, 12))
    truth = World((Table(), *[star] * 11), events).truth
    assert [facts["times:star"] for facts in truth] == [*map(str, range(10)), "many", "many"]
