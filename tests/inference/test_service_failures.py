"""The service when something goes wrong: whoever is concerned is told, nothing hangs, and what is not meant stays."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tailor.artifacts.artifact import MANIFEST, save
from tailor.errors import ConflictError, DataError, NotFoundError, OverloadedError, ResourceError, TailorError
from tailor.inference import engine, library
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.engine import Engine
from tailor.inference.library import Library
from tailor.inference.service import Service
from tailor.inference.streams import TokenStream
from tailor.models.base import Base, load_base
from tailor.server.errors import as_api_error
from tailor.server.stream import collect, open_all
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.prompting import Prompting
from tailor.techniques.technique import Technique
from tailor.text.messages import user

MODEL = "tailor-nano"
MADE: dict[str, Technique] = {
    "lora": LoRA(rank=2),
    "other": LoRA(rank=1),
    "voted": Prompting(system="Say a number.", shots=0, votes=3, answer_pattern=r"(\w+)"),
    "whole": Full(),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(folder))
        for name, technique in MADE.items():
            base = load_base(MODEL, dtype="float32")
            slot = base.host.attach([technique], seed=1)
            slot.bake()
            save(name, base, slot, [technique], {})
    return folder


@pytest.fixture
def home(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that the test may spoil."""
    folder = tmp_path / "home"
    shutil.copytree(kept, folder)
    monkeypatch.setenv("TAILOR_HOME", str(folder))
    return folder


def with_service(talk: Callable[[Service], Awaitable[Any]], **settings: Any) -> Any:
    """What a conversation with a service of its own comes to; one that hangs fails."""

    async def run() -> Any:
        service = Service(Library([load_base(MODEL, dtype="float32")], **settings))
        try:
            return await asyncio.wait_for(talk(service), 60)
        finally:
            await asyncio.wait_for(service.close(), 60)

    return asyncio.run(run())


def ask(text: str, **sampling: Any) -> Request:
    return Request((user(text),), sampling=SamplingParams(**{"max_new_tokens": 4, **sampling}))


LONG = {"max_new_tokens": 300, "ignore_stop": True}


