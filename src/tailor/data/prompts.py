"""Rows to be answered: prompts alone, and what every kind of training row asks. Their answers are not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike

from tailor.data.dataset import NO_TEMPLATES
from tailor.data.formats import FORMATS, Fields, Format, openai_chat, said_turns, sharegpt
from tailor.data.kinds import SAID
from tailor.data.readers import Reading, read_rows
from tailor.data.records import Comparison, Conversation, Judged, Rated, Record, conversation, prompt_of
from tailor.data.rows import RowError
from tailor.data.task_rows import FIELDS, with_templates
from tailor.data.turns import check_order
from tailor.errors import DataError
from tailor.text.messages import Message, user
from tailor.text.template import Templates


def _prompt(row: Fields) -> Record:
    said = said_turns(row["prompt"], user)
    check_order(said, answered=False)
    if said[-1].role == "assistant":
        raise RowError("the prompt ends in an assistant turn, so there is nothing to answer")
    return Conversation(said)


PROMPT_FORMATS: dict[str, Format] = {
    **FORMATS,
    "prompt": Format("a prompt without an answer", {"prompt": SAID}, _prompt),
    "openai_chat": replace(FORMATS["openai_chat"], convert=partial(openai_chat, answered=False)),
    "sharegpt": replace(FORMATS["sharegpt"], convert=partial(sharegpt, answered=False)),
}
"""FORMATS, and rows that only ask: `prompt`, and conversations that end in a user turn."""


def read_prompts(
    path: str | PathLike[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    templates: Templates = NO_TEMPLATES,
) -> Reading:
    """All rows of a data file that is to be answered, in its order; `question_of` gives each one's turns.

    Settings and errors are those of `read_records`, and DataError for rows of a kind that asks nothing. `templates` are
    those of the tasks that will answer.
    """
    formats = with_templates(PROMPT_FORMATS, templates, training=False)
    format = FIELDS if format == "auto" and FIELDS in formats else format
    reading = read_rows(path, formats, format=format, columns=columns, skip_bad_rows=skip_bad_rows)
    for record in reading.records:
        question_of(record)
    return reading


def question_of(record: Record) -> tuple[Message, ...]:
    """The turns to answer: all when they end in a question, else those before the last assistant turn.

    Raises DataError naming file and line for documents and retrieval rows, which ask nothing.
    """
    if isinstance(record, Comparison | Judged | Rated):
        return record.prompt
    try:
        turns = conversation(record)
    except TypeError:
        raise DataError(
            f"{record.source}: a {type(record).__name__} has no prompt to answer",
            hint='rows to answer look like {"prompt": "…"} or {"messages": […]}; '
            "--columns prompt=NAME says where the prompt is",
        ) from None
    return turns if turns[-1].role != "assistant" else prompt_of(record)
