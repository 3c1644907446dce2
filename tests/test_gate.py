"""Gate: what every rule is held against, and never a pass on nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.records import Record, Records, read, writer
from sparsify.errors import UsageError
from sparsify.report import rules
from sparsify.report.asked import Selection
from sparsify.report.gate import gate
from sparsify.report.pairs import counterpart
from sparsify.report.summary import summarise
from tests.bench_records import ARTIFACTS, SCENARIOS, write_run
from tests.gating import EVERYTHING, changed, edited, held, passes, without


@pytest.mark.parametrize("rule", EVERYTHING, ids=lambda rule: rule.text)
def test_rules_are_met_by_the_example(records: Records, rule: rules.Rule) -> None:
    # vLLM gives no KL divergence.
    found = held(records, rule, runtimes=("torch",) if rule.kind == "kl" else ())
    assert all(each.passed for each in found), [each.sentence() for each in found if not each.passed]
    candidates = {name for name, (pattern, *_) in ARTIFACTS.items() if pattern}
    assert {each.artifact for each in found} == candidates
    for each in found:
        assert each.measured is not None
        assert each.source.split(":")[-1].isdigit()
    # Of three scenarios two multiply as many tokens at a time.
    per_runtime = {"speedup": 2 * len(SCENARIOS) * 2, "sparse": 2 * 2 * 2, "kl": 2, "file": 2}.get(rule.kind, 4)
    assert len(found) == per_runtime


@pytest.mark.parametrize("rule", EVERYTHING, ids=lambda rule: rule.text)
def test_no_rule_passes_on_nothing(records: Records, rule: rules.Rule) -> None:
    run_only = edited(records, lambda record: record if record["record"] in ("run", "end") else None)
    baseline = edited(records, lambda record: record if record.get("artifact") in (None, "dense") else None)
    bare = edited(records, lambda record: record if record["record"] in ("run", "artifact", "end") else None)
    for less in (run_only, baseline):
        (finding,) = held(less, rule)
        assert not finding.passed
        assert "no candidate" in finding.sentence()
    if rule.kind != "file":
        found = held(bare, rule)
        assert {each.artifact for each in found} == {"2of4", "half"}
        assert not any(each.passed for each in found)
    # One of two candidates without records of it is enough.
    kinds = ("latency", "memory", "perplexity", "task", "artifact")
    half = edited(
        records,
        lambda record: None if record.get("artifact") == "half" and record["record"] in kinds[:4] else record,
    )
    failed = [each for each in held(half, rule) if not each.passed and "no KL divergence" not in each.why]
    assert [each.artifact for each in failed] == ([] if rule.kind == "file" else ["half"])


@pytest.mark.parametrize("rule", [rule for rule in EVERYTHING if rule.kind != "file"], ids=lambda rule: rule.text)
def test_a_named_runtime_needs_records(records: Records, rule: rules.Rule) -> None:
    kind = {"speedup": "latency", "sparse": "latency", "kl": "perplexity"}.get(rule.kind, rule.kind)
    less = without(records, kind, runtime="vllm")
    if rule.kind == "sparse":
        less = edited(less, lambda record: None if record.get("runtime") == "vllm" and "engaged" in record else record)
    found = gate(less, [rule], Selection(runtimes=("torch", "vllm")))
    assert [each.runtime for each in found if not each.passed] == ["vllm"]
    assert passes(less, rule, runtimes=("torch",))


def test_artifacts_and_runtimes_that_were_both_named_are_held_in_pairs(records: Records) -> None:
    both = {"artifacts": ("2of4", "half"), "runtimes": ("torch", "vllm")}
    for rule in EVERYTHING:
        kind = {"speedup": "latency", "sparse": "latency", "kl": "perplexity"}.get(rule.kind, rule.kind)

        def lack(record: Record, kind: str = kind, rule: rules.Rule = rule) -> Record | None:
            theirs = (record.get("artifact"), record.get("runtime")) == ("half", "vllm")
            gone = record["record"] == kind or (rule.kind == "sparse" and "engaged" in record)
            return None if theirs and gone else record

        less = edited(records, lack)
        failed = [each for each in held(less, rule, **both) if not each.passed and "no KL" not in each.why]
        assert [(each.artifact, each.runtime) for each in failed] == ([] if rule.kind == "file" else [("half", "vllm")])
        assert all("not held: no record" in each.why for each in failed)
    # What the runtime cannot open was not to be expected there.
    graph = changed(less, "artifact", "half", lambda record: record.update(kind="onnx"))
    assert not [each for each in held(graph, rules.perplexity("50%"), **both) if not each.passed]


def test_memory_and_files(records: Records) -> None:
    dense, pruned = (ARTIFACTS[name][2] for name in ("dense", "2of4"))
    files, memory = (pruned + 4e6) / (dense + 4e6), (pruned + 4e8) / (dense + 4e8)
    for option, value in (("--max-file-ratio", files), ("--max-memory-ratio", memory)):
        assert passes(records, rules.ratio(option, f"{value + 1e-9:.12f}"))  # type: ignore[arg-type]
        assert not passes(records, rules.ratio(option, f"{value - 1e-9:.12f}"))  # type: ignore[arg-type]
    gpu = edited(
        records,
        lambda r: {**r, "device_peak_bytes": 10 if r["artifact"] == "dense" else 5} if r["record"] == "memory" else r,
    )
    found = held(gpu, rules.ratio("--max-memory-ratio", "0.5"))
    assert all(each.passed and each.measured == 0.5 and "device" in each.shown for each in found)


def test_unfinished_runs(records: Records) -> None:
    assert passes(records, rules.FINISHED)
    (finding,) = held(without(records, "end"), rules.FINISHED)
    assert "interrupted" in finding.sentence()
    failure = {
        "format": 1, "record": "missing", "run": records.lines[0]["run"], "time": "", "what": "half in vllm",
        "why": "its process died", "failed": True, "artifact": "half", "runtime": "vllm", "scenario": None,
    }  # fmt: skip

    def broken(**changes: Any) -> Records:
        return Records((*records.lines, {**failure, **changes}), (*records.sources, "r.jsonl:77"))

    (finding,) = held(broken(), rules.FINISHED)
    assert not finding.passed
    assert finding.source == "r.jsonl:77"
    assert "half, vllm: half in vllm failed: its process died" in finding.sentence()
    assert passes(broken(), rules.FINISHED, artifacts=("2of4",))
    assert passes(broken(), rules.FINISHED, runtimes=("torch",))
    # A baseline, and the run as a whole, concern everything.
    assert not passes(broken(artifact="dense"), rules.FINISHED, artifacts=("2of4",))
    assert not passes(broken(artifact=None, runtime=None), rules.FINISHED, artifacts=("2of4",), runtimes=("torch",))
    assert passes(broken(failed=False), rules.FINISHED)
    counted = edited(records, lambda record: {**record, "failed": 1} if record["record"] == "end" else record)
    assert not passes(counted, rules.FINISHED)


def test_measurements_of_several_runs_complete_each_other(tmp_path: Path, records: Records) -> None:
    """Latency of one run and accuracy of another, of the same artifacts; not of others under their names."""
    with writer(tmp_path / "two.jsonl") as out:
        write_run(out, seed=5, rounds=6, runtimes=("torch",))
    other = read([tmp_path / "two.jsonl"])
    latency = edited(records, lambda r: None if r["record"] in ("perplexity", "task", "memory", "kernel") else r)
    accuracy = without(other, "latency")
    both = Records(latency.lines + accuracy.lines, latency.sources + accuracy.sources)
    asked = [rules.speedup("1.1"), rules.perplexity("50%")]
    assert all(each.passed for each in gate(both, asked, Selection()))
    foreign = changed(accuracy, "artifact", "half", lambda record: record.update(sha256="0" * 64))
    both = Records(latency.lines + foreign.lines, latency.sources + foreign.sources)
    failed = [each for each in gate(both, asked, Selection()) if not each.passed]
    assert [(each.rule[:13], each.artifact) for each in failed] == [
        ("--min-speedup", "half"),
        ("--max-ppl-inc", "half"),
    ]


def test_report_and_gate_say_the_same(records: Records) -> None:
    """Every figure that a rule was held against stands in report.json, and nothing is shown that is not claimed."""
    report = summarise(records)
    figures = set(numbers(report))
    for rule in (rules.speedup("1.1"), rules.speedup("ttft=1.1"), rules.perplexity("5%"), rules.kl("1"),
                 rules.task("arc_easy:acc=-1"), rules.ratio("--max-file-ratio", "1"),
                 rules.ratio("--max-memory-ratio", "1")):  # fmt: skip
        found = held(records, rule)
        assert found
        for each in found:
            unknown = rule.kind == "kl" and each.runtime == "vllm"
            assert unknown or each.measured in figures, each.sentence()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


def test_counterparts_are_of_the_same_runtime(records: Records) -> None:
    for kind in ("memory", "perplexity"):
        for record in records.of(kind):
            dense = counterpart(records, record)
            assert dense is not None
            assert (dense["artifact"], dense["runtime"]) == ("dense", record["runtime"])


def test_selecting_what_is_not_there(records: Records) -> None:
    for selection, words in (
        (Selection(artifacts=("dense",)), "--artifact dense: no candidate has that name; there are 2of4, half"),
        (Selection(artifacts=("x*",)), "--artifact x\\*: no candidate"),
        (Selection(runtimes=("tensorrt",)), "--runtime tensorrt: the records have none of it; there are torch, vllm"),
    ):
        with pytest.raises(UsageError, match=words):
            gate(records, EVERYTHING, selection)
    assert {each.artifact for each in held(records, rules.speedup("1.1"), artifacts=("2*",))} == {"2of4"}
