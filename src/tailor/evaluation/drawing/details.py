"""The rest of a comparison's report as texts: differences, curves, claims, settings, failures, how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailor.evaluation.drawing import quantities as q
from tailor.evaluation.drawing.tables import Cell, Column, Report, Table, labels, metric_title, scored, word_for

Facts = Sequence[tuple[str, str]]
"""Terms, each with what it is here."""

SOURCE_OF_CLAIMS = "NVIDIA, “Mastering LLM Techniques: Customization”, slide “Comparison of Approaches”"


EMPTY = "(empty)"


def has_curves(report: Report) -> bool:
    """Whether anything was measured at more than one size."""
    return len(_sizes(report)) > 1


def curves(report: Report, own: Sequence[Mapping[str, Any]] | None = None, caption: str = "Learning curves") -> Table:
    """Scores by the number of rows to learn from, of all curves or of some."""
    names, sizes = labels(report), _sizes(report)
    lines = []
    for curve in report["curves"] if own is None else own:
        points = {point["size"]: scored(point) for point in curve["points"]}
        lines.append((Cell(names[curve["id"]]), *(points.get(size, Cell(q.MISSING)) for size in sizes)))
    columns = (Column("Technique", number=False), *(Column(f"{q.count(size)} rows") for size in sizes))
    return Table(f"{caption}: {metric_title(report)} by training rows", columns, tuple(lines))


def differences(report: Report) -> Table:
    """Every difference to the best, whether it is a tie."""
    names = labels(report)
    lines = []
    for found in report["verdict"]["differences"]:
        interval = q.MISSING if found["low"] is None else q.span(found["low"], found["high"], signed=True)
        cells = (Cell(q.difference(found["mean"])), Cell(interval), Cell(word_for(report, found)))
        lines.append((Cell(names[found["id"]]), *cells))
    headers = (
        Column("Technique", number=False),
        Column("Difference"),
        Column("Interval"),
        Column("Verdict", number=False),
    )
    return Table(f"{metric_title(report)}: differences to the best", headers, tuple(lines))


def claims(report: Report) -> Table:
    """The claimed table's properties as lines, the techniques as columns: measured, and the claim below."""
    names, ids = labels(report), _claimed(report)
    lines = [
        (Cell(claim["column"]), *(_claim(claim["cells"].get(id_)) for id_ in ids))
        for claim in report["claims"]
        if claim["cells"]
    ]
    columns = (Column("Property", number=False), *(Column(names[id_], number=False) for id_ in ids))
    return Table("Measured, and below it what is claimed", columns, tuple(lines))


def reasons(report: Report) -> Table:
    """Every claim with what was measured, whether they agree, and why."""
    names, ids = labels(report), _claimed(report)
    lines = []
    for claim in report["claims"]:
        for id_ in (id_ for id_ in ids if id_ in claim["cells"]):
            cell = claim["cells"][id_]
            texts = (names[id_], cell["claim"], cell["measured"], _agreement(cell), cell["why"])
            lines.append((Cell(claim["column"]), *(Cell(text or q.MISSING) for text in texts)))
    headers = ("Property", "Technique", "Claimed", "Measured", "Do they agree?", "Why")
    return Table("Every claim and the reason", tuple(Column(header, number=False) for header in headers), tuple(lines))


def settings(report: Report) -> Table:
    """The settings of every technique, what was tried for it, and the name under which it is kept."""
    names = labels(report)
    rows = [row for row in report["rows"] if row["kind"] == "technique"]
    lines = [
        (
            Cell(names[row["id"]]),
            Cell("; ".join(_settings(one) for one in row["settings"]) or q.MISSING),
            Cell("; ".join(_trial(trial) for trial in row["trials"]) or q.MISSING),
            Cell(row["artifact"] or q.MISSING),
        )
        for row in rows
    ]
    headers = ("Technique", "Settings", "Tried (validation loss)", "Kept as")
    columns = tuple(Column(header, number=False) for header in headers)
    return Table("Settings of every technique", columns, tuple(lines))


@dataclass(frozen=True, slots=True)
class Example:
    """A test row on which techniques disagree. `outcome` says in short how many are right, where right is defined."""

    source: str
    prompt: str
    reference: str
    outcome: str
    answers: Table


def examples(report: Report) -> list[Example]:
    """The rows where techniques disagree, with the answers of all."""
    names = labels(report)
    return [_example(k, found, names) for k, found in enumerate(report["disagreements"], 1)]


def _example(k: int, found: Mapping[str, Any], names: Mapping[str, str]) -> Example:
    scores = [answer["score"] for answer in found["answers"].values() if answer["score"] is not None]
    binary = all(score in (0, 1) for score in scores)
    differ = any(answer["completion"] != answer["answer"] for answer in found["answers"].values())
    lines = []
    for id_ in (id_ for id_ in names if id_ in found["answers"]):
        answer = found["answers"][id_]
        texts = [answer["answer"], *([answer["completion"]] if differ else [])]
        cells = [Cell(q.MISSING, why="no answer was found") if text is None else Cell(text or EMPTY) for text in texts]
        lines.append((Cell(names[id_]), *cells, _judged(answer["score"], binary)))
    columns = [Column("Technique", number=False), Column("Answer", number=False)]
    columns += [Column("All of what it wrote", number=False)] if differ else []
    outcome = f"{sum(scores):.0f} of {len(scores)} right" if binary else ""
    table = Table(f"Answers to example {k}", (*columns, Column("Score", number=not binary)), tuple(lines))
    return Example(found["source"], found["prompt"] or EMPTY, found["reference"] or EMPTY, outcome, table)


