"""`tailor artifacts`: list, show, merge, export, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tailor.cli.output import AsJson, BaseOf, CompareOn, Task, emit

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List, show, merge, export and remove artifacts.")

EXPORTED = ("config.json", "adapter_config.json", "tailor.json")
"""One of these is in every folder that an export writes."""

PARITY = {True: "passed", False: "FAILED", None: "not checked"}

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
            print(f"no artifacts in {home() / 'artifacts'}; make one with `tailor tune`")
            return
        table = Table("name", "technique", "base", "parameters", "validation loss", "parity", "created")
        for artifact in found:
            facts = artifact.manifest
            loss = facts.get("metrics", {}).get("validation_loss")
            parity = facts.get("parity")
            table.add_row(
                artifact.name,
                artifact.kind + (f" ({', '.join(artifact.tasks)})" if artifact.tasks else ""),
                facts["base"]["name"],
                f"{facts['num_parameters']:,}",
                "" if loss is None else f"{loss:.4f}",
                PARITY[parity["passed"]] if parity else "",
                facts["created"],
            )
        console.print(table)

    emit({"artifacts": [dict(a.manifest) for a in found]}, as_json, render)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Everything `tailor.json` knows: technique, recipe, base, data, metrics, parity, versions; those of each task."""
    from rich.console import Console

    from tailor.artifacts.artifact import find
    from tailor.config import dump_yaml

    artifact = find(name)

    def render(console: Console) -> None:
        print(f"# {artifact.folder}")
        print(dump_yaml(dict(artifact.manifest)), end="")

    emit({"folder": str(artifact.folder), **artifact.manifest}, as_json, render)


@app.command()
def merge(
    name: Name,
    to: Annotated[str | None, typer.Option("--to", help="The new artifact's name; NAME-merged when not given.")] = None,
    data: CompareOn = None,
    base: BaseOf = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fold the artifact into its base's weights: a model of its own, checked against the unmerged one."""
    from tailor.recipes.export import merge as run_merge

    artifact, parity = run_merge(name, to or f"{name}-merged", base=base, data=data, force=force)
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
    task: Task = None,
    data: CompareOn = None,
    base: BaseOf = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the artifact in a format other tools read. An export that answers differently is refused."""
    from tailor.recipes.export import export as run_export

    folder = folder.expanduser().resolve()
    if force:
        _check_replaceable(folder)
    parity = run_export(name, folder, format, task=task, base=base, data=data, force=force)
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
    emit({"removed": artifact.name}, as_json, lambda console: print(f"removed {artifact.name}"))


def _check_replaceable(folder: Path) -> None:
    """Raise ConflictError when --force would delete something else than a model or an adapter."""
    from tailor.errors import ConflictError

    if Path.cwd().is_relative_to(folder):
        raise ConflictError(
            f"{folder} is or holds the folder you are in", hint="name a folder of its own for the export"
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any((folder / name).is_file() for name in EXPORTED):
        raise ConflictError(
            f"{folder} is no model or adapter (it holds none of {', '.join(EXPORTED)}), so --force does not replace it",
            hint="name a new folder, or remove this one yourself",
        )


def _saved(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    difference = max(hop["max_difference"] for hop in result["parity"]["hops"])
    emit(
        result,
        as_json,
        lambda console: print(f"saved in {folder}; largest logprob difference {difference:.1e}"),
    )
