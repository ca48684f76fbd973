"""What kind of task the rows are (a label set, or free text), found from their references and explained."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tailor.data.records import Conversation, Record, completion_of, last_assistant
from tailor.errors import DataError
from tailor.metrics.answers import extract_answer

Kind = Literal["labels", "labels and text", "answers and text", "text"]

MAX_LABELS = 200
"""Up to here a set of answers is a label set, and every label can be scored for every row."""

MAX_LABEL_LENGTH = 80
"""Characters of a label. Longer answers, and those of several lines, are texts."""

USUAL = 0.9
"""The share of rows that settles a question about all of them (a stray space in one row decides nothing)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the label in a completion. `ends` says that nothing but `after` follows it."""

    before: str
    after: str
    ends: bool

    def around(self, label: str) -> str:
        """The (beginning of a) completion that holds this label."""
        return self.before + label + self.after


@dataclass(frozen=True)
class Task:
    """The kind with its reason in one sentence, and what the label metrics need.

    `answers` are the right ones, row by row; `labels` is the sorted label set; `frame` is None when labels cannot be
    scored as completions because every row writes something else around them.
    """

    kind: Kind
    reason: str
    answers: tuple[str, ...]
    labels: tuple[str, ...]
    frame: Frame | None


def find_task(
    references: Sequence[str], answers: Sequence[str], known: Sequence[str] = (), pattern: str | None = None
) -> Task:
    """Decide the kind. `answers` were read from `references` by `pattern`; `known` are those of other rows (training).

    Answers are a label set when there are 2 to 200 different ones, short and of one line, and they repeat: each stands
    twice on average, or nearly all rows have an answer that is known from elsewhere.
    """
    labels = tuple(sorted({*answers, *known}))
    is_set, why = _is_label_set(answers, known, labels)
    frame = frame_of(references, pattern)
    if pattern is None:
        kind: Kind = "labels" if is_set else "text"
    elif is_set:
        kind = "labels" if frame is not None and frame.ends else "labels and text"
    else:
        kind = "answers and text"
    subject = "references" if pattern is None else f"answers that '{pattern}' reads from the references"
    return Task(kind, f"{kind}: the {subject} {why}", tuple(answers), labels, frame)


def _is_label_set(answers: Sequence[str], known: Sequence[str], labels: Sequence[str]) -> tuple[bool, str]:
    if len(labels) > MAX_LABELS:
        return False, f"have {len(labels)} different values, more than the {MAX_LABELS} of a label set"
    if len(labels) < 2:
        return False, "are all the same"
    longest = max(labels, key=len)
    if len(longest) > MAX_LABEL_LENGTH or any("\n" in label for label in labels):
        return False, f"are long (up to {len(longest)} characters) or have several lines"
    pool = len(answers) + len(known)
    seen = sum(answer in set(known) for answer in answers) / len(answers)
    if pool >= 2 * len(labels) or seen >= USUAL:
        return True, f"have {len(labels)} different short values that repeat"
    return False, f"hardly repeat ({len(labels)} different values in {pool} rows)"


def frame_of(references: Sequence[str], pattern: str | None) -> Frame | None:
    """The text that nearly all references have around their answer, None when each has something else there."""
    sides = [_around(reference, pattern) for reference in references]
    before, rows = Counter(left for left, _ in sides).most_common(1)[0]
    if rows < USUAL * len(sides):
        return None
    after, rows = Counter(right for _, right in sides).most_common(1)[0]
    if rows >= USUAL * len(sides):
        return Frame(before, after, ends=True)
    # what follows differs, but its common beginning still closes the label: "card" must not win over "card payment".
    # white space at its end is left out, since tokenisers glue it to the next word
    shared = _common_beginning([right for _, right in sides])
    closing = shared.rstrip() or shared
    return Frame(before, closing, ends=False) if closing else None


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all in between share
    return first[: next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _around(reference: str, pattern: str | None) -> tuple[str, str]:
    """What stands left and right of the answer; the answer is found as `extract_answer` finds it."""
    answer, start, held = reference.strip(), 0, reference
    if pattern is not None:
        match = list(re.finditer(pattern, reference))[-1]
        group = next((k for k, text in enumerate(match.groups(), 1) if text is not None), 0)
        answer, start, held = extract_answer(reference, pattern) or "", match.start(group), match[group]
    start += held.find(answer)
    return reference[:start], reference[start + len(answer) :]


def answered(records: Sequence[Record]) -> list[Record]:
    """The records, cut after their last assistant turn. Raises DataError naming those without one."""
    kept: list[Record] = []
    without = []
    for record in records:
        try:
            completion_of(record)
        except (TypeError, ValueError) as error:
            without.append(f"{record.source}: {error}")
            continue
        if isinstance(record, Conversation):
            last = last_assistant(record.messages)
            # weight says what is trained; here the turn is the reference
            turn = dataclasses.replace(record.messages[last], weight=None)
            record = dataclasses.replace(record, messages=(*record.messages[:last], turn))
        kept.append(record)
    if without:
        more = f"\nand {len(without) - 5} more" if len(without) > 5 else ""
        raise DataError(
            f"{len(without)} of {len(records)} rows have no completion to compare with:\n"
            + "\n".join(without[:5])
            + more
        )
    if not kept:
        raise DataError("there are no rows to evaluate")
    return kept


def answers_of(records: Sequence[Record], references: Sequence[str], pattern: str | None) -> list[str]:
    """The right answer of every row. Raises DataError naming rows whose reference the pattern does not match."""
    answers = [reference.strip() if pattern is None else extract_answer(reference, pattern) for reference in references]
    missing = [record.source for record, answer in zip(records, answers, strict=True) if answer is None]
    if missing:
        raise DataError(
            f"the answer pattern '{pattern}' matches nothing in {len(missing)} of {len(records)} references: "
            + ", ".join(map(str, missing[:5])),
            hint=f"the first of them is {references[answers.index(None)][:80]!r}",
        )
    return [answer for answer in answers if answer is not None]


def known_answers(labels: Sequence[str], pattern: str | None) -> tuple[list[str], int]:
    """The answers in completions of other rows, and how many of these the pattern does not match."""
    found = [label.strip() if pattern is None else extract_answer(label, pattern) for label in labels]
    return [answer for answer in found if answer is not None], found.count(None)
