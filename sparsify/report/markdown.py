"""``report.md`` from the summary."""

from __future__ import annotations

import re
from typing import Any

from sparsify.report.cells import Cell, Sources
from sparsify.report.tables import tables

TITLE = "# Sparsify: what was measured"
# What Markdown takes for a mark; an underscore within a word is none.
_MARKS = re.compile(r"^[-+=#]|[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")
# HTML, and what GitHub makes a link, a mention or a formula of.
_ENTITIES = re.compile(r"[&<>@$]|(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE)


def escape(text: str) -> str:
    """``text`` so that Markdown shows it letter by letter: it may be anybody's label."""
    return _ENTITIES.sub(lambda found: f"&#{ord(found[0])};", _MARKS.sub(r"\\\g<0>", text))


def render(summary: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [TITLE, "", f"**{escape(summary['verdict'])}**", ""]
    if summary["warnings"]:
        lines += [*(f"- ⚠ {escape(warning['text'])}" for warning in summary["warnings"]), ""]
    if len(summary["verdicts"]) > 1:
        lines += [*(f"- {escape(each['sentence'])}" for each in summary["verdicts"]), ""]
    for table in tables(summary):
        lines += [f"## {table.title}", "", table.caption, ""]
        lines.append("| " + " | ".join(escape(name) for name in table.head) + " |")
        lines.append("|" + "---|" * len(table.head))
        lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
        lines.append("")
    lines += ["## Files", ""]
    lines += [f"{number}. {escape(name)}" for number, name in enumerate(Sources(summary).files, 1)]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    return "<br>".join(f"**{escape(line.text)}**" if line.mark == "bad" else escape(line.text) for line in cell)
