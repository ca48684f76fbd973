"""`tailor keys`: create, list and revoke the server's API keys."""

from __future__ import annotations

import datetime
from typing import Annotated

import typer

from tailor.cli.output import AsJson, emit, say

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Create, list and revoke the server's API keys.")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whom the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="inference, files, training or admin (all); may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A new key, printed once: only its hash is kept. Running servers take it at once."""
    from rich.console import Console

    from tailor.server.auth import KeyRing, describe, keys_path

    text, key = KeyRing(keys_path()).create(name, scope or ("inference",))

    def render(console: Console) -> None:
        print(text)
        say(f"{key.key_id} for {name}: {', '.join(key.scopes)}. It cannot be shown again.")

    emit({"key": text, **describe(key)}, as_json, render)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """All keys: ids, beginnings, scopes."""
    from rich.console import Console
    from rich.table import Table

    from tailor.server.auth import KeyRing, describe, keys_path

    found = KeyRing(keys_path()).keys()

    def render(console: Console) -> None:
        if not found:
            print("no API keys; make one with `tailor keys create NAME`")
            return
        table = Table("id", "name", "begins with", "scopes", "created")
        for key in found:
            made = datetime.datetime.fromtimestamp(key.created, datetime.UTC).isoformat(timespec="seconds")
            table.add_row(key.key_id, key.name, f"{key.start}…", ", ".join(key.scopes), made)
        console.print(table)

    emit({"keys": [describe(key) for key in found]}, as_json, render)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `tailor keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Take a key back. Running servers refuse it at once."""
    from tailor.server.auth import KeyRing, keys_path

    KeyRing(keys_path()).revoke(key_id)
    emit({"id": key_id, "revoked": True}, as_json, lambda console: print(f"{key_id} is revoked"))
