"""`tailor`: finds the sub-command's module, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tailor import __version__
from tailor.errors import ResourceError, TailorError, nearest

COMMANDS = {
    "demo": "Compare every technique on sample support tickets, with the embedded base, in minutes.",
    "init": "Write a recipe with every setting, its default and a comment.",
    "data": "Look at data files, and make them of recorded chats.",
    "plan": "Memory, time and disk of a tuning run, and whether it fits. Nothing of the base's weights is loaded.",
    "tune": "Tune a base on your rows and save the result under a name.",
    "resume": "Go on with an interrupted or killed run or comparison, to the result it would have had.",
    "compare": "Train and measure every technique on the same rows, and report which is best, and at what cost.",
    "sweep": (
        "Search settings and techniques on your rows: trials of one base side by side, the hopeless given up early."
    ),
    "prompt": "Search, show and compare prompts.",
    "recommend": "Say which technique to try first for these rows, why, and the command that tries it.",
    "eval": "Generate and score every row; metrics follow from the kind of task, each with a bootstrap interval.",
    "hosted": "Tune hosted models: upload rows, follow the job, name the result.",
    "import-openai": (
        "Bring the dataset of an OpenAI fine-tune home: its files, checked, and a recipe that tunes a base here."
    ),
    "generate": "Answer a prompt, or every row of a file (all in one batch).",
    "chat": "Talk to an artifact or a base. `/new` forgets the conversation, `/quit` (or end of input) leaves.",
    "serve": "Serve bases and their customizations over the OpenAI protocol, all of them in one batch.",
    "keys": "Create, list and revoke the server's API keys.",
    "verify": (
        "Compare token logprobs between trainer, cached generation, reloaded artifact, merged weights and PEFT export."
    ),
    "artifacts": "List, show, merge, export and remove artifacts.",
    "doctor": "Check Python, torch, packages, folders and the embedded base. Exit code 1 when something fails.",
}
"""Sub-commands in the order of help, with the first paragraph of theirs, so that listing them imports none.

`name` is the module `tailor.cli.<name>` with a Typer `app`.
"""

MODULES = {"eval": "evaluate", "import-openai": "import_openai"}


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

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of sub-commands from the table alone."""
        listed: dict[str, Any] = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}
        TyperGroup(name=self.name, commands=listed, params=self.params, help=self.help).format_help(ctx, formatter)


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
    # torch and transformers bring 400,000 objects that stay: collecting after every 700 new ones costs an eighth of the
    # start, and taking all of them apart at the end a second
    gc.set_threshold(50_000)
    try:
        sys.exit(run(sys.argv[1:]))
    finally:
        gc.freeze()


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
    except OSError as error:
        from tailor.store import NO_ROOM

        if error.errno not in NO_ROOM:
            raise
        told = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        _report(told, "make room; what was interrupted goes on from what it had saved", "storage_full", arguments)
        return ResourceError.exit_code


def _usage_hint(error: Any) -> str | None:
    return f"{error.ctx.command_path} --help" if error.ctx is not None else None


def _report(message: str, hint: str | None, code: str, arguments: list[str]) -> None:
    if "--json" in arguments:
        print(json.dumps({"error": {"code": code, "message": message, "hint": hint}}), file=sys.stderr)
        return
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
