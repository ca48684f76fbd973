"""The engine and the local backend: greedy, sampled, stopped, packed with others or alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tailor.data.packing import Segment
from tailor.errors import DataError, NotFoundError, ResourceError
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.engine import Engine, EngineSettings
from tailor.inference.local import LocalBackend
from tailor.inference.sampling import choose, truncated
from tailor.inference.scheduler import Running
from tailor.inference.scripted import ScriptedBackend
from tailor.models.base import Base
from tailor.models.plan import Plan
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.text.messages import Message, assistant, user
from tiny_models import ARCHITECTURES, tiny_base

PROMPTS = [[1, 4, 70, 71, 6, 5], [1, 4, 99, 6, 5], [1, 4, *range(40, 60), 6, 5], [7]]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 7, **changes})


def running(prompt: Sequence[int], **changes: Any) -> Running:
    return Running(prompt, 0, params(**changes))


def run(engine: Engine, sequences: list[Running]) -> list[list[int]]:
    engine.run(sequences)
    return [s.token_ids for s in sequences]


def ask(text: str, artifact: str | None = None, **changes: Any) -> Request:
    return Request((user(text),), artifact, params(**changes))


# ------------------------------------------------------------------------------------------------ greedy, and company


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt"])
def test_greedy_is_the_argmax_of_a_full_recompute(model_type: str) -> None:
    base = tiny_base(model_type)
    sequences = [running(prompt) for prompt in PROMPTS]
    Engine(base, stop_ids=()).run(sequences)
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        ids = list(prompt)
        for token, logprob in zip(sequence.token_ids, sequence.logprobs, strict=True):
            logits = base.logits(ids)[-1]
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-5)
            ids.append(token)
        assert len(sequence.token_ids) == 7
        assert sequence.finish_reason == "length"


@pytest.mark.parametrize("max_sequences", [1, 2, 64])
@pytest.mark.parametrize("tokens_per_pass", [1, 12, 4096])
def test_batched_equals_alone_in_any_order(max_sequences: int, tokens_per_pass: int) -> None:
    base = tiny_base()
    alone = [run(Engine(base, ()), [running(p, max_new_tokens=3 + k)])[0] for k, p in enumerate(PROMPTS)]
    for order in itertools.islice(itertools.permutations(range(4)), 0, None, 5):
        sequences = [running(PROMPTS[k], max_new_tokens=3 + k) for k in order]
        limits = EngineSettings(max_sequences=max_sequences, tokens_per_pass=tokens_per_pass)
        engine = Engine(base, (), limits)
        assert run(engine, sequences) == [alone[k] for k in order]


def test_a_seed_belongs_to_its_request() -> None:
    base = tiny_base()
    backend = LocalBackend(base)
    requests = [ask(f"fox {k}", temperature=1.3, seed=k % 3, max_new_tokens=5 + k) for k in range(6)]
    requests.insert(3, ask("greedy beside them"))
    alone = [LocalBackend(base).generate([r])[0].text for r in requests]
    assert [c.text for c in backend.generate(requests)] == alone
    two_at_once = LocalBackend(base, settings=EngineSettings(max_sequences=2))
    assert [c.text for c in two_at_once.generate(requests[::-1])] == alone[::-1]
    assert [c.text for c in backend.generate(requests)] == alone, "a second call starts every seed again"
    one, two = (backend.generate([ask("fox", temperature=1.5, seed=s)])[0].text for s in (1, 2))
    assert one != two


def test_logprobs_are_those_before_temperature() -> None:
    base = tiny_base()
    sequence = running(PROMPTS[0], temperature=3.0, top_k=5)
    Engine(base, ()).run([sequence])
    ids = list(PROMPTS[0])
    for token, logprob in zip(sequence.token_ids, sequence.logprobs, strict=True):
        assert logprob == pytest.approx(float(base.logits(ids)[-1].log_softmax(0)[token]), abs=1e-5)
        ids.append(token)


# ------------------------------------------------------------------------------------------------ how it ends


def test_a_stop_token_ends_the_answer_and_is_part_of_its_tokens() -> None:
    base = tiny_base()
    free = run(Engine(base, ()), [running(PROMPTS[0])])[0]
    stop = free[3]
    sequence = running(PROMPTS[0])
    Engine(base, (stop,)).run([sequence])
    assert sequence.token_ids == free[: free.index(stop) + 1]
    assert sequence.finish_reason == "stop"
    assert len(sequence.logprobs) == len(sequence.token_ids)


def test_the_end_of_turn_is_not_in_the_text() -> None:
    base = tiny_base()
    end = base.renderer.stop[0]
    with torch.no_grad():  # make the end of turn the likeliest token of all
        base.model.get_output_embeddings().weight[end] = 0
        base.model.lm_head.bias = torch.nn.Parameter(torch.zeros(320).index_fill(0, torch.tensor([end]), 50.0))
    completion = LocalBackend(base).generate([ask("fox")])[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", (end,), "stop")


def test_stop_texts_end_the_answer_and_are_not_part_of_it() -> None:
    backend = LocalBackend(tiny_base())
    whole = backend.generate([ask("the fox", max_new_tokens=12)])[0]
    for at in (0, 3, len(whole.text) - 2):
        stop = whole.text[at : at + 2]
        cut = backend.generate([ask("the fox", max_new_tokens=12, stop=("never there", stop))])[0]
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert len(cut.token_ids) <= len(whole.token_ids)
    first, second = whole.text[4:6], whole.text[1:3]
    both = backend.generate([ask("the fox", max_new_tokens=12, stop=(first, second))])[0]
    assert both.text == whole.text[: min(whole.text.index(first), whole.text.index(second))], "the earliest counts"
    absent = backend.generate([ask("the fox", max_new_tokens=12, stop=("never there",))])[0]
    assert absent == whole


def test_the_answer_ends_with_the_context() -> None:
    base = tiny_base(max_position_embeddings=32)
    assert base.max_seq_len == 32
    sequences = [running([5] * n, max_new_tokens=100) for n in (20, 31)]
    Engine(base, ()).run(sequences)
    assert [len(s.token_ids) for s in sequences] == [12, 1]
    assert {s.finish_reason for s in sequences} == {"length"}
    with pytest.raises(ResourceError, match="a prompt of 32 tokens leaves no room in the base's context of 32"):
        Engine(base, ()).run([running([5] * 32)])


def test_caches_are_freed_when_a_sequence_ends() -> None:
    sequences = [running(p) for p in PROMPTS]
    Engine(tiny_base(), ()).run(sequences)
    assert all(s.cache is None for s in sequences)


def test_progress_counts_up_to_all() -> None:
    told: list[int] = []
    requests = [ask("fox", max_new_tokens=k + 1) for k in range(5)]
    LocalBackend(tiny_base(), settings=EngineSettings(max_sequences=2)).generate(requests, told.append)
    assert told == sorted(told)
    assert told[-1] == 5


def test_nothing_to_do() -> None:
    backend = LocalBackend(tiny_base())
    assert backend.generate([]) == []
    assert backend.logprobs([], []) == []
    assert backend.embed([]).shape == (0, 32)


# ------------------------------------------------------------------------------------------------ the budget of a pass


class Watched(Engine):
    """Writes down how many tokens of every sequence each pass holds."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.passes: list[list[int]] = []

    def _forward(self, chosen: Sequence[tuple[Running, int]]) -> Tensor:
        self.passes.append([num for _, num in chosen])
        return super()._forward(chosen)


