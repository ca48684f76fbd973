"""`tailor generate`: answers to one prompt or to a file of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, BaseOf, Columns, Device, Dtype, Quantize, SkipBadRows, Task, emit, pairs, say

if TYPE_CHECKING:
    from tailor.data.dataset import ReadSettings
    from tailor.inference.backend import Completion
    from tailor.text.messages import Message
    from tailor.text.render import Tools
    from tailor.text.template import Templates

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    name: Annotated[str, typer.Argument(help="An artifact or a base.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to say, or a template's fields as JSON; '-' reads standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file of prompts or rows; their prompts are answered in order."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system text in front.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text at which the answer ends.")] = None,
    columns: Columns = None,
    format: Annotated[
        str, typer.Option("--format", help="Of --file: auto, prompt, or one of docs/formats.md.")
    ] = "auto",
    skip_bad_rows: SkipBadRows = False,
    task: Task = None,
    base: BaseOf = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or every row of a file (all in one batch)."""
    from tailor.data.dataset import ReadSettings
    from tailor.inference.load import HostedCustomized, load
    from tailor.text.messages import Message

    reading = ReadSettings(format=format, columns=pairs(columns, "--columns"), skip_bad_rows=skip_bad_rows)
    asked = _asked(prompt, file, reading, _templates(name, task))
    opening = (Message("system", system),) if system else ()
    customized = load(name, base, task=task, device=device, dtype=dtype, quantize=quantize)
    completions = customized.complete(
        [(*opening, *turns) for turns, _ in asked],
        tools=[tools for _, tools in asked],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    rows = [_row(completion) for completion in completions]
    used: dict[str, Any] = {}
    if isinstance(customized, HostedCustomized):
        used = {"usage": customized.backend.usage.to_dict()}
        for line in (*customized.backend.notes, customized.backend.usage.told()):
            say(f"note: {line}")
    emit({"completions": rows, **used}, as_json, lambda console: print(*(row["text"] for row in rows), sep="\n"))


def _row(completion: Completion) -> dict[str, Any]:
    """A completion as JSON knows it."""
    from tailor.inference.hosted import HostedCompletion

    counted = completion.num_tokens if isinstance(completion, HostedCompletion) else len(completion.token_ids)
    return {
        "text": completion.text,
        "answer": completion.answer,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": counted,
    }


def _templates(name: str, task: str | None) -> Templates:
    """The templates that say which fields a file's rows have; known before the base is loaded."""
    from tailor.inference.load import find_or_none
    from tailor.techniques.soft_prompt import templates_of

    artifact = find_or_none(name, task)
    return templates_of(artifact.techniques) if artifact is not None else {}


def _asked(
    prompt: str | None, file: Path | None, settings: ReadSettings, templates: Templates
) -> list[tuple[tuple[Message, ...], Tools]]:
    """The turns to answer, with the tools offered."""
    from tailor.data.dataset import skipped_notes
    from tailor.data.prompts import question_of, read_prompts
    from tailor.data.records import tools_of
    from tailor.text.messages import user

    if (prompt is None) == (file is None):
        raise typer.BadParameter("give a prompt or --file, not both and not neither")
    if file is not None:
        reading = read_prompts(file, **settings.model_dump(), templates=templates)
        for note in skipped_notes(reading):
            say(f"note: {note}")
        return [(question_of(record), tools_of(record)) for record in reading.records]
    assert prompt is not None
    return [((user(sys.stdin.read() if prompt == "-" else prompt),), ())]
