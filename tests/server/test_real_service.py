"""The server over a real engine with the embedded base: answers, logprobs and errors as a client sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from live_server import Live, start

from tailor.inference.backend import GREEDY, Request
from tailor.inference.library import Library
from tailor.inference.local import LocalBackend
from tailor.inference.service import Service
from tailor.models.base import Base, load_base
from tailor.text.messages import user

MODEL = "tailor-nano"


@pytest.fixture(scope="module")
def base() -> Base:
    """The oracle's own: a base runs one pass at a time."""
    return load_base(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TAILOR_HOME", str(tmp_path_factory.mktemp("home")))
    running = start(Service(Library([load_base(MODEL, dtype="float32")])))
    yield running
    running.stop()
    patch.undo()


@pytest.fixture
def client(real: Live) -> Iterator[object]:
    with openai.OpenAI(base_url=real.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_greedy_answer_is_the_local_backends(client: openai.OpenAI, base: Base) -> None:
    asked = Request((user("Where is my parcel?"),), sampling=GREEDY.model_copy(update={"max_new_tokens": 12}))
    expected = LocalBackend(base).generate([asked])[0]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Where is my parcel?"}],
        temperature=0,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    told = [token.logprob for token in choice.logprobs.content]
    assert told == pytest.approx(expected.logprobs[: len(told)], abs=1e-5)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in choice.logprobs.content)
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    streamed = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Where is my parcel?"}],
        temperature=0,
        max_completion_tokens=12,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected.text


def test_echoed_logprobs_are_those_of_one_pass(client: openai.OpenAI, base: Base) -> None:
    """What lm-eval sends; the logprob of every token is its likeliest one's when the text is greedy."""
    ids = base.renderer.tokenizer.encode("Dear customer, thank you")
    answer = client.completions.create(
        model=MODEL, prompt=[ids, ids[:4]], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    whole, start_of_it = (choice.logprobs for choice in answer.choices)
    assert len(whole.token_logprobs) == len(ids) + 1
    assert whole.token_logprobs[0] is None
    assert whole.top_logprobs[0] is None
    assert whole.token_logprobs[1:4] == pytest.approx(start_of_it.token_logprobs[1:4], abs=1e-5)
    for logprob, top in zip(whole.token_logprobs[1:], whole.top_logprobs[1:], strict=True):
        assert logprob in top.values()
    assert whole.token_logprobs[-1] == max(whole.top_logprobs[-1].values())
    texts = client.completions.create(
        model=MODEL, prompt="Dear customer", max_tokens=2, temperature=0, logprobs=1, echo=True
    ).choices[0]
    assert texts.text.startswith("Dear customer")
    assert texts.logprobs.text_offset[0] == 0


def test_several_seeds_structure_and_the_cache(client: openai.OpenAI) -> None:
    told = "Tell me a story of a parcel that went the wrong way and came back after many weeks. " * 3
    said = {"model": MODEL, "messages": [{"role": "user", "content": told}], "max_completion_tokens": 8}
    first, second = (client.chat.completions.create(**said, n=3, seed=7, temperature=1.5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    schema = {"type": "object", "properties": {"queue": {"enum": ["billing", "parcels"]}}, "required": ["queue"]}
    schema["additionalProperties"] = False
    held = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Where is my parcel?"}],
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "q", "schema": schema, "strict": True}},
    )
    assert json.loads(held.choices[0].message.content)["queue"] in ("billing", "parcels")


def test_what_cannot_be_answered_is_refused(client: openai.OpenAI, base: Base) -> None:
    said = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError, match="tailor-nano"):
        client.chat.completions.create(model="tailor-nan", messages=said)
    with pytest.raises(openai.BadRequestError, match="context") as long:
        client.chat.completions.create(model=MODEL, messages=said, max_completion_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=MODEL, prompt=[base.renderer.tokenizer.vocab_size])
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=MODEL, prompt=[1 << 30])
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        client.chat.completions.create(model=MODEL, messages=said, tools=[tool])
    with pytest.raises(openai.PermissionDeniedError) as protected:
        client.models.delete(MODEL)
    assert protected.value.code == "base_model_protected"


def test_embeddings_are_the_bases(client: openai.OpenAI, base: Base) -> None:
    texts = ["Where is my parcel?", "The bill is wrong."]
    expected = LocalBackend(base).embed(texts)
    found = client.embeddings.create(model=MODEL, input=texts)
    for row, vector in zip(found.data, expected, strict=True):
        assert row.embedding == pytest.approx(vector.tolist(), abs=1e-6)


def test_an_answer_whose_reader_leaves_is_cancelled(client: openai.OpenAI, real: Live) -> None:
    before = real.service.metrics()["cancelled"]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count."}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    for _ in range(2000):
        if real.service.metrics()["running"] == 0:
            break
        client.models.list()
    assert real.service.metrics()["cancelled"] == before + 1
