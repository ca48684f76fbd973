"""Worked examples of chains of thought that the model writes itself, kept where they led to the right answer.

Bootstrapping of rationales: Zelikman et al. 2022 (STaR), arXiv:2203.14465; of demonstrations: Khattab et al. 2023
(DSPy), arXiv:2310.03714.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.metrics.answers import FINAL_ANSWER, extract_answer
from tailor.metrics.text_scores import exact_match
from tailor.models.base import Base
from tailor.techniques import Technique
from tailor.techniques.prompting import Prompting
from tailor.techniques.prompting_shots import Shot
from tailor.text.messages import user

Ask = Callable[[Sequence[Request]], list[Completion]]


def changed(technique: Prompting | None, **settings: Any) -> Prompting:
    """The prompt with other settings; None is the plain base's, which has none."""
    return Prompting(**{**(technique.model_dump() if technique is not None else {"shots": 0}), **settings})


def reasoning_in(text: str, pattern: str) -> str | None:
    """What stands before the final answer, up to its last whole sentence; None without an answer or a sentence."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    before = text[: matches[-1].start()]
    whole = re.match(r"(?s).*[.!?\n]", before)
    found = whole[0].strip() if whole else ""
    return found or None


def write_reasoning(technique: Prompting, shots: Sequence[Shot], ask: Ask) -> list[Shot]:
    """The shots, those without reasoning with one of the model's own where it came to the right answer.

    It is asked with the technique's own words, and with the shots that have a reasoning as examples.
    """
    pattern = technique.answer_pattern or FINAL_ANSWER
    worked = [shot for shot in shots if shot.reasoning is not None][: technique.shots]
    teacher = changed(
        technique, reasoning=True, bootstrap=False, votes=1, shots=len(worked), examples=worked, selection="fixed"
    )
    missing = [k for k, shot in enumerate(shots) if shot.reasoning is None]
    requests = [Request(teacher.compose((user(shots[k].prompt),)), sampling=SamplingParams()) for k in missing]
    found = list(shots)
    for k, completion in zip(missing, ask(requests) if requests else (), strict=True):
        answer = extract_answer(completion.text, pattern)
        wanted = extract_answer(shots[k].completion, pattern) or shots[k].completion
        reasoning = reasoning_in(completion.text, pattern)
        if answer is not None and reasoning is not None and exact_match(answer, wanted, normalized=True):
            found[k] = shots[k].model_copy(update={"reasoning": reasoning})
    return found


def bootstrapped(techniques: Sequence[Technique], base: Base) -> tuple[Technique, ...]:
    """The techniques; of prompting that is to bootstrap, with reasoning that the plain base wrote.

    Shots that have one come first, and stay alone where there are as many of them as are shown (and one to spare).
    """
    return tuple(
        _bootstrapped(technique, base) if isinstance(technique, Prompting) and technique.bootstrap else technique
        for technique in techniques
    )


def _bootstrapped(technique: Prompting, base: Base) -> Prompting:
    shots = write_reasoning(technique, technique.examples, LocalBackend(base).generate)
    shots.sort(key=lambda shot: shot.reasoning is None)
    worked = sum(shot.reasoning is not None for shot in shots)
    if technique.selection in ("fixed", "random"):
        shots = shots[: technique.shots + 1]
    elif worked > technique.shots:
        shots = shots[:worked]
    return changed(technique, examples=shots, bootstrap=False)
