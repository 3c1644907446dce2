"""Gate: every rule against records whose figures are known, and never a pass on nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from sparsify.bench.engaged import runs_sparse
from sparsify.bench.records import Record, Records, read, writer
from sparsify.errors import GateError, MeasurementError, SparsifyError, UsageError
from sparsify.gate_command import gate_command
from sparsify.report import rules
from sparsify.report.asked import Finding, Selection
from sparsify.report.gate import gate
from sparsify.report.pairs import (
    Measure,
    comparison,
    counterpart,
    pairs,
    ran_sparse,
    scenario_name,
    why_not,
)
from sparsify.report.summary import summarise
from tests.bench_records import ARTIFACTS, SCENARIOS, write_example, write_run

EVERYTHING = [
    rules.speedup("1.2"),
    rules.speedup("tpot=1.2"),
    rules.perplexity("50%"),
    rules.perplexity("6"),
    rules.kl("0.5"),
    rules.task("arc_easy:acc=-0.2"),
    rules.task("arc_easy=0.3"),
    rules.ratio("--max-memory-ratio", "0.9"),
    rules.ratio("--max-file-ratio", "70%"),
    rules.sparse("100%"),
]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("gate") / "r.jsonl")


@pytest.fixture(scope="module")
def records(example: Path) -> Records:
    return read([example])


Edit = Callable[[Record], Record | None]


def edited(records: Records, edit: Edit) -> Records:
    """The records after ``edit``, which is given a copy of each; without those it makes None."""
    kept = []
    for line, source in zip(records.lines, records.sources, strict=True):
        new = edit(json.loads(json.dumps(line)))
        if new is not None:
            kept.append((new, source))
    return Records(*map(tuple, zip(*kept, strict=True))) if kept else Records((), ())


def without(records: Records, kind: str, **keys: Any) -> Records:
    def drop(record: Record) -> Record | None:
        return None if record["record"] == kind and all(record[k] == v for k, v in keys.items()) else record

    return edited(records, drop)


def changed(records: Records, kind: str, artifact: str, change: Callable[[Record], object]) -> Records:
    count = 0

    def edit(record: Record) -> Record:
        nonlocal count
        if record["record"] == kind and record["artifact"] == artifact:
            change(record)
            count += 1
        return record

    found = edited(records, edit)
    assert count
    return found


def held(records: Records, rule: rules.Rule, **selection: Any) -> list[Finding]:
    found = gate(records, [rule], Selection(**selection))
    assert found, "a rule without a finding passes on nothing"
    return found


def passes(records: Records, rule: rules.Rule, **selection: Any) -> bool:
    return all(each.passed for each in held(records, rule, **selection))


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
    per_runtime = {"speedup": 2 * len(SCENARIOS) * 2, "kl": 2, "file": 2}.get(rule.kind, 4)
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


def test_no_baseline_no_speedup(records: Records) -> None:
    for less, why in (
        (without(records, "latency", artifact="dense"), "dense was not measured in this scenario"),
        (changed(records, "latency", "dense", lambda r: r.update(trace_sha256="0" * 64)), "dense was not measured"),
        (
            changed(records, "latency", "dense", lambda r: [x.update(round=x["round"] + 90) for x in r["rounds"]]),
            "no round",
        ),
        (edited(records, lambda r: {**r, "baseline": None} if "baseline" in r else r), "names no baseline"),
    ):
        found = held(less, rules.speedup("0.1"))
        assert len(found) == 12
        assert not any(each.passed for each in found)
        assert all(why in each.why for each in found)
        assert pairs(less) == []
        assert len(why_not(less)) == 12


def test_a_baseline_that_is_there_twice_is_none(records: Records) -> None:
    dense = records.of("latency")[0]
    assert dense["artifact"] == "dense"
    twice = Records((*records.lines, {**dense}), (*records.sources, "r.jsonl:999"))
    assert [each.why for each in why_not(twice)] == ["dense was 2 times measured in this scenario"] * 2


def test_speedups_are_those_of_the_rounds(records: Records) -> None:
    for pair in pairs(records):
        base = [each for each in pair.baseline["rounds"] if not each["again"]]
        mine = pair.candidate["rounds"]
        assert [each["round"] for each in base] == [each["round"] for each in mine]
        seconds: dict[Measure, Callable[[Record], Any]] = {
            "ttft": lambda r: np.median(r["ttft_s"]),
            "tpot": lambda r: np.median(np.concatenate(r["gaps_s"])),
            "total": lambda r: r["total_s"],
            # As many tokens in both.
            "throughput": lambda r: r["total_s"],
        }
        for measure, of in seconds.items():
            found = comparison(pair, measure)
            assert found is not None
            expected = np.median([of(a) / of(b) for a, b in zip(base, mine, strict=True)])
            assert found.ratio == pytest.approx(expected)
            assert found.claim == "faster"
            relative = ARTIFACTS[pair.candidate["artifact"]][1]
            assert found.ratio == pytest.approx(1 / relative, rel=0.05)


@pytest.mark.parametrize("measure", ["total", "ttft", "tpot", "throughput"])
def test_a_limit_at_what_was_measured(records: Records, measure: str) -> None:
    found = held(records, rules.speedup(f"{measure}=1.01"), artifacts=("2of4",))
    least = min(each.measured for each in found if each.measured)
    assert passes(records, rules.speedup(f"{measure}={least:.17g}"), artifacts=("2of4",))
    above = held(records, rules.speedup(f"{measure}={math.nextafter(least, 9):.17g}"), artifacts=("2of4",))
    assert [each.measured for each in above if not each.passed] == [least]


def test_a_speedup_within_noise_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with writer(path) as out:
        write_run(out, seed=0, rounds=7, runtimes=("onnxruntime",))
    records = read([path])
    ratios = [each.measured or 0 for each in held(records, rules.speedup("0.5"))]
    lucky = max(ratios)
    assert lucky > 1
    # Some point estimates are above 1, and none is more than noise.
    rule = rules.speedup("1.0001")
    found = held(records, rule)
    assert not any(each.passed for each in found)
    shown = [each for each in found if each.measured and each.measured > 1.0001]
    assert shown
    for each in shown:
        assert "not shown" in each.sentence()
    allowed = held(records, rule, claim=False)
    assert [each.passed for each in allowed] == [(each.measured or 0) >= 1.0001 for each in allowed]
    # Not slower than so much asks for no claim.
    assert passes(records, rules.speedup("0.95"))


def test_too_few_rounds_and_rounds_not_in_turn_show_nothing(tmp_path: Path, records: Records) -> None:
    few = read([write_example(tmp_path / "few.jsonl", rounds=5)])
    apart = changed(records, "latency", "2of4", lambda record: record.update(interleaved=False))
    for less, claim in ((few, "too few rounds"), (apart, "not in turn")):
        found = held(less, rules.speedup("1.1"), artifacts=("2of4",))
        assert not any(each.passed for each in found)
        assert all(f"not shown ({claim})" in each.why for each in found)
        assert passes(less, rules.speedup("1.1"), artifacts=("2of4",), claim=False)
    assert not passes(few, rules.speedup("0.5"), confident=True)


def test_what_ran_dense_has_no_speedup_to_show(records: Records) -> None:
    ran: tuple[dict[str, str], ...] = ({"a.down_proj": "dense"}, {"a": "unknown (TensorRT EP)"}, {})
    for engaged in ran:
        dense = changed(records, "latency", "half", partial(dict.update, engaged=engaged))
        found = held(dense, rules.speedup("1.1"))
        assert {each.artifact for each in found if not each.passed} == {"half"}
        assert all("no sparse kernel" in each.why for each in found if not each.passed)
        assert passes(dense, rules.speedup("1.1"), claim=False)
        # A dense model in 8 bits, say, was not to run sparse.
        unasked = changed(dense, "latency", "half", lambda record: record.update(asked_sparse=False))
        assert passes(unasked, rules.speedup("1.1"))


def test_scenarios_are_chosen_by_glob(records: Records) -> None:
    assert len(held(records, rules.speedup("tpot@128+32x8=1.1"))) == 4
    assert len(held(records, rules.speedup("@128+*=1.1"))) == 8
    found = held(records, rules.speedup("@*x64=1.1"))
    assert {each.artifact for each in found} == {"2of4", "half"}
    assert not any(each.passed for each in found)
    assert "128+32x1, 512+32x1, 128+32x8" in found[0].sentence()
    served = changed(records, "latency", "half", lambda record: record["scenario"].update(load="concurrency"))
    assert scenario_name(served.of("latency")[2]["scenario"]) == "128+32c1"


def test_one_new_token_has_no_time_between_tokens(records: Records) -> None:
    def one(record: Record) -> Record:
        if record["record"] == "latency" and record["scenario"]["prompt_tokens"] == 512:
            record["scenario"]["new_tokens"] = 1
            for each in record["rounds"]:
                each["gaps_s"] = [[] for _ in each["gaps_s"]]
        return record

    less = edited(records, one)
    assert len(held(less, rules.speedup("tpot=1.1"))) == 8
    assert len(held(less, rules.speedup("ttft=1.1"))) == 12
    only = edited(less, lambda r: None if r.get("scenario") and r["scenario"]["prompt_tokens"] != 512 else r)
    assert not any(each.passed for each in held(only, rules.speedup("tpot=1.1")))


def test_times_that_no_clock_tells_are_no_speedup(records: Records) -> None:
    def frozen(record: Record) -> None:
        for each in record["rounds"]:
            each["ttft_s"] = [0] * len(each["ttft_s"])

    less = changed(records, "latency", "2of4", frozen)
    found = held(less, rules.speedup("ttft=1.1"), artifacts=("2of4",))
    assert len(found) == 6
    assert not any(each.passed for each in found)
    assert "no ttft that its clock could tell" in found[0].sentence()


def test_perplexity_is_paired_over_windows(records: Records) -> None:
    increases: list[tuple[rules.Rule, Callable[[float, float], float]]] = [
        (rules.perplexity("1%"), lambda dense, mine: mine / dense - 1),
        (rules.perplexity("0.1"), lambda dense, mine: mine - dense),
    ]
    for rule, of in increases:
        found = held(records, rule, runtimes=("torch",))
        for each in found:
            expected = of(ARTIFACTS["dense"][3], ARTIFACTS[each.artifact][3])
            assert each.measured == pytest.approx(expected)
            assert not each.passed
            confident = next(
                other for other in held(records, rule, runtimes=("torch",), confident=True)
                if other.artifact == each.artifact
            )  # fmt: skip
            assert confident.judged is not None
            assert confident.judged > expected
    found = held(records, rules.perplexity("1%"), artifacts=("half",), runtimes=("torch",), confident=True)
    dense, mine = (
        next(line for line in records.of("perplexity") if line["artifact"] == name and line["runtime"] == "torch")
        for name in ("dense", "half")
    )
    differences = np.subtract(mine["window_nll"], dense["window_nll"])
    ratio = math.exp(differences.mean())
    error = ratio * differences.std(ddof=1) / math.sqrt(len(differences))
    assert found[0].judged == pytest.approx(ratio - 1 + stats.t.ppf(0.975, len(differences) - 1) * error)


def test_absolute_uncertainty_of_perplexity_is_that_of_a_bootstrap(records: Records) -> None:
    rng = np.random.default_rng(0)
    dense_nll, mine_nll = rng.normal(2.5, 0.2, 200), rng.normal(2.8, 0.2, 200)

    def fill(record: Record) -> Record:
        if record["record"] == "perplexity":
            nll = dense_nll if record["artifact"] == "dense" else mine_nll
            record.update(window_nll=list(nll), window_tokens=[64] * 200, perplexity=math.exp(nll.mean()))
        return record

    (finding,) = held(
        edited(records, fill), rules.perplexity("1"), artifacts=("half",), runtimes=("torch",), confident=True
    )
    draws = rng.integers(0, 200, (4000, 200))
    boots = np.exp(mine_nll[draws].mean(1)) - np.exp(dense_nll[draws].mean(1))
    assert finding.judged is not None
    assert finding.measured is not None
    assert (finding.judged - finding.measured) / stats.t.ppf(0.975, 199) == pytest.approx(boots.std(), rel=0.1)


def test_perplexity_of_other_windows_is_not_compared(records: Records) -> None:
    changes: tuple[Callable[[Record], object], ...] = (
        lambda r: r["text"].update(sha256="0" * 64),
        lambda r: r.update(window_tokens=[510] * 8),
    )
    for change in changes:
        less = changed(records, "perplexity", "dense", change)
        found = held(less, rules.perplexity("900%"))
        assert not any(each.passed for each in found)
        assert "same windows" in found[0].why


def test_a_perplexity_beyond_numbers_fails(records: Records) -> None:
    huge = changed(
        records, "perplexity", "half", lambda r: r.update(window_nll=[2000.0] * 8, nll_mean=2000.0, perplexity=1e308)
    )
    found = held(huge, rules.perplexity("5%"), artifacts=("half",))
    assert not any(each.passed for each in found)
    assert "larger than a number can be" in found[0].why
    json.dumps([each.to_dict() for each in held(huge, rules.perplexity("5"), artifacts=("half",))], allow_nan=False)


def test_one_window_has_no_uncertainty(records: Records) -> None:
    def one(record: Record) -> Record:
        if record["record"] == "perplexity":
            record["text"]["windows"] = 1
            record.update(window_nll=[math.log(record["perplexity"])], window_tokens=[511], n_tokens=511)
        return record

    less = edited(records, one)
    assert passes(less, rules.perplexity("50%"))
    found = held(less, rules.perplexity("50%"), confident=True)
    assert not any(each.passed for each in found)
    assert "no interval" in found[0].why


def test_divergence(records: Records) -> None:
    torch = partial(passes, records, runtimes=("torch",))
    assert torch(rules.kl("0.3"))
    assert not torch(rules.kl("0.29"))
    # 0.3 and Student's t of 8 windows times 0.02.
    assert not torch(rules.kl("0.347"), confident=True)
    assert torch(rules.kl("0.348"), confident=True)
    # vLLM gives no logits: the rule is not met by PyTorch's figure.
    for selection in ({"runtimes": ("vllm",)}, {}):
        failed = [each for each in held(records, rules.kl("0.5"), **selection) if not each.passed]
        assert [each.artifact for each in failed] == ["2of4", "half"]
        assert all(each.runtime == "vllm" and "it has no KL divergence" in each.why for each in failed)


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


def test_confidence_is_that_of_few_samples(records: Records) -> None:
    def cut(record: Record) -> Record:
        if record["record"] == "perplexity":
            record.update(
                window_nll=record["window_nll"][:4], window_tokens=record["window_tokens"][:4], n_tokens=4 * 511
            )
        return {**record, "n": 4} if record["record"] == "task" else record

    few = edited(records, cut)
    for rule in (rules.perplexity("900%"), rules.kl("9"), rules.task("arc_easy=0"), rules.task("arc_easy=-0.9")):
        assert passes(few, rule, runtimes=("torch",))
        found = held(few, rule, runtimes=("torch",), confident=True)
        assert not any(each.passed for each in found)
        assert all("fewer than 5 samples" in each.why for each in found)


def _update(keys: Record, record: Record) -> None:
    record.update(keys)


def test_tasks(records: Records) -> None:
    # 0.4 and 0.5, standard errors 0.03 each; of the paired difference 0.0309, with 30 questions lost and 10 gained.
    assert passes(records, rules.task("arc_easy:acc=-0.11"))
    assert not passes(records, rules.task("arc_easy:acc=-0.09"))
    assert not passes(records, rules.task("arc_easy:acc=+0"))
    assert passes(records, rules.task("arc_easy:acc=-0.161"), confident=True)
    assert not passes(records, rules.task("arc_easy:acc=-0.16"), confident=True)
    for lacking in ({"samples": None}, {"samples": [0.5] * 100}):
        unpaired = changed(records, "task", "dense", partial(_update, lacking))
        assert passes(unpaired, rules.task("arc_easy:acc=-0.19"), confident=True)
        assert not passes(unpaired, rules.task("arc_easy:acc=-0.18"), confident=True)
        assert "(unpaired)" in held(unpaired, rules.task("arc_easy:acc=-0.1"))[0].shown
    assert "unpaired" not in held(records, rules.task("arc_easy:acc=-0.1"))[0].shown
    assert passes(records, rules.task("arc_easy:acc=0.4"))
    assert not passes(records, rules.task("arc_easy:acc=0.41"))
    assert not passes(records, rules.task("arc_easy:acc=0.4"), confident=True)
    for other in ("piqa", "arc_easy:acc_norm", "arc:acc"):
        assert not passes(records, rules.task(f"{other}=-9"))
    samples = changed(records, "task", "dense", lambda record: record.update(samples_sha256="0" * 64))
    assert not passes(samples, rules.task("arc_easy:acc=-0.9"))
    assert passes(samples, rules.task("arc_easy:acc=0.4"))


def test_tasks_where_less_is_better(records: Records) -> None:
    def turn(record: Record) -> Record:
        return {**record, "higher_is_better": False} if record["record"] == "task" else record

    turned = edited(records, turn)
    # 0.4 against 0.5 is an improvement here.
    assert passes(turned, rules.task("arc_easy:acc=+0.09"))
    assert not passes(turned, rules.task("arc_easy:acc=+0.11"))
    assert passes(turned, rules.task("arc_easy:acc=0.41"))
    assert not passes(turned, rules.task("arc_easy:acc=0.39"))
    assert not passes(turned, rules.task("arc_easy:acc=0.41"), confident=True)


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


def test_sparse_linears(records: Records) -> None:
    one_dense = changed(
        records, "latency", "half", lambda record: record["engaged"].update({"model.layers.0.mlp.down_proj": "dense"})
    )
    found = held(one_dense, rules.sparse("100%"))
    assert sorted((each.artifact, each.measured) for each in found) == [
        ("2of4", 1.0), ("2of4", 1.0), ("half", 0.5), ("half", 0.5)
    ]  # fmt: skip
    assert passes(one_dense, rules.sparse("50%"))
    # What was timed decides; where nothing was timed, what else ran.
    assert passes(without(one_dense, "latency"), rules.sparse("100%"))
    nothing = changed(without(records, "latency"), "artifact", "half", lambda record: record.update(linears=0))
    assert "nothing in it was pruned" in [each.why for each in held(nothing, rules.sparse("1%"))]
    for kinds in ("latency", "memory", "perplexity", "task"):
        records = changed(records, kinds, "half", lambda record: record.update(engaged={}))
    assert "unknown: of 0 of its 2" in " ".join(each.why for each in held(records, rules.sparse("1%")))


@pytest.mark.parametrize(
    ("kernel", "sparse"),
    [
        ("native", True), ("cusparselt", True), ("native (on the CPU)", True), ("sparse in decode (sm90_spgemm)", True),
        ("SparseSemiStructuredTensorCUTLASS", True), ("native+packed", True),
        ("dense", False), ("dense+native", False), ("unknown (TensorRT EP)", False), ("native+unknown", False),
        ("com.microsoft::MatMulNBits bits=8", False), ("triton, expanded", False),
    ],
)  # fmt: skip
def test_which_kernels_are_sparse(kernel: str, sparse: bool) -> None:
    assert runs_sparse(kernel) is sparse


def test_what_ran_of_what_was_pruned() -> None:
    # The head is dense in every model and was never pruned.
    assert ran_sparse({"a": "native", "b": "native", "lm_head": "dense"}, 2) == (2, 2)
    assert ran_sparse({"a": "native", "lm_head": "dense"}, 2) == (1, 1)
    # Fused linears count as those that they are made of, but not where the model itself stores them so.
    fused = {f"{i}.{name}": "native" for i in range(30) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    assert ran_sparse(fused, 210) == (210, 210)
    assert ran_sparse({**fused, "3.qkv_proj": "dense"}, 210) == (207, 210)
    assert ran_sparse({**fused, "3.down_proj": "dense"}, 120) == (119, 120)
    # What is not named, or not known, did not run sparse.
    assert ran_sparse({"a": "native"}, 210) == (1, 1)
    assert ran_sparse({"a": "native", "b": "unknown (TensorRT EP)", "c": "native+unknown"}, 3) == (1, 1)
    assert ran_sparse({}, 5) == (0, 0)


def test_what_is_not_named_did_not_run_sparse(records: Records) -> None:
    one = changed(records, "latency", "half", lambda record: record["engaged"].pop("model.layers.0.mlp.down_proj"))
    failed = [each for each in held(one, rules.sparse("1%")) if not each.passed]
    assert [each.artifact for each in failed] == ["half"] * 2
    assert all("unknown: of 1 of its 2 pruned linears" in each.why for each in failed)
    head = changed(records, "latency", "half", lambda record: record["engaged"].update(lm_head="dense"))
    assert passes(head, rules.sparse("100%"))


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


def test_command_that_passes(sparsify_gate: Ran, example: Path) -> None:
    code, out, error = sparsify_gate(example, "--min-speedup", "1.2", "--max-ppl-increase", "50%", "--json")
    assert (code, error) == (0, "")
    body = json.loads(out)
    assert body["passed"] is True
    assert len(body["findings"]) == 1 + 12 + 4
    assert {each["rule"] for each in body["findings"]} == {
        "--require-finished", "--min-speedup 1.2", "--max-ppl-increase 50%"
    }  # fmt: skip


def test_command_that_fails(sparsify_gate: Ran, example: Path) -> None:
    arguments = (example, "--min-speedup", "tpot=1.2", "--max-ppl-increase", "30%", "--runtime", "torch")
    code, out, error = sparsify_gate(*arguments)
    assert code == 9
    assert error.startswith("--max-ppl-increase 30%: 2of4, torch: +43.94%")
    assert "wanted at most +30%" in error
    assert str(example) in error
    assert out.count("FAIL") == 1
    code, out, error = sparsify_gate(*arguments, "--json")
    assert code == 9
    body = json.loads(out)
    assert body["passed"] is False
    (failed,) = [each for each in body["findings"] if not each["passed"]]
    path, _, line = failed["source"].rpartition(":")
    record = json.loads(Path(path).read_text().splitlines()[int(line) - 1])
    assert (record["record"], record["artifact"], record["runtime"]) == ("perplexity", "2of4", "torch")
    code, _, error = sparsify_gate(example, "--max-kl", "0.1", "--max-ppl-increase", "1%")
    assert code == 9
    assert "; 7 more fail" in error


def test_command_without_rules(sparsify_gate: Ran, example: Path) -> None:
    for arguments in ((), ("--allow-unfinished",), ("--confident",), ("--artifact", "2of4")):
        code, _, error = sparsify_gate(example, *arguments)
        assert code == 2
        assert error.startswith("no rule is given")
    assert sparsify_gate(example, "--require-finished")[0] == 0


def test_command_on_an_interrupted_run(sparsify_gate: Ran, tmp_path: Path) -> None:
    path = write_example(tmp_path / "r.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    code, _, error = sparsify_gate(path, "--min-speedup", "1.1")
    assert code == 9
    assert error.startswith("--require-finished: the run: the run has no end")
    assert sparsify_gate(path, "--min-speedup", "1.1", "--allow-unfinished")[0] == 0


def test_command_on_bad_input(sparsify_gate: Ran, tmp_path: Path, example: Path) -> None:
    assert sparsify_gate(tmp_path / "absent", "--min-speedup", "1.1")[0] == 4
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(example.read_bytes()[:-9])
    code, _, error = sparsify_gate(cut, "--min-speedup", "1.1")
    assert code == 4
    assert "is cut off" in error
    assert sparsify_gate(example, "--min-speedup", "fast")[0] == 2
    assert sparsify_gate(example, "--min-speedup", "1.1", "--runtime", "onnx")[0] == 2
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