class Ending(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("kind", [RuntimeError, Ending])
def test_a_pass_that_fails_fails_all_its_answers_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Also those that had ended in this pass and were out of the scheduler already."""
    describe, calls = engine.describe, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise kind("out of memory")
        return describe(*arguments)

    async def talk(service: Service) -> None:
        monkeypatch.setattr(engine, "describe", failing)
        asked = [ask(f"Question {k}", max_new_tokens=1, num_top_logprobs=2) for k in range(3)]
        streams = await open_all(service, MODEL, asked, "messages")
        failed = await asyncio.gather(*(collect([stream]) for stream in streams), return_exceptions=True)
        assert sum(isinstance(each, RuntimeError) for each in failed) >= 2
        metrics = service.metrics()
        assert (metrics["running"], metrics["waiting"], metrics["kv_bytes_used"]) == (0, 0, 0)
        assert service.alive
        assert (await service.complete(MODEL, [ask("Hello")]))[0].token_ids

    with_service(talk)


@pytest.mark.parametrize("kind", [RuntimeError, Ending])
def test_an_answer_that_cannot_be_told_fails_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    tell = TokenStream.tell

    async def talk(service: Service) -> None:
        bad, good = await open_all(service, MODEL, [ask("One", **LONG), ask("Two", max_new_tokens=30)], "messages")

        def telling(stream: TokenStream) -> None:
            if stream is bad:
                raise kind("no text")
            tell(stream)

        monkeypatch.setattr(TokenStream, "tell", telling)
        failed, completions = await asyncio.gather(collect([bad]), collect([good]), return_exceptions=True)
        assert isinstance(failed, RuntimeError)
        assert isinstance(completions, list)
        assert completions[0].token_ids
        assert service.metrics()["kv_bytes_used"] == 0

    with_service(talk)


def test_an_order_that_fails_does_not_end_the_thread(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Engine.cancel

    def failing(self: Engine, sequence: Any) -> None:
        cancel(self, sequence)
        raise RuntimeError("cancelled badly")

    async def talk(service: Service) -> None:
        stream = await service.stream(MODEL, ask("Hello", **LONG))
        await anext(stream)
        monkeypatch.setattr(Engine, "cancel", failing)
        stream.cancel()
        await service._between_passes(lambda: None)
        monkeypatch.setattr(Engine, "cancel", cancel)
        assert (await service.complete(MODEL, [ask("Hello")]))[0].token_ids

    with_service(talk)


def test_a_reader_of_what_is_cancelled_wakes_up(home: Path) -> None:
    async def talk(service: Service) -> None:
        for model in (MODEL, "voted"):
            stream = await service.stream(model, ask("Hello", **LONG))
            reading = asyncio.ensure_future(drain(stream))
            await asyncio.sleep(0.05)
            stream.cancel()
            await asyncio.wait_for(reading, 20)
            assert stream.completion is None, "it was cancelled, not answered"

    async def drain(stream: Any) -> None:
        async for _ in stream:
            pass

    with_service(talk)


def test_collecting_leaves_no_task_behind_when_one_fails(home: Path) -> None:
    async def talk(service: Service) -> None:
        before = asyncio.all_tasks()
        streams = await open_all(service, MODEL, [ask("One", **LONG), ask("Two", **LONG)], "messages")
        assert isinstance(streams[0], TokenStream)
        streams[0].put(RuntimeError("one fails"))
        with pytest.raises(RuntimeError, match="one fails"):
            await collect(streams)
        assert asyncio.all_tasks() == before

    with_service(talk)


def test_an_adapter_from_a_folder_never_stands_for_an_artifact(home: Path, tmp_path: Path) -> None:
    folder = home / "artifacts"
    (folder / "broken").mkdir()
    (folder / "broken" / MANIFEST).write_text("{", "utf-8")
    elsewhere = shutil.copytree(folder / "other", tmp_path / "elsewhere")

    async def talk(service: Service) -> None:
        for name in ("other", "broken"):  # not among the names that are served
            with pytest.raises(ConflictError, match="already"):
                await service.load(name, folder / "lora")
        for path in (elsewhere, folder / "other"):
            await service.load("mine", path)
            with pytest.raises(ConflictError, match="unload"):
                await service.delete("mine")
            assert service.card("mine").status == "loaded"
            await service.unload("mine")
        await service.delete("lora")

    with_service(talk, names=["lora"])
    assert {path.name for path in folder.iterdir()} == {"broken", "other", "voted", "whole"}
    assert (elsewhere / MANIFEST).is_file()


def test_deleting_takes_the_folder_that_the_model_has(home: Path) -> None:
    """A folder that was renamed by hand: its artifact has another name, which may be another folder's."""
    (home / "artifacts" / "lora").rename(home / "artifacts" / "renamed")
    shutil.copytree(home / "artifacts" / "other", home / "artifacts" / "lora")
    manifest = json.loads((home / "artifacts" / "lora" / MANIFEST).read_text("utf-8"))
    assert manifest["name"] == "other"
    (home / "artifacts" / "other" / MANIFEST).unlink()

    async def talk(service: Service) -> None:
        await service.delete("lora")

    with_service(talk)
    assert not (home / "artifacts" / "renamed").exists()
    assert (home / "artifacts" / "lora").is_dir()


def test_what_is_deleted_does_not_come_back(home: Path) -> None:
    """However many ask for it in the meantime: it would stay in memory for ever, and nobody could unload it."""

    async def talk(service: Service) -> None:
        over = False

        async def asking() -> None:
            while not over:
                try:
                    await service.complete("lora", [ask("Hello", max_new_tokens=1)])
                except TailorError:
                    await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(asking()) for _ in range(3)]
        await service.warm("lora")
        await service.delete("lora")
        await asyncio.sleep(0.1)
        over = True
        await asyncio.gather(*tasks)
        with pytest.raises(NotFoundError):
            await service.complete("lora", [ask("Hello")])

    with_service(talk)


