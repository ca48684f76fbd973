"""`tailor prompt`: search a better prompt, see what one shows the base, compare two."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, BaseOf, Columns, Device, Dtype, Quiet, SkipBadRows, emit, pairs, say
from tailor.data.progress import stages

if TYPE_CHECKING:
    from rich.console import Console

    from tailor.recipes.prompt_optimize import PromptResult
    from tailor.recipes.prompt_settings import PromptRecipe

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Search, show and compare prompts.")

YAML = (".yaml", ".yml")

Source = Annotated[str, typer.Argument(help="A data file, or a recipe (.yaml).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, e.g. max_shots=4 similarity=embedding data.max_held_out=100")
]
Base = Annotated[str | None, typer.Option("--base", "-b", help="tailor-nano, a folder, a hub id, or openai:MODEL@URL.")]
Name = Annotated[str | None, typer.Option("--name", "-n", help="The search's name, and its artifact's.")]
Start = Annotated[str | None, typer.Option("--start", help="A prompting artifact to improve on.")]
System = Annotated[str | None, typer.Option("--system", help="A system text to improve on.")]
Budget = Annotated[int | None, typer.Option("--budget", min=1, help="Model calls in all. (1500)")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds of new prompts. (3)")]
Shots = Annotated[int | None, typer.Option("--shots", min=0, help="Most shots of a prompt. (8)")]
Reasoning = Annotated[bool, typer.Option("--reasoning", help="Try chain of thought too.")]
NumVotes = Annotated[int | None, typer.Option("--votes", min=1, help="Answers sampled per prompt and voted on. (1)")]
Metric = Annotated[str | None, typer.Option("--metric", "-m", help="What to improve; by the kind of task when none.")]
Pattern = Annotated[
    str | None, typer.Option("--answer-pattern", help="Regular expression whose first group is the answer.")
]
Validation = Annotated[str | None, typer.Option("--validation", help="A file of held-out rows; else 30 % are.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of splits, draws and samples.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a search, and an artifact, of that name.")]


@app.command()
def optimize(
    source: Source,
    overrides: Overrides = None,
    base: Base = None,
    name: Name = None,
    start: Start = None,
    system: System = None,
    budget: Budget = None,
    rounds: Rounds = None,
    shots: Shots = None,
    reasoning: Reasoning = False,
    votes: NumVotes = None,
    metric: Metric = None,
    answer_pattern: Pattern = None,
    validation: Validation = None,
    columns: Columns = None,
    skip_bad_rows: SkipBadRows = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search instructions and shots on one part of your rows, and report on a part that was held out.

    The same command goes on where an interrupted one stopped; answers that were given are not asked for again. The
    best prompt becomes an artifact, with the recipe that makes it without a search.
    """
    from tailor.recipes.prompt_optimize import optimize_prompt

    if start is not None and system is not None:
        raise typer.BadParameter("give --start or --system: both say what to begin with")
    flags = {
        "base.name": base,
        "base.device": device if device != "auto" else None,
        "base.dtype": dtype if dtype != "auto" else None,
        "name": name,
        "start": _start(start, system),
        "budget": budget,
        "rounds": rounds,
        "max_shots": shots,
        "reasoning": reasoning or None,
        "votes": votes,
        "metric": metric,
        "answer_pattern": answer_pattern,
        "data.validation": validation,
        "data.skip_bad_rows": skip_bad_rows or None,
        "seed": seed,
        **{f"data.columns.{ours}": theirs for ours, theirs in pairs(columns, "--columns").items()},
    }
    recipe = _recipe(source, flags, overrides or [])
    with stages(quiet) as progress:
        tell = (lambda text: None) if quiet else say
        result = optimize_prompt(recipe, force=force, progress=progress, say=tell)
    show_search(result, as_json)


def _recipe(source: str, flags: Mapping[str, Any], overrides: Sequence[str]) -> PromptRecipe:
    """The recipe of that name, or one for a data file, with the flags that were given and then the overrides."""
    from tailor.config import load_recipe
    from tailor.recipes.prompt_settings import PromptRecipe

    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]
    defaults: dict[str, Any] = {}
    if not source.endswith(YAML):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name.split(".")[0]).strip("-._") or "data"
        defaults = {"name": f"{stem}-prompt", "data": {"train": source}}
    path = source if source.endswith(YAML) else None
    return load_recipe(path, PromptRecipe, [*given, *overrides], defaults).recipe


def _start(name: str | None, system: str | None) -> dict[str, Any] | None:
    """The prompt to begin with, as a recipe has it."""
    if system is not None:
        return {"system": system, "shots": 0}
    if name is None:
        return None
    from tailor.recipes.prompt_show import prompting_of

    return prompting_of(name)[1].model_dump(mode="json", exclude_defaults=True)


def show_search(result: PromptResult, as_json: bool) -> None:
    """Print what a search came to, and where its files are."""
    from tailor.recipes.prompt_report import sentence

    report = result.report

    def render(console: Console) -> None:
        from rich.table import Table

        console.print(sentence(report), style="bold", soft_wrap=True)
        table = Table("prompt", "what it is", report["metric"], "prompt tokens", "calls per answer")
        for name in ("start", "drawn", "best"):
            if (line := report["held_out"].get(name)) is not None:
                score = line["score"]
                told = f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                table.add_row(name, line["origin"], told, f"{line['prompt_tokens']:g}", str(line["calls_per_row"]))
        console.print(table)
        calls, rows = report["calls"], report["rows"]
        used = f"{calls['search']} to search, {calls['held_out']} for the report, of {calls['budget']}"
        console.print(f"calls: {used}; prompts tried: {report['selection']['num_prompts']}", soft_wrap=True)
        sides = f"{rows['pool']} for shots, {rows['selection']} to choose by, {rows['held_out']} held out"
        console.print(f"rows: {sides}", soft_wrap=True)

    for note in report["notes"]:
        say(f"note: {note}")
    emit({**report, "folder": str(result.folder)}, as_json, render)
    if not as_json:
        say(f"report: {result.folder / 'report.json'}")
        if result.artifact is not None:
            say(f"next: tailor prompt show {result.artifact}   or   tailor eval {result.artifact} FILE")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A prompting artifact.")],
    prompt: Annotated[str | None, typer.Argument(help="A question; {prompt} stands for it when not given.")] = None,
    base: BaseOf = None,
    as_json: AsJson = False,
) -> None:
    """What the base is shown for a question, turn by turn, with its tokens counted."""
    from tailor.recipes.prompt_show import shown

    found = shown(name, prompt, base)

    def render(console: Console) -> None:
        for turn in found.turns:
            size = "" if turn.num_tokens is None else f" ({turn.num_tokens} tokens)"
            console.print(f"[{turn.role}]{size}", style="bold")
            print(turn.content)
        if found.num_tokens is not None:
            print(f"\n{found.num_tokens} tokens, {found.template_tokens} of them around the turns' texts")
        if found.votes > 1:
            print(f"asked {found.votes} times; the majority's answer counts")

    emit({"name": name, **dataclasses.asdict(found)}, as_json, render)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A prompting artifact.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """How two prompts differ: settings, instructions, shots."""
    from tailor.recipes.prompt_show import difference

    found = difference(first, second)

    def render(console: Console) -> None:
        for key, (one, other) in found.settings.items():
            if key not in ("system", "template", "examples"):
                print(f"{key}: {one} → {other}")
        print("\n".join(found.lines) or "the texts are the same")

    emit({"first": first, "second": second, **dataclasses.asdict(found)}, as_json, render)
