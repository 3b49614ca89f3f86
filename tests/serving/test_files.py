"""The store of uploaded files: what it holds is counted, also where a write fails."""

import asyncio

import pytest

from moss_jax.serving.files import FileStore, StoreFull


async def chunks(*parts: bytes | Exception):
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part


def store(max_bytes=100, max_files=10, keep_seconds=60.0) -> FileStore:
    return FileStore(max_bytes=max_bytes, max_files=max_files, keep_seconds=keep_seconds)


def test_what_fails_leaves_nothing():
    async def run():
        files = store()
        folder = files.new_path().parent
        with pytest.raises(StoreFull):
            await files.add(chunks(b"1" * 60, b"1" * 60), name="a", owner="a", purpose="vision")
        with pytest.raises(ConnectionError):
            await files.add(chunks(b"1" * 60, ConnectionError()), name="a", owner="a", purpose="vision")
        assert not list(folder.iterdir())
        assert files.all("a") == []
        # All of the room is there again.
        kept = await files.add(chunks(b"1" * 60, b"2" * 40), name="a", owner="a", purpose="vision")
        assert kept.path.read_bytes() == b"1" * 60 + b"2" * 40
        with pytest.raises(StoreFull):
            await files.add(chunks(b"1"), name="b", owner="a", purpose="vision")
        files.delete(kept.id)
        assert not list(folder.iterdir())
        assert (await files.add(chunks(b"1" * 100), name="b", owner="a", purpose="vision")).size == 100

    asyncio.run(run())


def test_writes_beside_one_another_share_the_room():
    async def run():
        files = store()
        gate = asyncio.Event()

        async def slow():
            yield b"1" * 60
            await gate.wait()
            yield b"1" * 30

        first = asyncio.create_task(files.add(slow(), name="a", owner="a", purpose="vision"))
        await asyncio.sleep(0)
        with pytest.raises(StoreFull):
            await files.add(chunks(b"1" * 50), name="b", owner="a", purpose="vision")
        gate.set()
        assert (await first).size == 90

    asyncio.run(run())


def test_a_file_is_kept_no_longer_than_the_store_allows(monkeypatch):
    async def run():
        files = store(keep_seconds=60.0)
        kept = await files.add(chunks(b"1"), name="a", owner="a", purpose="vision", keep_seconds=3600.0)
        brief = await files.add(chunks(b"1"), name="b", owner="a", purpose="vision", keep_seconds=5.0)
        assert kept.expires - kept.created == 60
        monkeypatch.setattr("time.time", lambda: brief.created + 10.0)
        assert files.get(brief.id, "a") is None
        assert not brief.path.exists()
        assert files.all("a") == [kept]
        monkeypatch.setattr("time.time", lambda: brief.created + 100.0)
        assert files.all("a") == []

    asyncio.run(run())


def test_a_file_exists_only_for_its_owner():
    async def run():
        files = store(max_files=2)
        own = await files.add(chunks(b"1"), owner="a", name="a", purpose="vision")
        other = await files.add(chunks(b"2"), owner="b", name="b", purpose="vision")
        assert files.get(own.id, "a") == own
        assert files.get(own.id, "b") is None
        assert files.all("b") == [other]
        # The limits are on the files of all.
        with pytest.raises(StoreFull):
            await files.add(chunks(b"3"), owner="c", name="c", purpose="vision")

    asyncio.run(run())
