"""`tailor data`: what is wrong with a data file, and how the base will see its rows; `from-traffic` makes one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor.cli.data_traffic import from_traffic
from tailor.cli.output import AsJson, Columns, emit, pairs, say

if TYPE_CHECKING:
    from rich.console import Console

    from tailor.recipes.check import CheckReport
    from tailor.recipes.check_findings import Finding

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Look at data files, and make them of recorded chats."
)

SHOWN_PLACES = 6
SHOWN_LABELS = 12
SHOWN_TOKENS = 400
COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@app.callback()
def data() -> None:
    """Look at data files, and make them of recorded chats."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A data file: JSONL, JSON, CSV, TSV, Parquet, .gz, .zst.")],
    base: Annotated[str, typer.Option("--base", "-b", help="tailor-nano, a folder, or a hub id.")] = "tailor-nano",
    format: Annotated[str, typer.Option("--format", help="auto, or one of the formats of docs/formats.md.")] = "auto",
    columns: Columns = None,
    validation: Annotated[Path | None, typer.Option("--validation", help="A validation file, for leakage.")] = None,
    technique: Annotated[str | None, typer.Option("--technique", "-t", help="Are there enough rows for it?")] = None,
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", min=8, help="Else the base's context.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Bad rows are no error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a data file: format, bad rows, lengths, duplicates, leakage, labels, and the first row as trained.

    Exit code 4 when rows would be refused.
    """
    from tailor.errors import DataError
    from tailor.recipes.check import check as run_check

    report = run_check(
        file,
        base=base,
        format=format,
        columns=pairs(columns, "--columns"),
        validation=validation,
        technique=technique,
        max_seq_len=max_seq_len,
        skip_bad_rows=skip_bad_rows,
        listen=lambda number: say(f"{number:,} rows read"),
    )
    emit(report.to_dict() if as_json else {}, as_json, lambda console: _show(report, console))
    if report.num_errors:
        first = next(finding for finding in report.findings if finding.severity == "error")
        raise DataError(f"{first.path or file}: {visible(first.message)}", hint=first.hint)


app.command("from-traffic")(from_traffic)


def visible(text: str) -> str:
    """Text from a data file on one line, with what a terminal would obey written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _show(report: CheckReport, console: Console) -> None:
    _head(report, console)
    _bad_rows(report, console)
    _findings(report, console)
    _lengths(report, console)
    _labels(report, console)
    _techniques(report, console)
    _first_row(report, console)
    counts = {kind: sum(f.severity == kind for f in report.findings) for kind in COLOURS}
    _line(console, ", ".join(f"{number} {kind}" for kind, number in counts.items()))


def _line(console: Console, text: str, style: str = "") -> None:
    """One line as it is, so that places can be copied: no wrapping, no markup, no emoji (rich reads `:100:` as one)."""
    from rich.text import Text

    console.print(Text(visible(text)), style=style or None, soft_wrap=True)


def _head(report: CheckReport, console: Console) -> None:
    for file in filter(None, (report.train, report.validation)):
        found = file.detection
        what = f"{found.format} ({found.confidence:.0%} of the rows looked at)" if found else "no format"
        _line(console, f"{file.path}: {what}, {file.num_rows:,} rows, {file.tally.num_rows:,} usable", "bold")
        for sentence in found.evidence if found else ():
            _line(console, f"  {sentence}")


def _bad_rows(report: CheckReport, console: Console) -> None:
    for file in filter(None, (report.train, report.validation)):
        if file.bad_rows:
            _line(console, "")
            _line(console, f"bad rows of {file.path}", "bold")
        for bad in file.bad_rows:
            _line(console, f"  {file.place(bad.line)}: {bad.reason}")


def _findings(report: CheckReport, console: Console) -> None:
    if report.findings:
        _line(console, "")
    for finding in report.findings:
        _line(console, f"{finding.severity}: {finding.message}", COLOURS[finding.severity])
        if finding.lines and finding.code != "bad_rows":
            _line(console, f"  at {_places(report, finding)}")
        if finding.hint:
            _line(console, f"  hint: {finding.hint}")


