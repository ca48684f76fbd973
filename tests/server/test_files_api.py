"""Files, through the official client and a real server: bytes come back as they were, and nothing leaves the store."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_jobs import app_of, client_of, served
from sqlalchemy import update

from tailor.jobs.database import open_database
from tailor.server.errors import ApiError
from tailor.server.file_store import FILES, FileSettings, FileStore, shown_name
from tailor.server.files import files_router

ROWS = b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xc3\xa9", "completion": "c"}\n'


class Live(NamedTuple):
    client: openai.OpenAI
    store: FileStore
    home: Path
    url: str


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, module_database: str | None) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(home))
        engine = open_database(module_database)
        store = FileStore(engine, FileSettings(max_bytes=100_000, max_rows=50))
        with served(app_of([files_router(store)])) as url, client_of(url) as client:
            yield Live(client, store, home, url)
        engine.dispose()


def raw(live: Live, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    """(status, headers, body) of a request as it is, without a client's own ideas of paths."""
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def form(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart body of (disposition after `form-data`, content), and its header."""
    lines = [
        b"--XX\r\ncontent-disposition: form-data; %s\r\n\r\n%s\r\n" % (what.encode(), data) for what, data in parts
    ]
    return b"".join(lines) + b"--XX--\r\n", {"content-type": "multipart/form-data; boundary=XX"}


def stored(live: Live) -> list[str]:
    return sorted(path.name for path in (live.home / "files").iterdir())


def test_bytes_come_back_as_they_were(live: Live) -> None:
    content = bytes(range(256)) * 300
    file = live.client.files.create(file=("odd näme.bin", content), purpose="user_data")
    assert (file.object, file.bytes, file.purpose, file.status) == ("file", len(content), "user_data", "processed")
    assert file.filename == "odd näme.bin"
    assert abs(file.created_at - time.time()) < 60
    answer = live.client.files.content(file.id)
    assert answer.read() == content
    assert answer.response.headers["content-type"] == "application/octet-stream"
    assert "odd%20n%C3%A4me.bin" in answer.response.headers["content-disposition"]
    assert answer.response.headers["x-request-id"].startswith("req_")
    assert live.client.files.retrieve(file.id) == file
    assert live.client.files.wait_for_processing(file.id) == file


@pytest.mark.parametrize(
    ("header", "status", "start", "end"),
    [
        ("bytes=2-4", 206, 2, 5),
        ("bytes=2-", 206, 2, 10),
        ("bytes=0-", 206, 0, 10),
        ("bytes=-3", 206, 7, 10),
        ("bytes=-30", 206, 0, 10),
        ("bytes=5-900", 206, 5, 10),
        ("bytes=1-2,4-5", 200, 0, 10),
        ("bytes=4-2", 200, 0, 10),
        ("lines=1-2", 200, 0, 10),
        ("bytes=-", 200, 0, 10),
    ],
)
def test_a_range_of_a_file(live: Live, header: str, status: int, start: int, end: int) -> None:
    file = live.client.files.create(file=b"0123456789", purpose="user_data")
    got, headers, body = raw(live, "GET", f"/v1/files/{file.id}/content", headers={"Range": header})
    assert (got, body) == (status, b"0123456789"[start:end])
    assert headers.get("content-range") == (f"bytes {start}-{end - 1}/10" if status == 206 else None)


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=99-100", "bytes=-0"])
def test_a_range_beyond_the_end(live: Live, header: str) -> None:
    file = live.client.files.create(file=b"0123456789", purpose="user_data")
    status, headers, body = raw(live, "GET", f"/v1/files/{file.id}/content", headers={"Range": header})
    assert (status, headers["content-range"]) == (416, "bytes */10")
    assert json.loads(body)["error"]["code"] == "range_not_satisfiable"


def test_lists_are_walked_in_both_orders(live: Live) -> None:
    made = [live.client.files.create(file=b"x", purpose="vision").id for _ in range(5)]
    assert [file.id for file in live.client.files.list(purpose="vision", limit=2)] == made[::-1]
    assert [file.id for file in live.client.files.list(purpose="vision", limit=2, order="asc")] == made
    page = live.client.files.list(purpose="vision", limit=2, order="asc", after=made[1])
    assert ([file.id for file in page.data], page.has_more) == (made[2:4], True)
    _, _, body = raw(live, "GET", "/v1/files?purpose=vision&limit=2")
    answer = json.loads(body)
    assert (answer["object"], answer["first_id"], answer["last_id"]) == ("list", made[4], made[3])
    assert json.loads(raw(live, "GET", "/v1/files?purpose=evals")[2])["first_id"] is None
    with pytest.raises(openai.NotFoundError):
        live.client.files.list(after="file-000000000000000000000000")
    for wrong in ("limit=0", "limit=10001", "order=up", "purpose=fun"):
        status, _, body = raw(live, "GET", f"/v1/files?{wrong}")
        assert (status, json.loads(body)["error"]["param"]) == (400, wrong.split("=")[0])


def test_a_deleted_file_is_gone(live: Live) -> None:
    file = live.client.files.create(file=b"x", purpose="batch")
    assert live.client.files.delete(file.id).to_dict() == {"id": file.id, "object": "file", "deleted": True}
    assert file.id not in stored(live)
    for ask in (live.client.files.retrieve, live.client.files.delete, live.client.files.content):
        with pytest.raises(openai.NotFoundError) as error:
            ask(file.id)
        assert (error.value.code, error.value.param) == ("file_not_found", "id")


def test_a_download_survives_the_deletion(live: Live) -> None:
    file = live.client.files.create(file=b"x" * 90_000, purpose="batch")
    _, opened = live.store.open(file.id)
    live.client.files.delete(file.id)
    with opened:
        assert opened.read() == b"x" * 90_000


def test_an_expired_file_is_gone(live: Live) -> None:
    file = live.client.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with live.store._engine.begin() as connection:
        connection.execute(update(FILES).where(FILES.c.id == file.id).values(expires_at=int(time.time())))
    with pytest.raises(openai.NotFoundError):
        live.client.files.retrieve(file.id)
    assert file.id not in [one.id for one in live.client.files.list()]
    live.client.files.create(file=b"x", purpose="batch")
    assert file.id not in stored(live)


@pytest.mark.parametrize("expiry", [{"anchor": "created_at", "seconds": 3599}, {"anchor": "born", "seconds": 3600}])
def test_a_wrong_expiry(live: Live, expiry: Any) -> None:
    before = stored(live)
    with pytest.raises(openai.BadRequestError) as error:
        live.client.files.create(file=b"x", purpose="batch", expires_after=expiry)
    assert str(error.value.param).startswith("expires_after[")
    assert stored(live) == before


def test_a_wrong_purpose(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'fine-tune'") as error:
        live.client.files.create(file=ROWS, purpose="finetune")  # type: ignore[arg-type]
    assert (error.value.param, error.value.code, error.value.type) == (
        "purpose",
        "invalid_value",
        "invalid_request_error",
    )
    assert error.value.request_id


def test_the_file_may_come_before_its_purpose(live: Live) -> None:
    file = ('name="file"; filename="x.jsonl"', ROWS)
    status, _, body = raw(live, "POST", "/v1/files", *form(file, ('name="purpose"', b"fine-tune")))
    assert (status, json.loads(body)["bytes"]) == (200, len(ROWS))
    bad = ('name="file"; filename="x.jsonl"', b"{]")
    status, _, body = raw(live, "POST", "/v1/files", *form(bad, ('name="purpose"', b"fine-tune")))
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_file_format")
    assert raw(live, "POST", "/v1/files", *form(bad, ('name="purpose"', b"batch")))[0] == 200


PURPOSE = ('name="purpose"', b"batch")
FILE = ('name="file"; filename="x"', b"x")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([FILE], "purpose"),
        ([PURPOSE], "file"),
        ([PURPOSE, FILE, FILE], "file"),
        ([PURPOSE, PURPOSE, FILE], "purpose"),
        ([PURPOSE, ('name="file"', b"x")], "file"),
        ([PURPOSE, ('name="flie"; filename="x"', b"x")], "flie"),
        ([PURPOSE, ('name="file"; filename="x"', b"")], "file"),
        ([('name="purpose"', b"x" * 5000), FILE], "purpose"),
        ([PURPOSE, ('name="expires_after[seconds]"', "٣٦٠٠".encode()), FILE], "expires_after[anchor]"),
    ],
)
def test_forms_that_are_refused(live: Live, parts: list[tuple[str, bytes]], param: str) -> None:
    before = stored(live)
    status, _, body = raw(live, "POST", "/v1/files", *form(*parts))
    assert (status, json.loads(body)["error"]["param"]) == (400, param)
    assert stored(live) == before


def test_bodies_that_are_no_forms(live: Live) -> None:
    body, headers = form(PURPOSE, FILE)
    before = stored(live)
    for sent, sent_headers, expected in (
        (b"{}", {"content-type": "application/json"}, 415),
        (body, {"content-type": "multipart/form-data"}, 415),
        (body[:-10], headers, 400),
        (b"rubbish", headers, 400),
    ):
        status, _, answer = raw(live, "POST", "/v1/files", sent, sent_headers)
        assert (status, set(json.loads(answer)["error"])) == (expected, {"message", "type", "param", "code"})
    assert stored(live) == before


def test_a_client_that_leaves_in_the_middle_leaves_nothing(live: Live) -> None:
    before = stored(live)
    body, headers = form(PURPOSE, ('name="file"; filename="x"', b"x" * 500))
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc)
    connection.putrequest("POST", "/v1/files")
    for name, value in {**headers, "content-length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders(body[:-20])
    end = time.monotonic() + 30
    while stored(live) == before and time.monotonic() < end:
        time.sleep(0.01)
    connection.close()
    while stored(live) != before and time.monotonic() < end:
        time.sleep(0.01)
    assert stored(live) == before


def test_a_file_that_is_too_large(live: Live) -> None:
    before = stored(live)
    for size in (100_001, 30_000_000):
        with pytest.raises(openai.APIStatusError) as error:
            live.client.files.create(file=b"x" * size, purpose="batch")
        assert (error.value.status_code, error.value.code, error.value.param) == (413, "file_too_large", "file")
    assert stored(live) == before
    live.client.files.create(file=b"x" * 100_000, purpose="batch")


def test_too_many_rows(live: Live) -> None:
    row = b'{"prompt": "a", "completion": "b"}\n'
    live.client.files.create(file=row * 50, purpose="fine-tune")
    for rows in (row * 51, row * 50 + row.strip()):
        with pytest.raises(openai.APIStatusError, match="more than 50 rows") as error:
            live.client.files.create(file=rows, purpose="fine-tune")
        assert error.value.status_code == 413
    live.client.files.create(file=row * 60, purpose="batch")


def test_rows_that_are_no_objects_are_told_by_line(live: Live) -> None:
    rows = b"\xef\xbb\xbf" + ROWS + b'\n[1]\n{"prompt": "x"\n{"a": NaN}\n\xff{}'
    with pytest.raises(openai.BadRequestError) as error:
        live.client.files.create(file=rows, purpose="fine-tune")
    message = error.value.body["message"]  # type: ignore[index]
    assert [line.split(":")[0] for line in message.split("\n")[1:]] == ["Line 4", "Line 5", "Line 6", "Line 7"]
    assert "a list of 1" in message
    assert (error.value.code, error.value.param) == ("invalid_file_format", "file")


def test_only_the_first_bad_rows_are_listed(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        live.client.files.create(file=b"no\n" * 45, purpose="fine-tune")
    lines = error.value.body["message"].split("\n")  # type: ignore[index]
    assert (len(lines), lines[-1]) == (22, "… and 25 more")


def test_a_full_disk_is_said_and_leaves_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = stored(live)
    monkeypatch.setattr("tailor.server.file_store.os.fsync", full)
    with pytest.raises(openai.APIStatusError, match="no room") as error:
        live.client.files.create(file=b"x", purpose="batch")
    assert (error.value.status_code, error.value.response.headers["x-should-retry"]) == (507, "false")
    assert stored(live) == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/..",
        "/v1/files/%2e%2e%2f%2e%2e%2fserver.db",
        "/v1/files/..%2fserver.db/content",
        "/v1/files/%2fetc%2fpasswd/content",
        "/v1/files/....//content",
        "/v1/files/file-%00/content",
        "/v1/files/" + "a" * 5000,
        "/v1/files/%ff%fe",
    ],
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_paths_lead_nowhere(live: Live, path: str, method: str) -> None:
    status, _, body = raw(live, method, path)
    assert status in (404, 405)
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert str(live.home) not in body.decode()
    assert (live.home / "server.db").exists() or live.store._engine.dialect.name != "sqlite"


@given(st.text() | st.from_regex(r"(\.\./|/|file-|%2f|\\|\x00){1,9}[a-z.]*"))
def test_no_id_but_a_given_one_names_a_file(live: Live, file_id: str) -> None:
    for ask in (live.store.get, live.store.open, live.store.delete):
        with pytest.raises(ApiError) as error:
            ask(file_id)
        assert error.value.status == 404


@given(st.text())
def test_a_shown_name_is_one_printable_word(name: str) -> None:
    shown = shown_name(name)
    assert shown.isprintable()
    assert 0 < len(shown) <= 255
    assert not set(shown) & set("/\\")


def test_what_a_kill_left_behind_is_removed_after_a_day(own_home: Path, database: str | None) -> None:
    import os

    engine = open_database(database)
    store = FileStore(engine)
    kept = store.add(b"kept", filename="k", purpose="batch", id="file-" + "k" * 24)
    folder = own_home / "files"
    for name in (".abc.tmp", "file-" + "0" * 24, ".new.tmp"):
        (folder / name).write_bytes(b"x")
    for path in folder.iterdir():
        if path.name != ".new.tmp":
            os.utime(path, (1, 1))
    again = FileStore(engine)
    assert sorted(path.name for path in folder.iterdir()) == [".new.tmp", kept.id]
    assert again.add(b"other", filename="k", purpose="batch", id=kept.id) == kept
    assert again.path(kept).read_bytes() == b"kept"
    engine.dispose()
