"""Gate: rules as they are typed, the command, its exit codes, and what reaches the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsify.bench.records import Record, Records
from sparsify.errors import GateError, MeasurementError, SparsifyError, UsageError
from sparsify.gate_command import gate_command
from sparsify.report import rules
from tests.bench_records import write_example
from tests.gating import edited


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        *(
            (rules.speedup, value)
            for value in ("", "x", "0", "-1", "nan", "inf", "1e999", "1,1", "1.1x", "10%", "rate=1.1")
        ),
        *((rules.speedup, value) for value in ("tpot=", "=1.1.1", "tpot:128=1", "1 ", "٣")),
        *((rules.perplexity, value) for value in ("", "%", "-1%", "5%%", "five", "inf", "1e999%")),
        *((rules.kl, value) for value in ("", "-0.1", "nan", "5%")),
        *((rules.task, value) for value in ("", "arc", "=0.5", ":acc=1", "arc:acc=", "arc:acc=x", "arc:acc=--1")),
        *((rules.sparse, value) for value in ("1", "0.5", "101%", "-1%", "all", "%")),
        *((lambda value: rules.ratio("--max-file-ratio", value), value) for value in ("", "0", "0%", "-1", "x")),
    ],
)
def test_values_that_mean_nothing(parse: Callable[[str], rules.Rule], value: str) -> None:
    with pytest.raises(UsageError, match=r"^--m(in|ax)-[a-z-]+ .*: .*(write it like|choose)"):
        parse(value)


@given(st.text(max_size=12) | st.from_regex(r"[a-z]*@?[0-9+x*]*=?[0-9.e%+-]*", fullmatch=True))
def test_any_text_is_a_rule_or_an_error(value: str) -> None:
    for parse in (rules.speedup, rules.perplexity, rules.kl, rules.task, rules.sparse):
        try:
            rule = parse(value)
        except UsageError:
            continue
        assert math.isfinite(rule.limit)
        assert rule.wanted


def test_rules_as_typed() -> None:
    assert rules.speedup("1.1") == rules.Rule("--min-speedup 1.1", "speedup", 1.1)
    found = rules.speedup("tpot@128+*x1=1.25")
    assert (found.measure, found.scenario, found.limit) == ("tpot", "128+*x1", 1.25)
    assert (rules.perplexity("5%").limit, rules.perplexity("5%").relative) == (0.05, True)
    assert (rules.perplexity("0.5").limit, rules.perplexity("0.5").relative) == (0.5, False)
    assert rules.perplexity("5%").wanted == "at most +5%"
    task = rules.task("mmlu:acc_norm,none=-0.02")
    assert (task.task, task.metric, task.limit, task.relative) == ("mmlu", "acc_norm,none", -0.02, True)
    assert (rules.task("arc=0.5").metric, rules.task("arc=0.5").relative) == ("acc", False)
    assert rules.ratio("--max-memory-ratio", "70%").limit == rules.ratio("--max-memory-ratio", "0.7").limit == 0.7


Ran = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sparsify_gate() -> Ran:
    """Exit code, output and error line of the command; a fault in it raises."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(gate_command)

    def run(*arguments: Any) -> tuple[int, str, str]:
        found = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(found.exception, SparsifyError):
            return found.exception.exit_code, found.stdout, str(found.exception)
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return found.exit_code, found.stdout, found.stderr

    return run


def test_exit_codes() -> None:
    assert (GateError.exit_code, MeasurementError.exit_code) == (9, 10)
    codes = [kind.exit_code for kind in SparsifyError.__subclasses__()]
    assert len(set(codes)) == len(codes)


def test_command_that_passes(sparsify_gate: Ran, gated: Path) -> None:
    code, out, error = sparsify_gate(gated, "--min-speedup", "1.2", "--max-ppl-increase", "50%", "--json")
    assert (code, error) == (0, "")
    body = json.loads(out)
    assert body["passed"] is True
    assert len(body["findings"]) == 1 + 12 + 4
    assert {each["rule"] for each in body["findings"]} == {
        "--require-finished", "--min-speedup 1.2", "--max-ppl-increase 50%"
    }  # fmt: skip


def test_command_that_fails(sparsify_gate: Ran, gated: Path) -> None:
    arguments = (gated, "--min-speedup", "tpot=1.2", "--max-ppl-increase", "30%", "--runtime", "torch")
    code, out, error = sparsify_gate(*arguments)
    assert code == 9
    assert error.startswith("--max-ppl-increase 30%: 2of4, torch: +43.94%")
    assert "wanted at most +30%" in error
    assert str(gated) in error
    assert out.count("FAIL") == 1
    code, out, error = sparsify_gate(*arguments, "--json")
    assert code == 9
    body = json.loads(out)
    assert body["passed"] is False
    (failed,) = [each for each in body["findings"] if not each["passed"]]
    path, _, line = failed["source"].rpartition(":")
    record = json.loads(Path(path).read_text().splitlines()[int(line) - 1])
    assert (record["record"], record["artifact"], record["runtime"]) == ("perplexity", "2of4", "torch")
    code, _, error = sparsify_gate(gated, "--max-kl", "0.1", "--max-ppl-increase", "1%")
    assert code == 9
    assert "; 7 more fail" in error


def test_command_without_rules(sparsify_gate: Ran, gated: Path) -> None:
    for arguments in ((), ("--allow-unfinished",), ("--confident",), ("--artifact", "2of4")):
        code, _, error = sparsify_gate(gated, *arguments)
        assert code == 2
        assert error.startswith("no rule is given")
    assert sparsify_gate(gated, "--require-finished")[0] == 0


def test_command_on_an_interrupted_run(sparsify_gate: Ran, tmp_path: Path) -> None:
    path = write_example(tmp_path / "r.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    code, _, error = sparsify_gate(path, "--min-speedup", "1.1")
    assert code == 9
    assert error.startswith("--require-finished: the run: the run has no end")
    assert sparsify_gate(path, "--min-speedup", "1.1", "--allow-unfinished")[0] == 0


def test_command_on_bad_input(sparsify_gate: Ran, tmp_path: Path, gated: Path) -> None:
    assert sparsify_gate(tmp_path / "absent", "--min-speedup", "1.1")[0] == 4
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(gated.read_bytes()[:-9])
    code, _, error = sparsify_gate(cut, "--min-speedup", "1.1")
    assert code == 4
    assert "is cut off" in error
    assert sparsify_gate(gated, "--min-speedup", "fast")[0] == 2
    assert sparsify_gate(gated, "--min-speedup", "1.1", "--runtime", "onnx")[0] == 2
    assert sparsify_gate("--min-speedup", "1.1")[0] == 2


def test_labels_do_not_reach_the_terminal_as_they_are(sparsify_gate: Ran, tmp_path: Path, records: Records) -> None:
    label = "x\x1b[2J\u202e\nerror"

    def rename(record: Record) -> Record:
        return {**record, "artifact": label} if record.get("artifact") == "2of4" else record

    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in edited(records, rename).lines))
    for option in ((), ("--json",)):
        code, out, error = sparsify_gate(path, "--max-kl", "0.1", *option)
        assert code == 9
        for text in (out, error):
            assert "x" in text
            assert not {"\x1b", "\u202e"} & set(text)
        assert error.isprintable()
