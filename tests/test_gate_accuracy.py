"""Gate: perplexity, divergence and tasks, with the uncertainty of what was paired and of what was not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy import stats

from sparsify.bench.records import Record, Records
from sparsify.report import rules
from tests.bench_records import ARTIFACTS
from tests.gating import changed, edited, held, passes


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
