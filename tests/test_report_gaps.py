"""The report: what was not measured, failed or broke off is said, and runs never meet in a ratio."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsify.bench.records import read, writer
from sparsify.errors import DataError
from sparsify.report import markdown, page
from tests.bench_records import write_example, write_run
from tests.reporting import Raw, edited, only, summary_of


def test_unfinished_run_says_so(tmp_path: Path, example: Path) -> None:
    def change(record: Raw) -> Raw | None:
        return None if record["record"] == "end" else record

    path = edited(example, tmp_path / "a.jsonl", change)
    summary = summary_of(path)
    assert summary["runs"][0]["finished"] is False
    assert summary["verdict"].endswith("(run 1 did not finish).")
    assert summary["warnings"][0]["text"].startswith("Run 1 did not finish")
    assert "no: it broke off" in markdown.render(summary)
    one = summary_of(edited(path, tmp_path / "b.jsonl", only("torch", "2of4")))
    assert one["verdict"].endswith("(the run did not finish).")


def test_failures_stand_apart_from_what_was_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with writer(path) as out:
        write_run(out, seed=1, rounds=7, runtimes=("torch",))
    lines = path.read_text().splitlines()
    missing = json.loads(next(line for line in lines if '"missing"' in line))
    broken = {**missing, "what": "2of4 in tensorrt", "why": "the worker died", "failed": True}
    path.write_text("\n".join([*lines[:-1], json.dumps(broken), lines[-1]]) + "\n")
    summary = summary_of(path)
    assert [each["what"] for each in summary["failed"]] == ["2of4 in tensorrt"]
    assert [each["what"] for each in summary["not_measured"]] == ["KL divergence in vllm"]
    assert any("the worker died" in warning["text"] for warning in summary["warnings"])
    assert "✖ failed" in markdown.render(summary)


def test_no_candidates_and_kernels_alone(tmp_path: Path, example: Path) -> None:
    def dense(record: Raw) -> Raw | None:
        return record if record.get("artifact", "dense") in ("dense", None) else None

    summary = summary_of(edited(example, tmp_path / "dense.jsonl", dense))
    assert summary["verdict"] == "No candidate was measured, so that there is nothing to compare."
    assert any("no candidate" in each["what"] for each in summary["absent"])

    def kernels(record: Raw) -> Raw | None:
        kept = record["record"] in ("run", "kernel", "end") or record.get("artifact") == "2of4"
        return record if kept and record["record"] in ("run", "artifact", "kernel", "end") else None

    path = edited(example, tmp_path / "kernels.jsonl", kernels)
    summary = summary_of(path)
    assert len(summary["kernels"]) == 4
    assert summary["verdict"].startswith("2of4 was not timed as a whole; its single linears are 1.6")
    html = page.render(read([path]), summary)
    assert html.count("<figure>") == 2
    begun = edited(example, tmp_path / "run.jsonl", lambda record: record if record["record"] == "run" else None)
    alone = summary_of(begun)
    assert alone["verdict"].startswith("No candidate was measured")
    assert "<figure>" not in page.render(read([begun]), alone)
    assert "What was not measured" in markdown.render(alone)


def test_scenario_of_the_baseline_only_is_named(tmp_path: Path, example: Path) -> None:
    def change(record: Raw) -> Raw | None:
        alone = record["record"] == "latency" and record["scenario"]["batch"] == 8 and record["baseline"]
        return None if alone else only("torch", "2of4")(record)

    summary = summary_of(edited(example, tmp_path / "a.jsonl", change))
    assert {"128+32 tokens, batch 8 in torch: only of dense, no candidate"} == {e["what"] for e in summary["absent"]}
    assert "faster in 2 of 2 scenarios" in summary["verdict"]


def test_runs_never_meet_in_a_ratio(tmp_path: Path, example: Path) -> None:
    def without(record: Raw) -> Raw | None:
        dense = record.get("artifact") == "dense" and record["record"] != "artifact"
        return None if dense else record

    other = write_example(tmp_path / "b.jsonl", seed=5, runtimes=("torch",))
    cut = edited(other, tmp_path / "c.jsonl", without)
    summary = summary_of(example, cut)
    assert [run["number"] for run in summary["runs"]] == [1, 2]
    mine = [row for row in summary["latency"] if row["run"] == 2]
    assert len(mine) == 6
    assert all(values["comparison"] is None for row in mine for values in row["measures"].values())
    assert all(row["increase"] is None for row in summary["accuracy"]["perplexity"] if row["run"] == 2)
    assert all(row["to_baseline"] is None for row in summary["memory"] if row["run"] == 2)
    assert "Of 4 candidates in 2 runs, 2 are faster" in summary["verdict"]
    text = markdown.render(summary)
    assert "| run 2 |" in text
    assert "file 2: " in text
    assert str(cut).replace("_", r"\_") in text.replace("_", r"\_")
    with pytest.raises(DataError, match="twice"):
        summary_of(example, example)
