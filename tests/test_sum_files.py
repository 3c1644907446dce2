"""Sums of shards in files: added up again they are those of one process, to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsify.errors import ModelError
from sparsify.stats import Wanted
from sparsify.sum_files import SumFiles, write_sums
from sparsify.sums import Accumulator
from sparsify.types import LinearSpec


def linear(name: str, n_in: int) -> LinearSpec:
    return LinearSpec(name=name, parameter=f"{name}.weight", expert=None, in_features=n_in, out_features=4)


@pytest.mark.parametrize("width", [5, 700])
def test_sums_from_files_are_to_the_bit_those_of_one_process(width: int, tmp_path: Path) -> None:
    """Strips of rows included, of which 700 channels have three."""
    draw, wanted = torch.Generator().manual_seed(0), Wanted(mean=True, gram=True, drift=True, shift=True)
    whole, paths, a, b = Accumulator(width, wanted=wanted), [], linear("a", width), linear("b", width)
    for shard in range(3):
        part = Accumulator(width, wanted=wanted)
        for _ in range(shard + 1):
            x = torch.randn(1, 9, width, generator=draw).bfloat16()
            dense, shift = x + torch.randn(1, 9, width, generator=draw).bfloat16(), x[..., :3]
            for sums in (whole, part):
                sums.add(x, dense, shift)
        whole.flush()
        paths.append(tmp_path / f"{shard}")
        write_sums(paths[-1], [([("a.weight", None), ("b.weight", None)], part)])
    files, expected = SumFiles(paths), whole.result("a")
    found = files.statistics([a, b], wanted, "cpu")
    assert found["a"] is found["b"]
    for name in ("sq_norm", "total", "gram", "drift", "shift", "scatter"):
        assert torch.equal(getattr(found["a"], name), getattr(expected, name)), name
    assert found["a"].n_tokens == files.n_tokens(a) == expected.n_tokens == 54
    assert files.n_tokens(linear("c", 3)) == 0
    assert files.statistics([linear("c", 3)], wanted, "cpu")["c"].n_tokens == 0


def test_gram_matrices_of_strips_are_whole(tmp_path: Path) -> None:
    x = torch.randn(40, 700, generator=torch.Generator().manual_seed(0))
    sums = Accumulator(700, wanted=Wanted(gram=True))
    sums.add(x)
    gram = sums.result("x").gram
    assert gram is not None
    torch.testing.assert_close(gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, None])
def test_damaged_sums_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "sums.0.0.0"
    if content is None:
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"sums\.0\.0\.0: "):
        SumFiles([path])


def test_inputs_that_are_shared_in_some_shards_only_are_refused(tmp_path: Path) -> None:
    paths = []
    for shard, keys in enumerate(
        ([[("a.weight", None), ("b.weight", None)]], [[("a.weight", None)], [("b.weight", None)]])
    ):
        inputs = []
        for sharing in keys:
            sums = Accumulator(4)
            sums.add(torch.ones(2, 4))
            inputs.append((sharing, sums))
        paths.append(tmp_path / f"{shard}")
        write_sums(paths[-1], inputs)
    with pytest.raises(ModelError, match="in some calls only"):
        SumFiles(paths).statistics([linear("a", 4), linear("b", 4)], Wanted(), "cpu")
