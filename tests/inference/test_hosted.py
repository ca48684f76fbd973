"""Hosted bases: names and settings, requests and their odd answers, errors, counts, prompts composed on our side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hosted_stub import END, Fault, Stub, stub_endpoint
from tailor.artifacts.artifact import find, save_hosted
from tailor.data.records import PromptCompletion
from tailor.errors import (
    AuthError,
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    OverloadedError,
    ResourceError,
    TailorError,
)
from tailor.evaluation.evaluate import EvalSettings, evaluate
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.hosted import HostedBackend, HostedCompletion, HostedCustomization
from tailor.inference.hosted_endpoint import DEFAULT_URL, hosted_endpoint
from tailor.inference.load import HostedCustomized, load
from tailor.models.base import load_base
from tailor.techniques.prompting import Prompting
from tailor.text.messages import user


@pytest.fixture
def stub(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with stub_endpoint() as running:
        yield running


def backend(stub: Stub, model: str = "m") -> HostedBackend:
    return HostedBackend(hosted_endpoint(f"openai:{model}@{stub.url}"))


def ask(stub: Stub, **sampling: object) -> HostedCompletion:
    (found,) = backend(stub).generate([Request((user("hi"),), sampling=SamplingParams.model_validate(sampling))])
    assert isinstance(found, HostedCompletion)
    return found


def settings(own_home: Path, stub: Stub, text: str) -> None:
    own_home.mkdir(exist_ok=True)
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    (own_home / "hosted.yaml").write_text(f"endpoints:\n  {stub.url}:\n{lines}")


@pytest.mark.parametrize(
    ("name", "model", "url"),
    [
        ("openai:gpt-x", "gpt-x", DEFAULT_URL),
        ("openai:org/name@v1@https://host/v1/", "org/name@v1", "https://host/v1"),
        ("openai:ft:toy:org:sum:1a2b@http://127.0.0.1:8000/v1", "ft:toy:org:sum:1a2b", "http://127.0.0.1:8000/v1"),
    ],
)
def test_names(name: str, model: str, url: str, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    found = hosted_endpoint(name)
    assert (found.model, found.url) == (model, url)
    assert hosted_endpoint(found.name) == found


def test_the_environment_names_the_place(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://mine/v1/")
    assert hosted_endpoint("openai:m").name == "openai:m@https://mine/v1"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("openai:", "names no hosted model"),
        ("openai:m@https://me:sk-1@host/v1", "without user, password"),
        ("openai:m@https://host/v1?key=sk-1", "without user, password"),
    ],
)
def test_names_that_are_refused_do_not_repeat_secrets(name: str, told: str, own_home: Path) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        hosted_endpoint(name)
    assert "sk-1" not in f"{raised.value.message} {raised.value.hint}"


def test_weights_are_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match="weights") as raised:
        load_base("openai:m@https://host/v1")
    assert "hosted tune" in str(raised.value.hint)


def test_a_missing_key_names_its_variable(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(AuthError, match="OPENAI_API_KEY"):
        HostedBackend(hosted_endpoint("openai:m@https://host.invalid/v1")).generate([Request((user("hi"),))])


def test_an_answer(stub: Stub) -> None:
    found = ask(stub, max_new_tokens=7)
    assert (found.text, found.answer, found.finish_reason) == ("fine", "fine", "stop")
    assert (found.num_prompt_tokens, found.num_tokens, found.token_ids, found.logprobs) == (10, 2, (), ())
    (asked,) = stub.asked
    assert asked.headers["authorization"] == "Bearer sk-secret"
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 7,
        "temperature": 0.0,
    }


def test_sampling_in_the_protocols_words(stub: Stub) -> None:
    same = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "top_k": 5}
    ask(stub, **same, stop=list("12345"), logit_bias=[(7, -100)], min_new_tokens=2)
    (body,) = stub.bodies("/v1/chat/completions")
    translated = {"stop": ["1", "2", "3", "4"], "logit_bias": {"7": -100}, "min_tokens": 2}
    assert {key: body[key] for key in (*same, *translated)} == same | translated


def test_stop_texts_beyond_the_protocols_four_hold_too(stub: Stub) -> None:
    stub.answer = lambda asked: "one END two"
    assert ask(stub, stop=["1", "2", "3", "4", "END"]).text == "one "


@pytest.mark.parametrize(
    ("oddity", "text"), [("list_content", "fine"), ("null_content", ""), ("no_usage", "fine"), ("odd_fields", "fine")]
)
def test_odd_answers_are_read(oddity: str, text: str, stub: Stub) -> None:
    stub.oddities.add(oddity)
    found = ask(stub)
    assert (found.text, found.finish_reason) == (text, "stop")


def test_logprobs_without_top_logprobs(stub: Stub) -> None:
    stub.oddities.add("logprobs")
    assert ask(stub, num_top_logprobs=3).logprobs == (-0.5,) * 4
    assert stub.bodies("/v1/chat/completions")[0]["top_logprobs"] == 3


@pytest.mark.parametrize(
    ("oddity", "told"), [("no_choices", "no answer"), ("html", "no answer"), ("error_body", "the provider behind")]
)
def test_what_is_no_answer_is_an_error(oddity: str, told: str, stub: Stub) -> None:
    stub.oddities.add(oddity)
    with pytest.raises(TailorError, match=told):
        ask(stub)


NO_RETRY = {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        (Fault(401, "Incorrect API key: sk-secret"), AuthError, "Incorrect API key: …"),
        (Fault(403, "not yours"), AuthError, "not yours"),
        (Fault(404, "no model m", "model_not_found"), NotFoundError, "no model m"),
        (Fault(400, "too long", "context_length_exceeded"), ResourceError, "too long"),
        (Fault(400, "This model's maximum context length is 8 tokens"), ResourceError, "maximum context"),
        (Fault(400, "bad role", None, "messages"), DataError, "bad role"),
        (Fault(400, "no such value", "invalid_value", "top_p"), ConfigError, "no such value"),
        (Fault(409, "there already", headers=NO_RETRY), ConflictError, "there already"),
        (
            Fault(429, "no credit", "insufficient_quota", headers=NO_RETRY),
            ResourceError,
            "no credit",
        ),
        (Fault(429, "later", headers={"retry-after": "500"}), OverloadedError, "later"),
        (Fault(500, "broken", headers=NO_RETRY), TailorError, r"broken \(request req_1\)"),
    ],
)
def test_errors_in_our_words(fault: Fault, kind: type[TailorError], told: str, stub: Stub) -> None:
    stub.faults.append(fault)
    with pytest.raises(TailorError, match=told) as raised:
        ask(stub)
    assert type(raised.value) is kind
    assert "sk-secret" not in str(raised.value)
    assert len(stub.asked) == 1


def test_what_may_pass_is_tried_again_and_counted(stub: Stub) -> None:
    stub.faults.extend([Fault(429, headers={"retry-after-ms": "1"}), Fault(500, headers={"retry-after-ms": "1"})])
    own = backend(stub)
    assert own.generate([Request((user("hi"),))])[0].text == "fine"
    assert (own.usage.requests, own.usage.retries) == (1, 2)


def test_a_place_where_nobody_is(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    own_home.mkdir()
    (own_home / "hosted.yaml").write_text('endpoints:\n  "http://127.0.0.1:9/v1": {max_retries: 0}\n')
    with pytest.raises(NotFoundError, match="cannot be reached"):
        HostedBackend(hosted_endpoint("openai:m@http://127.0.0.1:9/v1")).generate([Request((user("hi"),))])


def test_a_slow_place(stub: Stub, own_home: Path) -> None:
    stub.oddities.add("slow")
    settings(own_home, stub, "timeout: 0.05\nmax_retries: 0")
    with pytest.raises(OverloadedError, match=r"within 0\.05 s"):
        ask(stub)


def test_refused_parameters_are_said_otherwise_or_left_out(stub: Stub) -> None:
    stub.refused = {"max_tokens": "unsupported_parameter", "temperature": "unsupported_value"}
    own = backend(stub)
    assert [c.text for c in own.generate([Request((user(str(k)),)) for k in range(4)])] == ["fine"] * 4
    assert "max_completion_tokens" in stub.bodies("/v1/chat/completions")[-1]
    assert own.notes == [f"openai:m@{stub.url} does not take temperature 0: its own default is used"]


def test_answers_keep_the_order_of_the_requests(stub: Stub, own_home: Path) -> None:
    settings(own_home, stub, "concurrency: 3\nprices:\n  m: {prompt: 1, cached: 0.5, completion: 10}")
    stub.answer = lambda asked: asked["messages"][0]["content"] * 2
    own, told = backend(stub), list[int]()
    texts = [c.text for c in own.generate([Request((user(str(k)),)) for k in range(20)], told.append)]
    assert texts == [str(k) * 2 for k in range(20)]
    assert told == list(range(1, 21))
    # 20 x (6 fresh at $1, 4 cached at $0.5, 2 new at $10) per million
    assert own.usage.cost == pytest.approx(20 * (6 + 2 + 20) / 1e6)
    assert "20 requests, 200 prompt tokens (80 cached), 40 completion tokens, $0.0006" in own.usage.told()
    assert own.usage.limits == {"requests": "99"}


def test_one_error_ends_all_and_says_how_far_it_came(stub: Stub, own_home: Path) -> None:
    settings(own_home, stub, "concurrency: 1")
    own = backend(stub)
    own.generate([Request((user("hi"),))])
    stub.faults.append(Fault(404, "gone"))
    with pytest.raises(NotFoundError, match=r"gone .*\(0 of 50 requests were answered\)"):
        own.generate([Request((user("hi"),)) for _ in range(50)])
    assert len(stub.asked) < 10


def test_missing_counts_are_told(stub: Stub) -> None:
    stub.oddities.add("no_usage")
    own = backend(stub)
    own.generate([Request((user("hi"),))])
    assert "1 answers came without counts" in own.usage.told()


def test_a_stream(stub: Stub) -> None:
    own = backend(stub)
    assert list(own.stream(Request((user("hi"),)))) == list("fine")
    assert own.usage.completion_tokens == 4


def test_an_error_in_the_middle_of_a_stream(stub: Stub) -> None:
    stub.oddities.add("mid_stream_error")
    stream = backend(stub).stream(Request((user("hi"),)))
    assert [next(stream), next(stream)] == ["f", "i"]
    with pytest.raises(TailorError, match="the engine died"):
        next(stream)


def test_embeddings_in_order_and_of_unit_length(stub: Stub) -> None:
    found = backend(stub).embed(["abc", "a"])
    assert torch.allclose(found, torch.tensor([[3.0, 1.0], [1.0, 1.0]]) / torch.tensor([[10.0], [2.0]]).sqrt())


def test_logprobs_by_echo_count_the_completion_and_its_end(stub: Stub) -> None:
    stub.oddities.add("echo")
    own = backend(stub)
    (found,) = own.logprobs([Request((user("hi"),))], ["no"])
    assert found.tolist() == pytest.approx([-ord("n") / 1000, -ord("o") / 1000, -END / 1000])


def test_logprobs_that_cannot_be_had_are_refused_with_the_reason(stub: Stub) -> None:
    with pytest.raises(ConfigError, match="no /tokenize"):
        backend(stub).logprobs([Request((user("hi"),))], ["no"])


ROWS = [PromptCompletion(prompt=f"is {k} even?", completion="yes" if k % 2 == 0 else "no") for k in range(8)]


def test_evaluation_by_text_says_what_it_leaves_out(stub: Stub) -> None:
    stub.answer = lambda asked: "yes"
    found = evaluate(backend(stub), None, ROWS)
    assert found.metrics["accuracy"].mean == 0.5
    assert "perplexity" not in found.metrics
    assert any(note.startswith("no perplexity: openai:m@") for note in found.notes)
    assert any("8 requests" in note for note in found.notes)
    with pytest.raises(ConfigError, match="no /tokenize"):
        evaluate(backend(stub), None, ROWS, settings=EvalSettings(metrics=("perplexity",)))


def test_evaluation_by_likelihood_where_the_endpoint_echoes(stub: Stub) -> None:
    stub.oddities.add("echo")
    found = evaluate(backend(stub), None, ROWS, settings=EvalSettings(metrics=("label_accuracy", "perplexity")))
    # n + o weigh less than y + e + s, so "no" is always the likelier one
    assert found.metrics["label_accuracy"].mean == 0.5
    sums = [sum(map(ord, row.completion)) + END for row in ROWS]
    assert found.metrics["perplexity"].mean == pytest.approx(math.exp(sum(sums) / 1000 / (4 * 4 + 4 * 3)))


def test_prompts_are_composed_here_and_answers_are_read(stub: Stub) -> None:
    stub.answer = lambda asked: "Two and two. The answer is 4."
    prompting = Prompting(system="Count.", shots=0, reasoning=True)
    own = HostedBackend(hosted_endpoint(f"openai:m@{stub.url}"), {"p": HostedCustomization(prompting=prompting)})
    (found,) = own.generate([Request((user("2+2?"),), "p")])
    assert found.answer == "4"
    turns = stub.bodies("/v1/chat/completions")[0]["messages"]
    assert turns[0] == {"role": "system", "content": "Count."}
    assert turns[1]["content"].startswith("2+2?\nLet's think step by step")
    with pytest.raises(NotFoundError, match="no customization 'q'"):
        own.generate([Request((user("2+2?"),), "q")])


def test_votes(stub: Stub) -> None:
    answers = iter(["a", "b", "b"])
    stub.answer = lambda asked: next(answers)
    own = HostedCustomization(prompting=Prompting(shots=0, votes=3))
    (found,) = HostedBackend(hosted_endpoint(f"openai:m@{stub.url}"), {"p": own}).generate([Request((user("?"),), "p")])
    assert found.text == "b"


def test_artifacts_of_hosted_bases(stub: Stub) -> None:
    base = f"openai:m@{stub.url}"
    save_hosted("mine", base, {"techniques": [Prompting(system="Be short.", shots=0).model_dump(mode="json")]})
    save_hosted("tuned", base, {"techniques": [], "kind": "hosted", "model": "ft:m:org:x:1"})
    for name in ("mine", "tuned"):
        loaded = load(name)
        assert isinstance(loaded, HostedCustomized)
        assert loaded.generate("hi") == "fine"
    one, other = stub.bodies("/v1/chat/completions")
    assert [turn["role"] for turn in one["messages"]] == ["system", "user"]
    assert (one["model"], other["model"]) == ("m", "ft:m:org:x:1")
    assert find("tuned").kind == "hosted"
    assert find("tuned").techniques == ()
    with pytest.raises(ConflictError, match="no base here goes under it"):
        load("tuned", "tailor-nano")
    kept = "".join(path.read_text() for path in find("tuned").folder.rglob("*") if path.is_file())
    assert "sk-secret" not in kept


def test_a_prompt_made_here_goes_around_a_hosted_model(stub: Stub, own_home: Path) -> None:
    save_hosted("mine", "tailor-nano", {"techniques": [Prompting(system="Be short.", shots=0).model_dump(mode="json")]})
    loaded = load("mine", f"openai:m@{stub.url}")
    assert loaded.generate("hi") == "fine"


def test_an_artifact_from_elsewhere_gets_no_key(own_home: Path, tmp_path: Path) -> None:
    save_hosted("evil", "openai:m@https://elsewhere.invalid/v1", {"techniques": [], "model": "m", "kind": "hosted"})
    moved = find("evil").folder.rename(tmp_path / "evil")
    with pytest.raises(AuthError, match="would be given your key"):
        load(moved)
