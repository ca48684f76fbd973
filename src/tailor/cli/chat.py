"""`tailor chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import BaseOf, Device, Dtype, Quantize, Task, say
from tailor.errors import ResourceError, TailorError

if TYPE_CHECKING:
    from tailor.inference.load import Customized, HostedCustomized
    from tailor.text.messages import Message

app = typer.Typer(add_completion=False)


@app.command()
def chat(
    name: Annotated[str, typer.Argument(help="An artifact or a base.")],
    system: Annotated[str | None, typer.Option("--system", help="A system text in front.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling; each answer takes the next one.")] = 0,
    task: Task = None,
    base: BaseOf = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Talk to an artifact or a base. `/new` forgets the conversation, `/quit` (or end of input) leaves."""
    from tailor.inference.load import HostedCustomized, load
    from tailor.text.messages import Message

    customized = load(name, base, task=task, device=device, dtype=dtype, quantize=quantize)
    hosted = isinstance(customized, HostedCustomized)
    opening = [Message("system", system)] if system else []
    turns = list(opening)
    say(f"{name}: /new starts over, /quit leaves")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/new":
            turns = list(opening)
            continue
        if not line.strip():
            continue
        turns.append(Message("user", line))
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        try:
            text = _answered(customized, turns, sampling)
        except TailorError as error:
            turns.pop()  # what cannot be answered is not part of the conversation
            _explain(error, hosted)
            continue
        seed += 1
        turns.append(Message("assistant", text))


def _answered(customized: Customized | HostedCustomized, turns: Sequence[Message], sampling: Mapping[str, Any]) -> str:
    """Print the answer, that of a hosted model as it comes, and return it."""
    from tailor.inference.load import HostedCustomized

    if not isinstance(customized, HostedCustomized):
        text = customized.generate(turns, **sampling)
        print(text, flush=True)
        return text
    pieces = []
    try:
        for piece in customized.stream(turns, **sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    finally:
        if pieces:
            print(flush=True)
    return "".join(pieces)


def _explain(error: TailorError, hosted: bool) -> None:
    say(f"error: {error.message}")
    if isinstance(error, ResourceError) and not hosted:
        say("hint: the conversation is too long to go on; /new starts over")
    elif error.hint:
        say(f"hint: {error.hint}")
