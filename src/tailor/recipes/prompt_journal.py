"""Model calls that are counted, and kept: a search that is started again is given the answers it was given before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailor.errors import DataError, ResourceError
from tailor.evaluation.likelihood import completion_logprobs
from tailor.evaluation.passes import finite
from tailor.inference.backend import Backend, Completion, Request
from tailor.store import text_hash, write_text

ANSWERED_AT_ONCE = 64
"""Requests between two writes: a kill loses at most these."""

KEPT = ("text", "logprobs", "finish_reason", "num_prompt_tokens", "answer")


class Journal:
    """Asks a backend, at most `budget` times less `reserved`, and keeps every answer in a file of JSON lines.

    The same request is asked once. What is in the file already is not asked again but counts, so that a search which
    decides by the answers alone takes the same way a second time.
    """

    def __init__(self, path: Path, backend: Backend, budget: int) -> None:
        self.path = path
        self.backend = backend
        self.budget = budget
        self.reserved = 0
        self._known, self._chosen = _read(path)
        self._counted: set[str] = set()

    @property
    def num_calls(self) -> int:
        """Different requests so far."""
        return len(self._counted)

    @property
    def left(self) -> int:
        """Calls that the budget still has, those kept for later left out."""
        return self.budget - self.reserved - self.num_calls

    def cost(self, requests: Sequence[Request]) -> int:
        """Calls that these requests would add."""
        return len({_key(request) for request in requests} - self._counted)

    def _check(self, cost: int) -> None:
        if cost > self.left:
            raise ResourceError(f"{cost} calls are wanted, and {self.left} of the budget of {self.budget} are left")

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion per request, in order. Raises ResourceError when the budget does not hold them all."""
        keys = [_key(request) for request in requests]
        self._check(self.cost(requests))
        asked = dict(zip(keys, requests, strict=True))
        missing = [key for key in asked if key not in self._known]
        for start in range(0, len(missing), ANSWERED_AT_ONCE):
            some = missing[start : start + ANSWERED_AT_ONCE]
            completions = self.backend.generate([asked[key] for key in some])
            self._keep(dict(zip(some, completions, strict=True)))
            if progress is not None:
                progress(len(requests) - len(missing) + start + len(some))
        self._counted.update(keys)
        return [self._known[key] for key in keys]

    def choose(
        self,
        requests: Sequence[Request],
        completions: Sequence[str],
        *,
        ends: bool,
        progress: Callable[[int], None] | None = None,
    ) -> list[int]:
        """For each request the place of the likeliest of `completions` (see `completion_logprobs`); one call each."""
        told = json.dumps([list(completions), ends])
        keys = [text_hash(_key(request) + told)[:32] for request in requests]
        self._check(len({*keys} - self._counted))
        asked = dict(zip(keys, requests, strict=True))
        missing = [key for key in asked if key not in self._chosen]
        for start in range(0, len(missing), ANSWERED_AT_ONCE):
            some = missing[start : start + ANSWERED_AT_ONCE]
            prompts = [asked[key].messages for key in some]
            scores = completion_logprobs(self.backend, None, prompts, completions, ends=ends)
            found = dict(zip(some, finite(scores, None).argmax(dim=1).tolist(), strict=True))
            self._chosen |= found
            self._write([{"key": key, "chosen": place} for key, place in found.items()])
            if progress is not None:
                progress(len(requests) - len(missing) + start + len(some))
        self._counted.update(keys)
        return [self._chosen[key] for key in keys]

    def _keep(self, found: dict[str, Completion]) -> None:
        self._known |= found
        self._write([{"key": key, **{name: getattr(c, name) for name in KEPT}} for key, c in found.items()])

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))


def _key(request: Request) -> str:
    """What tells one request from another."""
    asked: dict[str, Any] = {
        "messages": [dataclasses.asdict(message) for message in request.messages],
        "artifact": request.artifact,
        "tools": [dict(tool) for tool in request.tools],
        "sampling": request.sampling.model_dump(mode="json"),
    }
    return text_hash(json.dumps(asked, sort_keys=True, default=str))[:32]


def _read(path: Path) -> tuple[dict[str, Completion], dict[str, int]]:
    """The answers and choices of a journal; a last line torn by a kill is cut off. Raises DataError for any other."""
    found: dict[str, Completion] = {}
    chosen: dict[str, int] = {}
    if not path.is_file():
        return found, chosen
    text = path.read_text("utf-8", errors="replace")
    *lines, torn = text.split("\n")
    if torn:
        write_text(path, "".join(f"{line}\n" for line in lines))
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "chosen" in row:
                chosen[row["key"]] = int(row["chosen"])
                continue
            found[row["key"]] = Completion(
                token_ids=(),
                **{name: row[name] for name in KEPT if name != "logprobs"},
                logprobs=tuple(row["logprobs"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a line of a journal ({type(error).__name__})", hint="start anew with --force"
            ) from None
    return found, chosen
