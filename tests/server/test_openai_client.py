"""The protocol as the official client sees it, called from both of its worlds, over the scripted service.

Runs with any generation of the client: `PYTHONPATH=FOLDER pytest tests/server/test_openai_client.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from operator import attrgetter
from typing import Any

import openai
import pytest
from live_server import Live, start
from pydantic import BaseModel
from scripted_service import BASE, CONTEXT, TUNED, VOCAB_SIZE, WITH_SLASH, ScriptedService

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"const": "Rome"}}, "required": ["city"]},
    },
}


class Calls:
    """The client's methods by their dotted names; a stream comes back as the list of its chunks."""

    def __init__(self, url: str, world: str) -> None:
        self.settings = {"base_url": url, "api_key": "none", "max_retries": 0}
        self.is_async = world == "async"

    def __call__(self, name: str, *args: Any, **given: Any) -> Any:
        if self.is_async:
            return asyncio.run(self._await(name, args, given))
        with openai.OpenAI(**self.settings) as client:
            found = attrgetter(name)(client)(*args, **given)
            return list(found) if isinstance(found, Iterator | Iterable) and given.get("stream") else found

    async def _await(self, name: str, args: Any, given: Any) -> Any:
        async with openai.AsyncOpenAI(**self.settings) as client:
            found = await attrgetter(name)(client)(*args, **given)
            return [chunk async for chunk in found] if isinstance(found, AsyncIterator) else found


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, live: Live) -> Calls:
    return Calls(live.url, request.param)


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(call: Calls, text: str, **more: Any) -> Any:
    return call("chat.completions.create", **{"model": BASE, "messages": asked(text), "temperature": 0, **more})


def test_models_are_listed_retrieved_and_deleted(call: Calls, live: Live) -> None:
    assert [model.id for model in call("models.list").data] == [BASE, TUNED, WITH_SLASH]
    for name in (BASE, TUNED, WITH_SLASH):
        found = call("models.retrieve", name)
        assert found.id == name
        assert found.object == "model"
        assert found.parent == (None if name == BASE else BASE)
        assert "/srv/" not in found.root
    with pytest.raises(openai.NotFoundError) as missing:
        call("models.retrieve", "ft:toy-base:org:sum:1a2b3c4e")
    assert missing.value.code == "model_not_found"
    assert TUNED in missing.value.message
    with pytest.raises(openai.PermissionDeniedError) as protected:
        call("models.delete", BASE)
    assert protected.value.code == "base_model_protected"
    for name in (TUNED, WITH_SLASH):
        kept = live.service.cards[name]
        assert call("models.delete", name).deleted
        assert name not in live.service.cards
        live.service.cards[name] = kept


def test_a_chat_is_answered(call: Calls) -> None:
    answer = chat(call, "héllo")
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == BASE
    assert answer.choices[0].message.content == "You said: héllo"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage.completion_tokens == len("You said: héllo".encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = chat(call, "héllo")
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.system_fingerprint == answer.system_fingerprint != chat(call, "x", model=TUNED).system_fingerprint


def test_a_stream_is_the_reference_transcript(call: Calls) -> None:
    chunks = chat(call, "say Hé", stream=True, stream_options={"include_usage": True})
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "H"}, {"content": "é"}, {}]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    plain = chat(call, "say Hé", stream=True)
    assert len(plain) == 4
    assert all(len(chunk.choices) == 1 and "usage" not in chunk.model_fields_set for chunk in plain)


