"""Gate: how many of the pruned linears ran sparse, by the names of what ran."""

from __future__ import annotations

from functools import partial

import pytest

from sparsify.bench.engaged import ran_sparse, reads_packed, runs_sparse
from sparsify.bench.records import Record, Records
from sparsify.report import rules
from tests.gating import changed, held, passes, without


def test_sparse_linears(records: Records) -> None:
    one_dense = changed(
        records, "latency", "half", lambda record: record["engaged"].update({"model.layers.0.mlp.down_proj": "dense"})
    )
    found = held(one_dense, rules.sparse("100%"))
    # One for each runtime and number of tokens at a time.
    assert sorted((each.artifact, each.scenario, each.measured) for each in found) == [
        (artifact, scenario, share)
        for artifact, share in (("2of4", 1.0), ("half", 0.5))
        for scenario in ("128+32x1", "128+32x8")
        for _ in ("torch", "vllm")
    ]
    assert passes(one_dense, rules.sparse("50%"))
    # What each new token took decides; a prompt of that many may run dense.
    for kernel, share in (("native+dense:9-", "100%"), ("native+expanded:8-", "50%"), ("native+dense:1-1", "50%")):

        def partly(record: Record, kernel: str = kernel) -> None:
            record["engaged"].update({"model.layers.0.mlp.down_proj": kernel})

        some = changed(records, "latency", "half", partly)
        assert passes(some, rules.sparse(share))
        assert share == "100%" or not passes(some, rules.sparse("100%"))
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
        ("SparseSemiStructuredTensorCUTLASS", True), ("native+packed", False), ("packed", False), ("", False),
        ("native+dense:513-", True), ("native+dense:2-", True), ("native+expanded:65-", True),
        ("native+expanded:1-", False), ("native+dense:3-+expanded:1-2", False), ("native+expanded:2-", True),
        ("packed | native", False), ("native+dense", False), ("native, expanded", False),
        ("dense", False), ("dense+native", False), ("dense | native", False),
        ("native | native+dense:513-", True), ("unknown (TensorRT EP)", False), ("native+unknown", False),
        ("com.microsoft::MatMulNBits bits=8", False), ("triton, expanded", False),
    ],
)  # fmt: skip
def test_which_kernels_are_sparse(kernel: str, sparse: bool) -> None:
    assert runs_sparse(kernel) is sparse


@pytest.mark.parametrize(
    ("kernel", "sparse"),
    [
        ("native", {1, 2, 32, 512, 513}), ("native+dense:513-", {1, 2, 32, 512}), ("native+dense:1-1,33-", {2, 32}),
        ("native | native+dense:2-", {1}), ("dense | native", set()), ("native+dense:many", set()),
        ("native+dense:2-32+expanded:513-", {1, 512}), ("triton+expanded:65-", {1, 2, 32}), ("packed", set()),
    ],
)  # fmt: skip
def test_for_how_many_tokens_a_kernel_is_sparse(kernel: str, sparse: set[int]) -> None:
    assert {n for n in (1, 2, 32, 512, 513) if runs_sparse(kernel, n)} == sparse


@pytest.mark.parametrize(
    ("kernel", "packed"),
    [
        ("native", True), ("packed", True), ("triton, expanded", True), ("native+expanded:1-", True), ("", False),
        ("native+dense:2-", True), ("native+dense:1-", False), ("dense", False), ("dense | native", False),
        ("unknown", False), ("com.microsoft::MatMulNBits", False),
    ],
)  # fmt: skip
def test_which_weights_are_read_without_their_zeros(kernel: str, packed: bool) -> None:
    assert reads_packed(kernel) is packed


def test_scenarios_are_judged_one_by_one_in_any_order(records: Records) -> None:
    """With 8 rows at a time it runs dense, and with one it does not."""
    some = records
    for name in ("2of4", "half"):
        engaged = dict.fromkeys(records.of("latency")[1]["engaged"], "native+dense:8-")
        some = changed(some, "latency", name, partial(dict.update, engaged=engaged))
    turned = Records(some.lines[::-1], some.sources[::-1])
    for each in (some, turned):
        found = held(each, rules.sparse("100%"))
        assert {(one.scenario[-2:], one.passed) for one in found} == {("x1", True), ("x8", False)}
        assert not passes(each, rules.sparse("1%"))
    one_token = changed(some, "latency", "half", lambda record: record["scenario"].update(new_tokens=1, batch=1))
    # Of one new token what ran for the prompt decides.
    assert {one.passed for one in held(one_token, rules.sparse("1%"), artifacts=("half",))} == {False}


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
    assert [each.artifact for each in failed] == ["half"] * 4
    assert all("unknown: of 1 of its 2 pruned linears" in each.why for each in failed)
    head = changed(records, "latency", "half", lambda record: record["engaged"].update(lm_head="dense"))
    assert passes(head, rules.sparse("100%"))
