"""Memory of frames is used again, and never while anything refers to it."""

from concurrent import futures

import jax
import numpy as np

from moss_jax.stream import Session
from moss_jax.stream.frame_pool import MOST, FramePool


def numbered(number: int, height: int = 8) -> np.ndarray:
    return np.full((height, 6, 3), number, np.uint8)


def test_a_copy_that_is_no_longer_used_is_written_again():
    pool = FramePool()
    first = pool.copy(numbered(1))
    place = first.ctypes.data
    held = first[2:4]  # Also a part of it is a reference.
    assert pool.copy(numbered(2)).ctypes.data != place
    del first
    assert pool.copy(numbered(3)).ctypes.data != place
    assert (held == 1).all()
    del held
    again = [pool.copy(numbered(4)) for _ in range(3)]
    assert place in {x.ctypes.data for x in again}
    assert all((x == 4).all() for x in again)
    assert pool.copy(numbered(5, height=4)).shape == (4, 6, 3)


def test_a_frame_on_its_way_to_the_device_is_in_use():
    pool = FramePool()
    sent = [jax.device_put(pool.copy(numbered(i, height=512))) for i in range(40)]
    assert [int(x[0, 0, 0]) for x in sent] == list(range(40))


def test_threads_share_a_pool():
    pool = FramePool()

    def push(number: int) -> bool:
        return all((pool.copy(numbered(number)) == number).all() for _ in range(500))

    with futures.ThreadPoolExecutor(4) as threads:
        assert all(threads.map(push, range(4)))
    held = [pool.copy(numbered(i % 250)) for i in range(3 * MOST)]
    assert len(pool._frames) == MOST
    assert all((x == i % 250).all() for i, x in enumerate(held))


def test_a_frame_is_copied_unless_the_caller_leaves_it_alone(make_engine):
    session = Session(make_engine())
    frame = numbered(1)
    for time, copy in enumerate((True, False)):
        session.push_frame(frame, float(time), copy=copy)
    copied, given = (inbound.rgb for inbound in sorted(session._streams[0].conversation._inbox))
    assert not np.shares_memory(copied, frame)
    assert np.shares_memory(given, frame)
    frame[:] = 2
    assert (copied == 1).all()
