"""What is perceived at all: the change between two frames, the distance of their features, the rates."""

import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import ConfigError, SelectionConfig
from moss_jax.memory.selection import Selection, change, feature_distance, select, thumbnail
from moss_jax.worlds.tabletop import TabletopStream, digits
from moss_jax.worlds.tabletop.render import Look
from moss_jax.worlds.tabletop.world import Impairment, generate

ON = SelectionConfig(enabled=True, max_gap=1000)
STREAMS, SECONDS = 32, 24


def picture(*, noise=0.0, seed=0, height=120, width=160) -> np.ndarray:
    """A textured room with a window, by a camera with noise."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    room = 110 + 30 * np.sin(x / 7) * np.cos(y / 11)
    room[20:70, 30:80] = 210
    rgb = room[..., None] * np.array([1.0, 0.9, 0.8], np.float32)
    rgb = rgb + noise * np.random.default_rng(seed).standard_normal(rgb.shape)
    return rgb.clip(0, 255).astype(np.uint8)


def changed(before: np.ndarray, after: np.ndarray) -> bool:
    return change(thumbnail(before), thumbnail(after)) >= ON.min_change


def test_a_thumbnail_holds_the_means_of_its_cells():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (128, 192, 3), dtype=np.uint8)
    expected = rgb.reshape(64, 2, 64, 3, 3).mean((1, 3))
    np.testing.assert_allclose(thumbnail(rgb), expected, rtol=1e-6)
    assert thumbnail(rgb[:5, :7]).shape == (5, 7, 3)
    np.testing.assert_array_equal(thumbnail(rgb[:5, :7]), rgb[:5, :7])
    # Of a large frame a part of the pixels is read.
    large = np.repeat(np.repeat(picture(), 8, axis=0), 8, axis=1)
    assert np.abs(thumbnail(large) - thumbnail(picture())).mean() < 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (9, 300)])
def test_frames_may_be_as_small_as_they_like(shape):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert change(thumbnail(rgb), thumbnail(rgb)) == 0
    assert 0 <= change(thumbnail(rgb), thumbnail(255 - rgb)) <= 1


def test_another_shape_is_a_change():
    assert change(thumbnail(picture()[:9, :9]), thumbnail(picture()[:9, :8])) == 1


def test_the_change_of_a_picture_is_a_share_of_the_full_scale():
    black, white = (thumbnail(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255))
    assert change(black, white) == pytest.approx(1, abs=0.01)
    # Some of the darkness may be the exposure.
    assert 0.75 < change(white, black) < 1


@pytest.mark.parametrize("gain", [0.85, 1.0, 1.15])
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-2, 3), (4, -4)])
def test_noise_exposure_and_a_shake_are_no_change(gain, shift):
    """The camera moves by up to 4 of 160 pixels; at most 5 % of the picture is 8 here."""
    wide = picture(height=140, width=180)
    before = wide[10:130, 10:170]
    dy, dx = shift
    after = wide[10 + dy : 130 + dy, 10 + dx : 170 + dx] * gain
    noise = 6 * np.random.default_rng(1).standard_normal(after.shape)
    assert not changed(before, (after + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("corner", [(0, 0), (0, 152), (112, 0), (112, 152), (50, 100)])
def test_a_small_thing_in_a_corner_is_a_change(corner):
    """8 of 160 pixels wide, in noise."""
    before, after = picture(noise=5, seed=1), picture(noise=5, seed=2)
    assert not changed(before, after)
    y, x = corner
    after[y : y + 8, x : x + 8] = (20, 30, 200)
    assert changed(before, after)
    assert changed(after, before)


def test_a_change_of_colour_alone_is_a_change():
    before = picture()
    after = before.copy()
    before[40:60, 100:120], after[40:60, 100:120] = (206, 44, 40), (134, 56, 164)
    luma = np.array([0.299, 0.587, 0.114])
    assert abs((before[50, 110] - after[50, 110].astype(float)) @ luma) < 3
    assert changed(before, after)


def test_lights_out_is_a_change():
    assert changed(picture(), picture() // 3)


@pytest.fixture(scope="module")
def tables():
    """Streams of a table with many changes: the world, and its frames."""
    streams = []
    for seed in range(STREAMS):
        rng = np.random.default_rng([3, seed])
        world = generate(rng, SECONDS, digit_indices=digits.held_out_indices(), rate=0.5, gap=2)
        streams.append((world, TabletopStream(world, Look.draw(rng), (), seed).frames(112)))
    return streams


def test_on_a_table_every_event_is_encoded_and_next_to_nothing_else(tables):
    events, still, encoded = {}, 0, 0
    for world, frames in tables:
        state, at = Selection(), {event.frame: event.change for event in world.events}
        for second, frame in enumerate(frames):
            reason, state = select(ON, state, float(second), thumbnail(frame))
            if second == 0 or second in at:
                assert reason is None, at[second]
                events[at.get(second, "first")] = events.get(at.get(second, "first"), 0) + 1
            else:
                still, encoded = still + 1, encoded + (reason is None)
    assert set(events) == {"first", "appear", "leave", "move", "colour", "digit", "cover", "uncover"}
    assert min(events.values()) >= 10
    assert still > 300
    assert encoded < 0.1 * still


@pytest.mark.parametrize("kind", ["black", "overexposed", "blurred"])
def test_a_camera_that_goes_blind_and_sees_again_is_a_change(kind):
    seen = 0
    for seed in range(20):
        rng = np.random.default_rng([4, seed])
        impairments = (Impairment(3, 6, kind),)
        indices = digits.held_out_indices()
        world = generate(rng, 8, digit_indices=indices, rate=0.0, gap=1, impairments=impairments)
        if not world.tables[0].things:
            continue  # A blurred table is a table.
        frames, state = TabletopStream(world, Look.draw(rng), (), seed).frames(112), Selection()
        for second, frame in enumerate(frames):
            reason, state = select(ON, state, float(second), thumbnail(frame))
            assert reason is None or second not in (3, 6)
            seen += second in (3, 6)
    assert seen >= 20


def test_a_still_stream_has_a_heartbeat():
    frame, state, encoded = thumbnail(picture()), Selection(), []
    config = SelectionConfig(enabled=True, max_gap=7)
    for second in range(30):
        reason, state = select(config, state, float(second), frame)
        assert reason in (None, "still")
        encoded += [second] * (reason is None)
    assert encoded == [0, 7, 14, 21, 28]


def moving(until: float):
    """Thumbnails at a time: something moves until then."""
    bright, dark = (thumbnail(np.full((8, 8, 3), level, np.uint8)) for level in (250, 5))
    return lambda time, k: dark if k % 2 and time < until else bright


@pytest.mark.parametrize("source", [4, 10, 30])
@pytest.mark.parametrize("jitter", [0.0, 0.004])
def test_more_frames_enter_while_something_moves(source, jitter):
    config = SelectionConfig(enabled=True, max_fps=4, max_gap=1000)
    rng, shown, state = np.random.default_rng(0), moving(until=5.0), Selection()
    taken = {None: [], "still": [], "rate": []}
    for k in range(20 * source):
        time = max(k / source + jitter * rng.standard_normal(), 0)
        reason, state = select(config, state, time, shown(time, k // max(source // 10, 1)))
        taken[reason].append(time)
    entered = np.sort(taken[None] + taken["still"])
    fast, slow = (entered < 5).sum(), (entered > 6).sum()
    assert 12 <= fast <= 21
    assert 13 <= slow <= 15
    assert len(taken["rate"]) == 20 * source - len(entered)
    assert len(taken["still"]) >= 13


def test_a_source_at_the_base_rate_loses_nothing_to_the_rate():
    """Though its frames are late and early by up to a tenth of a second."""
    config = SelectionConfig(enabled=True, max_fps=4)
    rng, state, frame = np.random.default_rng(0), Selection(), thumbnail(picture())
    for second in range(200):
        reason, state = select(config, state, second + rng.uniform(0, 0.1), frame)
        assert reason in (None, "still")


def test_the_distance_of_features_is_that_of_the_vector_that_differs_most():
    rng = np.random.default_rng(0)
    before = jnp.asarray(rng.standard_normal((17, 64)), jnp.bfloat16)
    assert feature_distance(before, before) == 0
    after = before.at[5].multiply(2)
    assert feature_distance(before, after) == pytest.approx(1, abs=1e-3)
    assert feature_distance(before, before.at[5].set(-before[5]).at[3].multiply(1.5)) == pytest.approx(
        2, abs=1e-2
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_change": 1.5}, r"min_change must be in \[0, 1\], not 1.5"),
        ({"max_gap": 0}, "max_gap must be a positive number of seconds, not 0"),
        ({"min_distance": -1}, "min_distance must be at least 0, or None; got -1"),
        ({"fps": 0}, "fps must be a positive number, not 0"),
        ({"fps": 2, "max_fps": 1}, "max_fps must be a number from fps 2 on, or None; got 1"),
        ({"enabled": 1}, "enabled must be bool; got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**settings)
