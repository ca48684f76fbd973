"""Check a data file before anything is trained on it: everything that can be known from the rows and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from tailor.data.containers import open_container
from tailor.data.detect import Detection
from tailor.data.readers import detect_format, stream_records
from tailor.data.rows import BadRow, BadRowsError, where
from tailor.errors import ConfigError, nearest
from tailor.recipes.base_facts import BaseFacts, base_facts
from tailor.recipes.check_findings import (
    TRAINABLE,
    Finding,
    Labels,
    Lengths,
    Suitability,
    bin_edges,
    findings,
    kinds_differ,
    label_set,
    leakage,
    lengths,
    suitability,
)
from tailor.recipes.check_rows import RenderedRow, Tally
from tailor.techniques import TECHNIQUES

Listen = Callable[[int], None]

REPORTED_EVERY = 20_000


@dataclass(frozen=True)
class FileRows:
    """What reading one file came to. `detection` is None when no row could be read; `unit` is line or row."""

    path: Path
    unit: str
    detection: Detection | None
    num_rows: int
    bad_rows: tuple[BadRow, ...]
    tally: Tally

    def place(self, line: int) -> str:
        """`file:line` of a row."""
        return where(self.path, line, self.unit)


@dataclass(frozen=True)
class CheckReport:
    """All that was found. `lengths` has prompt, completion and total where they apply, in tokens of the base."""

    train: FileRows
    validation: FileRows | None
    base: str
    max_seq_len: int
    end_of_turn: str
    findings: tuple[Finding, ...]
    lengths: Mapping[str, Lengths]
    labels: Labels | None
    techniques: tuple[Suitability, ...]
    first_row: RenderedRow | None
    end_of_turn_in_loss: bool | None

    @property
    def num_errors(self) -> int:
        """Findings for which tune would refuse the file."""
        return sum(finding.severity == "error" for finding in self.findings)

    def places(self, finding: Finding) -> list[str]:
        """`file:line` of every row that a finding is about."""
        file = self.validation if self.validation and finding.path == str(self.validation.path) else self.train
        return [file.place(line) for line in finding.lines]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        row = self.first_row
        return {
            "file": _file_dict(self.train),
            "validation": _file_dict(self.validation) if self.validation else None,
            "base": {"name": self.base, "max_seq_len": self.max_seq_len, "end_of_turn": self.end_of_turn},
            "num_errors": self.num_errors,
            "findings": [{**asdict(finding), "places": self.places(finding)} for finding in self.findings],
            "lengths": {side: asdict(spread) for side, spread in self.lengths.items()},
            "labels": asdict(self.labels) if self.labels else None,
            "techniques": [asdict(technique) for technique in self.techniques],
            "first_row": None
            if row is None
            else {
                "place": self.train.place(row.line),
                "end_of_turn_in_loss": self.end_of_turn_in_loss,
                "tokens": [
                    {"id": token_id, "text": text, "in_loss": bool(counted)}
                    for token_id, text, counted in zip(row.token_ids, row.texts, row.loss_mask, strict=True)
                ],
            },
        }


def check(  # noqa: PLR0913 - each is a flag of `tailor data check`
    path: str | PathLike[str],
    *,
    base: str = "tailor-nano",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    validation: str | PathLike[str] | None = None,
    technique: str | None = None,
    max_seq_len: int | None = None,
    skip_bad_rows: bool = False,
    listen: Listen | None = None,
) -> CheckReport:
    """Check the rows of a file as `base` would see them. Memory is bounded: 52 bytes per row, no texts.

    Bad rows are an error finding, with `skip_bad_rows` a warning, and always listed in `train.bad_rows`. `listen` is
    told the number of rows read now and then. Raises NotFoundError for a file or base that is not there, DataError
    for a file in which no format is found, ConfigError for unknown names and for a base that cannot be tuned.
    """
    if technique is not None and technique not in TECHNIQUES:
        raise ConfigError(f"there is no technique {technique!r}; {nearest(technique, TECHNIQUES)}")
    open_container(Path(path))  # a wrong file is said before the base takes its time
    facts = base_facts(base)
    limit = max_seq_len or facts.max_seq_len
    if limit > facts.max_seq_len:
        raise ConfigError(f"max_seq_len {limit} is beyond the base's context of {facts.max_seq_len}")
    train = _read(path, facts, format, columns, listen)
    other = None if validation is None else _read(validation, facts, format, columns, listen)
    tally = train.tally
    found = _bad_rows(train, skip_bad_rows)
    found += [replace(finding, path=str(train.path)) for finding in findings(tally, limit, technique)]
    if other is not None:
        found += _bad_rows(other, skip_bad_rows)
        found += kinds_differ(tally.kinds, other.tally.kinds, str(other.path))
        found += leakage(tally, other.tally, str(other.path))
    rank = {"error": 0, "warning": 1, "info": 2}
    row = tally.first
    trainable = any(tally.kinds[kind] for kind in TRAINABLE)
    return CheckReport(
        train=train,
        validation=other,
        base=facts.name,
        max_seq_len=limit,
        end_of_turn=facts.end_of_turn,
        findings=tuple(sorted(found, key=lambda finding: rank[finding.severity])),
        lengths=_all_lengths(tally),
        labels=label_set(tally),
        techniques=tuple(suitability(tally.num_rows, technique)) if trainable else (),
        first_row=row,
        end_of_turn_in_loss=None if row is None else _stops_in_loss(row, facts.renderer.stop),
    )


def _read(
    path: str | PathLike[str],
    facts: BaseFacts,
    format: str,
    columns: Mapping[str, str] | None,
    listen: Listen | None,
) -> FileRows:
    """One file into a tally, bad rows aside. A file in which no row can be read has no detection."""
    unit = open_container(Path(path)).unit
    tally = Tally(facts.tokenizer, facts.renderer)
    try:
        detection = detect_format(path, format=format, columns=columns)
    except BadRowsError as error:
        return FileRows(Path(path), unit, None, len(error.bad_rows), error.bad_rows, tally)
    bad_rows: list[BadRow] = []
    for number, row in enumerate(stream_records(path, format=detection.format, columns=columns), start=1):
        if isinstance(row, BadRow):
            bad_rows.append(row)
        else:
            tally.add(row)
        if listen is not None and number % REPORTED_EVERY == 0:
            listen(number)
    return FileRows(Path(path), unit, detection, tally.num_rows + len(bad_rows), tuple(bad_rows), tally)


def _bad_rows(file: FileRows, skip: bool) -> list[Finding]:
    if not file.bad_rows:
        return []
    usable = file.tally.num_rows
    kind = file.detection.format if file.detection else "a row"
    count = f"{len(file.bad_rows):,} of {file.num_rows:,} rows"
    lines = tuple(bad.line for bad in file.bad_rows)
    message = f"{count} cannot be read as {kind}"
    if skip and usable:
        return [Finding("warning", "bad_rows", f"{message} and are skipped", None, lines, str(file.path))]
    hint = "correct them, or leave them out: --skip-bad-rows"
    if not usable:
        hint = "no row is usable; is this the right file and format?"
    return [Finding("error", "bad_rows", message, hint, lines, str(file.path))]


def _all_lengths(tally: Tally) -> dict[str, Lengths]:
    sides = {"prompt": tally.prompt_tokens, "completion": tally.completion_tokens, "total": tally.total_tokens}
    edges = bin_edges(max((max(values, default=1) for values in sides.values()), default=1))
    spreads = {side: lengths(values, edges) for side, values in sides.items()}
    return {side: spread for side, spread in spreads.items() if spread is not None}


def _stops_in_loss(row: RenderedRow, stop: tuple[int, ...]) -> bool:
    """Is the token at which generation stops trained? Without it a tuned model never ends its answer."""
    return any(counted and token_id in stop for token_id, counted in zip(row.token_ids, row.loss_mask, strict=True))


def _file_dict(file: FileRows) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "format": file.detection.format if file.detection else None,
        "confidence": file.detection.confidence if file.detection else None,
        "evidence": list(file.detection.evidence) if file.detection else [],
        "num_rows": file.num_rows,
        "num_usable": file.tally.num_rows,
        "kinds": dict(file.tally.kinds),
        "bad_rows": [{"place": file.place(bad.line), "line": bad.line, "reason": bad.reason} for bad in file.bad_rows],
    }
