"""Uploaded files: a bounded store in a temporary folder."""

import contextlib
import dataclasses
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any


class StoreFull(Exception):
    """The store has no room for a file; the message says why."""


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """An uploaded file.

    Attributes:
      owner: the client that it belongs to, as `security.owner_of` names it.
      size: size in bytes.
      created, expires: seconds since the epoch.
    """

    id: str
    path: Path
    name: str
    purpose: str
    owner: str
    size: int
    created: int
    expires: int

    def describe(self) -> dict[str, Any]:
        """The file object of OpenAI's API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created,
            "expires_at": self.expires,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """Uploaded files by id, in a temporary folder that is deleted with the store.

    Each file belongs to its owner; for all others it does not exist. The limits are on all files together.

    All methods must be called from one event loop.

    Args:
      max_bytes: maximum total size.
      max_files: maximum number of files.
      keep_seconds: lifetime of a file.
    """

    def __init__(self, *, max_bytes: int, max_files: int, keep_seconds: float):
        self._folder = tempfile.TemporaryDirectory(prefix="moss-files-", ignore_cleanup_errors=True)
        self._max_bytes, self._max_files, self._keep_seconds = max_bytes, max_files, keep_seconds
        self._files: dict[str, StoredFile] = {}
        # Bytes of stored files, and of files being written.
        self._used = 0

    def new_path(self) -> Path:
        """A path in the folder for a temporary file outside the store."""
        return Path(self._folder.name) / secrets.token_hex(12)

    async def add(
        self,
        chunks: AsyncIterator[bytes],
        *,
        owner: str,
        name: str,
        purpose: str,
        keep_seconds: float | None = None,
    ) -> StoredFile:
        """Stores a file.

        Args:
          keep_seconds: lifetime, capped at the store's, which is the default.

        Raises:
          StoreFull: there is no room; the partial file is removed.
          OSError: the file cannot be written.
        """
        self.expire()
        if len(self._files) >= self._max_files:
            raise StoreFull(
                f"the server holds {self._max_files} files, its maximum; delete some, or try later"
            )
        path, size = self.new_path(), 0
        try:
            with open(path, "xb") as file:
                async for chunk in chunks:
                    size, self._used = size + len(chunk), self._used + len(chunk)
                    if self._used > self._max_bytes:
                        raise StoreFull(
                            f"all files together may have {self._max_bytes} bytes; delete some, or try later"
                        )
                    file.write(chunk)
        except BaseException:
            self._used -= size
            path.unlink(missing_ok=True)
            raise
        now, seconds = time.time(), min(keep_seconds or self._keep_seconds, self._keep_seconds)
        stored = StoredFile(
            f"file-{path.name}", path, name, purpose, owner, size, int(now), int(now + seconds)
        )
        self._files[stored.id] = stored
        return stored

    def get(self, file_id: str, owner: str) -> StoredFile | None:
        """Returns a file, or None if it does not exist, has expired, or belongs to another owner."""
        self.expire()
        stored = self._files.get(file_id)
        return stored if stored and stored.owner == owner else None

    def all(self, owner: str) -> list[StoredFile]:
        """All files of an owner, oldest first."""
        self.expire()
        return [stored for stored in self._files.values() if stored.owner == owner]

    def delete(self, file_id: str) -> None:
        """Deletes an existing file."""
        stored = self._files.pop(file_id)
        self._used -= stored.size
        with contextlib.suppress(OSError):
            os.unlink(stored.path)

    def expire(self) -> None:
        """Deletes expired files."""
        now = time.time()
        for stored in [stored for stored in self._files.values() if stored.expires <= now]:
            self.delete(stored.id)
