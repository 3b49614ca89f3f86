"""Endpoints of uploaded files: `/v1/files`."""

import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from moss_jax.serving.chat.bodies import limited
from moss_jax.serving.chat.errors import ApiError, busy, no_file
from moss_jax.serving.files import FileStore, StoredFile, StoreFull
from moss_jax.serving.security import owner_of

_PURPOSES = ("user_data", "vision")
# Allowance in bytes for the multipart form around a file.
_FORM_BYTES = 2**20
# Concurrent uploads; each one occupies disk space before the store can refuse it.
_UPLOADS = 8


class Uploads:
    """Endpoints of uploaded files; each client has its own.

    Args:
      files: the store.
      max_bytes: maximum size of a file.
    """

    def __init__(self, files: FileStore, *, max_bytes: int):
        self._files, self._max_bytes = files, max_bytes
        self._under_way = 0

    async def upload(self, request: Request) -> Response:
        """Stores a file."""
        if self._under_way >= _UPLOADS:
            raise busy(f"{_UPLOADS} uploads are under way", status=429, code="queue_full")
        self._under_way += 1
        try:
            return await self._upload(request)
        finally:
            self._under_way -= 1

    async def _upload(self, request: Request) -> Response:
        bounded = Request(request.scope, limited(request.receive, self._max_bytes + _FORM_BYTES))
        try:
            async with bounded.form(max_files=1, max_fields=16, max_part_size=2**16) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise ApiError("the form has no file", param="file", code="missing_required_parameter")
                if purpose not in _PURPOSES:
                    names = " or ".join(_PURPOSES)
                    raise ApiError(f"purpose must be {names}", param="purpose", code="invalid_value")
                keep = form.get("expires_after[seconds]")
                try:
                    keep_seconds = None if keep is None else max(1.0, float(str(keep)))
                except ValueError:
                    raise ApiError("expires_after.seconds must be a number", param="expires_after") from None
                name = Path((file.filename or "file").replace("\\", "/")).name[:255] or "file"
                stored = await self._files.add(
                    _chunks(file),
                    owner=owner_of(request.scope),
                    name=name,
                    purpose=str(purpose),
                    keep_seconds=keep_seconds,
                )
        except StoreFull as error:
            raise ApiError(str(error), status=413, code="storage_full", param="file") from None
        except OSError:
            raise ApiError("the file cannot be stored", status=507, code="storage_full") from None
        return JSONResponse(stored.describe())

    async def list_files(self, request: Request) -> Response:
        """Lists the client's files, paginated."""
        query = request.query_params
        try:
            limit = int(query.get("limit", 10_000))
        except ValueError:
            limit = 0
        if not 1 <= limit <= 10_000:
            raise ApiError("limit is a number from 1 to 10000", param="limit", code="invalid_value")
        files = self._files.all(owner_of(request.scope))
        files = [stored for stored in files if query.get("purpose") in (None, stored.purpose)]
        if query.get("order", "desc") == "desc":
            files.reverse()
        if "after" in query:
            ids = [stored.id for stored in files]
            if query["after"] not in ids:
                raise no_file("after")
            files = files[ids.index(query["after"]) + 1 :]
        page = [stored.describe() for stored in files[:limit]]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(files) > limit,
            }
        )

    async def get_file(self, request: Request) -> Response:
        """Returns the metadata of a file."""
        return JSONResponse(self._find(request).describe())

    async def get_content(self, request: Request) -> Response:
        """Returns the content of a file."""
        stored = self._find(request)
        name = urllib.parse.quote(stored.name)
        headers = {
            "Content-Disposition": f"attachment; filename*=utf-8''{name}",
            "X-Content-Type-Options": "nosniff",
        }
        return FileResponse(stored.path, media_type="application/octet-stream", headers=headers)

    async def delete_file(self, request: Request) -> Response:
        """Deletes a file."""
        stored = self._find(request)
        self._files.delete(stored.id)
        return JSONResponse({"id": stored.id, "object": "file", "deleted": True})

    def _find(self, request: Request) -> StoredFile:
        if (stored := self._files.get(request.path_params["file"], owner_of(request.scope))) is None:
            raise no_file("file_id")
        return stored


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(2**20):
        yield chunk
