"""Models in memory: linears packed and unpacked, what is left alone, what they compute, keep and say."""

import copy
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.compress import compress_, decompress_, engaged, report
from sparsify.errors import UsageError
from sparsify.format.packed import decode
from sparsify.kernels import native
from sparsify.kernels.kernel import Kernel, State
from sparsify.kernels.table import Entry, Times
from sparsify.plugins.sparse_linear import SparseLinear, packed_if_sparse
from tests.checkpoints import same
from tests.sparse_layers import BF16, F32, NAMES, NO_NATIVE, TWO_OF_FOUR, kernel_of, x_of, zeroed

# float32 sums in another order, rounded to bfloat16 in each of a few layers.
TOLERANCE = {F32: 1e-4, BF16: 5e-2}


class Block(nn.Module):
    """2:4, half of zeros, none, and tied."""

    two_of_four: Any
    loose: Any

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 32, dtype=dtype)
        self.two_of_four = nn.Linear(32, 48, dtype=dtype)
        self.loose = nn.Linear(48, 32, bias=False, dtype=dtype)
        self.full = nn.Linear(32, 32, dtype=dtype)
        self.norm = nn.LayerNorm(32, dtype=dtype)
        self.head = nn.Linear(32, 24, bias=False, dtype=dtype)
        with torch.no_grad():
            self.two_of_four.weight.copy_(zeroed((48, 32), TWO_OF_FOUR, dtype, 1))
            self.loose.weight.copy_(zeroed((32, 48), None, dtype, 2))
            self.loose.weight[3, 5] = -0.0
            self.embed.weight.copy_(zeroed((24, 32), None, dtype, 3))
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.full(self.loose(torch.relu(self.two_of_four(x))))))
        return result


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kernel", NAMES)
def test_the_function_stays_and_comes_back_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    model = Block(dtype)
    before, kept = copy.deepcopy(model), model.full
    assert compress_(model, kernel) is model
    found = {name: kernel_of(ran) for name, ran in engaged(model).items()}
    assert found == {"two_of_four": kernel, "loose": kernel, "full": "dense", "head": "dense"}
    assert model.full is kept
    assert model.head.weight is model.embed.weight
    patterns = {name: (kernel_of(entry.kernel), entry.pattern, entry.reason) for name, entry in report(model).items()}
    assert patterns["full"] == ("dense", "dense", "it is not sparse")
    assert patterns["head"] == ("dense", "dense", "its weight is tied")
    assert [patterns[name][:2] for name in ("two_of_four", "loose")] == [(kernel, "2:4"), (kernel, "unstructured")]
    with torch.no_grad():
        torch.testing.assert_close(
            model(x_of(dtype)), before(x_of(dtype)), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    assert decompress_(model) is model
    assert not report(model)
    assert {type(part) for part in model.modules()} == {type(part) for part in before.modules()}
    same(model, before)
    with torch.no_grad():
        assert torch.equal(model(x_of(dtype)), before(x_of(dtype)))


@pytest.mark.parametrize("kernel", NAMES)
def test_what_stays_in_memory(kernel: str) -> None:
    model = compress_(Block(), kernel)
    layer = model.two_of_four
    assert isinstance(layer, SparseLinear)
    held = sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers())
    assert held == layer.n_bytes == report(model)["two_of_four"].resident_bytes
    # A mask of one bit and half the values, and at most 16 bytes of a size that says where values begin.
    assert 32 * 48 * 2 * 9 / 16 <= held <= 32 * 48 * 2 * 9 / 16 + 16
    assert "weight" not in dict(layer.named_parameters())


def test_flags_of_parameters_and_modes_come_back() -> None:
    model = Block()
    model.two_of_four.weight.requires_grad_(False)
    model.two_of_four.eval()
    bias = model.two_of_four.bias
    compress_(model, "packed")
    assert (model.two_of_four.training, model.loose.training) == (False, True)
    compress_(model, "packed")
    decompress_(model)
    assert (model.two_of_four.weight.requires_grad, model.loose.weight.requires_grad) == (False, True)
    assert (model.two_of_four.training, model.loose.training) == (False, True)
    assert model.two_of_four.bias is bias


def test_globs_choose_linears() -> None:
    assert set(engaged(compress_(Block(), "packed", include="loose")).items()) >= {
        ("loose", "packed"),
        ("two_of_four", "dense"),
    }
    model = compress_(Block(), "packed", exclude=["l*"])
    assert (engaged(model)["loose"], engaged(model)["two_of_four"]) == ("dense", "packed")
    assert "loose" not in report(model)
    for options in ({"include": "other"}, {"exclude": ["loose", "other*"]}):
        with pytest.raises(UsageError, match=r"'other\*?' matches no linear of the model; names look like two_of_four"):
            compress_(Block(), "packed", **options)


def test_kernels_that_are_not_there_are_refused_before_anything_changes() -> None:
    model = Block()
    before = dict(model.named_modules())
    with pytest.raises(UsageError, match="kernel 'fast' is unknown; choose auto, dense, packed"):
        compress_(model, "fast")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="kernel triton cannot run on cpu"):
            compress_(model, "triton")
    with pytest.raises(UsageError, match="itself a linear"):
        compress_(nn.Linear(4, 4), "packed")
    assert dict(model.named_modules()) == before


