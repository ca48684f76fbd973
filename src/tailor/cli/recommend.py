"""`tailor recommend`: which technique to try first, and why."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor.cli.output import AsJson, Columns, SkipBadRows, emit, pairs

if TYPE_CHECKING:
    from rich.console import Console

    from tailor.recipes.recommend import Recommendation
    from tailor.recipes.recommend_rule import Facts

app = typer.Typer(add_completion=False)


class Changes(StrEnum):
    """How often the knowledge changes."""

    never = "never"
    monthly = "monthly"
    daily = "daily"


@app.command()
def recommend(
    file: Annotated[Path, typer.Argument(help="A data file: JSONL, JSON, CSV, TSV, Parquet, .gz, .zst.")],
    base: Annotated[str, typer.Option("--base", "-b", help="tailor-nano, a folder, or a hub id.")] = "tailor-nano",
    changes: Annotated[Changes, typer.Option(help="How often what the answers must know changes.")] = Changes.never,
    customizations: Annotated[int, typer.Option(min=1, help="Customizations to be served side by side.")] = 1,
    answer_pattern: Annotated[
        str | None,
        typer.Option("--answer-pattern", help="Regular expression that reads the answer out of a completion."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="auto, or one of the formats of docs/formats.md.")] = "auto",
    columns: Columns = None,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Say which technique to try first for these rows, why, and the command that tries it.

    Rows, task, base, machine and use are looked at; comparisons that are finished count more than the rule.
    """
    from tailor.recipes.recommend import recommend as run_recommend

    found = run_recommend(
        file,
        base=base,
        changes=changes.value,
        customizations=customizations,
        answer_pattern=answer_pattern,
        format=format,
        columns=pairs(columns, "--columns"),
        skip_bad_rows=skip_bad_rows,
    )
    emit(found.to_dict() if as_json else {}, as_json, lambda console: _show(found, console))


def _show(found: Recommendation, console: Console) -> None:
    _line(console, f"{found.path}: {_rows(found.facts)}", "bold")
    _line(console, _base(found.facts))
    for number, choice in enumerate(found.ranking.choices, start=1):
        missing = "" if choice.available else "  (not in this tailor yet)"
        _line(console, "")
        _line(console, f"{number}. {choice.title}{missing}", "bold" if choice.available else "")
        for reason in choice.reasons:
            _line(console, f"   {reason}")
    for sentence in found.ranking.measured:
        _line(console, "")
        _line(console, sentence)
    if found.notes:
        _line(console, "")
    for note in found.notes:
        _line(console, f"note: {note}")
    if found.commands:
        _line(console, "")
        _line(console, "next", "bold")
    for command in found.commands:
        _line(console, f"  {command}")


def _line(console: Console, text: str, style: str = "") -> None:
    """One line as it is, unwrapped, so that commands can be copied."""
    from rich.text import Text

    from tailor.evaluation.drawing.quantities import visible

    console.print(Text(visible(text)), style=style or None, soft_wrap=True)


def _rows(facts: Facts) -> str:
    """What the file holds, in one line."""
    parts = []
    if facts.rows:
        kind = f"{facts.kind} ({facts.labels} different)" if facts.labels else str(facts.kind)
        tokens = f"{facts.prompt_tokens:.0f} → {facts.completion_tokens:.0f} tokens in the middle"
        parts.append(f"{facts.rows:,} rows with a completion, {kind}, {tokens}, {facts.longest_row:,} at most")
    others = {
        "preferences": facts.comparisons,
        "judged answers": facts.judged,
        "rated answers": facts.rated,
        "documents": facts.documents,
        "questions with passages": facts.retrievals,
    }
    return "; ".join([*parts, *(f"{count:,} {what}" for what, count in others.items() if count)])


def _base(facts: Facts) -> str:
    """Base, machine and use, in one line."""
    from tailor.evaluation.drawing.quantities import count, size
    from tailor.models.files import is_hosted

    if is_hosted(facts.base):
        return f"base {facts.base}, hosted"
    memory = "unknown memory" if facts.memory is None else size(facts.memory)
    parts = [
        f"base {facts.base}: {count(facts.base_parameters)} parameters, {facts.context:,} tokens of context",
        f"{memory} on the GPU" if facts.gpu else f"{memory}, no GPU",
        f"knowledge changes {facts.changes}" if facts.changes != "never" else "",
        f"{facts.customizations} customizations side by side" if facts.customizations > 1 else "",
    ]
    return "; ".join(part for part in parts if part)