def test_a_pass_keeps_its_budget_and_cuts_long_prompts() -> None:
    engine = Watched(tiny_base(), (), EngineSettings(max_sequences=3, tokens_per_pass=12))
    sizes = [6, 5, 30, 4, 4, 4, 9]
    engine.run(batch := [running([5] * n, max_new_tokens=3) for n in sizes])
    assert max(sum(p) for p in engine.passes) <= 12
    assert all(len(p) <= 3 for p in engine.passes)
    assert engine.passes[0] == [6, 5, 1], "the third prompt begins with what is left"
    assert engine.num_prefilled == sum(sizes) - sum(s.num_cached for s in batch)
    assert engine.num_generated == 3 * len(sizes)


def test_a_long_prompt_does_not_keep_others_waiting_for_their_next_token() -> None:
    engine = Watched(tiny_base(), (), EngineSettings(chunk_size=8))
    first = running([5] * 4, max_new_tokens=9)
    engine.add(first)
    engine.step()
    engine.add(long := running(list(range(10, 50)), max_new_tokens=2))
    while not engine.idle:
        before = len(first.token_ids)
        engine.step()
        assert len(first.token_ids) > before or first.finish_reason
    assert engine.passes[1:6] == [[1, 8]] * 5
    assert long.finish_reason == "length"


