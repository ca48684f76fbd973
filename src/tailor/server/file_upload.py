"""Reading an upload as it comes: a multipart body whose file goes straight to the disk, never as a whole to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from tailor.errors import nearest
from tailor.server.errors import ApiError, invalid
from tailor.server.protocol_jobs import PURPOSES

if TYPE_CHECKING:
    from tailor.server.file_store import Draft, FileStore, StoredFile

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("purpose", ANCHOR, SECONDS, "file")
FIELD_BYTES = 1024
EXPIRY = (3_600, 2_592_000)
"""Seconds that a file may be kept: an hour to 30 days."""

BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                    "properties": {
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        ANCHOR: {"type": "string", "enum": ["created_at"]},
                        SECONDS: {"type": "integer", "minimum": EXPIRY[0], "maximum": EXPIRY[1]},
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                    },
                }
            }
        },
    }
}
"""The body in OpenAPI's words; FastAPI does not see it, because it is read piece by piece."""


async def receive(request: Request, store: FileStore) -> StoredFile:
    """Read the upload and keep its file. Raises ApiError; then, and when the client leaves, nothing is left behind."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(415, "Send the file as multipart/form-data.", code="unsupported_media_type")
    form = _Form(store)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in request.stream():
            await run_in_threadpool(parser.write, chunk)
        return await run_in_threadpool(form.keep)
    except FormParserError as error:
        raise invalid(None, "The multipart body cannot be read.", "invalid_multipart") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The upload ended too early.", code="incomplete_upload") from error
    finally:
        form.discard()


class _Form:
    """The parts of an upload: short fields in memory, the file in a draft."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._fields: dict[str, bytearray] = {}
        self._draft: Draft | None = None
        self._filename = ""
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._name = ""
        self._ended = False

    def callbacks(self) -> Any:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._named,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def keep(self) -> StoredFile:
        """The file, when all that was sent is good."""
        if not self._ended:
            raise invalid(None, "The multipart body ends too early.", "invalid_multipart")
        purpose = self._text("purpose")
        if purpose is None:
            raise invalid("purpose", "Missing required parameter: 'purpose'.", "missing_required_parameter")
        if self._draft is None:
            raise invalid("file", "Missing required parameter: 'file'.", "missing_required_parameter")
        self._check_purpose(purpose)
        expires = self._expires()
        return self._store.keep(self._draft, filename=self._filename, purpose=purpose, expires_after=expires)

    def discard(self) -> None:
        """Remove the draft, unless it was kept."""
        if self._draft is not None:
            self._draft.discard()

    def _begin(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _named(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name not in FIELDS:
            message = f"Unrecognized request argument supplied: {self._name[:80]}: {nearest(self._name, FIELDS)}"
            raise invalid(self._name[:80], message, "unknown_parameter")
        if self._name in self._fields or (self._name == "file" and self._draft is not None):
            raise invalid(self._name, f"Duplicate parameter: {self._name!r}.")
        if self._name != "file":
            self._fields[self._name] = bytearray()
            return
        if b"filename" not in options:
            raise invalid("file", "'file' must be a file: its part has no filename.")
        self._filename = options[b"filename"].decode("utf-8", "replace")
        purpose = self._text("purpose")
        if purpose is not None:
            self._check_purpose(purpose)
        self._draft = self._store.draft()
        self._draft.check_rows = purpose in (None, "fine-tune")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file" and self._draft is not None:
            self._draft.write(data[start:end])
            return
        field = self._fields[self._name]
        field += data[start:end]
        if len(field) > FIELD_BYTES:
            raise invalid(self._name, f"{self._name!r} is longer than {FIELD_BYTES} bytes.")

    def _end(self) -> None:
        self._ended = True

    def _text(self, name: str) -> str | None:
        return self._fields[name].decode("utf-8", "replace") if name in self._fields else None

    def _check_purpose(self, purpose: str) -> None:
        if purpose not in PURPOSES:
            message = f"Invalid value for 'purpose': {purpose[:80]!r}; {nearest(purpose, PURPOSES)}."
            raise invalid("purpose", message)

    def _expires(self) -> int | None:
        anchor, seconds = self._text(ANCHOR), self._text(SECONDS)
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise invalid(ANCHOR, f"{ANCHOR} must be 'created_at'.")
        low, high = EXPIRY
        if seconds is None or not seconds.isascii() or not seconds.isdecimal() or not low <= int(seconds) <= high:
            raise invalid(SECONDS, f"{SECONDS} must be a whole number from {low} to {high}.")
        return int(seconds)
