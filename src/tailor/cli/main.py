"""`tailor`: finds the sub-command's module, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tailor import __version__
from tailor.errors import TailorError, nearest

COMMANDS = (
    "demo",
    "init",
    "data",
    "plan",
    "tune",
    "resume",
    "compare",
    "recommend",
    "eval",
    "generate",
    "chat",
    "verify",
    "artifacts",
    "doctor",
)
"""Sub-commands in the order of help. `name` is the module `tailor.cli.<name>` with a Typer `app`."""

MODULES = {"eval": "evaluate"}


UsageError: Any = typer.BadParameter.__base__
"""What Typer raises for a wrong command line (its own copy of click has no public name)."""


class LazyGroup(TyperGroup):
    """Imports a sub-command's module when it is asked for; heavy packages are imported inside the commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All sub-commands, in the order of help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command from its module. Raises a usage error with a suggestion for an unknown one."""
        if cmd_name not in COMMANDS:
            raise UsageError(f"there is no command {cmd_name!r}; {nearest(cmd_name, COMMANDS)}", ctx)
        module = importlib.import_module(f"tailor.cli.{MODULES.get(cmd_name, cmd_name)}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tailor {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Customise a language model by every technique there is, and know which one is best because it was measured."""


def main() -> None:
    """The entry point. Results go to stdout, everything else to stderr; see docs/cli.md for the exit codes."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(arguments, prog_name="tailor", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        _report(error.format_message(), _usage_hint(error), "usage", arguments)
        return 2
    except TailorError as error:
        _report(error.message, error.hint, error.code, arguments)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted", None, "interrupted", arguments)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _usage_hint(error: Any) -> str | None:
    return f"{error.ctx.command_path} --help" if error.ctx is not None else None


def _report(message: str, hint: str | None, code: str, arguments: list[str]) -> None:
    if "--json" in arguments:
        print(json.dumps({"error": {"code": code, "message": message, "hint": hint}}), file=sys.stderr)
        return
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
