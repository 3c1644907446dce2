"""The report: every figure again from the raw lines with NumPy and SciPy, what is claimed, and what is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

from sparsify.bench.record_check import KINDS
from sparsify.bench.records import Records, check, read, writer
from sparsify.errors import DataError, MissingExtraError, OutputError, UsageError
from sparsify.report import markdown, page
from sparsify.report.drawing import Figure, draw
from sparsify.report.summary import summarise
from sparsify.report_command import FORMATS, report_command
from tests.bench_records import write_example, write_run

RUNTIMES = ("torch", "onnxruntime", "vllm")
Raw = dict[str, Any]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("records") / "a.jsonl", runtimes=RUNTIMES)


def edited(source: Path, out: Path, change: Callable[[Raw], Raw | None]) -> Path:
    """A copy of a records file in which ``change`` edited each record, or dropped it by None."""
    lines = [change(json.loads(line)) for line in source.read_text().splitlines()]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))
    return out


def summary_of(*paths: Path) -> dict[str, Any]:
    return summarise(read(list(paths)))


def slowed(by: float) -> Callable[[Raw], Raw]:
    """Every time of candidates times ``by``."""

    def change(record: Raw) -> Raw:
        if record["record"] == "latency" and record["baseline"]:
            for each in record["rounds"]:
                each["ttft_s"] = [value * by for value in each["ttft_s"]]
                each["gaps_s"] = [[value * by for value in row] for row in each["gaps_s"]]
                each["total_s"] *= by
        return record

    return change


def only(runtime: str, *artifacts: str) -> Callable[[Raw], Raw | None]:
    """Records of one runtime, and of the baseline and ``artifacts``."""

    def change(record: Raw) -> Raw | None:
        names = {"dense", *artifacts}
        return (
            record if record.get("runtime", runtime) == runtime and record.get("artifact", "dense") in names else None
        )

    return change


def interval(values: Any) -> tuple[float, float] | None:
    """The sign test's interval of the median, with SciPy's binomial."""
    n = len(values)
    dropped = sum(1 for k in range(1, n) if stats.binom.cdf(k - 1, n, 0.5) <= 0.025)
    return (float(np.sort(values)[dropped - 1]), float(np.sort(values)[n - dropped])) if dropped else None


def per_round(record: Raw, measure: str, *, again: bool) -> dict[int, float]:
    found = {}
    for each in record["rounds"]:
        if each["again"] == again:
            tokens = record["scenario"]["batch"] * record["scenario"]["new_tokens"]
            found[each["round"]] = {
                "ttft": float(np.median(each["ttft_s"])),
                "tpot": float(np.median(np.concatenate([np.asarray(row) for row in each["gaps_s"]]))),
                "total": each["total_s"],
                "throughput": tokens / each["total_s"],
            }[measure]
    return found


def lines_of(path: Path, sources: list[str]) -> list[Raw]:
    """The raw records that ``file:line`` name."""
    raw = path.read_text().splitlines()
    for source in sources:
        assert source.rsplit(":", 1)[0] == str(path)
    return [json.loads(raw[int(source.rsplit(":", 1)[1]) - 1]) for source in sources]


def test_every_comparison_follows_from_the_lines_it_names(example: Path) -> None:
    compared = 0
    for row in summary_of(example)["latency"]:
        for measure, values in row["measures"].items():
            if not values["comparison"]:
                assert row["artifact"] == "dense"
                continue
            candidate, dense = lines_of(example, values["from"])
            assert [candidate["artifact"], dense["artifact"]] == [row["artifact"], "dense"]
            assert {record["runtime"] for record in (candidate, dense)} == {row["runtime"]}
            assert candidate["scenario"] == dense["scenario"] == row["scenario"]
            mine, base = (per_round(record, measure, again=False) for record in (candidate, dense))
            repeated = per_round(dense, measure, again=True)
            better = 1.0 if measure == "throughput" else -1.0
            ratios = np.array([(mine[i] / base[i]) ** better for i in sorted(base)])
            noise = np.array([(repeated[i] / base[i]) ** better for i in sorted(base)])
            low, high = interval(ratios) or (None, None)
            found = values["comparison"]
            assert found["ratio"] == pytest.approx(np.median(ratios))
            assert (found["low"], found["high"]) == pytest.approx((low, high))
            noise_low, noise_high = interval(noise) or (np.nan, np.nan)
            reach = max(noise_high, 1 / noise_low)
            assert found["noise_high"] == pytest.approx(reach)
            assert found["n"] == 7
            assert low is not None
            assert found["claim"] == ("faster" if low > reach else "no difference shown")
            compared += 1
    assert compared == len(RUNTIMES) * 3 * 2 * 4


def test_statistics_and_roofs_follow_from_the_lines(example: Path) -> None:
    roofs = 0
    for row in summary_of(example)["latency"]:
        (record,) = lines_of(example, row["from"])
        # What dense had against itself is its noise, and no part of its own figures; rows that come together are one.
        rounds = [each for each in record["rounds"] if not each["again"]]
        assert (len(rounds) < len(record["rounds"])) == (row["artifact"] == "dense")
        gaps = [gap for each in rounds for line in {*map(tuple, each["gaps_s"])} for gap in line]
        values = row["measures"]["tpot"]
        assert values["statistics"]["median"] == pytest.approx(np.median(gaps))
        assert values["statistics"]["p99"] == pytest.approx(np.percentile(gaps, 99))
        assert values["roof"]["fraction"] == pytest.approx(record["roof"]["tpot_s"] / np.median(gaps))
        firsts = [value for each in rounds for value in set(each["ttft_s"])]
        first = row["measures"]["ttft"]
        assert first["statistics"]["n"] == len(firsts)
        # Too few samples tell no percentile.
        assert (first["statistics"]["p99"] is None) == (len(firsts) < 100)
        roofs += first["roof"]["fraction"] == pytest.approx(record["roof"]["ttft_s"] / np.median(firsts))
    assert roofs == len(RUNTIMES) * 3 * 3


def test_accuracy_follows_from_the_lines(example: Path) -> None:
    found = summary_of(example)["accuracy"]
    increases = 0
    for row in found["perplexity"]:
        if row["artifact"] == "dense":
            assert row["increase"] is None
            continue
        pruned, dense = lines_of(example, row["increase"]["from"])
        tokens = np.array(pruned["window_tokens"])
        differences = np.array(pruned["window_nll"]) - np.array(dense["window_nll"])
        ratio = np.exp((differences * tokens).sum() / tokens.sum())
        assert row["increase"]["relative"] == pytest.approx(ratio - 1)
        # All windows have as many tokens: the standard error of a plain mean, by the delta method.
        error = ratio * differences.std(ddof=1) / np.sqrt(len(differences))
        assert row["increase"]["standard_error"] == pytest.approx(error)
        assert row["perplexity"] == pruned["perplexity"]
        if pruned["kl"]:
            assert row["kl"] == pruned["kl"]
            assert row["noise_floor"]["mean_nats"] == dense["kl"]["mean_nats"]
        increases += 1
    assert increases == 2 * len(RUNTIMES)
    differences_found = 0
    for row in found["tasks"]:
        if row["difference"]:
            pruned, dense = lines_of(example, row["difference"]["from"])
            assert row["difference"]["value"] == pytest.approx(pruned["value"] - dense["value"])
            differences = np.subtract(pruned["samples"], dense["samples"])
            assert row["difference"]["standard_error"] == pytest.approx(differences.std(ddof=1) / np.sqrt(200))
            assert row["difference"]["paired"]
            differences_found += 1
    assert differences_found == 2 * len(RUNTIMES)


def test_tasks_that_cannot_be_paired_say_so(example: Path, tmp_path: Path) -> None:
    for key in ("samples", "samples_sha256"):

        def lack(record: Raw, key: str = key) -> Raw:
            return {**record, key: None} if key in record else record

        summary = summary_of(edited(example, tmp_path / "r.jsonl", lack))
        found = next(row for row in summary["accuracy"]["tasks"] if row["difference"])
        assert found["difference"]["standard_error"] == pytest.approx(np.hypot(0.03, 0.03))
        assert not found["difference"]["paired"]
        assert "unpaired" in markdown.render(summary)
    assert "unpaired" not in markdown.render(summary_of(example))


def test_bytes_and_linears_follow_from_the_lines(example: Path) -> None:
    summary = summary_of(example)
    for rows, keys in ((summary["memory"], ("peak_resident_bytes", "loaded_resident_bytes")), (
        summary["artifacts"], ("weight_bytes", "file_bytes")
    )):  # fmt: skip
        ratios = [row["to_baseline"] for row in rows if row["to_baseline"]]
        assert len(ratios) == len(rows) * 2 // 3
        for each in ratios:
            candidate, dense = lines_of(example, each["from"])
            for key in keys:
                assert each[key] == candidate[key] / dense[key]
    assert summary["kernels"]
    for row in summary["kernels"]:
        (record,) = lines_of(example, row["from"])
        slow, fast = (np.array(record["kernels"][name]["samples_us"]) for name in ("dense torch", "native"))
        native = next(each for each in row["kernels"] if each["kernel"] == "native")
        assert native["speedup"]["ratio"] == pytest.approx(np.median(slow / fast))
        assert (native["speedup"]["low"], native["speedup"]["high"]) == pytest.approx(interval(slow / fast))
        assert native["roof_fraction"] == pytest.approx(record["kernels"]["native"]["roof_us"] / np.median(fast))
        assert row["roof_speedup"] == pytest.approx(16 / 9)


def test_everything_names_the_lines_it_is_from(example: Path) -> None:
    summary, n_lines = summary_of(example), len(example.read_text().splitlines())
    named: set[str] = set()

    def walk(value: Any) -> None:
        for entry in value.values() if isinstance(value, dict) else value:
            if isinstance(entry, dict | list):
                walk(entry)
        if isinstance(value, dict) and "from" in value:
            assert value["from"]
            named.update(value["from"])

    for key in ("runs", "artifacts", "latency", "accuracy", "memory", "kernels", "not_measured", "verdicts"):
        rows = (
            summary[key] if isinstance(summary[key], list) else [row for each in summary[key].values() for row in each]
        )
        assert rows
        assert all(row["from"] for row in rows), key
        walk(rows)
    # And nothing that was measured is left out.
    assert named == {f"{example}:{number}" for number in range(1, n_lines + 1)}


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (1.0, "2of4 decodes 1.54x as fast as dense in torch (95 % interval 1.5"),
        (2.5, "2of4 decodes 0.6"),
        (1 / 0.65, "2of4 shows no difference to dense in decoding in torch (1.0"),
    ],
)
def test_verdict_says_faster_slower_or_neither(example: Path, tmp_path: Path, by: float, words: str) -> None:
    one = edited(example, tmp_path / "one.jsonl", only("torch", "2of4"))
    summary = summary_of(edited(one, tmp_path / "b.jsonl", slowed(by)))
    assert summary["verdict"].startswith(words)
    assert "at +44 % perplexity" in summary["verdict"]
    claims = {row["measures"]["tpot"]["comparison"]["claim"] for row in summary["latency"][1::2]}
    assert claims == {{1.0: "faster", 2.5: "slower"}.get(by, "no difference shown")}


def test_what_ran_dense_is_red_and_gains_nothing(example: Path, tmp_path: Path) -> None:
    one = edited(example, tmp_path / "one.jsonl", only("onnxruntime", "2of4"))
    summary = summary_of(one)
    assert summary["verdict"] == "2of4 ran dense in onnxruntime and is not faster at +44 % perplexity."
    assert [row["status"]["state"] for row in summary["latency"]] == ["dense", "DENSE"] * 3
    (warning,) = summary["warnings"]
    assert warning["text"] == "2of4 in onnxruntime: DENSE: asked to be sparse, no sparse kernel ran."
    assert len(warning["from"]) == 6
    html = page.render(read([one]), summary)
    assert '<span class="line bad">✖ DENSE: asked to be sparse, no sparse kernel ran</span>' in html
    assert "**✖ DENSE: asked to be sparse, no sparse kernel ran**" in markdown.render(summary)
    # Faster for another reason, it is still no gain by sparse kernels.
    fast = edited(example, tmp_path / "fast.jsonl", slowed(0.5))
    verdicts = summary_of(edited(fast, tmp_path / "c.jsonl", only("onnxruntime", "2of4", "half")))
    assert "none is shown to be faster than dense with sparse kernels" in verdicts["verdict"]
    assert "2of4 ran dense in onnxruntime and decodes 2.0" in verdicts["verdicts"][0]["sentence"]


@pytest.mark.parametrize(
    ("engaged", "state", "text"),
    [
        ({"a": "native", "b": "dense"}, "partly", "partly sparse (1 of 2)"),
        ({"a": "unknown", "b": "unknown"}, "unknown", "UNKNOWN"),
        ({}, "unknown", "UNKNOWN"),
        ({"a": "com.microsoft::MatMulNBits"}, "DENSE", "DENSE"),
        ({"a": "dense", "b": "dense"}, "DENSE", "DENSE"),
    ],
)
def test_status_is_what_ran(example: Path, tmp_path: Path, engaged: dict[str, str], state: str, text: str) -> None:
    def change(record: Raw) -> Raw | None:
        if record["record"] == "latency" and record["baseline"]:
            record["engaged"] = engaged
        return only("torch", "2of4")(record)

    found = summary_of(edited(example, tmp_path / "a.jsonl", change))["latency"][1]["status"]
    assert found["state"] == state
    assert found["text"].startswith(text)


def test_what_fewer_bytes_do_not_explain_is_said(example: Path, tmp_path: Path) -> None:
    said = "more than fewer bytes explain: part of it is that the runtime's own dense product is not the best"
    one = edited(example, tmp_path / "one.jsonl", only("torch", "2of4"))
    summary = summary_of(one)
    assert summary["latency"][1]["measures"]["tpot"]["roof_ratio"] == pytest.approx(16 / 9)
    # Roofs of 1.78 to 1 explain 1.54x, those of 1.28 to 1 do not.
    assert said not in summary["verdict"] + markdown.render(summary)

    def near(record: Raw) -> Raw:
        if record["record"] == "latency" and record["baseline"]:
            record["roof"]["tpot_s"] = 0.02 / 1.28
        return record

    more = summary_of(edited(one, tmp_path / "b.jsonl", near))
    assert said in more["verdict"]
    assert said in markdown.render(more)
    # Without a difference shown, and without roofs, there is nothing to explain.
    same = summary_of(edited(tmp_path / "b.jsonl", tmp_path / "c.jsonl", slowed(1 / 0.65)))
    assert said not in same["verdict"]
    bare = summary_of(edited(one, tmp_path / "d.jsonl", lambda r: {**r, "roof": None} if "roof" in r else r))
    assert said not in bare["verdict"]
    assert bare["latency"][1]["measures"]["tpot"]["roof_ratio"] is None


def test_other_work_on_the_machine_is_a_warning(example: Path, tmp_path: Path) -> None:
    def busy(record: Raw) -> Raw:
        if record["record"] == "run":
            record["environment"]["host"]["load_1m"] = 1.1
        return record

    def beyond(record: Raw) -> Raw:
        if record["record"] == "latency" and record["artifact"] == "dense":
            record["roof"]["tpot_s"] = 0.055
        return record

    one = edited(example, tmp_path / "one.jsonl", only("torch", "2of4"))
    assert summary_of(one)["warnings"] == []
    (warning,) = summary_of(edited(one, tmp_path / "b.jsonl", busy))["warnings"]
    assert warning["text"].startswith("Other work ran when it began: load 1.1 on 2 cores.")
    (warning,) = summary_of(edited(one, tmp_path / "c.jsonl", beyond))["warnings"]
    assert warning["text"].startswith("The ceiling was measured too low: other work ran (dense in torch reached 11")
    (record,) = lines_of(tmp_path / "c.jsonl", warning["from"])
    assert record["artifact"] == "dense"


def test_warnings_of_several_runs_name_theirs(example: Path, tmp_path: Path) -> None:
    alone = summary_of(example)["warnings"]
    assert alone
    assert not any("run 1" in warning["text"] for warning in alone)
    other = write_example(tmp_path / "b.jsonl", seed=5, runtimes=("onnxruntime",))
    summary = summary_of(example, other)
    texts = [warning["text"] for warning in summary["warnings"]]
    assert [text.count("(run 1)") + 2 * text.count("(run 2)") for text in texts] == [1, 1, 2, 2]
    # A row is of its artifact; which run it is from stands before it.
    html = page.render(read([example, other]), summary)
    assert '<th scope="row"><span class="line short">2of4</span>' in html
    assert '<th scope="row"><span class="line short">run 1</span>' not in html


def test_few_rounds_and_turns_not_taken_claim_nothing(tmp_path: Path, example: Path) -> None:
    few = summary_of(write_example(tmp_path / "few.jsonl", rounds=5, runtimes=("torch",)))
    values = few["latency"][1]["measures"]["tpot"]
    assert values["comparison"]["claim"] == "too few rounds"
    assert values["comparison"]["low"] is None
    assert values["why_no_claim"] == "5 rounds, 6 are the fewest"
    assert "none is shown to be faster" in few["verdict"]
    assert "cannot be judged in torch (5 rounds, 6 are the fewest)" in few["verdicts"][0]["sentence"]

    def apart(record: Raw) -> Raw:
        return {**record, "interleaved": False} if record["record"] == "latency" else record

    summary = summary_of(edited(example, tmp_path / "apart.jsonl", apart))
    assert {row["measures"]["tpot"]["why_no_claim"] for row in summary["latency"] if row["baseline"]} == {
        "candidate and baseline were not measured in turn"
    }
    assert "none is shown to be faster" in summary["verdict"]


def test_other_prompts_are_not_compared(tmp_path: Path, example: Path) -> None:
    def change(record: Raw) -> Raw:
        return {**record, "trace_sha256": "0" * 64} if record.get("baseline") == "dense" else record

    summary = summary_of(edited(example, tmp_path / "a.jsonl", change))
    for row in summary["latency"]:
        assert row["measures"]["tpot"]["comparison"] is None
    assert "cannot be compared in torch (dense was not measured in this scenario)" in summary["verdicts"][0]["sentence"]


def test_another_text_gives_no_increase(tmp_path: Path, example: Path) -> None:
    def change(record: Raw) -> Raw | None:
        if record["record"] == "perplexity" and record["artifact"] == "2of4":
            record["text"]["sha256"] = "0" * 64
        return only("torch", "2of4")(record)

    summary = summary_of(edited(example, tmp_path / "a.jsonl", change))
    row = summary["accuracy"]["perplexity"][1]
    assert (row["increase"], row["why_no_increase"]) == (
        None,
        "not the same windows of the same text as its baseline's",
    )
    assert "its cost in accuracy was not measured" in summary["verdict"]


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
    assert rows[0][3:5] == ["▲", "1.54x"]
    assert rows[0][-3:] == ["+44", "%", "0.84x"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    report_command([example])
    assert "\x1b[1;31mDENSE" in capsys.readouterr().out


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


def test_documented_record_is_one_and_every_kind_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    section = text.split("## Records of measurements", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("{")]
    assert lines
    for line in lines:
        check(json.loads(line), "docs/formats.md")
    documented = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert documented >= {*KINDS}
    keys = {key for line in section.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line)}
    assert summary_keys() <= keys


def summary_keys() -> set[str]:
    nothing = summarise(Records((), ()))
    return set(nothing) - {"format"}