def test_what_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Special(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.ModuleDict({
        "special": Special(8, 8), "hooked": nn.Linear(8, 8), "far": nn.Linear(8, 8, device="meta"),
        "wide": nn.Linear(8, 8, dtype=torch.float64), "shared": nn.Linear(8, 8), "plain": nn.Linear(8, 8),
    })  # fmt: skip
    model["again"] = model["shared"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    model["hooked"].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "sparsify"):
        compress_(model, "packed")
    reasons = {name: entry.reason for name, entry in report(model).items()}
    assert reasons == {
        "hooked": "it has hooks", "far": "its weight is not in memory",
        "wide": "it is not sparse", "shared": "its weight is tied", "plain": "",
    }  # fmt: skip
    assert [name for name, part in model.items() if isinstance(part, SparseLinear)] == ["plain"]
    (line,) = caplog.messages
    assert "1 x 2:4 by packed; " in line
    assert "1 x dense by dense (it has hooks)" in line


def test_a_weight_is_worth_packing_from_a_quarter_of_zeros_on() -> None:
    weight = torch.ones(8, 16)
    weight[:2] = 0
    found = packed_if_sparse(weight)
    assert found is not None
    assert found.pattern is None
    weight[1, 0] = 1
    assert packed_if_sparse(weight) is None
    assert packed_if_sparse(torch.full((8, 16), -0.0)) is None
    assert packed_if_sparse(torch.zeros(0, 16)) is None
    found = packed_if_sparse(torch.zeros(8, 16))
    assert found is not None
    assert found.pattern == TWO_OF_FOUR


@pytest.mark.parametrize("kernel", NAMES)
def test_one_linear_is_packed_at_a_time(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    dense_bytes = sum(p.nbytes for p in model.parameters())
    alive: list[int] = []

    def prepare(self: SparseLinear, *arguments: Any, **options: Any) -> None:
        # Of everything that is referred to from the model when the next linear is prepared, nothing is there twice.
        alive.append(sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
        init(self, *arguments, **options)

    init = SparseLinear.__init__
    monkeypatch.setattr(SparseLinear, "__init__", prepare)
    compress_(model, kernel)
    assert len(alive) == 2
    assert alive[0] == dense_bytes > alive[1]


def table(ways: dict[str, float], *, n_out: int, n_in: int, values: str = "bf16", pattern: str = "2:4") -> Entry:
    times = {way: Times(median, median, median, 3) for way, median in ways.items()}
    return Entry(values, values, pattern, 0.5, n_out, n_in, {1: times, 512: times})


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
def test_auto_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    entries = {
        (48, 32): table({"dense": 10.0, "slices": 5.0}, n_out=48, n_in=32),
        (32, 48): table({"dense": 10.0, "slices": 20.0}, n_out=32, n_in=48, pattern="unstructured"),
    }
    monkeypatch.setattr("sparsify.kernels.dispatch._measured", lambda packed, x: entries[packed.shape])
    with caplog.at_level(logging.INFO, "sparsify"):
        model = compress_(Block())
    assert engaged(model) == {"two_of_four": "native+expanded:1-", "loose": "dense", "full": "dense", "head": "dense"}
    assert type(model.loose) is nn.Linear
    assert "dense is faster" in report(model)["loose"].reason
    assert [record.levelname for record in caplog.records] == ["INFO"]
    # The plan is the table's, not that of the row in the list of kernels.
    assert model.two_of_four.kernel is native.native("slices")


def test_auto_without_measurements_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.kernels.dispatch.table_for", lambda device: None)
    model = Block()
    assert set(engaged(compress_(model)).values()) == {"dense"}
    assert "sparsify tune" in report(model)["loose"].reason or NO_NATIVE


@pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")
def test_a_dtype_that_a_kernel_cannot_take_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model = Block(torch.float16)
    with caplog.at_level(logging.INFO, "sparsify"):
        compress_(model, "native")
    assert set(engaged(model).values()) == {"dense"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch.float16" in caplog.messages[0]


def test_another_kernel_takes_over() -> None:
    model = Block()
    dense = copy.deepcopy(model)
    compress_(model, "packed")
    values = model.loose.values
    again = compress_(model, "packed")
    assert again.loose.values is values
    same(compress_(model, "dense"), dense)
    assert set(engaged(model).values()) == {"dense"}


def test_forms_that_cannot_be_undone_are_left() -> None:
    blob = Kernel(
        "blob", "", lambda device: None, lambda packed: None, lambda packed: State({"blob": decode(packed)}, {}),
        lambda x, tensors, sizes, bias: nn.functional.linear(x, tensors["blob"], bias),
    )  # fmt: skip
    model = compress_(Block(), "packed")
    model.loose = SparseLinear(model.loose.packed(), blob)
    with pytest.raises(UsageError, match="loose: what kernel blob keeps cannot be undone; open the model again"):
        decompress_(model)
    assert isinstance(model.two_of_four, SparseLinear)
    with pytest.raises(UsageError, match="loose: what kernel blob"):
        compress_(model, "packed")
    assert compress_(model, "dense", exclude="loose").loose.kernel_name == "blob"


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("kernel", NAMES)
def test_one_graph(kernel: str) -> None:
    model = compress_(Block(), kernel)
    with torch.no_grad():
        run: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(run(x_of(BF16)), model(x_of(BF16)))


@pytest.mark.parametrize("kernel", NAMES)
def test_gradients_are_refused(kernel: str) -> None:
    model = compress_(Block(), kernel)
    with pytest.raises(UsageError, match=f"kernel {kernel} computes no gradients"):
        model(x_of(BF16)).sum().backward()


def test_public_names_come_without_torch() -> None:
    code = (
        "import sys, sparsify\nassert 'torch' not in sys.modules\n"
        "from sparsify import compress_, decompress_, engaged\nassert 'torch' in sys.modules\n"
        "try: sparsify.nothing\nexcept AttributeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "module 'sparsify' has no attribute 'nothing'\n"), result.stderr
    assert sparsify.compress_ is compress_
