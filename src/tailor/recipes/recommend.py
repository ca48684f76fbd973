"""Recommend: which technique to try first for these rows, why, and the command that tries it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from tailor.data.readers import Reading, read_records
from tailor.data.records import (
    Comparison,
    Conversation,
    Document,
    Judged,
    PromptCompletion,
    Rated,
    Record,
    Retrieval,
    completion_of,
    prompt_of,
)
from tailor.errors import ConfigError
from tailor.evaluation.task import answers_of, find_task
from tailor.inference.hosted_endpoint import hosted_endpoint
from tailor.machine import memory as system_memory
from tailor.models.files import absolute_name, is_hosted
from tailor.objectives import OBJECTIVES
from tailor.recipes.base_facts import BaseFacts, base_facts
from tailor.recipes.recommend_evidence import Ranking, measured, rank
from tailor.recipes.recommend_rule import Changes, Choice, Facts, Standing
from tailor.runs import home
from tailor.techniques import TECHNIQUES

MEASURED_ROWS = 1000
"""Rows whose length in tokens is taken, spread over the file; the longest by characters come on top."""

LONGEST = 5

UNKNOWN_CONTEXT = 1 << 30
"""In tokens: an endpoint does not say what its model takes."""

HOSTED_NOTE = (
    "the base is hosted: techniques that train need its weights and are left out (`tailor hosted tune` lets its "
    "provider tune it); tokens are counted with tailor-nano's tokenizer"
)

MIN_ROWS_PER_LABEL = 5
"""Rows per label below which a label is hardly learned."""


@dataclass(frozen=True)
class Recommendation:
    """What was found. `commands` are to be run next, in this order; `notes` are what else a person should know."""

    path: Path
    facts: Facts
    ranking: Ranking
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        choices = [
            {**asdict(choice), "standing": None if choice.standing is None else choice.standing.name.lower()}
            for choice in self.ranking.choices
        ]
        return {
            "file": str(self.path),
            "facts": asdict(self.facts),
            "decided_by": self.ranking.decided_by,
            "first_technique": self.ranking.first_technique,
            "choices": choices,
            "measured": list(self.ranking.measured),
            "commands": list(self.commands),
            "notes": list(self.notes),
        }


def recommend(  # noqa: PLR0913 - each is a flag of `tailor recommend`
    path: str | PathLike[str],
    *,
    base: str = "tailor-nano",
    changes: Changes = "never",
    customizations: int = 1,
    answer_pattern: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Recommendation:
    """Look at a data file, the base, this machine and earlier comparisons, and say what to try first.

    `changes` is how often the knowledge changes, `customizations` how many are to be served side by side. Raises
    NotFoundError, DataError, and ConfigError for a base that cannot be tuned.
    """
    if customizations < 1:
        raise ConfigError(f"customizations is {customizations}: it must be at least 1")
    reading = read_records(path, format=format, columns=columns, skip_bad_rows=skip_bad_rows)
    hosted = is_hosted(base)
    of_base = _hosted_facts(base) if hosted else base_facts(absolute_name(base))  # as comparisons name it
    memory, gpu = (None, False) if hosted else machine_memory()
    facts = look(
        reading, of_base, answer_pattern, memory=memory, gpu=gpu, changes=changes, customizations=customizations
    )
    found, unread = measured(home() / "comparisons", reading.content_hash)
    usable = {name: one.traits for name, one in TECHNIQUES.items() if one.has_defaults()}
    if hosted:
        usable = {"prompting": usable["prompting"]}
    ranking = rank(facts, usable, OBJECTIVES, found)
    flags = _flags(base, format, columns or {}, skip_bad_rows)
    commands = next_commands(Path(path), facts, ranking, flags, answer_pattern)
    if hosted and facts.rows:
        commands.append(shlex.join(["tailor", "hosted", "tune", str(path), "--base", base]))
    told = (*([HOSTED_NOTE] if hosted else []), *notes(facts, ranking, reading), *unread)
    return Recommendation(Path(path), facts, ranking, tuple(commands), told)


def _hosted_facts(base: str) -> BaseFacts:
    """What is known of a hosted base without asking it: nothing. Tokens are counted as tailor-nano's."""
    endpoint = hosted_endpoint(base)
    return replace(base_facts("tailor-nano"), name=endpoint.name, num_parameters=0, max_seq_len=UNKNOWN_CONTEXT)