# ------------------------------------------------------------------------------------------------ sampling


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.4, [1]),  # 0.4 is reached by the first
        (0, 0.41, [1, 3]),
        (0, 0.8, [1, 3, 4]),
        (0, 1e-9, [1]),  # the likeliest always stays
        (1, 0.9, [1]),
        (3, 0.6, [1, 3]),  # within the top three: 0.4/0.85 = 0.47, 0.7/0.85 = 0.82
        (2, 0.6, [1, 3]),  # within the top two: 0.4/0.7 = 0.57 < 0.6
    ],
)
def test_truncation_by_hand(top_k: int, top_p: float, kept: list[int]) -> None:
    found = truncated(PROBABILITIES, top_k, top_p)
    assert found.nonzero()[:, 0].tolist() == kept
    assert torch.equal(found[kept], PROBABILITIES[kept])


@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.93, 1.0])
def test_truncation_equals_transformers(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(1, 200, dtype=torch.float64)
    scores = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    scores = transformers.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = transformers.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    ours = truncated((logits[0] / 0.7).softmax(0), top_k, top_p)
    torch.testing.assert_close(ours / ours.sum(), scores[0].softmax(0))


def test_samples_have_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = PROBABILITIES.log()
    drawn = [choose(logits, SamplingParams(temperature=0.5, top_k=3), generator) for _ in range(4000)]
    sharp = PROBABILITIES**2
    sharp[[0, 2]] = 0
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / 4000
    torch.testing.assert_close(shares, sharp / sharp.sum(), atol=0.03, rtol=0)


def test_every_sample_takes_one_random_number() -> None:
    generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
    for sampling in (SamplingParams(temperature=1.0), SamplingParams(temperature=2.0, top_k=1, top_p=0.1)):
        choose(PROBABILITIES.log(), sampling, generator)
        torch.rand((), generator=twin, dtype=torch.float64)
        assert torch.equal(generator.get_state(), twin.get_state())
    choose(PROBABILITIES.log(), SamplingParams(), generator)
    assert torch.equal(generator.get_state(), twin.get_state()), "greedy takes none"


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 80.0, -5.0, 79.9])
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, SamplingParams(temperature=temperature), generator) for _ in range(20)} == {1}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, SamplingParams(temperature=1.0), generator) for _ in range(200)}
    assert drawn == {1, 3}


# ------------------------------------------------------------------------------------------------ the local backend


def backend_of_all() -> LocalBackend:
    base = tiny_base()
    slots = {
        "tuned": base.host.attach([LoRA(rank=2)], seed=1),
        "prompted": base.host.attach([Prompting(system="Be short.", shots=0)]),
        "soft": base.host.attach([PromptTuning(num_virtual_tokens=4)], seed=2),
    }
    with torch.no_grad():
        for parameter in slots["tuned"].parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LocalBackend(base, slots)


def reference(backend: LocalBackend, request: Request, completion: str) -> Tensor:
    """Logprobs of a completion from the logits of the whole row, without packing, groups or the loss head."""
    base, slot = backend.base, backend.slot(request.artifact)
    messages = slot.compose(request.messages) if slot and slot.compose else request.messages
    prefix = slot.virtual_ids if slot else ()
    prompt = base.renderer.prompt(messages, prefix_ids=prefix)
    answer = [*base.tokenizer.encode(completion), base.renderer.stop[0]]
    logits = base.logits([*prompt, *answer], slot.number if slot else 0)
    rows = logits[len(prompt) - 1 : -1].log_softmax(1)
    return rows.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("tokens_per_pass", [1, 60, 4096])
def test_logprobs_equal_those_of_the_logits(tokens_per_pass: int) -> None:
    backend = backend_of_all()
    backend.engine.tokens_per_pass = tokens_per_pass
    pairs = [
        (ask(text, name), completion)
        for text, name, completion in itertools.product(
            ["the fox", "a dog"], [None, "tuned", "prompted", "soft"], ["jumps", "jumps over", "", "hello"]
        )
    ]
    found = backend.logprobs([r for r, _ in pairs], [c for _, c in pairs])
    for (request, completion), logprobs in zip(pairs, found, strict=True):
        torch.testing.assert_close(logprobs, reference(backend, request, completion), atol=1e-5, rtol=0)


