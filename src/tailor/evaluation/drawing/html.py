"""The report of a comparison as one HTML page: no script, no network, nothing beside it but report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from tailor.evaluation.drawing import chart_data, details, tables
from tailor.evaluation.drawing.quantities import visible

HERE = Path(__file__).parent


def render_html(report: Mapping[str, Any]) -> str:
    """The page, drawn from the dict of `build_report` (or report.json) alone.

    All texts are escaped, and what is invisible in them is written out. The page forbids itself scripts and the
    network (Content-Security-Policy), follows the system's light or dark colours, and prints.
    """
    return render("page.html.jinja", _view(report))


def render(template: str, view: Mapping[str, Any]) -> str:
    """One of the templates beside this file with what it shows; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_written,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(view)


def _written(value: Any) -> Any:
    return visible(value) if type(value) is str else value


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, in its order; an empty list or None leaves a section out."""
    headline, *sentences = report["verdict"]["sentences"] or ["Nothing was measured."]
    detailed = [tables.quality(report), tables.training(report), tables.serving(report)]
    curves = chart_data.curve_figures(report)
    view = {
        "gaps": tables.gaps,
        "name": report["name"] or "comparison",
        "created": report["created"],
        "headline": headline,
        "sentences": sentences,
        "summary": tables.summary(report),
        "costs": chart_data.cost_figures(report),
        "curves": curves,
        "crossovers": report["crossovers"] if curves else [],
        "forest": chart_data.difference_figure(report),
        "differences": details.differences(report),
        "noise": report["verdict"]["noise"],
        "claims": details.claims(report),
        "reasons": details.reasons(report),
        "source_of_claims": details.SOURCE_OF_CLAIMS,
        "detailed": [table for table in detailed if len(table.columns) > 1 and table.lines],
        "examples": details.examples(report),
        "failures": details.failures(report),
        "facts": {title: facts for title, facts in details.facts(report).items() if facts},
        "settings": details.settings(report),
        "commands": details.commands(report),
        "notes": details.notes(report),
    }
    return {**view, "sections": _sections(view)}


def _sections(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The page's headings, by their ids."""
    titles = {
        "verdict": ("Verdict", True),
        "cost": ("Quality against cost", view["costs"]),
        "curves": ("Learning curves", view["curves"]),
        "differences": ("Differences to the best", view["differences"].lines),
        "comparison": ("All measurements", view["detailed"]),
        "claims": ("Claimed and measured", view["claims"].lines),
        "examples": ("Where techniques disagree", view["examples"]),
        "failures": ("What failed", view["failures"].lines),
        "method": ("How this was measured", True),
    }
    return [(key, title) for key, (title, shown) in titles.items() if shown]
