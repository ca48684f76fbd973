"""/v1/files: upload, list, retrieve, delete, download (whole, or a range of it)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Header, Query
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tailor.server.errors import ApiError
from tailor.server.file_store import FileStore, StoredFile
from tailor.server.file_upload import BODY, receive
from tailor.server.protocol_jobs import DeletedFile, FileList, FileObject, Order, Purpose

CHUNK = 1 << 16
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_CONTENT: dict[int | str, dict[str, Any]] = {
    status: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    for status in (200, 206)
}


def file_object(file: StoredFile) -> FileObject:
    """A file in OpenAI's words."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        filename=file.filename,
        purpose=file.purpose,
        expires_at=file.expires_at,
    )


def files_router(store: FileStore) -> APIRouter:
    """The routes of files."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    @router.post("", response_model=FileObject, openapi_extra=BODY)
    async def upload_file(request: Request) -> FileObject:
        """Upload a file. Those for fine-tuning are JSON Lines, checked line by line as they come."""
        return file_object(await receive(request, store))

    @router.get("", response_model=FileList)
    def list_files(
        purpose: Purpose | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Order = "desc",
        after: str | None = None,
    ) -> FileList:
        """A page of files."""
        files, more = store.page(limit, purpose=purpose, after=after, ascending=order == "asc")
        first, last = (files[0].id, files[-1].id) if files else (None, None)
        return FileList(data=[file_object(file) for file in files], has_more=more, first_id=first, last_id=last)

    @router.get("/{file_id}", response_model=FileObject)
    def retrieve_file(file_id: str) -> FileObject:
        """What is known of a file."""
        return file_object(store.get(file_id))

    @router.delete("/{file_id}", response_model=DeletedFile)
    def delete_file(file_id: str) -> DeletedFile:
        """Delete a file. Jobs that were made with it have their own copy."""
        store.delete(file_id)
        return DeletedFile(id=file_id)

    @router.get("/{file_id}/content", response_class=Response, responses=_CONTENT)
    def download_file(file_id: str, range: Annotated[str | None, Header()] = None) -> Response:
        """The bytes as they were uploaded, or one range of them."""
        stored, file = store.open(file_id)
        try:
            return _content(stored, file, range)
        except BaseException:
            file.close()
            raise

    return router


def _content(stored: StoredFile, file: BinaryIO, wanted: str | None) -> Response:
    part = _range(wanted, stored.bytes)
    start, end = part or (0, stored.bytes)
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
        "content-length": str(end - start),
        "etag": f'"{stored.sha256}"',
        "x-content-type-options": "nosniff",
    }
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{stored.bytes}"
    return StreamingResponse(
        _pieces(file, start, end),
        200 if part is None else 206,
        headers,
        "application/octet-stream",
        background=BackgroundTask(file.close),
    )


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while (left := end - file.tell()) > 0 and (piece := file.read(min(CHUNK, left))):
            yield piece


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes from start to before end that a Range header asks for; None: all of them.

    What cannot be understood, several ranges included, is as if it were not there (RFC 9110, section 14.2). Raises
    ApiError 416 for a range beyond the end.
    """
    found = _RANGE.fullmatch(header or "")
    if found is None or not (found[1] or found[2]):
        return None
    if found[1]:
        start, end = int(found[1]), int(found[2]) + 1 if found[2] else size
    else:
        start, end = max(0, size - int(found[2])), size
    if found[1] and found[2] and start >= end:
        return None
    if start >= size:
        headers = {"content-range": f"bytes */{size}"}
        raise ApiError(416, f"The file has {size} bytes.", code="range_not_satisfiable", headers=headers)
    return start, min(end, size)
