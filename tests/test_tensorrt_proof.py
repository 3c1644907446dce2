"""Logs and inspector output of every TensorRT version, and what is concluded from them."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_engine import PROOF
from sparsify.exporters.tensorrt_evidence import EngineLayer, inspected_layers, logged_layers, parse_log
from sparsify.exporters.tensorrt_layout import LinearLayout
from sparsify.exporters.tensorrt_proof import make_proof, read_proof
from tests.fake_tensorrt import DENSE, SPARSE

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


LOG_8 = [
    "[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: a, b + c, d",
    "[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: b + c",
]
LOG_8_EMPTY = [
    "[I] [TRT] (Sparsity) Layers eligible for sparse math:",
    "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:",
]
LOG_10 = [
    "    1.000 INFO (Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, d",
    "    1.000 INFO (Sparsity) Chose 1 layer(s) using sparse tactics: b",
]
LOG_10_COUNTS = [
    "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
    "(Sparsity) Chose 0 layer(s) using sparse tactics",
]
LOG_10_LAYERS = [
    "    2.000 VERBOSE Layers:",
    "Name: a+b_myl1_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,32] }], "
    "TacticName: sm80_xmma_sparse_gemm, StreamId: 0, Metadata: [ONNX Layer: a][ONNX Layer: b]",
    "Name: d [profile 1]_myl3_7, LayerType: gemm, Inputs: [], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: ",
]


def test_logs_of_every_version() -> None:
    (report,) = parse_log(LOG_8)
    assert (report.n_eligible, report.n_chosen) == (3, 1)
    assert report.eligible == ("a", "b + c", "d")
    assert report.chosen == ("b + c",)
    (report,) = parse_log(LOG_8_EMPTY)
    assert (report.n_eligible, report.n_chosen, report.eligible) == (0, 0, ())
    (report,) = parse_log(LOG_10)
    assert (report.n_eligible, report.n_chosen, report.chosen) == (3, 1, ("b",))
    (report,) = parse_log(LOG_10_COUNTS)
    assert (report.n_eligible, report.n_chosen, report.eligible) == (39, 0, ())
    assert len(parse_log([*LOG_10, *LOG_10_COUNTS])) == 2
    assert parse_log(["nothing of the kind"]) == ()
    first, second = logged_layers(LOG_10_LAYERS)
    assert first == EngineLayer("a+b_myl1_2", "sm80_xmma_sparse_gemm", ("a", "b"))
    assert second == EngineLayer("d [profile 1]_myl3_7", "", ("d",), 1)
    # The first of the list behind the prefix of our own log, and of trtexec's.
    for prefix in ("    2.000 VERBOSE ", "12345.678 INFO Layers: ", "[08/05/2024-12:06:54] [V] [TRT] "):
        assert logged_layers([prefix + LOG_10_LAYERS[1]]) == (first,)


def test_inspector_of_every_version() -> None:
    detailed = {"Layers": [{"Name": "a + b", "TacticName": SPARSE}, {"Name": "c", "TacticValue": "0x0"}]}
    assert inspected_layers(json.dumps({**detailed, "Bindings": []}))[0] == EngineLayer("a + b", SPARSE, ("a", "b"))
    assert inspected_layers(json.dumps({"Layers": ["a + b"], "I/O Tensors": []}))[0].tactic == ""
    for text in ("", "{}", "[]", '{"Layers": 3}', '{"Layers": [3]}', "[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            inspected_layers(text)


PROFILES = ("prefill", "decode")


def _row(node: str, *, eligible: bool = True) -> LinearLayout:
    why = "" if eligible else "not 2:4 along the inputs"
    return LinearLayout(node, "MatMul", f"{node}.weight.transposed", "float16", 512, 512, eligible, eligible, why)


def test_the_engine_overrules_the_log() -> None:
    rows = [_row("a"), _row("b"), _row("c", eligible=False), _row("d")]
    layers = [EngineLayer("b", DENSE, ("b",)), EngineLayer("d", SPARSE, ("d",))]
    proof = make_proof(rows, parse_log(LOG_10), layers, PROFILES, sparse_allowed=True)
    assert proof.status == "sparse"
    assert [row.sparse for row in proof.linears] == [False, False, False, True]
    why = [row.why for row in proof.linears]
    assert why[0].startswith("a dense kernel was faster")
    assert DENSE in why[1]
    assert why[2:] == ["not 2:4 along the inputs", "sparse in prefill"]
    assert [row.kernels for row in proof.linears] == [{}, {"prefill": DENSE}, {}, {"prefill": SPARSE}]


@pytest.mark.parametrize(
    ("log", "layers", "status"),
    [
        (LOG_8, [], "sparse"),
        # Blocks that TensorRT compiles as a whole may be missing from its report.
        (LOG_8_EMPTY, [], "unknown"),
        (LOG_8_EMPTY, [EngineLayer("a+b+d", DENSE, ("a", "b", "d"))], "dense"),
        (["(Sparsity) Found 2 layer(s) eligible to use sparse tactics", LOG_10_COUNTS[1]], [], "unknown"),
        # Selections that are redone: the last counts, and nothing where they contradict each other.
        ([*LOG_10, *LOG_10_COUNTS], [], "unknown"),
        ([*LOG_10_COUNTS, *LOG_10], [], "unknown"),
        ([*LOG_10, *LOG_10], [], "sparse"),
        ([*LOG_10, *LOG_10_COUNTS], [EngineLayer("a+b+d", DENSE, ("a", "b", "d"))], "dense"),
        (LOG_10, [], "sparse"),
        (LOG_10_COUNTS, [], "dense"),
        ([*LOG_10_COUNTS[:1], "(Sparsity) Chose 2 layer(s) using sparse tactics"], [], "sparse"),
        ([], [], "unknown"),
        ([], [EngineLayer("{ForeignNode[a...d]}", "", ("{ForeignNode[a...d]}",))], "unknown"),
        ([], [EngineLayer("a", DENSE, ("a",))], "unknown"),
        ([], [EngineLayer("a+b+d", DENSE, ("a", "b", "d"))], "dense"),
        (LOG_10_COUNTS, [EngineLayer("d", SPARSE, ("d",))], "sparse"),
    ],
)
def test_status(log: list[str], layers: list[EngineLayer], status: str) -> None:
    rows = [_row("a"), _row("b"), _row("d")]
    proof = make_proof(rows, parse_log(log), layers, PROFILES, sparse_allowed=True)
    assert proof.status == status, proof
    assert make_proof(rows, parse_log(log), [], PROFILES, sparse_allowed=False).status == "dense"


def test_profiles_are_told_apart() -> None:
    text = json.dumps(
        {
            "Layers": [
                {"Name": "a", "TacticName": DENSE},
                {"Name": "a [profile 1]", "TacticName": SPARSE},
                {"Name": "b", "TacticName": SPARSE},
                {"Name": "b_part", "TacticName": DENSE, "Metadata": "[ONNX Layer: b]"},
                {"Name": "b [profile 1]", "TacticName": SPARSE},
                {"Name": "d [profile 7]", "TacticName": SPARSE},
            ]
        }
    )
    proof = make_proof([_row("a"), _row("b"), _row("d")], (), inspected_layers(text), PROFILES, sparse_allowed=True)
    assert [row.why for row in proof.linears] == [
        "sparse in decode, dense in prefill",
        "sparse in prefill and decode",
        "sparse in profile 7",
    ]
    assert proof.reason == "sparse kernels run 3 of 3 linears (1 in prefill, 2 in decode, 1 in profile 7)"


def test_a_linear_that_is_not_two_four_is_never_sparse() -> None:
    rows = [_row("a"), _row("c", eligible=False)]
    shared = [EngineLayer("a+c", SPARSE, ("a", "c"))]
    proof = make_proof(rows, parse_log([]), shared, PROFILES, sparse_allowed=True)
    assert [row.sparse for row in proof.linears] == [True, False]
    assert proof.linears[1].why == "unknown (kernel is shared); not 2:4 along the inputs"
    only = make_proof(rows[1:], parse_log([]), shared, PROFILES, sparse_allowed=True)
    assert only.status == "unknown"
    picked = ["(Sparsity) Found 1 layer(s) eligible to use sparse tactics: c", "(Sparsity) Chose 1 layer(s): c"]
    assert not make_proof(rows, parse_log(picked), [], PROFILES, sparse_allowed=True).linears[1].sparse


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_proofs_that_are_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / PROOF
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_proof(path, "0" * 64)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        read_proof(path, "0" * 64)
