"""State dicts of packed layers: what fits where, and that no kernel sees of them what does not."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.compress import compress_
from sparsify.format.packed import Packed, decode, encode, quantise
from sparsify.kernels import native, packed_reference
from sparsify.kernels.kernel import Kernel, State
from sparsify.kernels.packed_reference import PACKED
from sparsify.plugins.sparse_linear import SparseLinear
from tests.checkpoints import bits
from tests.sparse_layers import BF16, F32, NAMES, NO_NATIVE, TWO_OF_FOUR, zeroed

N_OUT, N_IN = 24, 44  # the last byte of a row of the mask has four columns
KERNELS = [PACKED] if NO_NATIVE else [PACKED, native.native("slices"), native.native("slices<=2,dense")]


def loose(seed: int = 0) -> Packed:
    return encode(zeroed((N_OUT, N_IN), None, BF16, seed))


def permuted() -> Packed:
    order = torch.randperm(N_IN, generator=torch.Generator().manual_seed(3))
    weight = torch.empty(N_OUT, N_IN, dtype=BF16)
    weight[:, order] = zeroed((N_OUT, N_IN), TWO_OF_FOUR, BF16)
    return encode(weight, TWO_OF_FOUR, order)


def layer_of(packed: Packed, kernel: Kernel, seed: int = 5) -> SparseLinear:
    bias = torch.randn(N_OUT, generator=torch.Generator().manual_seed(seed)).to(BF16)
    return SparseLinear(packed, kernel, nn.Parameter(bias))


def contents(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Bits of every tensor."""
    return {name: bits(tensor).clone() for name, tensor in (*layer.named_buffers(), *layer.named_parameters())}