def test_prompts_with_tool_calls_can_be_scored() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}
    turns = (user("Hi"), Message("assistant", "", tool_calls=(call,)), Message("tool", "dog", tool_call_id="1"))
    backend = LocalBackend(tiny_base())
    requests = [Request(turns), Request(turns), Request(turns[:1])]
    one, two, other = backend.logprobs(requests, ["yes", "no", "yes"])
    torch.testing.assert_close(one, reference(backend, requests[0], "yes"), atol=1e-5, rtol=0)
    torch.testing.assert_close(two, reference(backend, requests[1], "no"), atol=1e-5, rtol=0)
    torch.testing.assert_close(other, reference(backend, requests[2], "yes"), atol=1e-5, rtol=0)


def test_a_completion_says_what_it_cost() -> None:
    backend = backend_of_all()
    plain, soft = backend.generate([ask("the fox"), ask("the fox", "soft")])
    assert plain.num_prompt_tokens == len(backend.base.renderer.prompt((user("the fox"),)))
    assert soft.num_prompt_tokens == plain.num_prompt_tokens + 4
    assert isinstance(plain, Completion)
    assert plain.answer == plain.text


def test_the_answer_of_a_chain_of_thought_is_read_out_of_it() -> None:
    base = tiny_base()
    slot = base.host.attach([Prompting(shots=0, system="x", answer_pattern=r"^(.)")])
    completion = LocalBackend(base, {"cot": slot}).generate([ask("the fox", "cot")])[0]
    assert completion.answer == completion.text[:1]


def test_an_unknown_artifact_is_named_with_the_nearest() -> None:
    with pytest.raises(NotFoundError, match="no customization 'tunde' is attached") as caught:
        backend_of_all().generate([ask("fox", "tunde")])
    assert "did you mean 'tuned'" in str(caught.value.hint)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_embeddings_are_unit_means_of_the_last_hidden_states(model_type: str) -> None:
    base = tiny_base(model_type)
    backend = LocalBackend(base)
    backend.engine.tokens_per_pass = 20
    texts = ["the fox", "", "hello there, how are you? " * 3, "dog"]
    vectors = backend.embed(texts)
    for text, vector in zip(texts, vectors, strict=True):
        expected = torch.nn.functional.normalize(hidden_of(base, text).mean(dim=0), dim=0)
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))


def hidden_of(base: Base, text: str) -> Tensor:
    ids = base.renderer.prompt([user(text)])
    plan = Plan.of([Segment(0, len(ids))])
    with torch.no_grad(), base.host.run(plan):
        return base.hidden(plan, torch.tensor(ids), torch.arange(len(ids)))


# ------------------------------------------------------------------------------------------------ the scripted backend


def test_the_scripted_backend_answers_by_its_script_and_remembers() -> None:
    backend = ScriptedBackend(lambda request: request.messages[-1].content.upper())
    requests = [ask("fox"), Request((user("Hi"), assistant("Ho"), user("dog")))]
    completions = backend.generate(requests)
    assert [c.text for c in completions] == ["FOX", "DOG"]
    assert {c.finish_reason for c in completions} == {"stop"}
    assert backend.requests == requests


def test_scripted_scores_and_embeddings_are_always_the_same() -> None:
    first, second = (ScriptedBackend(lambda request: "") for _ in range(2))
    requests, answers = [ask("fox"), ask("dog")], ["one two three", ""]
    one, none = first.logprobs(requests, answers)
    assert torch.equal(one, second.logprobs(requests, answers)[0])
    assert one.shape == (3,)
    assert none.shape == (0,)
    assert bool(((one <= 0) & (one > -10)).all())
    vectors = first.embed(["the fox jumps", "The fox sleeps", "entirely different words"])
    assert torch.equal(vectors, second.embed(["the fox jumps", "The fox sleeps", "entirely different words"]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert first.embed([]).shape == (0, 16)


def test_a_prompt_without_tokens_is_refused() -> None:
    """A base without chat template and bos has nothing to continue after an empty prompt."""
    backend = LocalBackend(tiny_base(chat=False))
    assert backend.base.renderer.prompt((user(""),)) == []
    with pytest.raises(DataError, match="a prompt has no tokens"):
        backend.generate([ask("fox"), ask("")])
    with pytest.raises(DataError, match="text 1 has no tokens"):
        backend.embed(["fox", ""])
