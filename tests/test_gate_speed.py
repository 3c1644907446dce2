"""Gate: speedups are those of rounds in turn with the baseline, and only what is shown passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsify.bench.records import Record, Records, read, writer
from sparsify.report import rules
from sparsify.report.pairs import Measure, comparison, pairs, scenario_name, why_not
from tests.bench_records import ARTIFACTS, write_example, write_run
from tests.gating import changed, edited, held, passes, without


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
        twin = [each for each in pair.baseline["rounds"] if each["again"]]
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
            expected = [np.median([of(a) / of(b) for a, b in zip(each, mine, strict=True)]) for each in (base, twin)]
            assert found.ratio == pytest.approx(min(expected))
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
    paths = [tmp_path / f"{seed}.jsonl" for seed in range(6)]
    for seed, path in enumerate(paths):
        with writer(path) as out:
            write_run(out, seed=seed, rounds=7, runtimes=("onnxruntime",))
    records = read(paths)
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
        unasked = changed(dense, "latency", "half", lambda record: record.update(asked_sparse=False))
        found = held(unasked, rules.speedup("1.1"), artifacts=("half",))
        assert {each.why for each in found} == {"not shown (ran dense, as asked)"}
        # A dense model in 8 bits, say, was not pruned.
        assert passes(
            changed(unasked, "artifact", "half", lambda record: record.update(linears=0)), rules.speedup("1.1")
        )


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


def test_what_ran_for_the_prompt_decides_the_time_to_the_first_token(records: Records) -> None:
    engaged = dict.fromkeys(records.of("latency")[1]["engaged"], "native+expanded:65-")
    many = changed(records, "latency", "half", lambda record: record.update(engaged=engaged))
    for measure in ("tpot", "total"):
        assert passes(many, rules.speedup(f"{measure}=1.1"))
    assert not passes(many, rules.speedup("ttft=1.1"), artifacts=("half",))

    def one(record: Record) -> None:
        record["scenario"]["new_tokens"] = 1
        for each in record["rounds"]:
            each.update(gaps_s=[[] for _ in each["gaps_s"]], total_s=max(each["ttft_s"]))

    # With one new token there is nothing but the prompt.
    for name in ("dense", "half"):
        many = changed(many, "latency", name, one)
    for measure in ("ttft", "total", "throughput"):
        found = held(many, rules.speedup(f"{measure}=1.1"), artifacts=("half",))
        assert {each.why for each in found} == {"not shown (no sparse kernel is known to have run)"}


def test_times_that_no_clock_tells_are_no_speedup(records: Records) -> None:
    def frozen(record: Record) -> None:
        for each in record["rounds"]:
            each["ttft_s"] = [0] * len(each["ttft_s"])

    less = changed(records, "latency", "2of4", frozen)
    found = held(less, rules.speedup("ttft=1.1"), artifacts=("2of4",))
    assert len(found) == 6
    assert not any(each.passed for each in found)
    assert "no ttft that its clock could tell" in found[0].sentence()
