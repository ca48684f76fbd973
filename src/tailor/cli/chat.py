"""`tailor chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tailor.cli.output import BaseOf, Device, Dtype, Quantize, Task, say
from tailor.errors import ResourceError, TailorError

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
    from tailor.inference.load import load
    from tailor.text.messages import Message

    customized = load(name, base, task=task, device=device, dtype=dtype, quantize=quantize)
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
        try:
            text = customized.generate(turns, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        except TailorError as error:
            turns.pop()  # what cannot be answered is not part of the conversation
            _explain(error)
            continue
        seed += 1
        turns.append(Message("assistant", text))
        print(text, flush=True)


def _explain(error: TailorError) -> None:
    say(f"error: {error.message}")
    if isinstance(error, ResourceError):
        say("hint: the conversation is too long to go on; /new starts over")
    elif error.hint:
        say(f"hint: {error.hint}")