def test_several_answers_have_their_own_seeds(call: Calls, live: Live) -> None:
    first, second = (chat(call, "go", n=3, seed=5, temperature=1) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in first.choices]
    assert texts == [f"You said: go #{seed}" for seed in (5, 6, 7)]
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage.prompt_tokens == len("user: go\n") + 1
    streamed: dict[int, str] = {}
    for chunk in chat(call, "go", n=3, seed=5, temperature=1, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == dict(enumerate(texts))
    chat(call, "go", temperature=1)
    chat(call, "go", temperature=1)
    unseeded = [request.sampling.seed for request in live.service.requests[-2:]]
    assert unseeded[0] != unseeded[1]
    assert chat(call, "go", seed=-3).choices


def test_logprobs_have_bytes_and_leave_out_the_end(call: Calls) -> None:
    answer = chat(call, "say hé", logprobs=True, top_logprobs=2)
    told = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in told) == "hé".encode()
    assert [token.token for token in told] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert all(len(token.top_logprobs) == 2 for token in told)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in told)
    streamed = [
        token
        for chunk in chat(call, "say hé", logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == told
    with pytest.raises(openai.BadRequestError) as alone:
        chat(call, "x", top_logprobs=2)
    assert alone.value.param == "top_logprobs"


def test_stops_and_lengths(call: Calls) -> None:
    assert chat(call, "one two", stop=" two").choices[0].message.content == "You said: one"
    assert chat(call, "one two", stop=["zzz", " one"]).choices[0].message.content == "You said:"
    cut = chat(call, "one two", max_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("You", "length")
    with pytest.raises(openai.BadRequestError, match="at most 4"):
        chat(call, "x", stop=list("abcde"))


def test_sampling_reaches_the_engine(call: Calls, live: Live) -> None:
    chat(
        call,
        "x",
        temperature=0.3,
        top_p=0.5,
        frequency_penalty=1.5,
        presence_penalty=-1,
        logit_bias={"65": 12, "66": -100},
        max_completion_tokens=9,
        user="me",
        metadata={"k": "v"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True},
    )
    params = live.service.requests[-1].sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.3, 0.5, 5, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (1.5, -1, 1.2)
    assert params.logit_bias == ((65, 12.0), (66, -100.0))
    assert (params.max_new_tokens, params.min_new_tokens, params.ignore_stop) == (9, 2, True)
    chat(call, "x", extra_body={"tailor": {"task": "summary"}}, temperature=openai.NOT_GIVEN)
    request = live.service.requests[-1]
    assert request.task == "summary"
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_new_tokens == CONTEXT - len("user: x\n") - 1


def test_messages_in_all_their_shapes(call: Calls, live: Live) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call_ = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call_]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "bye"},
    ]
    assert call("chat.completions.create", model=BASE, messages=messages).choices
    seen = live.service.requests[-1].messages
    assert [(m.role, m.content) for m in seen] == [
        *(("system", "Be kind."), ("user", "ab"), ("assistant", ""), ("tool", "sunny"), ("assistant", "no")),
        ("user", "bye"),
    ]
    assert seen[1].name == "Ann"
    assert seen[2].tool_calls[0]["function"]["name"] == "weather"
    assert seen[3].tool_call_id == "call_1"


def test_tools_make_a_round_trip(call: Calls, live: Live) -> None:
    said = 'say <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    first = chat(call, said, tools=[WEATHER]).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    made = first.message.tool_calls[0]
    assert made.id.startswith("call_")
    assert json.loads(made.function.arguments) == {"city": "Rome"}
    assert live.service.requests[-1].tools[0]["function"]["name"] == "weather"
    result = {"role": "tool", "tool_call_id": made.id, "content": "sunny"}
    history = [*asked(said), first.message.model_dump(exclude_none=True), result]
    assert call("chat.completions.create", model=BASE, messages=history, tools=[WEATHER]).choices
    assert live.service.requests[-1].messages[1].tool_calls[0]["id"] == made.id


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_tool_is_called(call: Calls, choice: Any) -> None:
    forced = chat(call, "anything", tools=[WEATHER], tool_choice=choice).choices[0]
    assert forced.message.tool_calls[0].function.name == "weather"
    assert json.loads(forced.message.tool_calls[0].function.arguments) == {"city": "Rome"}


