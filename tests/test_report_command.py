"""The report's command: what it writes, replaces, prints and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sparsify.bench.records import read
from sparsify.errors import DataError, MissingExtraError, OutputError, UsageError
from sparsify.report import markdown, page
from sparsify.report_command import FORMATS, report_command
from tests.reporting import RUNTIMES, summary_of


def test_only_the_page_needs_matplotlib(tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.extras.importlib.util.find_spec", lambda name: None if name == "matplotlib" else True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'matplotlib; run: pip install "sparsify-toolkit\[bench\]"'):
        report_command([example], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report_command([example], out=tmp_path / "out", formats=["md", "json"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]


def test_command_writes_reports_and_replaces_only_its_own(tmp_path: Path, example: Path) -> None:
    app = typer.Typer()
    app.command()(report_command)
    out = tmp_path / "a" / "out"
    result = CliRunner().invoke(app, [str(example), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Of 2 candidates, both are faster than dense with sparse kernels")
    assert "DENSE" in result.output
    names = {f"report.{name}" for name in FORMATS}
    assert {path.name for path in out.iterdir()} == names
    summary = summary_of(example)
    assert json.loads((out / "report.json").read_text()) == summary
    assert (out / "report.md").read_text() == markdown.render(summary)
    assert (out / "report.html").read_text() == page.render(read([example]), summary)
    before = {name: (out / name).read_bytes() for name in names}
    with pytest.raises(OutputError, match=r"report\.md: exists"):
        report_command([example], out=out)
    report_command([example], out=out, overwrite=True)
    assert before == {name: (out / name).read_bytes() for name in names}
    for name in names:
        (out / name).write_text("anybody's")
        with pytest.raises(OutputError, match=f"{name}: is no report"):
            report_command([example], out=out, formats=[name.removeprefix("report.")], overwrite=True)
        assert (out / name).read_text() == "anybody's"
    with pytest.raises(OutputError, match="is a file"):
        report_command([example], out=example)


def test_terminal_has_a_line_for_each_candidate_and_runtime(
    example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report_command([example])
    lines = capsys.readouterr().out.splitlines()
    assert all(f"- {each['sentence']}" in lines for each in summary_of(example)["verdicts"])
    assert "2of4 most, in 2 of 3 runtimes" in lines[0]
    head = next(i for i, line in enumerate(lines) if line.startswith("artifact "))
    rows = [line.split() for line in lines[head + 1 : head + 7]]
    assert [row[:3] for row in rows] == [
        [name, runtime, "DENSE" if runtime == "onnxruntime" else "sparse"]
        for runtime in RUNTIMES
        for name in ("2of4", "half")
    ]
    assert all(len(line) <= 80 for line in lines[head:])
    assert rows[0][3:5] == ["▲", "1.53x"]
    assert rows[0][-3:] == ["+44", "%", "0.84x"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    report_command([example])
    assert "\x1b[1;31mDENSE" in capsys.readouterr().out


def test_command_refuses_what_it_cannot_use(tmp_path: Path, example: Path) -> None:
    with pytest.raises(UsageError, match="--format 'pdf': choose from md, json, html"):
        report_command([example], out=tmp_path / "out", formats=["pdf"])
    with pytest.raises(UsageError, match="--format has no effect without --out"):
        report_command([example], formats=["md"])
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(example.read_bytes()[:-200])
    with pytest.raises(DataError, match="cut off"):
        report_command([cut], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_prints_the_summary_as_json(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_command([example], json=True)
    assert json.loads(capsys.readouterr().out) == summary_of(example)
