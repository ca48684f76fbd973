"""One pass over the rows of a data file. Hashes, lengths and counts are kept, never the texts."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tailor.data.prepare import content_text, prompt_text
from tailor.data.records import (
    Comparison,
    Conversation,
    Document,
    Judged,
    PromptCompletion,
    Rated,
    Record,
    Retrieval,
    completion_of,
    conversation,
    prompt_of,
)
from tailor.errors import DataError
from tailor.text.messages import Message
from tailor.text.render import Rendered, Renderer, Tools, TrainedTurns
from tailor.text.tokenizer import Tokenizer

MAX_LABELS = 2000
LABEL_LENGTH = 80
"""A label set has at most so many labels of at most so many characters; beyond that, completions are free text."""

MAX_REASONS = 100
"""Different reasons for refused rows that are kept apart."""

UNMEASURED = -1
"""The length of what does not exist or could not be rendered."""


def lines() -> array[int]:
    """An empty column of 1-based lines."""
    return array("q")


def _hashes() -> array[int]:
    return array("Q")


def _lengths() -> array[int]:
    return array("i")


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as the base sees it: ids, how each token reads, and which of them are in the loss."""

    line: int
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    loss_mask: tuple[int, ...]


@dataclass(slots=True)
class Pairs:
    """Lengths of chosen and rejected answers, in tokens."""

    num_pairs: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0

    def add(self, chosen: int, rejected: int) -> None:
        """Count one pair."""
        self.num_pairs += 1
        self.chosen_longer += chosen > rejected
        self.rejected_longer += rejected > chosen
        self.chosen_tokens += chosen
        self.rejected_tokens += rejected


