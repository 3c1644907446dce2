"""The command that makes a report of records."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.errors import OutputError, UsageError
from sparsify.options import Json

if TYPE_CHECKING:
    from sparsify.bench.records import Records

# Format -> what a file of it that this command wrote begins with, or holds near its beginning.
FORMATS = {"md": "# Sparsify: what was measured", "json": '"verdict"', "html": 'content="sparsify report"'}
_BEGINNING = 2000


def report_command(
    records: Annotated[list[Path], typer.Argument(help="Files that `sparsify bench` wrote.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.md, report.json, report.html.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="md, json, html; repeatable.", show_default="all")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    json: Json = False,
) -> None:
    """Make a report of what `sparsify bench` measured: does sparsity pay here, and what does it cost.

    The same records give the same report, byte for byte; each number names the lines it is from.
    """
    from sparsify.bench.records import read
    from sparsify.console import print_json, print_line, print_table
    from sparsify.report.summary import summarise
    from sparsify.report.tables import brief

    if formats and out is None:
        raise UsageError("--format has no effect without --out; name a folder for the report")
    chosen = list(dict.fromkeys(formats or FORMATS))
    unknown = [name for name in chosen if name not in FORMATS]
    if unknown:
        raise UsageError(f"--format {unknown[0]!r}: choose from {', '.join(FORMATS)}")
    if out is not None:
        _check_out(out, chosen, overwrite)
    found = read(records)
    summary = summarise(found)
    if out is not None:
        _write(out, {name: _render(name, found, summary) for name in chosen})
    if json:
        print_json(summary)
        return
    print_line(summary["verdict"])
    for warning in summary["warnings"]:
        print_line(f"! {warning['text']}")
    if len(summary["verdicts"]) > 1:
        for each in summary["verdicts"]:
            print_line(f"- {each['sentence']}")
    head, rows = brief(summary)
    if rows:
        print_line("")
        print_table(head, rows, lines=False)
        print_line("speed: ratio to dense, paired by round (95 % interval)")
        print_line("▲ faster, ▼ slower, = no difference shown, ? no claim")
    if out is not None:
        print_line(f"written: {', '.join(str(out / f'report.{name}') for name in chosen)}")


def _render(name: str, records: Records, summary: dict[str, Any]) -> str:
    if name == "json":
        return json_text.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if name == "md":
        from sparsify.report import markdown

        return markdown.render(summary)
    from sparsify.report import page

    return page.render(records, summary)


def _check_out(out: Path, formats: list[str], overwrite: bool) -> None:
    """Refuse what is there already, unless it is an earlier report and may go."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another --out")
    for name in formats:
        path = out / f"report.{name}"
        if not path.exists():
            continue
        if not overwrite:
            raise OutputError(f"{path}: exists; choose another --out or pass --overwrite")
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                ours = FORMATS[name] in file.read(_BEGINNING)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}; choose another --out") from None
        if not ours:
            raise OutputError(f"{path}: is no report of records, so --overwrite leaves it alone; choose another --out")


def _write(out: Path, texts: dict[str, str]) -> None:
    from sparsify.files import write_text, writing

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out / f"report.{name}", text)
