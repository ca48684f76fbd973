"""`tailor artifacts`: list, show, merge, export, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tailor.cli.output import AsJson, emit

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, show, merge, export and remove artifacts.")

Name = Annotated[str, typer.Argument(help="The artifact's name.")]


@app.command("list")
def list_artifacts(as_json: AsJson = False) -> None:
    """All artifacts of TAILOR_HOME."""
    from rich.console import Console
    from rich.table import Table

    from tailor.artifacts.artifact import every
    from tailor.runs import home

    found = every()

    def render(console: Console) -> None:
        if not found:
            console.print(f"no artifacts in {home() / 'artifacts'}; make one with `tailor tune`")
            return
        table = Table("name", "technique", "base", "parameters", "validation loss", "parity", "created")
        for artifact in found:
            facts = artifact.manifest
            loss = facts.get("metrics", {}).get("validation_loss")
            parity = facts.get("parity")
            table.add_row(
                artifact.name,
                artifact.kind,
                facts["base"]["name"],
                f"{facts['num_parameters']:,}",
                "" if loss is None else f"{loss:.4f}",
                "" if parity is None else ("passed" if parity["passed"] else "FAILED"),
                facts["created"],
            )
        console.print(table)

    emit({"artifacts": [dict(a.manifest) for a in found]}, as_json, render)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Everything `tailor.json` knows: technique, recipe, base, data, metrics, parity, versions."""
    from rich.console import Console

    from tailor.artifacts.artifact import find
    from tailor.config import dump_yaml

    artifact = find(name)

    def render(console: Console) -> None:
        console.print(f"# {artifact.folder}")
        console.print(dump_yaml(dict(artifact.manifest)))

    emit({"folder": str(artifact.folder), **artifact.manifest}, as_json, render)


@app.command()
def merge(
    name: Name,
    to: Annotated[str | None, typer.Option("--to", help="The new artifact's name; NAME-merged when not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fold the artifact into its base's weights: a model of its own, checked against the unmerged one."""
    from tailor.recipes.export import merge as run_merge

    artifact, parity = run_merge(name, to or f"{name}-merged", force=force)
    _saved(
        {"artifact": artifact.name, "folder": str(artifact.folder), "parity": parity.to_dict()},
        artifact.folder,
        as_json,
    )


@app.command()
def export(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Where to write; must not exist.")],
    format: Annotated[
        Literal["hf", "peft"], typer.Option("--format", help="hf: a merged model folder; peft: the adapter's files.")
    ] = "peft",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the artifact in a format other tools read. An export that answers differently is refused."""
    from tailor.recipes.export import export as run_export

    parity = run_export(name, folder, format, force=force)
    _saved({"folder": str(folder), "format": format, "parity": parity.to_dict()}, folder, as_json)


@app.command()
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an artifact."""
    import sys

    from tailor.artifacts.artifact import find, remove

    artifact = find(name)
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("nobody is there to ask; add --yes")
        typer.confirm(f"delete {artifact.folder}?", abort=True, err=True)
    remove(artifact)
    emit({"removed": artifact.name}, as_json, lambda console: console.print(f"removed {artifact.name}"))


def _saved(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    difference = max(hop["max_difference"] for hop in result["parity"]["hops"])
    emit(
        result,
        as_json,
        lambda console: console.print(f"saved in {folder}; largest logprob difference {difference:.1e}"),
    )