def _judged(score: float | None, binary: bool) -> Cell:
    if score is None:
        return Cell(q.MISSING, why="not scored")
    if not binary:
        return Cell(q.score(score))
    return Cell("✓ right", mark="good") if score else Cell("✗ wrong", mark="bad")


def failures(report: Report) -> Table:
    """What failed, at which size and seed, and what to do about it."""
    names = labels(report)
    lines = []
    for failure in report["failures"]:
        error = failure["error"] or {}
        cells = (
            Cell(q.count(failure["size"])),
            Cell(str(failure["seed"])),
            Cell(error.get("message") or "no reason is known"),
        )
        lines.append((Cell(names.get(failure["id"], failure["id"])), *cells, Cell(error.get("hint") or q.MISSING)))
    columns = (
        *(Column("Technique", number=False), Column("Rows"), Column("Seed")),
        *(Column("What happened", number=False), Column("What may help", number=False)),
    )
    return Table("What failed", columns, tuple(lines))


def notes(report: Report) -> list[str]:
    """Everything that a reader should know besides, each once."""
    names = labels(report)
    found = [*report["notes"], *report["data"].get("notes", ())]
    if not has_curves(report):
        found += report["crossovers"]
    found += [f"{names[row['id']]}: {note}" for row in report["rows"] for note in row["notes"]]
    return list(dict.fromkeys(found))


def facts(report: Report) -> dict[str, Facts]:
    """How it was measured: the rows, the rules, the machine, the versions."""
    return {
        "Rows": _known(_rows(report)),
        "Rules": _known(_rules(report)),
        "Machine": _known(_machine(report["machine"] or {})),
        "Versions": [(str(name), str(version)) for name, version in sorted((report["versions"] or {}).items())],
    }


def commands(report: Report) -> list[tuple[str, str]]:
    """What each command does, and the command."""
    found = [("Measure again (goes on where it stopped)", report["command"])] if report["command"] else []
    pick = next((row for row in report["rows"] if row["id"] == report["verdict"]["pick"]), None)
    if pick and pick["artifact"]:
        found.append((f"Use {labels(report)[pick['id']]}", f'tailor generate {pick["artifact"]} "your text"'))
    return [*found, ("Draw this report again from report.json", f"tailor compare {report['name']} --redraw")]


def _sizes(report: Report) -> list[int]:
    return sorted({point["size"] for curve in report["curves"] for point in curve["points"]})


def _claimed(report: Report) -> list[str]:
    """The rows that any claim speaks of, in the table's order."""
    spoken = {id_ for claim in report["claims"] for id_ in claim["cells"]}
    return [row["id"] for row in report["rows"] if row["id"] in spoken]


def _claim(cell: Mapping[str, Any] | None) -> Cell:
    if cell is None:
        return Cell(q.MISSING)
    claimed = f"claimed: {cell['claim']}; {_agreement(cell)}" if cell["claim"] else "no claim"
    mark = {True: "good", False: "bad", None: ""}[cell["agrees"]]
    return Cell(cell["measured"] or q.MISSING, claimed, cell["why"] or "", mark)


def _agreement(cell: Mapping[str, Any]) -> str:
    if cell["claim"] is None:
        return "no claim"
    return {True: "✓ agrees", False: "✗ differs", None: "not decided"}[cell["agrees"]]


def _settings(one: Mapping[str, Any]) -> str:
    given = [(key, value) for key, value in sorted(one.items()) if key != "type" and value is not None]
    name = str(one.get("type", ""))
    return f"{name}: {', '.join(f'{key} {_value(value)}' for key, value in given)}" if given else name


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_value(item)}' for key, item in sorted(value.items()))})"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _trial(trial: Mapping[str, Any]) -> str:
    loss = "no loss" if trial["validation_loss"] is None else q.score(trial["validation_loss"])
    return f"{trial['label']} ({loss}{', chosen' if trial['chosen'] else ''})"


def _known(found: Iterator[tuple[str, object]]) -> Facts:
    return [(term, str(value)) for term, value in found if value not in (None, "", [])]


def _rows(report: Report) -> Iterator[tuple[str, object]]:
    data = report["data"]
    yield "Data", data.get("train")
    yield "Test file", data.get("test")
    yield "Content hash", data.get("content_hash")
    sides = {"training": "num_train", "validation": "num_validation", "test": "num_test"}
    parts = [f"{q.count(data[key])} {side}" for side, key in sides.items() if data.get(key) is not None]
    yield "Rows", f"{q.count(data['num_rows'])}: {', '.join(parts)}" if data.get("num_rows") is not None else None
    yield "Kind of task", data.get("reason") or data.get("kind")


def _rules(report: Report) -> Iterator[tuple[str, object]]:
    settings, metric = report["settings"], report["metric"]
    yield "Decided by", f"{metric['name']}: {metric['description']}"
    yield "A tie", report["verdict"]["noise"]
    yield "Intervals", f"{100 * settings['confidence']:g} %, by bootstrap over the test rows"
    yield "Training rows", ", ".join(q.count(size) for size in settings["sizes"])
    yield "Seeds", settings["seeds"]
    tried = f"{settings['trials']} for each technique, chosen on the validation rows" if settings["trials"] else "yes"
    yield "Settings tried", tried if settings["tune"] else "none: every technique has its own defaults"
    yield "Price of the machine", f"{q.money(settings['rate'])} an hour" if settings["rate"] else None


def _machine(machine: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key in ("system", "cpu", "cores"):
        yield {"cpu": "Processor"}.get(key, key.capitalize()), machine.get(key)
    yield "Memory", q.size(machine["memory"]) if machine.get("memory") else None
    for key in ("device", "dtype", "num_threads"):
        yield {"dtype": "Numbers", "num_threads": "Threads"}.get(key, key.capitalize()), machine.get(key)
