"""What goes wrong around a server that answers: damaged files, full disks, clients that leave, unloading, kills."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from live_jobs import app_of, client_of, served
from live_server import Live, start
from sqlalchemy import text

from tailor.artifacts import artifact as artifacts
from tailor.errors import DataError, OverloadedError, TailorError
from tailor.inference.backend import GREEDY, Request
from tailor.inference.library import Library
from tailor.inference.service import Service
from tailor.inference.streams import Stream
from tailor.jobs.database import open_database
from tailor.models.base import Base, load_base
from tailor.server.file_store import FileStore
from tailor.server.files import files_router
from tailor.techniques import Technique
from tailor.techniques.lora import LoRA
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompting import Prompting
from tailor.text.messages import user

MODEL = "tailor-nano"
MADE: dict[str, Technique] = {
    "lora": LoRA(rank=2),
    "prefix": PrefixTuning(num_virtual_tokens=3, init="random"),
    **{f"prompt-{k}": Prompting(system=f"You are clerk number {k}.", shots=0) for k in range(6)},
}
LONG = GREEDY.model_copy(update={"max_new_tokens": 50, "ignore_stop": True})


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def saved(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact of each of MADE."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TAILOR_HOME", str(tmp_path_factory.mktemp("saved")))
    for name, technique in MADE.items():
        slot = base.host.attach([technique], seed=1)
        slot.bake()
        with torch.no_grad():
            for parameter in slot.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        folder = artifacts.save(name, base, slot, [technique], {}).folder
        base.host.detach(slot)
    patch.undo()
    return folder.parent


@pytest.fixture
def made(own_home: Path, saved: Path) -> Path:
    """The same folder, in a TAILOR_HOME of the test's own."""
    return Path(shutil.copytree(saved, own_home / "artifacts"))


@pytest.fixture
def live(made: Path, base: Base) -> Iterator[Live]:
    running = start(Service(Library([base])))
    yield running
    running.stop()


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as made:
        yield made


def say(client: openai.OpenAI, model: str) -> str:
    said = [{"role": "user", "content": "Where is my parcel?"}]
    answer = client.chat.completions.create(model=model, messages=said, temperature=0, max_completion_tokens=4)  # type: ignore[arg-type]
    return answer.choices[0].message.content or ""


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# --- damaged artifacts -----------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path: Path, key: str) -> None:
    told = json.loads(path.read_text())
    del told[key]
    path.write_text(json.dumps(told))


