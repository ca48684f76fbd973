"""Rows of free fields, `{"taskname": …, "context": …, "question": …, "answer": …}`: read by their tasks' templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from tailor.data.formats import Fields, Format
from tailor.data.kinds import TEXT
from tailor.data.records import Conversation, PromptCompletion, Record
from tailor.data.rows import RowError
from tailor.errors import nearest
from tailor.text.messages import Message
from tailor.text.template import COMPLETION, PROMPT, TASK, Template, Templates

FIELDS = "fields"
"""The name of the format."""


def with_templates(formats: Mapping[str, Format], templates: Templates, *, training: bool) -> dict[str, Format]:
    """`formats`, and `fields` when one of the templates needs others than prompt and completion.

    In `training` the answer must be there, and every other column must have its place in the template.
    """
    if not any(template is not None and template.is_free for template in templates.values()):
        return dict(formats)
    names = dict.fromkeys(name for t in templates.values() for name in (*_asked(t), _answer(t)))
    (only,) = templates.values() if len(templates) == 1 else (None,)
    required = (*_asked(only), *([_answer(only)] if training else ())) if len(templates) == 1 else (TASK,)
    optional = [name for name in (TASK, *names) if name not in required]
    told = {name: None if t is None else t.model_dump(mode="json") for name, t in templates.items()}
    return {
        **formats,
        FIELDS: Format(
            "fields of a task's template",
            dict.fromkeys(required, TEXT),
            partial(_read, dict(templates), training),
            dict.fromkeys(optional, TEXT),
            closed=training,
            made_from=json.dumps([told, training], sort_keys=True),
        ),
    }


def _asked(template: Template | None) -> tuple[str, ...]:
    return template.asked if template is not None else (PROMPT,)


def _answer(template: Template | None) -> str:
    return template.answer if template is not None else COMPLETION


def _read(templates: Templates, training: bool, row: Fields) -> Record:
    template = templates[_task(row, templates)]
    for name in (*_asked(template), *([_answer(template)] if training else ())):
        if not str(row.get(name) or "").strip():
            found = nearest(name, [n for n in row if n != TASK]).replace("choices:", "the row has")
            raise RowError(f"field {name!r} of the task's template is missing; {found}")
    fields = tuple((name, str(row[name])) for name in (TASK, *_asked(template)) if name in row)
    prompt = template.plain(row) if template is not None else str(row[PROMPT])
    answer = row.get(_answer(template))
    if answer is None:
        return Conversation((Message("user", prompt, fields=fields),))
    return PromptCompletion(prompt, str(answer), fields)


def _task(row: Fields, templates: Templates) -> str:
    """The task of a row. A single unnamed one takes every row."""
    if "" in templates:
        return ""
    named = row.get(TASK) or (next(iter(templates)) if len(templates) == 1 else None)
    if named not in templates:
        raise RowError(f"there is no task {named!r} here; {nearest(str(named), templates)}")
    return str(named)
