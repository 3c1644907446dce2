"""``report.html``: one file that needs no network and runs no script."""

from __future__ import annotations

from importlib import resources
from typing import Any

from sparsify.bench.records import Records
from sparsify.extras import require
from sparsify.report.cells import Sources
from sparsify.report.tables import tables

TITLE = "Sparsify: what was measured"


def render(records: Records, summary: dict[str, Any]) -> str:
    """The report as a page; ``summary`` is ``summarise(records)``.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require("bench", "the report as a page (--format html)")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from sparsify.report.plots import figures

    # Labels are anybody's text: everything is escaped but the drawings, which are ours and hold none of it unescaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("sparsify.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=TITLE,
        summary=summary,
        tables=tables(summary),
        figures=[{"about": figure, "svg": Markup(figure.svg)} for figure in figures(records, summary)],
        files=Sources(summary).files,
    )