def test_streamed_tools_come_in_fragments(call: Calls) -> None:
    text = 'say Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    chunks = chat(call, text, tools=[WEATHER], stream=True)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert content == "Let me see. "
    fragments = [call_ for chunk in chunks for call_ in chunk.choices[0].delta.tool_calls or ()]
    assert [fragment.index for fragment in fragments] == [0, 0]
    assert (fragments[0].type, fragments[0].function.name, fragments[0].function.arguments) == (
        "function",
        "weather",
        "",
    )
    assert fragments[1].id is None
    assert json.loads(fragments[1].function.arguments) == {"city": "Rome"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_older_functions(call: Calls) -> None:
    answer = chat(call, "x", functions=[WEATHER["function"]], function_call={"name": "weather"}).choices[0]
    assert answer.finish_reason == "function_call"
    assert answer.message.function_call.name == "weather"
    assert answer.message.tool_calls is None


def test_no_tools_when_none_are_wanted(call: Calls, live: Live) -> None:
    text = '{"name": "weather", "arguments": {}}'
    answer = chat(call, f"say {text}", tools=[WEATHER], tool_choice="none").choices[0]
    assert answer.message.content == text
    assert live.service.requests[-1].tools == ()


def test_json_answers(call: Calls, live: Live) -> None:
    class Ticket(BaseModel):
        queue: str
        urgent: bool

    parsed = call("chat.completions.parse", model=BASE, messages=asked("x"), response_format=Ticket)
    assert parsed.choices[0].message.parsed == Ticket(queue="text", urgent=True)
    assert live.service.requests[-1].sampling.structure.kind == "json_schema"
    plain = chat(call, "x", response_format={"type": "json_object"})
    assert json.loads(plain.choices[0].message.content) == {"a": 1}
    assert chat(call, "x", extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content == "yes"
    newer = chat(call, "x", extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert newer.choices[0].message.content == "2026"
    with pytest.raises(openai.LengthFinishReasonError):
        call("chat.completions.parse", model=BASE, messages=asked("x"), response_format=Ticket, max_tokens=3)


def test_completions_of_texts_and_token_arrays(call: Calls) -> None:
    ids = list(b"say ab")
    cases: list[tuple[Any, list[str]]] = [
        ("say ab", ["ab"]),
        (["say ab", "say c"], ["ab", "c"]),
        (ids, ["ab"]),
        ([ids, list(b"say c")], ["ab", "c"]),
    ]
    for prompt, texts in cases:
        answer = call("completions.create", model=BASE, prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert answer.object == "text_completion"
    several = call("completions.create", model=BASE, prompt=["a", "b"], n=2, seed=1, temperature=1, max_tokens=30)
    found = [(choice.index, choice.text) for choice in several.choices]
    assert found == list(enumerate(f"You said: {text} #{seed}" for text in "ab" for seed in (1, 2)))
    assert len(call("completions.create", model=BASE, prompt="a").choices[0].text) == 16


def test_echoed_logprobs_as_lm_eval_reads_them(call: Calls) -> None:
    ids = list("say hé".encode())
    sent = {"prompt": [ids, ids[:5]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    answer = call("completions.create", model=BASE, **sent)
    for choice, context in zip(answer.choices, (ids, ids[:5]), strict=True):
        told = choice.logprobs
        assert choice.text.startswith(bytes(context).decode("utf-8", "replace"))
        assert len(told.tokens) == len(told.token_logprobs) == len(context) + 1
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        for logprob, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
            assert logprob == max(top.values())
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5, 5, 6]
    text = call("completions.create", model=BASE, **{**sent, "prompt": "say hé"}).choices[0]
    assert text.logprobs == answer.choices[0].logprobs
    nothing = call("completions.create", model=BASE, **{**sent, "prompt": "say hé", "max_tokens": 0}).choices[0]
    assert nothing.text == "say hé"
    assert len(nothing.logprobs.tokens) == len(ids)


def test_streamed_completions(call: Calls) -> None:
    sent = {"model": BASE, "prompt": ["say hé", "say b"], "temperature": 0, "echo": True, "logprobs": 0}
    whole = call("completions.create", **sent)
    chunks = call("completions.create", **sent, stream=True, stream_options={"include_usage": True})
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [t for piece in mine for t in piece.logprobs.tokens] == choice.logprobs.tokens
        assert [o for piece in mine for o in piece.logprobs.text_offset] == choice.logprobs.text_offset
        assert mine[-1].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_best_of_several(call: Calls) -> None:
    sent = {"model": BASE, "prompt": "a", "seed": 1, "temperature": 1, "max_tokens": 40}
    every = call("completions.create", **sent, n=4, logprobs=0).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every]
    best = call("completions.create", **sent, best_of=4).choices
    assert [choice.text for choice in best] == [every[means.index(max(means))].text]
    with pytest.raises(openai.BadRequestError):
        call("completions.create", **sent, best_of=1, n=2)


def test_embeddings_in_both_encodings(call: Calls) -> None:
    inputs: list[Any] = ["a", ["a", "b"], [97, 98], [[97], [98, 99]]]
    for given in inputs:
        packed = call("embeddings.create", model=BASE, input=given)
        plain = call("embeddings.create", model=BASE, input=given, encoding_format="float")
        assert [row.embedding for row in packed.data] == [row.embedding for row in plain.data]
        assert [row.index for row in plain.data] == list(range(len(plain.data)))
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 3
    short = call("embeddings.create", model=BASE, input="a", dimensions=3).data[0].embedding
    assert len(short) == 3
    assert sum(x * x for x in short) == pytest.approx(1, abs=1e-6)
    for wrong in ({"dimensions": 9}, {"input": []}, {"input": ""}, {"input": ["a"] * 2049}, {"input": [VOCAB_SIZE]}):
        with pytest.raises(openai.BadRequestError):
            call("embeddings.create", **{"model": BASE, "input": "a", **wrong})


@pytest.mark.parametrize(
    ("sent", "param", "code"),
    [
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"extra_body": {"tailor": {"tsk": "a"}}}, "tailor.tsk", "unknown_parameter"),
        ({"extra_body": {"tailor": {"rag": {}}}}, "tailor.rag", "unsupported_parameter"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_value",
        ),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"word": 1}}, "logit_bias", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]", "unsupported_value"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_completion_tokens": CONTEXT}, "messages", "context_length_exceeded"),
        ({"messages": asked("x" * CONTEXT)}, "messages", "context_length_exceeded"),
    ],
)
def test_bad_requests_name_the_parameter(call: Calls, sent: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(call, "x", **sent)
    assert (error.value.param, error.value.code) == (param, code)
    assert error.value.type == "invalid_request_error"
    assert error.value.request_id.startswith("req_")


def test_text_completions_refuse_what_they_cannot(call: Calls) -> None:
    wrong: list[dict[str, Any]] = [
        {"suffix": "end"},
        {"prompt": [VOCAB_SIZE]},
        {"prompt": [1 << 30]},
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"logprobs": 6},
        {"best_of": 3, "stream": True},
    ]
    for sent in wrong:
        with pytest.raises(openai.BadRequestError):
            call("completions.create", **{"model": BASE, "prompt": "a", **sent})