@dataclass(slots=True)
class Tally:
    """What is known of the usable rows. Columns have one entry per row, 52 bytes in all; row k is at `line[k]`."""

    tokenizer: Tokenizer
    renderer: Renderer
    line: array[int] = field(default_factory=lines)
    content: array[int] = field(default_factory=_hashes)
    normalised_content: array[int] = field(default_factory=_hashes)
    prompt: array[int] = field(default_factory=_hashes)
    normalised_prompt: array[int] = field(default_factory=_hashes)
    prompt_tokens: array[int] = field(default_factory=_lengths)
    completion_tokens: array[int] = field(default_factory=_lengths)
    total_tokens: array[int] = field(default_factory=_lengths)
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] | None = field(default_factory=Counter)
    pairs: Pairs = field(default_factory=Pairs)
    refused: dict[str, array[int]] = field(default_factory=dict)
    noted: dict[str, array[int]] = field(default_factory=dict)
    first: RenderedRow | None = None

    def add(self, record: Record) -> None:
        """Count one row."""
        self.line.append(record.source.line)
        self.kinds[type(record).__name__] += 1
        self.content.append(hash64(content_text(record, normalise=False)))
        self.normalised_content.append(hash64(content_text(record, normalise=True)))
        self.prompt.append(hash64(prompt_text(record, normalise=False)))
        self.normalised_prompt.append(hash64(prompt_text(record, normalise=True)))
        self._count_label(record)
        self._note_texts(record)
        try:
            lengths = self._lengths(record)
        except DataError as error:
            self._refuse(error.message, record.source.line)
            lengths = (UNMEASURED, UNMEASURED, UNMEASURED)
        self.prompt_tokens.append(lengths[0])
        self.completion_tokens.append(lengths[1])
        self.total_tokens.append(lengths[2])

    @property
    def num_rows(self) -> int:
        """Usable rows."""
        return len(self.line)

    def note(self, code: str, record: Record) -> None:
        """Remember that something holds for this row."""
        self.noted.setdefault(code, lines()).append(record.source.line)

    def _refuse(self, reason: str, line: int) -> None:
        if reason not in self.refused and len(self.refused) >= MAX_REASONS:
            reason = "other reasons"
        self.refused.setdefault(reason, lines()).append(line)

    def _count_label(self, record: Record) -> None:
        if self.labels is None:
            return
        if isinstance(record, Judged):
            self.labels[str(record.label).lower()] += 1
        elif isinstance(record, PromptCompletion | Conversation):
            completion = completion_of(record)
            self.labels[completion] += 1
            if len(completion) > LABEL_LENGTH or "\n" in completion.strip() or len(self.labels) > MAX_LABELS:
                self.labels = None
        else:
            self.labels = None

    def _note_texts(self, record: Record) -> None:
        """White space, blank sides, and preferences that only white space or case decide."""
        if isinstance(record, Comparison) and _same(record.chosen, record.rejected):
            self.note("identical_pair", record)
        prompt = asked(record)
        if prompt and not any(message.content.strip() for message in prompt):
            self.note("blank_prompt", record)
        if not isinstance(record, PromptCompletion | Conversation):
            return
        last, completion = prompt_of(record)[-1].content, completion_of(record)
        if completion != completion.rstrip():
            self.note("completion_space", record)
        if self.tokenizer.chat_template is None:
            if last.endswith((" ", "\t")):
                self.note("prompt_space", record)
            elif last[-1:].isalnum() and completion[:1].isalnum():
                self.note("no_delimiter", record)

    def _lengths(self, record: Record) -> tuple[int, int, int]:
        """Tokens of prompt, completion (the longer of a pair) and both. Raises DataError when it cannot be rendered."""
        if isinstance(record, Document):
            self._check_special(record.text, "document")
            return UNMEASURED, UNMEASURED, len(self.tokenizer.encode(record.text))
        if isinstance(record, Retrieval):
            return len(self.tokenizer.encode(record.query)), len(self.tokenizer.encode(record.positive)), UNMEASURED
        rendered = self._rendered(record)
        counted = [sum(side.loss_mask) for side in rendered]
        if isinstance(record, Comparison):
            self.pairs.add(*counted)
        if self.first is None:
            ids = rendered[0].token_ids
            texts = tuple(map(self.tokenizer.token_text, ids))
            self.first = RenderedRow(record.source.line, tuple(ids), texts, tuple(rendered[0].loss_mask))
        totals = [len(side.token_ids) for side in rendered]
        return totals[0] - counted[0], max(counted), max(totals)

    def _rendered(self, record: Record) -> list[Rendered]:
        if not isinstance(record, Conversation):
            return [self._example(turns, "last") for turns in sequences(record)]
        try:
            return [self._example(record.messages, "all", record.tools)]
        except DataError as error:
            try:
                rendered = [self._example(record.messages, "last", record.tools)]
            except DataError:
                raise error from None
            self.note("last_turn_only", record)
            return rendered

    def _example(self, messages: tuple[Message, ...], trained_turns: TrainedTurns, tools: Tools = ()) -> Rendered:
        return self.renderer.example(messages, tools=tools, trained_turns=trained_turns)

    def _check_special(self, text: str, what: str) -> None:
        if special := self.tokenizer.special_in(text):
            raise DataError(f"the {what} text holds the special token {special!r}")


def sequences(record: Record) -> list[tuple[Message, ...]]:
    """The conversations a record stands for: two of a comparison, one of other records with an answer, else none."""
    if isinstance(record, Comparison):
        return [(*record.prompt, *record.chosen), (*record.prompt, *record.rejected)]
    if isinstance(record, Judged | Rated):
        return [(*record.prompt, *record.completion)]
    return [conversation(record)] if isinstance(record, PromptCompletion | Conversation) else []


def asked(record: Record) -> tuple[Message, ...]:
    """The turns before the answer; none for records without one."""
    if isinstance(record, Comparison | Judged | Rated):
        return record.prompt
    return prompt_of(record) if isinstance(record, PromptCompletion | Conversation) else ()


def hash64(text: str) -> int:
    """64 bits of BLAKE2b: 8 bytes per row; two of 10⁶ rows meet with p ≈ 3·10⁻⁸."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def repeated(hashes: array[int]) -> Iterator[np.ndarray[Any, np.dtype[np.intp]]]:
    """Row indices that share a hash, ascending, for each hash that stands more than once."""
    values = np.frombuffer(hashes, dtype=np.uint64) if len(hashes) else np.empty(0, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    edges = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, [len(ranked)]])
    for at in np.flatnonzero(np.diff(edges) > 1):
        yield order[edges[at] : edges[at + 1]]


def _same(one: tuple[Message, ...], other: tuple[Message, ...]) -> bool:
    first, second = (" ".join(" ".join(m.content for m in side).split()).casefold() for side in (one, other))
    return first == second
