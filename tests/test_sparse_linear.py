"""The packed layer by itself: what it gives back, copies and state dicts of it, casts."""

import copy
import io
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsify.errors import UsageError
from sparsify.format.packed import Packed, decode, encode, quantise
from sparsify.kernels import native
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED
from sparsify.plugins.sparse_linear import SparseLinear
from tests.checkpoints import bits
from tests.sparse_layers import BF16, F32, NO_NATIVE, TWO_OF_FOUR, x_of, zeroed


def layers(dtype: torch.dtype = BF16) -> list[tuple[Packed, Kernel]]:
    perm = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    weight = zeroed((32, 48), TWO_OF_FOUR, dtype)
    scattered = torch.empty_like(weight)
    scattered[:, perm] = weight
    kinds = [encode(weight, TWO_OF_FOUR), encode(scattered, TWO_OF_FOUR, perm), encode(zeroed((32, 48), None, dtype))]
    kinds += [quantise(kind) for kind in kinds]
    kernels = [PACKED]
    if NO_NATIVE is None:
        kernels += [native.native("slices"), native.native("slices<=2,dense")]
    return [(packed, kernel) for packed in kinds for kernel in kernels]


def test_every_state_gives_its_packed_weight_back() -> None:
    for packed, kernel in layers():
        layer = SparseLinear(packed, kernel)
        back = layer.packed()
        assert (back.shape, back.pattern, back.dtype) == (packed.shape, packed.pattern, packed.dtype)
        for part in ("values", "mask", "perm", "scale"):
            ours, theirs = getattr(back, part), getattr(packed, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
        assert torch.equal(bits(layer.to_linear().weight), bits(decode(packed)))


def bias() -> nn.Parameter:
    return nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(5)).to(BF16))


def test_copies_pickles_and_state_dicts_compute_the_same() -> None:
    for packed, kernel in layers():
        layer = SparseLinear(packed, kernel, bias())
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        empty = SparseLinear(replace(packed, values=torch.zeros_like(packed.values)), kernel, bias())
        others = [copy.deepcopy(layer), torch.load(file, weights_only=False), empty]
        for tokens in (1, 5):
            x = x_of(BF16, 48).view(-1, 48)[:tokens]
            with torch.no_grad():
                assert not torch.equal(empty(x), layer(x))
                empty.load_state_dict(layer.state_dict())
                assert all(torch.equal(other(x), layer(x)) for other in others)
            for name in {"values", "dense"} & set(empty.state_names):
                empty.get_buffer(name).zero_()
        assert {other.kernel_name for other in others} == {kernel.reported}


def test_casts_change_the_weight_and_nothing_that_it_is_made_from() -> None:
    for packed, kernel in layers():
        layer = SparseLinear(packed, kernel, bias())
        assert layer.to(BF16) is layer
        if kernel is not PACKED:
            with pytest.raises(UsageError, match=f"prepared for kernel {re.escape(kernel.name)} cannot be cast"):
                layer.to(F32)
        else:
            layer.to(F32)
            assert torch.equal(bits(layer.to_linear().weight), bits(decode(packed.to(F32))))
        scale = layer.packed().scale
        assert scale is None or scale.dtype == F32
