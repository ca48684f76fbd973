"""`tailor import-openai`: the rows of a fine-tuning job, brought home."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailor.cli.output import AsJson, emit, say

app = typer.Typer(add_completion=False)


@app.command("import-openai")
def import_openai(
    job: Annotated[str, typer.Argument(help="The job's id: ftjob-…")],
    folder: Annotated[Path | None, typer.Option("--to", help="A new folder; the job's id when not given.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="The endpoint; OPENAI_BASE_URL or OpenAI when none.")] = None,
    base: Annotated[str, typer.Option("--base", "-b", help="The recipe's base.")] = "tailor-nano",
    technique: Annotated[str, typer.Option("--technique", "-t", help="The recipe's technique.")] = "lora",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if an import made it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the dataset of an OpenAI fine-tune home: its files, checked, and a recipe that tunes a base here."""
    from tailor.errors import ConflictError
    from tailor.recipes.import_openai import import_openai as run_import

    target = (folder or Path("".join(c if c.isalnum() or c in "._-" else "-" for c in job))).expanduser().absolute()
    if force and target.exists() and not (target / "import.json").is_file():
        raise ConflictError(
            f"{target} was not made by an import: --force does not replace it", hint="name a new folder"
        )
    place = "openai:any" if url is None else f"openai:any@{url}"
    found = run_import(job, target, place=place, base=base, technique=technique, force=force)
    for note in found.notes:
        say(f"note: {note}")
    rows = ", ".join(f"{count:,} {side} rows" for side, count in found.sides.items())
    emit(found.to_dict(), as_json, lambda console: print(f"{found.folder}: {rows} as {found.format}"))
    if not as_json and found.recipe is not None:
        say(f"next: tailor tune {found.recipe}")