def same_contents(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def product(layer: nn.Module, tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, N_IN, generator=torch.Generator().manual_seed(tokens)).to(BF16)
    with torch.no_grad():
        result: torch.Tensor = layer(x)
    return result


def flipped(mask: torch.Tensor, *columns: int) -> torch.Tensor:
    """The bits of ``columns`` of the first row turned over."""
    mask = mask.clone()
    for column in columns:
        mask[0, column // 8] ^= 1 << column % 8
    return mask


def kept(mask: torch.Tensor, bit: int) -> list[int]:
    """Columns of the first row whose bit is ``bit``."""
    return [column for column in range(N_IN) if int(mask[0, column // 8]) >> column % 8 & 1 == bit]


Change = Callable[[dict[str, Any]], Any]


def put(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda state: state.update({name: make(state.get(name))})


MISFITS: dict[str, tuple[Callable[[], Packed], Change, str]] = {
    "other number of values": (loose, put("values", lambda t: t[:-1]), r"values is torch.bfloat16 \[\d+\], the layer"),
    "other dtype": (loose, put("values", lambda t: t.to(F32)), r"values is torch.float32 \[\d+\], the layer has"),
    "other shape": (loose, put("mask", lambda t: t[:, :-1]), r"mask is torch.uint8 \[24, 5\], .* \[24, 6\]"),
    "a bit more": (loose, put("mask", lambda t: flipped(t, kept(t, 0)[0])), "mask keeps .* weights, and .* are stored"),
    "a bit less": (loose, put("mask", lambda t: flipped(t, kept(t, 1)[0])), "mask keeps .* weights, and .* are stored"),
    "bits past the end": (loose, put("mask", lambda t: flipped(t, kept(t, 1)[0], 45)), "mask marks columns"),
    "other groups": (
        permuted,
        put("mask", lambda t: flipped(t, kept(t, 1)[0], next(c for c in kept(t, 0) if c >= 4))),
        "mask does not keep 2:4 in every group",
    ),
    "no order": (permuted, put("perm", lambda t: t.clone().fill_(0)), "perm is not a permutation"),
    "an order past the end": (permuted, put("perm", lambda t: t + 1), "perm is not a permutation"),
    "an order too many": (loose, put("perm", lambda t: torch.arange(N_IN, dtype=torch.int32)), "perm has no place"),
    "the order missing": (permuted, lambda state: state.pop("perm"), "perm is missing beside the other parts"),
    "the mask missing": (loose, lambda state: state.pop("mask"), "mask is missing beside the other parts"),
    "the values missing": (loose, lambda state: state.pop("values"), "values is missing beside the other parts"),
    "other scales": (lambda: quantise(loose()), put("scale", lambda t: t[:-1]), r"scale is torch.float32 \[23\]"),
    "scales missing": (lambda: quantise(loose()), lambda state: state.pop("scale"), "scale is missing beside"),
    "another bias": (loose, put("bias", lambda t: t[:-1]), r"bias is \[23\], the layer has \[24\]"),
    "no tensor": (loose, put("mask", lambda t: "mask"), "mask is <class 'str'>, the layer has torch.uint8"),
    "no data": (loose, put("mask", lambda t: t.to("meta")), "mask has no data"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: str, options: dict[str, bool]) -> None:
    made, change, message = MISFITS[kind]
    for kernel in KERNELS:
        layer = layer_of(made(), kernel)
        before = contents(layer)
        # Of the same weight, with another bias: what is refused is the change alone, and it keeps the bias out too.
        state = dict(layer_of(made(), kernel, seed=6).state_dict())
        change(state)
        with pytest.raises(RuntimeError, match=rf"\n\t{message}.*; load the state dict of .* or call compress_"):
            layer.load_state_dict(state, **options)
        same_contents(contents(layer), before)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_where_values_begin_is_never_read_from_a_state_dict(kernel: Kernel) -> None:
    """A forged table would make kernels read anywhere."""
    packed = loose()
    layer = layer_of(packed, kernel)
    wanted = contents(layer)
    forged = {"starts": torch.full((N_OUT + 1,), 1 << 40), "dense": torch.zeros(N_OUT, N_IN, dtype=BF16)}
    for options in ({}, {"strict": False}, {"assign": True}):
        other = layer_of(packed, kernel, seed=6)
        assert other.load_state_dict({**layer.state_dict(), **forged}, **options) == ([], [])
        same_contents(contents(other), wanted)
        assert torch.equal(product(other, 3), product(layer, 3))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_another_mask_with_as_many_values_brings_its_own_places(kernel: Kernel) -> None:
    packed = loose()
    weight = decode(packed).flip(0)  # rows of other lengths
    layer, wanted = layer_of(packed, kernel), layer_of(encode(weight), kernel)
    assert not torch.equal(product(layer, 1), product(wanted, 1))
    layer.load_state_dict(wanted.state_dict())
    same_contents(contents(layer), contents(wanted))
    for tokens in (1, 5):
        assert torch.equal(product(layer, tokens), product(wanted, tokens))


@pytest.mark.parametrize("made", [loose, permuted, lambda: quantise(permuted())], ids=["loose", "order", "int8"])
def test_a_state_dict_fits_wherever_the_weight_is_the_same_whatever_the_plan(made: Callable[[], Packed]) -> None:
    packed = made()
    for source in KERNELS:
        state = layer_of(packed, source, seed=6).state_dict()
        assert state.keys() == {*layer_of(packed, source).state_names, "bias"}
        stored = {name: tensor for name, tensor in state.items() if name not in ("starts", "dense")}
        for target, given in itertools.product(KERNELS, (state, stored)):
            layer = layer_of(packed, target)
            layer.get_buffer("values").zero_()
            layer.load_state_dict(given)
            same_contents(contents(layer), contents(layer_of(packed, target, seed=6)))


def test_loading_copies_or_takes_tensors_as_it_does_for_any_module() -> None:
    for kernel in KERNELS:
        layer, given = layer_of(loose(), kernel), layer_of(loose(), kernel, seed=6).state_dict()
        place = layer.get_buffer("values").data_ptr()
        layer.load_state_dict(given)
        assert layer.get_buffer("values").data_ptr() == place
        layer.load_state_dict(given, assign=True)
        assert layer.get_buffer("values").data_ptr() == given["values"].data_ptr() != place
        # Kernels read rows one after another.
        layer.load_state_dict({**given, "mask": given["mask"].t().contiguous().t()}, assign=True)
        assert torch.equal(product(layer, 2), product(layer_of(loose(), kernel, seed=6), 2))


@pytest.mark.parametrize("options", [{}, {"assign": True}], ids=str)
def test_slices_are_those_of_the_layer_wherever_a_state_dict_was_made(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device cuts a weight otherwise, and a layer that was moved keeps its slices."""
    monkeypatch.setattr(packed_reference, "_SLICE", 5 * N_IN)
    layer, source = layer_of(loose(), PACKED), layer_of(encode(decode(loose()).flip(0)), PACKED, seed=6)
    monkeypatch.setattr(packed_reference, "_SLICE", 7 * N_IN)
    elsewhere = layer_of(source.packed(), PACKED, seed=6)
    assert len(layer.get_buffer("starts")) != len(elsewhere.get_buffer("starts"))
    layer.load_state_dict(elsewhere.state_dict(), **options)
    same_contents(contents(layer), contents(source))
    assert torch.equal(product(layer, 3), product(source, 3))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_what_hooks_put_into_a_state_dict_is_checked_too(kernel: Kernel) -> None:
    layer, good = layer_of(loose(), kernel), layer_of(encode(decode(loose()).flip(0)), kernel, seed=6)
    before, calls = contents(layer), []

    def forge(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        calls.append(prefix)
        state[f"{prefix}mask"] = torch.full_like(state[f"{prefix}mask"], 255)

    def swap(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        calls.append(prefix)
        state.update({prefix + name: tensor for name, tensor in good.state_dict().items()})

    given = layer.state_dict()
    model = nn.Sequential(layer)
    handle = layer.register_load_state_dict_pre_hook(forge)  # type: ignore[no-untyped-call]
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(RuntimeError, match=r"0\.mask marks columns"):
            model.load_state_dict({f"0.{name}": tensor for name, tensor in given.items()}, **options)
        same_contents(contents(layer), before)
    handle.remove()
    layer.register_load_state_dict_pre_hook(swap)  # type: ignore[no-untyped-call]
    layer.load_state_dict(given)
    same_contents(contents(layer), contents(good))
    assert torch.equal(product(layer, 3), product(good, 3))
    # Each once, and the layer keeps them.
    assert calls == ["0."] * 3 + [""]
    layer.load_state_dict(given)
    assert len(calls) == 5


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_mask_is_the_layers_own_even_where_tensors_are_taken(kernel: Kernel) -> None:
    layer, given = layer_of(loose(), kernel), dict(layer_of(loose(), kernel, seed=6).state_dict())
    layer.load_state_dict(given, assign=True)
    before, wanted = contents(layer), product(layer, 1)
    given["mask"].fill_(255)
    same_contents(contents(layer), before)
    assert torch.equal(product(layer, 1), wanted)


@pytest.mark.parametrize("made", [loose, permuted, lambda: quantise(loose())], ids=["loose", "order", "int8"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_layer_moved_without_its_data_has_an_empty_mask_until_it_is_loaded(
    made: Callable[[], Packed], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What uninitialised memory may hold.
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, 77, **options))
    source = layer_of(made(), kernel, seed=6)
    for through_meta in (False, True):
        layer = layer_of(made(), kernel)
        if through_meta:
            layer.to("meta")
        layer.to_empty(device="cpu")
        assert not layer.get_buffer("mask").any()
        assert not layer.get_buffer("starts").any()
        if made is loose and kernel is PACKED:
            # The bias alone, which is as it was made.
            assert torch.equal(product(layer, 1), layer.get_parameter("bias").detach().unsqueeze(0))
        elif made is loose:
            with pytest.raises(ValueError, match="number of values does not follow"):
                product(layer, 1)
        layer.load_state_dict(source.state_dict())
        same_contents(contents(layer), contents(source))
        # A move that copies keeps all.
        layer._apply(torch.clone)
        same_contents(contents(layer), contents(source))
    layer = layer_of(made(), kernel).to("meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    same_contents(contents(layer), contents(source))


def test_nothing_of_the_layer_in_a_state_dict_is_missing_as_usual() -> None:
    layer = layer_of(permuted(), PACKED)
    assert layer.load_state_dict({}, strict=False) == (["bias", "values", "mask", "starts", "perm"], [])
    assert layer.load_state_dict({"other": torch.ones(1)}, strict=False).unexpected_keys == ["other"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias", "values", "mask", "starts", "perm"'):
        layer.load_state_dict({})


def test_of_a_form_that_only_the_kernel_reads_sizes_are_checked() -> None:
    blob = Kernel(
        "blob", "", lambda device: None, lambda packed: None,
        lambda packed: State({"blob": decode(packed), "perm": torch.arange(N_IN)}, {}),
        lambda x, tensors, sizes, bias: nn.functional.linear(x, tensors["blob"], bias),
    )  # fmt: skip
    layer, other = layer_of(loose(), blob), layer_of(loose(1), blob)
    assert layer.state_dict().keys() == {"blob", "perm", "bias"}
    layer.load_state_dict(other.state_dict())
    same_contents(contents(layer), contents(other))
    for name, tensor in (
        ("blob", torch.ones(3)), ("blob", torch.ones(N_OUT, N_IN)), ("perm", torch.zeros(N_IN, dtype=torch.int64)),
        ("mask", loose().mask),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"\n\t{name} .*; load the state dict"):
            layer.load_state_dict({**layer_of(loose(), blob).state_dict(), name: tensor})
        same_contents(contents(layer), contents(other))


class Model(nn.Module):
    def __init__(self, factor: float = 1, seed: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N_IN, N_OUT, dtype=BF16), nn.Linear(N_OUT, 16, bias=False, dtype=BF16)
        with torch.no_grad():
            self.first.weight.copy_(factor * zeroed((N_OUT, N_IN), None, BF16, seed))
            self.second.weight.copy_(factor * zeroed((16, N_OUT), TWO_OF_FOUR, BF16, seed))
            self.first.bias.fill_(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


@pytest.mark.parametrize("kernel", NAMES)
def test_a_model_saved_and_loaded_into_a_fresh_one_is_the_same_to_the_bit(kernel: str) -> None:
    model, fresh = compress_(Model(), kernel), compress_(Model(2), kernel)
    assert not torch.equal(product(fresh, 3), product(model, 3))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same_contents(contents(fresh), contents(model))
    for tokens in (1, 3, 20):
        assert torch.equal(product(fresh, tokens), product(model, tokens))


@pytest.mark.parametrize("kernel", NAMES)
def test_a_model_with_other_zeros_names_the_linear(kernel: str) -> None:
    model = compress_(Model(), kernel)
    before = contents(model.first)
    with pytest.raises(RuntimeError, match=r"first\.values is torch\.bfloat16 .*; load the state dict") as error:
        model.load_state_dict(compress_(Model(seed=1), kernel).state_dict())
    assert "second." not in str(error.value)
    same_contents(contents(model.first), before)


@pytest.mark.parametrize("kernel", NAMES)
def test_copies_of_a_model_share_nothing_with_it(kernel: str) -> None:
    model = compress_(Model(), kernel)
    wanted = {tokens: product(model, tokens) for tokens in (1, 20)}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same_contents(contents(twin), contents(model))
        twin.load_state_dict(compress_(Model(2), kernel).state_dict())
        assert not torch.equal(product(twin, 1), wanted[1])
        assert all(torch.equal(product(model, tokens), result) for tokens, result in wanted.items())
