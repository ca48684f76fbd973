"""`tailor data from-traffic`: recorded chats and the feedback on them as a data file."""

from __future__ import annotations

import os
from datetime import UTC, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, emit, say

if TYPE_CHECKING:
    from tailor.feedback.dataset import Harvest

SHOWN_PLACES = 6


def from_traffic(
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL file to write.")],
    kind: Annotated[str, typer.Option("--kind", help="sft, preference or rated.")] = "sft",
    model: Annotated[str | None, typer.Option("--model", help="Only chats with this model or artifact.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="A date, or a time such as 2026-03-01T12:00; UTC unless it says.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Chats before this; a date counts with its day.")] = None,
    min_rating: Annotated[
        float | None, typer.Option("--min-rating", min=1, max=5, help="Answers rated so well at least, on average.")
    ] = None,
    only_voted: Annotated[
        bool, typer.Option("--only-voted/--all", help="Only answers that people liked, or all but those they did not.")
    ] = True,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where `traffic` and `feedback` are, when not TAILOR_HOME.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a data file of recorded chats and feedback: edits, votes and ratings decide what becomes a row.

    sft: answers people liked, corrected where somebody did. preference: pairs of a better and a worse answer. rated:
    answers with their attributes.
    """
    from tailor.data.writers import write_records
    from tailor.errors import ConflictError, DataError
    from tailor.feedback.dataset import KINDS, Wanted, harvest
    from tailor.feedback.feedback import FeedbackLog
    from tailor.feedback.traffic import TrafficSettings, open_traffic
    from tailor.runs import home

    if kind not in KINDS:
        raise typer.BadParameter(f"--kind is one of {', '.join(KINDS)}, not {kind!r}")
    if os.path.lexists(output) and not force:
        raise ConflictError(f"{output} exists already", hint="choose another name, or replace it with --force")
    place = folder or home()
    wanted = Wanted(
        kind=kind,
        model=model,
        since=_seconds(since, "--since"),
        until=_seconds(until, "--until", day=time.max),
        min_rating=min_rating,
        only_voted=only_voted,
    )
    traffic = open_traffic(TrafficSettings(folder=place / "traffic"))
    found = harvest(traffic, FeedbackLog(place / "feedback"), wanted)
    for place_of, reason in found.damaged:
        say(f"damaged: {place_of}: {reason}")
    if not found.records:
        raise DataError(
            f"no rows: {found.num_exchanges:,} chats and {found.num_feedback:,} statements about them in {place}"
            + "".join(f"\n  {len(places):,} {reason}" for reason, places in found.reasons().items()),
            hint=_hint(found, only_voted=only_voted),
        )
    write_records(output, found.records)
    emit(_told(found, output), as_json, lambda console: _show(found, output))


def _seconds(text: str | None, option: str, *, day: time = time.min) -> int | None:
    """Seconds since 1970. A date alone is the start of its day; for `time.max` the start of the next."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{option} wants a date such as 2026-03-01, got {text!r}") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    is_date = len(text) <= len("2026-03-01") and day == time.max
    return int(moment.timestamp()) + (86_400 if is_date else 0)


def _hint(found: Harvest, *, only_voted: bool) -> str:
    if not found.num_exchanges:
        return "record some: `tailor serve --record`, and `store: true` in the request; or `--record-all`"
    if only_voted and found.kind == "sft":
        return "--all takes answers that nobody said anything about, too"
    return "POST /v1/feedback says what people think of answers"


def _told(found: Harvest, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "kind": found.kind,
        "num_rows": len(found.records),
        "num_exchanges": found.num_exchanges,
        "num_feedback": found.num_feedback,
        "left_out": found.reasons(),
        "damaged": [{"place": place, "reason": reason} for place, reason in found.damaged],
    }


def _show(found: Harvest, output: Path) -> None:
    print(f"{output}: {len(found.records):,} rows of {found.num_exchanges:,} chats ({found.kind})")
    for reason, places in found.reasons().items():
        more = f", and {len(places) - SHOWN_PLACES:,} more" if len(places) > SHOWN_PLACES else ""
        print(f"left out: {len(places):,} {reason}\n  {', '.join(places[:SHOWN_PLACES])}{more}")