def _places(report: CheckReport, finding: Finding) -> str:
    places = report.places(finding)
    more = f", and {len(places) - SHOWN_PLACES:,} more" if len(places) > SHOWN_PLACES else ""
    return ", ".join(places[:SHOWN_PLACES]) + more


def _lengths(report: CheckReport, console: Console) -> None:
    from rich.table import Table

    if not report.lengths:
        return
    sides = list(report.lengths)
    _line(console, "")
    _line(console, f"tokens per row, by {report.base} (at most {report.max_seq_len} fit)", "bold")
    table = Table()
    table.add_column("tokens", justify="right")
    for side in sides:
        table.add_column(side)
    most = max(count for spread in report.lengths.values() for _, count in spread.bins)
    low = 0
    for at, (high, _) in enumerate(report.lengths[sides[0]].bins):
        counts = [report.lengths[side].bins[at][1] for side in sides]
        span = f"{low + 1}-{high}" if high > low + 1 else str(high)
        if any(counts):
            table.add_row(span, *(_bar(count, most) for count in counts))
        low = high
    table.add_section()
    for name in ("min", "median", "p90", "max"):
        table.add_row(name, *(f"{getattr(report.lengths[side], name):g}" for side in sides))
    console.print(table)


def _bar(count: int, most: int) -> str:
    return f"{'█' * (-(-12 * count // most))} {count:,}" if count else ""


def _labels(report: CheckReport, console: Console) -> None:
    if report.labels is None:
        return
    counts = list(report.labels.counts.items())
    _line(console, "")
    _line(console, f"labels ({len(counts)})", "bold")
    shown = counts if len(counts) <= SHOWN_LABELS else [*counts[: SHOWN_LABELS // 2], *counts[-(SHOWN_LABELS // 2) :]]
    for at, (label, count) in enumerate(shown):
        if len(shown) < len(counts) and at == SHOWN_LABELS // 2:
            _line(console, f"  … {len(counts) - len(shown)} more …")
        _line(console, f"  {count:>6,}  {label}")


def _techniques(report: CheckReport, console: Console) -> None:
    if not report.techniques:
        return
    _line(console, "")
    _line(console, f"{report.train.tally.num_rows:,} rows for each technique", "bold")
    for one in report.techniques:
        _line(
            console,
            f"  {one.technique:<14} {one.verdict:<8} it takes {one.scale}: from {one.minimum}, "
            f"comfortable from {one.comfortable}",
        )


def _first_row(report: CheckReport, console: Console) -> None:
    """Every token of the first row; those in the loss in green on a terminal, in square brackets elsewhere."""
    from rich.text import Text

    row = report.first_row
    if row is None:
        return
    how = "green tokens are in the loss" if console.is_terminal else "tokens in [brackets] are in the loss"
    _line(console, "")
    _line(console, f"first row as trained, {report.train.place(row.line)} ({how})", "bold")
    drawn = Text()
    hidden = range(SHOWN_TOKENS // 4, len(row.texts) - 3 * SHOWN_TOKENS // 4)
    for at, (text, counted) in enumerate(zip(row.texts, row.loss_mask, strict=True)):
        if at in hidden:
            if at == hidden.start:
                drawn.append(f" … {len(hidden)} tokens … ")
        elif console.is_terminal:
            drawn.append(visible(text), style="bold green" if counted else "dim")
            drawn.append("·" if at + 1 < len(row.texts) else "", style="dim")
        else:
            drawn.append(f"[{visible(text)}]" if counted else visible(text))
    console.print(drawn, soft_wrap=True)
    ends = "inside" if report.end_of_turn_in_loss else "NOT inside"
    counted = sum(row.loss_mask)
    _line(
        console,
        f"{counted} of {len(row.texts)} tokens are in the loss; "
        f"the end-of-turn token {report.end_of_turn} is {ends} the loss",
    )