def test_weights_are_read_beside_the_passes_and_without_the_lock(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    free: list[bool] = []
    read_state, attach = library.read_state, library.attach

    def reading(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read_state(*arguments)

    def attaching(*arguments: Any) -> Any:
        free.append(is_free())
        return attach(*arguments)

    def is_free() -> bool:
        """Whether another thread may look names up."""
        found: list[bool] = []

        def look() -> None:
            if taken := known._lock.acquire(timeout=2):
                known._lock.release()
            found.append(taken)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return found[0]

    def alias(name: str) -> None:
        free.append(is_free())

    known = Library([load_base(MODEL, dtype="float32")], alias=alias)
    monkeypatch.setattr(library, "read_state", reading)
    monkeypatch.setattr(library, "attach", attaching)

    async def talk() -> None:
        service = Service(known)
        await service.complete("lora", [ask("Hello")])
        await service.close()

    asyncio.run(talk())
    assert len(threads) == 1
    assert threads[0] == "loads"
    assert len(free) >= 2
    assert all(free)


def test_damaged_weights_are_told(home: Path) -> None:
    for path in (home / "artifacts" / "lora").rglob("*.safetensors"):
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="'lora' is damaged"):
        with_service(lambda service: service.complete("lora", [ask("Hello")]))


def test_who_makes_room_and_who_does_not(home: Path) -> None:
    bases = [load_base(MODEL, dtype="float32") for _ in range(3)]
    known = Library(bases[:1], max_base_bytes=10**12)
    known._install("first", bases[1])
    size = known.loaded["first"].num_bytes
    known._max_base_bytes = size - 1
    with pytest.raises(ResourceError, match="more than the server may hold") as caught:
        known._install("second", bases[2])
    assert not isinstance(caught.value, OverloadedError)
    assert "first" in known.loaded  # it would have gone in vain
    known._max_base_bytes = size
    backend = known.loaded["first"].backend
    backend.engine.add(backend.running(ask("Hello")))
    with pytest.raises(OverloadedError, match="are answering"):
        known._install("second", bases[2])


def test_models_of_their_own_are_loaded_as_the_server_was_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def loading(folder: Path, *how: Any) -> Base:
        asked.append((folder.name, *how))
        return load_base(folder, "cpu", "float32")

    monkeypatch.setattr(library, "load_base", loading)
    for settings in ({}, {"device": "cpu", "dtype": "bfloat16", "quantize": "nf4"}):
        with_service(lambda service: service.complete("whole", [ask("Hello")]), **settings)
    assert asked == [("whole", "auto", "float32", None), ("whole", "cpu", "bfloat16", "nf4")]


def test_texts_beyond_the_context_have_no_embedding(home: Path) -> None:
    async def embed(service: Service, num: int) -> Sequence[Any]:
        return await service.embed(MODEL, [(5,) * num])

    context = load_base(MODEL, dtype="float32").max_seq_len
    with pytest.raises(ResourceError, match=f"{context + 1} tokens exceeds the base's context of {context}"):
        with_service(lambda service: embed(service, context + 1))
    assert with_service(lambda service: embed(service, context))[1] == context


def test_what_is_unloaded_while_a_request_is_prepared_can_be_asked_for_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(service: Service) -> None:
        look_up = service._backend
        found = await look_up("lora")
        await service.unload("lora")

        async def before(model: str) -> Any:
            return found

        monkeypatch.setattr(service, "_backend", before)
        named = Request((user("Hello"),), artifact="lora")
        for attempt in (
            service.stream("lora", ask("Hello")),
            service._begin(found[0], named),
            service.tokenize("lora", ask("Hello")),
            service.detokenize("lora", [5]),
        ):
            with pytest.raises(OverloadedError, match="unloaded while"):
                await attempt
        with pytest.raises(OverloadedError, match="unloaded while"):
            service.context("lora")
        monkeypatch.setattr(service, "_backend", look_up)
        with pytest.raises(NotFoundError, match="task"):  # another reason stays what it is
            await service.stream(MODEL, Request((user("Hello"),), task="nothing"))

    with_service(talk)


def test_a_closed_service_says_that_it_is_unavailable(home: Path) -> None:
    async def talk(service: Service) -> None:
        await service.warm("lora")
        await service.close()
        for attempt in (service.stream(MODEL, ask("Hello")), service.warm("other"), service.unload("lora")):
            with pytest.raises(TailorError, match="shutting down") as caught:
                await attempt
            assert as_api_error(caught.value).status == 503

    with_service(talk)
