"""The report: labels are text, the same records give the same bytes, and no more is drawn than was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.records import read
from sparsify.report import markdown, page
from sparsify.report.drawing import Figure, draw
from tests.reporting import edited, only, summary_of

HOSTILE = "</svg><script>alert(1)</script>|[x](http://evil.example)`$a$_\"'\u202e\x07&amp;"


def test_labels_are_text(tmp_path: Path, example: Path) -> None:
    text = example.read_text().replace('"2of4"', json.dumps(HOSTILE)).replace("pydoc", "<img src=x>")
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    summary = summary_of(path)
    html = page.render(read([path]), summary)
    assert "&lt;script&gt;alert(1)" in html
    for bad in ("<script", "</svg><", "<img", "\u202e", "\x07"):
        assert bad not in html, bad
    written = markdown.render(summary)
    for bad in ("<script", "[x](", "://", "<img", "$a$", "\u202e", "\x07"):
        assert bad not in written.replace(r"\]", ""), bad
    rows = [line for line in written.splitlines() if line.startswith("|")]
    heads = [i for i, line in enumerate(rows) if line.startswith("|---")]
    for i, head in enumerate(heads):
        columns = rows[head].count("|")
        for row in rows[head - 1 : heads[i + 1] - 1 if i + 1 < len(heads) else None]:
            assert row.replace(r"\|", "").count("|") == columns, row


def test_a_label_draws_no_formula_and_hides_from_no_legend() -> None:
    from sparsify.report.drawing import legend

    def fill(axes: Any) -> None:
        lines = [axes.plot([0, 1], [0, i])[0] for i in range(2)]
        legend(axes, lines, ["_hidden $\\frac{", "漢字 " * 30])

    figure = draw(Figure("f", "t", "c", "d", ("a",), (("b",),)), fill)
    assert figure.svg.count("DejaVuSans-") > 20


SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from sparsify.bench.records import read
from sparsify.report import markdown, page
from sparsify.report.summary import summarise
records = read([Path(sys.argv[1])])
summary = summarise(records)
texts = [json.dumps(summary), markdown.render(summary), page.render(records, summary)]
print(*(hashlib.sha256(text.encode()).hexdigest() for text in texts))
"""


def test_the_same_records_give_the_same_bytes(tmp_path: Path, example: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: none\naxes.facecolor: red\n")
    seen = set()
    for variables in (
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "2", "SOURCE_DATE_EPOCH": "1", "MATPLOTLIBRC": str(tmp_path), "LC_ALL": "C"},
    ):
        seen.add(
            subprocess.run(
                [sys.executable, "-c", SCRIPT, str(example)], env={**os.environ, **variables}, check=True,
                capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
            ).stdout
        )  # fmt: skip
    assert len(seen) == 1


def test_one_point_draws_no_frontier(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.report import drawing, plots

    seen: list[list[str]] = []
    original = drawing.legend

    def legend(axes: Any, lines: list[Any], names: list[str]) -> None:
        seen.append(names)
        original(axes, lines, names)

    monkeypatch.setattr("sparsify.report.plots.legend", legend)
    for runtime, drawn in (("torch", 1), ("onnxruntime", 0)):
        seen.clear()
        path = edited(example, tmp_path / f"{runtime}.jsonl", only(runtime, "2of4"))
        plots.figures(read([path]), summary_of(path))
        assert seen[0][:2] == ["dense", "2of4"]
        assert sum("frontier" in names for names in seen) == drawn