def flip(path: Path, place: int) -> None:
    """One bit of one number: the file can still be read."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "manifest cut": ("lora", "tailor.json", cut),
    "manifest empty": ("lora", "tailor.json", lambda path: path.write_text("")),
    "manifest a list": ("lora", "tailor.json", lambda path: path.write_text("[1]")),
    "manifest a number": ("lora", "tailor.json", lambda path: path.write_text("7")),
    "manifest no text": ("lora", "tailor.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "manifest without base": ("lora", "tailor.json", lambda path: without(path, "base")),
    "manifest without techniques": ("prefix", "tailor.json", lambda path: without(path, "techniques")),
    "weights cut": ("lora", "adapter_model.safetensors", cut),
    "weights empty": ("prefix", "adapter_model.safetensors", lambda path: path.write_bytes(b"")),
    "weights of nothing": (
        "lora",
        "adapter_model.safetensors",
        lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0{}"),
    ),
    "weights gone": ("lora", "adapter_model.safetensors", lambda path: path.unlink()),
    "a bit flipped in the weights": ("lora", "adapter_model.safetensors", lambda path: flip(path, -1)),
    "a bit flipped in another place": ("prefix", "adapter_model.safetensors", lambda path: flip(path, -400)),
    "a prompt rewritten": ("prompt-0", "prompt.json", lambda path: path.write_text("{}")),
    "settings cut": ("prefix", "adapter_config.json", cut),
    "settings a list": ("lora", "adapter_config.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_hurts_nobody(
    live: Live, client: openai.OpenAI, made: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name, file, spoil = DAMAGES[damage]
    path = made / name / file
    whole = path.read_bytes()
    spoil(path)
    listed = {model.id for model in client.models.list()}
    assert {MODEL, *MADE} - {name} <= listed
    assert (name in listed) == (file != "tailor.json")
    with pytest.raises(openai.InternalServerError) as error:
        say(client, name)
    told = error.value.response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert (error.value.status_code, told["type"], told["code"]) == (500, "server_error", "model_damaged")
    assert error.value.response.headers["x-should-retry"] == "false"
    assert told["message"] == "The files of this model are damaged; the server's log says which."
    assert "Traceback" not in error.value.response.text
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{error.value.request_id} POST /v1/chat/completions: ")
    assert str(path if damage != "manifest without techniques" else path.parent) in line
    for healthy in (MODEL, "prompt-1"):
        say(client, healthy)
    path.write_bytes(whole)
    assert say(client, name)


def test_damage_is_said_where_artifacts_are_looked_after(made: Path) -> None:
    (made / "lora" / "tailor.json").write_text("{")
    found, damaged = artifacts.survey()
    assert sorted(one.name for one in found) == sorted(MADE.keys() - {"lora"})
    assert list(damaged) == ["lora"]
    with pytest.raises(DataError, match=r"lora.*not an artifact's manifest"):
        artifacts.every()
    with pytest.raises(TailorError, match="no artifact 'lara'"):
        artifacts.find("lara")


def test_a_folder_that_is_gone_takes_only_its_own_model(live: Live, client: openai.OpenAI, made: Path) -> None:
    (made / "lora").rename(made.parent / "elsewhere")
    assert {model.id for model in client.models.list()} == {MODEL, *MADE} - {"lora"}
    with pytest.raises(openai.NotFoundError):
        say(client, "lora")
    assert say(client, "prefix")


def test_a_damaged_artifact_can_still_be_deleted(live: Live, client: openai.OpenAI, made: Path) -> None:
    flip(made / "lora" / "adapter_model.safetensors", -1)
    assert client.models.delete("lora").deleted
    assert not (made / "lora").exists()


def test_an_adapter_from_a_folder_is_unloaded_and_not_deleted(made: Path, base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (made / "lora").rename(folder)
    live = start(Service(Library([base])), adapter_folders=(tmp_path,))
    try:
        with openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as client:
            given = {"lora_name": "mine", "lora_path": str(folder)}
            client.post("/load_lora_adapter", body=given, cast_to=str)
            assert say(client, "mine")
            with pytest.raises(openai.ConflictError, match="unload_lora_adapter") as error:
                client.models.delete("mine")
            assert (error.value.code, error.value.param) == ("adapter_not_deletable", "model")
            assert error.value.response.headers["x-should-retry"] == "false"
            assert str(tmp_path) not in error.value.message
            assert folder.is_dir()
            client.post("/unload_lora_adapter", body={"lora_name": "mine"}, cast_to=str)
            assert "mine" not in {model.id for model in client.models.list()}
            assert folder.is_dir()
    finally:
        live.stop()


# --- loading, unloading, closing -------------------------------------------------------------------------------------


def asked(words: str = "Count.") -> Request:
    return Request((user(words),), sampling=LONG)


async def read(stream: Stream) -> tuple[str, str | None]:
    """The text and how it ended: a reason, or the error's words."""
    words = ""
    try:
        async for piece in stream:
            words += piece.text
            reason = piece.finish_reason
    except TailorError as error:
        return words, str(error)
    return words, reason