def machine_memory() -> tuple[int | None, bool]:
    """(bytes, is it a GPU's) of where a base would be trained; None where the system does not say."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, True
    free_and_total = system_memory()
    return (None if free_and_total is None else free_and_total[1]), False


def look(
    reading: Reading,
    base: BaseFacts,
    answer_pattern: str | None = None,
    *,
    memory: int | None = None,
    gpu: bool = False,
    changes: Changes = "never",
    customizations: int = 1,
) -> Facts:
    """The facts of a file's rows. Raises DataError when `answer_pattern` does not match the completions."""
    records = reading.records
    rows = [record for record in records if isinstance(record, PromptCompletion | Conversation)]
    rated = [record for record in records if isinstance(record, Rated)]
    kind, labels = None, 0
    if rows:
        references = [completion_of(record) for record in rows]
        task = find_task(references, answers_of(rows, references, answer_pattern), (), answer_pattern)
        kind, labels = task.kind, len(task.labels) if task.kind.startswith("labels") else 0
    prompt, completion, longest = _lengths(rows, base)
    return Facts(
        rows=len(rows),
        kind=kind,
        labels=labels,
        comparisons=sum(isinstance(record, Comparison) for record in records),
        judged=sum(isinstance(record, Judged) for record in records),
        rated=len(rated),
        attributes=tuple(dict.fromkeys(name for record in rated for name in record.attributes)),
        documents=sum(isinstance(record, Document) for record in records),
        retrievals=sum(isinstance(record, Retrieval) for record in records),
        prompt_tokens=prompt,
        completion_tokens=completion,
        longest_row=longest,
        content_hash=reading.content_hash,
        base=base.name,
        base_parameters=base.num_parameters,
        context=base.max_seq_len,
        memory=memory,
        gpu=gpu,
        changes=changes,
        customizations=customizations,
    )


def _lengths(rows: Sequence[Record], base: BaseFacts) -> tuple[float, float, int]:
    """Median tokens of prompt and completion, and of the longest row, without the template around them."""
    if not rows:
        return 0.0, 0.0, 0
    texts = [("\n".join(turn.content for turn in prompt_of(row)), completion_of(row)) for row in rows]
    step = max(1, len(texts) // MEASURED_ROWS)
    encode = base.tokenizer.encode
    sides = [(len(encode(prompt)), len(encode(completion))) for prompt, completion in texts[::step]]
    long = sorted(texts, key=lambda text: -len(text[0]) - len(text[1]))[:LONGEST]
    longest = max(len(encode(prompt)) + len(encode(completion)) for prompt, completion in long)
    return median(p for p, _ in sides), median(c for _, c in sides), max(longest, *(p + c for p, c in sides))


def _flags(base: str, format: str, columns: Mapping[str, str], skip_bad_rows: bool) -> list[str]:
    flags = [] if base == "tailor-nano" else ["--base", base]
    flags += [part for ours, theirs in columns.items() for part in ("--columns", f"{ours}={theirs}")]
    flags += [] if format == "auto" else [f"data.format={format}"]
    return flags + (["data.skip_bad_rows=true"] if skip_bad_rows else [])


def next_commands(
    path: Path, facts: Facts, ranking: Ranking, flags: Sequence[str], answer_pattern: str | None
) -> list[str]:
    """What to type next: compare the best few unless these rows were compared, and tune with the first.

    For rows without completions, tune with the first objective that this tailor has.
    """
    usable = [c for c in ranking.choices if c.standing is not None and c.standing != Standing.EXCLUDED]
    commands = []
    if usable and ranking.decided_by != "same rows":
        several = ",".join(dict.fromkeys([*(choice.name for choice in usable[:3]), *_usual(usable)]))
        pattern = [] if answer_pattern is None else ["--answer-pattern", answer_pattern]
        commands.append(_line("compare", path, "--techniques", several, *pattern, *flags))
    if usable:
        commands.append(_line("tune", path, "--technique", usable[0].name, *flags))
    elif not facts.rows:
        objectives = [choice.objective for choice in ranking.choices if choice.available and choice.objective]
        commands += [_line("tune", path, f"objective={objective}", *flags) for objective in objectives[:1]]
    return commands


def _usual(choices: Sequence[Choice]) -> list[str]:
    """LoRA, which most people would take: what is better should show against it."""
    return [choice.name for choice in choices if choice.name == "lora"]


def _line(command: str, path: Path, *arguments: str) -> str:
    return shlex.join(["tailor", command, str(path), *arguments])


def notes(facts: Facts, ranking: Ranking, reading: Reading) -> list[str]:
    """What a person should know besides the ranking."""
    found = []
    standings = [choice.standing for choice in ranking.choices if choice.standing is not None]
    if standings and min(standings) >= Standing.TOO_FEW:
        found.append(
            "no technique has the rows, the base and the memory it takes: collect more rows, or choose another base; "
            "the order says what comes closest"
        )
    if facts.labels and facts.rows / facts.labels < MIN_ROWS_PER_LABEL:
        each = f"{facts.rows / facts.labels:.3g}"
        found.append(
            f"{facts.labels} labels with {each} rows each on average: more rows will help more than any technique"
        )
    if facts.labels:
        found.append(
            "for a label set, `tailor compare` also measures classifiers that need no language model; "
            "when one of them is as good, take it"
        )
    if facts.longest_row > facts.context:
        found.append(
            f"the longest row has {facts.longest_row:,} tokens, the context of {facts.base} {facts.context:,}: "
            "`data.truncation` says what happens to such rows"
        )
    if reading.bad_rows:
        found.append(f"rows that cannot be used were left out: {len(reading.bad_rows):,}")
    return found
