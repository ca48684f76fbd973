"""Requests that are voted on: how many are asked, with which seeds and temperature, and which answer comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.inference.votes import generate_with_votes, sampled
from tailor.metrics.votes import Votes
from tailor.text.messages import user
from tiny_models import tiny_base

PLAIN = Request((user("plain"),))
VOTED = Request((user("voted"),), sampling=SamplingParams(seed=3))


class Asked:
    """Answers from a list, whatever is asked; keeps the requests."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.requests: list[Request] = []

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        self.requests += requests
        for done in range(1, len(requests) + 1):
            if progress is not None:
                progress(done)
        return [Completion(text, (), (-1.0,), "stop", 0, text) for text in self.texts[: len(requests)]]


def votes_of(request: Request) -> Votes | None:
    return Votes(5, 0.7) if request.messages == VOTED.messages else None


def test_the_majority_comes_back_in_the_place_of_its_request() -> None:
    asked, told = Asked(["first", "b", "a", "b", "", "a", "b", "last"]), list[int]()
    # 1 + 5 + 1 requests; "last" is one too many and never given
    found = generate_with_votes(asked, [PLAIN, VOTED, PLAIN], votes_of, told.append)
    assert [completion.text for completion in found] == ["first", "b", "b"]
    assert told == [0, 0, 1, 1, 2, 2, 3]
    assert asked.requests[0] == asked.requests[-1] == PLAIN
    samples = asked.requests[1:-1]
    assert {request.sampling.temperature for request in samples} == {0.7}
    assert len({request.sampling.seed for request in samples}) == 5
    assert all(replace(request, sampling=VOTED.sampling) == VOTED for request in samples)


def test_without_votes_nothing_changes() -> None:
    asked = Asked(["x", "y"])
    assert [c.text for c in generate_with_votes(asked, [PLAIN, PLAIN], lambda request: None)] == ["x", "y"]
    assert asked.requests == [PLAIN, PLAIN]


def test_samples_follow_from_the_request_alone() -> None:
    assert sampled(VOTED, Votes(3, 0.7)) == sampled(VOTED, Votes(5, 0.7))[:3]
    other = replace(VOTED, sampling=SamplingParams(seed=4, temperature=0.2))
    assert {request.sampling.temperature for request in sampled(other, Votes(3, 0.7))} == {0.2}
    assert not {r.sampling.seed for r in sampled(other, Votes(9, 0.7))} & {
        r.sampling.seed for r in sampled(VOTED, Votes(9, 0.7))
    }
    assert sampled(VOTED, Votes(1, 0.7)) == [VOTED]


def test_over_a_model_the_answer_is_one_of_the_samples_and_repeats() -> None:
    backend = LocalBackend(tiny_base())
    request = replace(VOTED, sampling=SamplingParams(max_new_tokens=3, seed=1))
    votes = Votes(4, 1.5)
    texts = [c.text for c in backend.generate(sampled(request, votes))]
    once = generate_with_votes(backend.generate, [request], lambda asked: votes)
    again = generate_with_votes(backend.generate, [request, PLAIN_SHORT], lambda asked: votes)
    assert once[0].text in texts
    assert once[0].text == again[0].text


PLAIN_SHORT = replace(PLAIN, sampling=SamplingParams(max_new_tokens=2))