def test_what_is_ignored_is_said(call: Calls, live: Live) -> None:
    with openai.OpenAI(base_url=live.url, api_key="none") as client:
        raw = client.chat.completions.with_raw_response.create(
            model=WITH_SLASH,
            messages=asked("x"),
            service_tier="auto",
            prompt_cache_key="k",
            modalities=["text"],
            reasoning_effort="low",
            store=True,
        )
    assert raw.headers["x-ignored-params"] == "service_tier, prompt_cache_key, reasoning_effort, store"
    assert raw.headers["openai-model"] == WITH_SLASH
    assert raw.headers["openai-version"] == "2020-10-01"
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_an_effort_reaches_models_that_can_think(call: Calls, live: Live) -> None:
    with openai.OpenAI(base_url=live.url, api_key="none") as client:
        create = client.chat.completions.with_raw_response.create
        assert "x-ignored-params" not in create(model=TUNED, messages=asked("x"), reasoning_effort="low").headers
    assert live.service.requests[-1].effort == "low"
    chat(call, "x", model=TUNED)
    assert live.service.requests[-1].effort is None
    with pytest.raises(openai.BadRequestError) as error:
        chat(call, "x", model=TUNED, extra_body={"reasoning_effort": "hardest"})
    assert (error.value.param, error.value.code) == ("reasoning_effort", "invalid_value")


def test_every_error_is_its_exception(call: Calls, live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(call, "x", model="toy-bass")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    assert "toy-base" in unknown.value.message
    with pytest.raises(openai.InternalServerError) as busy:
        chat(call, "overload")
    assert (busy.value.status_code, busy.value.code) == (503, "overloaded")
    assert busy.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError) as crash:
        chat(call, "crash")
    assert crash.value.code == "internal_error"
    assert crash.value.type == "server_error"
    assert "secret" not in str(crash.value.body)
    with pytest.raises(openai.APIError) as midway:
        chat(call, "fail midway", stream=True)
    assert midway.value.code == "internal_error"
    assert "secret" not in midway.value.message
    told = capfd.readouterr().err
    assert crash.value.request_id in told
    assert told.count("a secret") >= 2


def test_retries_follow_the_headers() -> None:
    """503 says when to come back and is tried again; a limit says so too; 409 and what will not change says not to."""
    service = ScriptedService()
    live = start(service, requests_per_minute=2)
    try:
        with openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as client:
            client.models.list()
            raw = client.models.with_raw_response.list()
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == "0"
            assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
            with pytest.raises(openai.RateLimitError) as limited:
                client.models.list()
        assert limited.value.code == "rate_limit_exceeded"
        assert int(limited.value.response.headers["retry-after"]) > 0
    finally:
        live.stop()
