"""Task templates: where a row's fields and the virtual tokens of a task stand in the text that the base is shown.

    <|VIRTUAL_PROMPT_0|> Context: {context} <|VIRTUAL_PROMPT_1|> Question: {question} Answer:{answer}

The settings have the names that NeMo gives them in `task_templates`. What NeMo asserts, or quietly lets pass, is an
error here. A text of a row is put in as it stands: neither its braces nor a marker in it are ever read as the
template's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from tailor.config import Strict
from tailor.errors import DataError, nearest
from tailor.text.messages import Message

MARKER = re.compile(r"<\|VIRTUAL_PROMPT_(0|[1-9]\d*)\|>")
LIKE_A_MARKER = re.compile(r"<\|?\s*virtual[ _-]?prompt[^<>]{0,12}>?", re.IGNORECASE)
FIELD = re.compile(r"\{(\w[\w .-]*)\}")

PROMPT = "prompt"
COMPLETION = "completion"
TASK = "taskname"
"""The column, as NeMo calls it, that names a row's task."""


class Template(Strict):
    """The text of a task around a row's fields, with markers where its virtual tokens stand.

    The answer stands last: `{answer_field}` when it is named, else `{completion}`, or nothing, and the answer follows.
    """

    prompt_template: str = Field(description="text with {fields} and <|VIRTUAL_PROMPT_0|> where virtual tokens stand")
    virtual_token_splits: tuple[int, ...] | None = Field(
        None, description="virtual tokens at marker 0, 1, …; all at the only marker when not given"
    )
    truncate_field: str | None = Field(None, description="the field whose end is cut off a row that is too long")
    answer_only_loss: bool = Field(True, description="false: all words of the row are learned, not only the answer")
    answer_field: str | None = Field(None, description="the field that is the answer; the row's completion otherwise")

    @model_validator(mode="after")
    def _markers_are_counted(self) -> Self:
        own = [match.group() for match in MARKER.finditer(self.prompt_template)]
        for match in LIKE_A_MARKER.finditer(self.prompt_template):
            if match.group() not in own:
                raise ValueError(f"{match.group()!r} is no marker: write <|VIRTUAL_PROMPT_0|>, <|VIRTUAL_PROMPT_1|>, …")
        if not own:
            raise ValueError(
                "the template has no marker: put <|VIRTUAL_PROMPT_0|> where the virtual tokens are to stand"
            )
        numbers = sorted(int(match.group(1)) for match in MARKER.finditer(self.prompt_template))
        if numbers != list(range(len(own))) or len({*own}) != len(own):
            listed = ", ".join(own)
            raise ValueError(f"markers are numbered 0 to {len(own) - 1}, each standing once; the template has {listed}")
        splits = self.virtual_token_splits
        if splits is None and len(own) > 1:
            raise ValueError(f"{len(own)} markers: virtual_token_splits must say how many tokens stand at each")
        if splits is not None and (len(splits) != len(own) or min(splits) < 1):
            raise ValueError(
                f"virtual_token_splits has {len(splits)} numbers ({', '.join(map(str, splits))}) for {len(own)} "
                "markers: it needs one for each, at least 1"
            )
        return self

    @model_validator(mode="after")
    def _fields_are_known(self) -> Self:
        counts = Counter(FIELD.findall(self.prompt_template))
        answer = self.answer
        if self.answer_field is not None and self.answer_field not in counts:
            raise ValueError(f"answer_field {answer!r} is not in the template; {nearest(answer, counts)}")
        if answer in counts and not (counts[answer] == 1 and self.prompt_template.endswith(f"{{{answer}}}")):
            raise ValueError(f"the answer {{{answer}}} must stand once, as the last thing of the template")
        if not self.asked:
            raise ValueError("the template has no field that asks something, such as {prompt}")
        if self.truncate_field == answer:
            raise ValueError(f"truncate_field is the answer {answer!r}: the answer is never cut")
        if self.truncate_field is not None and self.truncate_field not in self.asked:
            raise ValueError(
                f"truncate_field {self.truncate_field!r} is not in the template; "
                f"{nearest(self.truncate_field, self.asked)}"
            )
        return self

    @property
    def answer(self) -> str:
        """The name of the answer's field."""
        return self.answer_field or COMPLETION

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields before the answer, each once."""
        return tuple(dict.fromkeys(name for name in FIELD.findall(self.prompt_template) if name != self.answer))

    @property
    def is_free(self) -> bool:
        """Whether rows need other fields than `prompt` and `completion`."""
        return self.asked != (PROMPT,) or self.answer != COMPLETION

    def splits(self, total: int) -> tuple[int, ...]:
        """How many of `total` virtual tokens stand at marker 0, 1, …"""
        return self.virtual_token_splits or (total,)

    def fill(self, fields: Mapping[str, str]) -> str:
        """The text before the answer, markers in place."""
        return _filled(self._before_answer, fields)

    def plain(self, fields: Mapping[str, str]) -> str:
        """What people and other bases see of the fields: the text without markers, or the prompt alone."""
        if self.asked == (PROMPT,):
            return fields[PROMPT]
        return _filled(MARKER.sub("", self._before_answer), fields).strip()

    def read(self, turn: Message) -> dict[str, str]:
        """The fields that a user turn gives.

        They are its text when the template asks for `{prompt}` alone, else its `fields`, or the JSON object that its
        text is. Raises DataError for missing and unknown fields.
        """
        if self.asked == (PROMPT,):
            return {PROMPT: turn.content}
        given = dict(turn.fields)
        given.pop(TASK, None)
        found = given or self._parsed(turn.content)
        for name in self.asked:
            if name not in found:
                raise DataError(f"the template's field {name!r} is missing; given: {', '.join(found) or 'none'}")
        return {name: found[name] for name in self.asked}

    @property
    def _before_answer(self) -> str:
        return self.prompt_template.removesuffix(f"{{{self.answer}}}")

    def _parsed(self, text: str) -> dict[str, str]:
        example = json.dumps(dict.fromkeys(self.asked, "…"), ensure_ascii=False)
        wanted = f"this task is asked with a JSON object of its template's fields, like {example}"
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise DataError("the prompt is no JSON object of texts", hint=wanted)
        found.pop(TASK, None)
        if unknown := [name for name in found if name not in self.asked]:
            raise DataError(f"the template has no field {unknown[0]!r}; {nearest(unknown[0], self.asked)}", hint=wanted)
        return found


Templates = Mapping[str, Template | None]
"""Task name ("" when it has none) → its template; None: virtual tokens lead, and rows are prompt and completion."""


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """The virtual tokens of a task: in front of every sequence, or at the markers of its template."""

    ids: tuple[int, ...]
    template: Template | None = None

    @property
    def marks(self) -> dict[str, tuple[int, ...]]:
        """Marker → the ids that stand there."""
        found: dict[str, tuple[int, ...]] = {}
        first = 0
        for number, size in enumerate(self.template.splits(len(self.ids)) if self.template else ()):
            found[f"<|VIRTUAL_PROMPT_{number}|>"] = self.ids[first : first + size]
            first += size
        return found


def refuse_markers(turns: Sequence[Message]) -> None:
    """Raise DataError for a text that holds a marker: behind a template it might be taken for one."""
    for turn in turns:
        for text in (turn.content, *(text for _, text in turn.fields)):
            if found := MARKER.search(text):
                raise DataError(
                    f"the {turn.role} text holds {found.group()!r}, which only a template may",
                    hint="remove it or write it differently (for instance with a space inside)",
                )


def _filled(text: str, fields: Mapping[str, str]) -> str:
    return FIELD.sub(lambda match: fields[match.group(1)], text)
