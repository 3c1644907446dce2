"""The report: every figure again, with NumPy and SciPy, from the raw lines that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sparsify.report import markdown
from tests.reporting import RUNTIMES, Raw, edited, lines_of, summary_of


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
            ratios = [np.array([(mine[i] / each[i]) ** better for i in sorted(base)]) for each in (base, repeated)]
            noise = np.array([(repeated[i] / base[i]) ** better for i in sorted(base)])
            lows, highs = zip(*(interval(each) or (np.nan, np.nan) for each in ratios), strict=True)
            low = min(lows)
            found = values["comparison"]
            assert found["ratio"] == pytest.approx(min(np.median(each) for each in ratios))
            assert (found["low"], found["high"]) == pytest.approx((low, max(highs)))
            noise_low, noise_high = interval(noise) or (np.nan, np.nan)
            reach = max(noise_high, 1 / noise_low)
            assert found["noise_high"] == pytest.approx(reach)
            assert found["n"] == 7
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