def test_many_may_ask_for_models_that_are_not_in_memory(made: Path, base: Base) -> None:
    """However few threads the loop has: those that wait must not keep out the one that loads."""

    async def ask() -> list[tuple[str, str | None]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        service = Service(Library([base]))
        short = Request((user("Hello"),), sampling=GREEDY.model_copy(update={"max_new_tokens": 2}))

        async def one(name: str) -> tuple[str, str | None]:
            return await read(await service.stream(name, short))

        found = await asyncio.wait_for(asyncio.gather(*(one(name) for name in MADE for _ in range(3))), 60)
        leaving = [asyncio.ensure_future(one(MODEL)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        assert (await one("lora"))[1] in ("stop", "length")
        await service.close()
        return found

    assert {reason for _, reason in asyncio.run(ask())} <= {"stop", "length"}


def test_unloading_ends_the_answers_of_that_model_alone(made: Path, base: Base) -> None:
    async def ask() -> None:
        service = Service(Library([base]))
        alone = await read(await service.stream("prefix", asked()))
        streams = [await service.stream(name, asked()) for name in ("lora", "prefix", "lora", MODEL)]
        reading = [asyncio.ensure_future(read(stream)) for stream in streams]
        await service.unload("lora")
        ends = await asyncio.gather(*reading)
        assert [reason for _, reason in ends] == [
            "lora was unloaded while it answered",
            "length",
            "lora was unloaded while it answered",
            "length",
        ]
        assert ends[1] == alone
        assert service.metrics()["kv_bytes_used"] == 0
        assert (await read(await service.stream("lora", asked("Again."))))[1] == "length"
        await service.close()

    asyncio.run(ask())


def test_a_request_never_gets_the_answer_of_what_was_unloaded_under_it(
    made: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        service = Service(Library([base]))
        await service.warm("lora")
        begin = service._between_passes

        async def after_unloading(order: Callable[[], Any]) -> Any:
            monkeypatch.setattr(service, "_between_passes", begin)
            await service.unload("lora")
            return await begin(order)

        monkeypatch.setattr(service, "_between_passes", after_unloading)
        with pytest.raises(OverloadedError, match="unloaded"):
            await service.stream("lora", asked())
        assert (service.metrics()["requests"], service.metrics()["kv_bytes_used"]) == (0, 0)
        await service.close()

    asyncio.run(ask())


def test_unloading_a_model_of_its_own_ends_its_answers(made: Path, base: Base) -> None:
    async def ask() -> None:
        service = Service(Library([base]))
        other = load_base(MODEL, dtype="float32")
        service.library._install("whole", other)
        streams = [await service.stream(name, asked()) for name in ("whole", MODEL)]
        reading = [asyncio.ensure_future(read(stream)) for stream in streams]
        await service._between_passes(lambda: service._drop("whole"))
        ends = await asyncio.wait_for(asyncio.gather(*reading), 60)
        assert [reason for _, reason in ends] == ["whole was unloaded while it answered", "length"]
        await service.close()

    asyncio.run(ask())


def test_closing_ends_every_stream_and_refuses_new_ones(made: Path, base: Base) -> None:
    async def ask() -> None:
        service = Service(Library([base]))
        streams = [await service.stream(name, asked()) for name in ("lora", "prefix", MODEL)]
        reading = [asyncio.ensure_future(read(stream)) for stream in streams]
        late = asyncio.ensure_future(service.stream("prompt-3", asked()))
        await asyncio.sleep(0)
        await service.close()
        assert {reason for _, reason in await asyncio.gather(*reading)} == {"the server is shutting down"}
        with contextlib.suppress(TailorError):
            assert (await read(await late))[1] == "the server is shutting down"
        for model in (MODEL, "prompt-5"):
            with pytest.raises(TailorError, match="shutting down"):
                await service.stream(model, asked())
        await service.close()

    asyncio.run(ask())


# --- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_memory_back(live: Live, client: openai.OpenAI, stream: bool) -> None:
    say(client, "prefix")
    body = json.dumps(
        {"model": "prefix", "messages": [{"role": "user", "content": "Count."}], "ignore_eos": True, "stream": stream}
        | {"n": 3, "max_completion_tokens": 450}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    before = live.service.metrics()
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
        raw.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        until(lambda: live.service.metrics()["running"] == 3)
        assert live.service.metrics()["kv_bytes_used"] > 0
    until(lambda: live.service.metrics()["running"] == 0)
    after = live.service.metrics()
    assert (after["kv_bytes_used"], after["waiting"]) == (0, 0)
    assert after["cancelled"] - before["cancelled"] == 3
    assert after["generated_tokens"] - before["generated_tokens"] < 3 * 450


# --- full disks ------------------------------------------------------------------------------------------------------


def test_an_upload_that_fills_the_disk_leaves_nothing(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the file."""

    class Full:
        """A file on a disk with room for a megabyte."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 1 << 20

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    store = FileStore(open_database())
    draft = store.draft

    def small_disk() -> Any:
        made = draft()
        made._file = Full(made._file)  # type: ignore[assignment]
        return made

    with served(app_of([files_router(store)])) as url, client_of(url) as client:
        monkeypatch.setattr(store, "draft", small_disk)
        with pytest.raises(openai.APIStatusError, match="no room") as error:
            client.files.create(file=b"x" * (3 << 20), purpose="batch")
        assert (error.value.status_code, error.value.code) == (507, "storage_full")
        assert list((own_home / "files").iterdir()) == []
        monkeypatch.undo()
        monkeypatch.setenv("TAILOR_HOME", str(own_home))
        kept = client.files.create(file=b"x" * (3 << 20), purpose="batch")
        assert client.files.content(kept.id).read() == b"x" * (3 << 20)
    store._engine.dispose()


def test_a_database_without_room_keeps_no_file(own_home: Path) -> None:
    engine = open_database()
    store = FileStore(engine)
    with served(app_of([files_router(store)])) as url, client_of(url) as client:
        first = client.files.create(file=b"first", purpose="batch")

        def pages(most: int | None) -> None:
            """How many pages the database may have, on every connection: None is as many as it has."""
            engine.dispose()
            with engine.connect() as connection:
                now = connection.execute(text("PRAGMA page_count")).scalar_one()
                connection.execute(text(f"PRAGMA max_page_count={most or now}"))

        pages(None)
        kept, refused = [first.id], None
        for number in range(200):
            try:
                kept.append(client.files.create(file=(f"{'n' * 200}{number}", b"more"), purpose="batch").id)
            except openai.APIStatusError as error:
                refused = error
                break
        assert refused is not None
        assert (refused.status_code, refused.code) == (507, "storage_full")
        assert sorted(path.name for path in (own_home / "files").iterdir()) == sorted(kept)
        assert sorted(file.id for file in client.files.list(limit=1000)) == sorted(kept)
        pages(1 << 20)
        kept.append(client.files.create(file=b"later", purpose="batch").id)
        assert sorted(path.name for path in (own_home / "files").iterdir()) == sorted(kept)
    engine.dispose()
