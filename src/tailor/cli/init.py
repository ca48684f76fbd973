"""`tailor init`: a commented recipe to start from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from tailor.cli.output import AsJson, emit, say

app = typer.Typer(add_completion=False)

HEAD = """A tuning recipe: every setting with its default, and what it does.
Run it:      tailor tune {path}
Change one:  tailor tune {path} train.num_epochs=3
null means: not given; the description says what happens then."""


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    data: Annotated[str | None, typer.Option("--data", help="The training file.")] = None,
    technique: Annotated[str, typer.Option("--technique", "-t", help="The technique to start with.")] = "lora",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe with every setting, its default and a comment."""
    from rich.text import Text

    from tailor.errors import ConfigError, ConflictError, nearest
    from tailor.recipes.recipe_template import recipe_template
    from tailor.recipes.tune_settings import TuneRecipe
    from tailor.store import write_text
    from tailor.techniques import TECHNIQUES

    if technique not in TECHNIQUES:
        raise ConfigError(f"there is no technique {technique!r}; {nearest(technique, TECHNIQUES)}")
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file} does not end in .yaml, so tune would take it for data", hint=f"{file.stem}.yaml")
    if file.is_dir():
        raise ConflictError(f"{file} is a folder", hint="name a file in it")
    if os.path.lexists(file) and not force:
        raise ConflictError(f"{file} exists already", hint="choose another name, or replace it with --force")
    train = data or "data.jsonl"
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(train).name.split(".")[0]).strip("-_") or "data"
    given = {"data": {"train": train}, "technique": technique, "output": {"name": f"{stem}-{technique}"}}
    write_text(file, recipe_template(TuneRecipe, given, HEAD.format(path=file)))
    if not Path(train).is_file():
        say(f"note: there is no file {train} yet; set data.train")
    emit({"recipe": str(file)}, as_json, lambda console: console.print(Text(f"wrote {file}"), soft_wrap=True))
    if not as_json:
        say(f"next: tailor data check {train}   and   tailor tune {file}")
