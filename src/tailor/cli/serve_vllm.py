"""`tailor serve --engine vllm`: what vLLM can run goes into a folder, with the command lines and a check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tailor.cli.output import emit

if TYPE_CHECKING:
    from rich.console import Console


TAKEN = ("models", "base", "engine", "output", "force", "port", "device", "dtype", "as_json")
"""The options of `tailor serve` that mean something here; others are the engine's own."""

Engine = Annotated[
    Literal["tailor", "vllm"],
    typer.Option("--engine", help="vllm: write a folder that vLLM serves, with the command lines and a check."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="With --engine vllm: the folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="With --engine vllm: replace an earlier hand-over.")]


def handed_over(context: typer.Context) -> bool:
    """Hand over when `--engine vllm` was given; False when it was not, and tailor is to serve.

    Raises a usage error for options that are the other engine's.
    """
    options = context.params
    given = [n for n in options if getattr(context.get_parameter_source(n), "name", "DEFAULT") == "COMMANDLINE"]
    if options["engine"] != "vllm":
        if ours := [name for name in ("output", "force") if name in given]:
            raise typer.BadParameter(f"--{ours[0]} is for --engine vllm")
        return False
    if others := [name for name in given if name not in TAKEN]:
        raise typer.BadParameter(
            f"--{others[0].replace('_', '-')} is for tailor's own engine; options of vLLM go after ./serve.sh NAME"
        )
    bases = options["base"] or []
    if options["output"] is None:
        raise typer.BadParameter("--engine vllm writes a folder: name it with --output")
    if len(bases) > 1:
        raise typer.BadParameter("--engine vllm takes one --base: where the artifacts' base is")
    _hand_over(options, bases[0] if bases else None)
    return True


def _hand_over(options: Mapping[str, Any], base: str | None) -> None:
    from tailor.recipes.hand_over import hand_over

    folder = options["output"].expanduser().resolve()
    if options["force"]:
        check_replaceable(folder)
    settings = {name: options[name] for name in ("port", "force", "device", "dtype")}
    done = hand_over(options["models"] or [], folder, base=base, **settings)

    def render(console: Console) -> None:
        lines = [f"written: {folder}"]
        for server in done.servers:
            lines += [f"  {folder / 'serve.sh'} {server.name}   ({server.url})"]
            lines += [f"    {route.name}: {route.told}" for route in server.routes]
        lines += [f"not handed over: {one.name}: {one.reason}" for one in done.refused]
        print("\n".join([*lines, f"when it runs: python {folder / 'check.py'} --wait 600"]))

    emit(done.to_dict(), options["as_json"], render)


def check_replaceable(folder: Path) -> None:
    """Raise ConflictError when --force would delete something else than an earlier hand-over."""
    from tailor.errors import ConflictError
    from tailor.recipes.hand_over import EXPECTED

    if Path.cwd().is_relative_to(folder):
        raise ConflictError(f"{folder} is or holds the folder you are in", hint="name a folder of its own")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / EXPECTED).is_file():
        raise ConflictError(
            f"{folder} is no hand-over (it holds no {EXPECTED}), so --force does not replace it",
            hint="name a new folder, or remove this one yourself",
        )
