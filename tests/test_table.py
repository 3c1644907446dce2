"""Tables of measured kernels: their form, which entry stands for a weight, and the plan that its times suggest."""

import json
import logging
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.format.packed import Packed, encode, quantise
from sparsify.kernels import dispatch, native, table
from sparsify.kernels.dispatch import NOT_MEASURED, choose
from sparsify.kernels.plans import NOISE, decide, plan_of
from sparsify.kernels.table import Entry, Table, Times, merged, parse, wanted, write
from sparsify.types import NofM

CPU = torch.device("cpu")
ALL = ("bf16", "amx", "slices")


def entry(tokens: dict[int, dict[str, float]], **changes: Any) -> Entry:
    kind = {"values": "bf16", "x": "bf16", "pattern": "2:4", "density": 0.5, "n_out": 64, "n_in": 128}
    times = {t: {way: Times(us, us / 2, us * 2, 5) for way, us in ways.items()} for t, ways in tokens.items()}
    return Entry(**{**kind, **changes}, tokens=times)


def here(*entries: Entry) -> Table:
    return Table(table.device_key(CPU), table.threads_of(CPU), {"torch": "2"}, {"rounds": 5}, entries)


def any_way(_tokens: int) -> Collection[str]:
    return ALL


@pytest.fixture
def folders(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where this device's tables would lie, with nothing there yet."""
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    table._warn.cache_clear()
    return table.places(CPU)


# Their form.


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = here(entry({1: {"dense": 2.0, "bf16": 1.0}, 512: {"dense": 9.0, "loop": 8.5, "gather": 0.25}}))
    write(written, tmp_path / "new" / "table.json")
    assert table.read(tmp_path / "new" / "table.json", CPU) == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


def body() -> Any:
    row = {"median_us": 2.0, "min_us": 1.0, "max_us": 3.0, "n": 5}
    kind = {"values": "bf16", "x": "f32", "pattern": "2:4", "density": 0.5, "n_out": 64, "n_in": 128}
    head = {"format": 1, "device": {"type": "cpu"}, "threads": 1, "versions": {}, "run": {}}
    return {**head, "entries": [{**kind, "tokens": {"4": {"dense": dict(row), "amx": dict(row)}}}]}


def test_what_is_no_table_is_refused() -> None:
    assert parse(body()).entries[0].tokens[4]["amx"] == Times(2.0, 1.0, 3.0, 5)
    damages: list[tuple[list[Any], Any, str]] = [
        (["format"], 2, "format is 2"),
        (["device"], "cpu", "device"),
        (["threads"], None, "threads"),
        (["entries"], {}, "entries"),
        (["entries", 0], 7, "entry 0 is not an object"),
        (["entries", 0, "values"], "u8", "values or x"),
        (["entries", 0, "pattern"], 0.5, "pattern"),
        (["entries", 0, "density"], 0, "density is not above 0"),
        (["entries", 0, "density"], 1.5, "density is above 1"),
        (["entries", 0, "n_in"], 1.5, "n_in is no whole number"),
        (["entries", 0, "tokens"], {}, "tokens is missing"),
        (["entries", 0, "tokens"], {"-1": {}}, "no number of tokens"),
        (["entries", 0, "tokens", "4"], {"amx": {}}, "dense is missing"),
        (["entries", 0, "tokens", "4", "amx"], 3.0, "4 tokens, amx is not an object"),
        (["entries", 0, "tokens", "4", "amx", "median_us"], "fast", "median_us is no number"),
        (["entries", 0, "tokens", "4", "amx", "median_us"], math.nan, "median_us is not above 0"),
        (["entries", 0, "tokens", "4", "amx", "min_us"], 2.5, "not between"),
        (["entries", 0, "tokens", "4", "amx", "n"], True, "n is no whole number"),
    ]
    for path, value, why in damages:
        damaged = place = body()
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(ValueError, match=why):
            parse(damaged)
    twice = body()
    twice["entries"] *= 2
    others: list[Any] = [twice, [], None, "table"]
    for other in others:
        with pytest.raises(ValueError, match=r"twice|not a JSON object"):
            parse(other)


def test_merging_replaces_what_was_measured_again_and_keeps_the_rest() -> None:
    old = here(entry({1: {"dense": 1.0}, 8: {"dense": 8.0}}), entry({1: {"dense": 3.0}}, n_out=32))
    new = here(entry({8: {"dense": 7.0}}), entry({1: {"dense": 4.0}}, n_out=16))
    found = {each.n_out: each for each in merged(old, new).entries}
    assert found.keys() == {64, 32, 16}
    assert {tokens: times["dense"].median_us for tokens, times in found[64].tokens.items()} == {1: 1.0, 8: 7.0}


# Where they lie.


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no table"),
        ("{", "is no table"),
        ("[" * 100_000, "is no table"),
        ("\x00\xff", "is no table"),
        ('{"format": 9}', "format is 9"),
        (json.dumps(body()), "was measured on another device"),
    ],
    ids=["empty", "cut", "deep", "binary", "newer", "foreign"],
)
@pytest.mark.parametrize("where", ["measured here", "shipped"])
def test_a_table_that_cannot_be_used_is_named_and_not_used(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, text: str, why: str, where: str
) -> None:
    folders[where].parent.mkdir(parents=True)
    folders[where].write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        assert table.table_for(CPU) is None
        assert table.table_for(CPU) is None
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "\n" not in message
    assert all(part in message for part in (str(folders[where]), why, "run sparsify tune"))


def test_a_damaged_table_hides_no_other(folders: dict[str, Path]) -> None:
    write(here(entry({1: {"dense": 1.0}})), folders["shipped"])
    folders["measured here"].parent.mkdir(parents=True)
    folders["measured here"].write_text("{")
    found = table.table_for(CPU)
    assert found is not None
    assert len(found.entries) == 1


def test_what_the_user_measured_goes_before_what_was_shipped(folders: dict[str, Path]) -> None:
    write(here(entry({1: {"dense": 1.0}}), entry({1: {"dense": 5.0}}, n_out=32)), folders["shipped"])
    write(here(entry({1: {"dense": 2.0}})), folders["measured here"])
    found = table.table_for(CPU)
    assert found is not None
    assert {each.n_out: each.tokens[1]["dense"].median_us for each in found.entries} == {64: 2.0, 32: 5.0}


def test_a_table_that_is_written_again_is_read_again(folders: dict[str, Path]) -> None:
    for us in (1.0, 22.0):
        write(here(entry({1: {"dense": us}})), folders["shipped"])
        found = table.table_for(CPU)
        assert found is not None
        assert found.entries[0].tokens[1]["dense"].median_us == us


def test_another_number_of_threads_is_another_table(folders: dict[str, Path]) -> None:
    write(here(entry({1: {"dense": 1.0}})), folders["shipped"])
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert table.table_for(CPU) is None
    finally:
        torch.set_num_threads(before)
    assert table.table_for(CPU) is not None


def test_devices_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.device_key(CPU)["type"] == "cpu"
    assert set(table.device_key(CPU)["features"]) == native.features()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    key = table.device_key(torch.device("cuda"))
    assert key == {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0"}
    assert table.file_name(key, 0) == "cuda-NVIDIA-H200-9.0.json"


def test_shipped_tables_are_whole() -> None:
    """Of devices that are not this one, too."""
    files = sorted(table.SHIPPED.glob("*.json"))
    assert files
    for file in files:
        found = parse(json.loads(file.read_text()))
        assert found.device.keys() == table.device_key(torch.device(found.device["type"])).keys(), "measure it again"
        assert file.name == table.file_name(found.device, found.threads)
        assert len(found.entries) >= 50
        assert {"torch", "sparsify"} <= found.versions.keys()
        for each in found.entries:
            assert {1, 32, 2048} <= each.tokens.keys()
            for times in each.tokens.values():
                assert times.keys() & {"bf16", "avx512", "vnni", "amx", "slices"}


# Which entry stands for a weight.


def packed(n_out: int, n_in: int, pattern: NofM | None, density: float = 0.5) -> Packed:
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(n_out, n_in, generator=generator)
    if pattern is None:
        keep = rank < density
    else:
        keep = (rank.view(n_out, -1, pattern.m).argsort(2).argsort(2) < pattern.n).view(n_out, n_in)
    return encode(torch.where(keep, rank + 1, 0).bfloat16(), pattern)


def test_what_is_looked_for() -> None:
    two_of_four = wanted(packed(64, 128, NofM(2, 4)), torch.bfloat16)
    assert two_of_four.key == ("bf16", "bf16", "2:4", 0.5, 64, 128)
    int8 = wanted(quantise(packed(64, 128, None, 0.3)), torch.float32)
    assert int8.key[:3] == ("i8", "f32", "unstructured")
    assert abs(int8.density - 0.3) < 0.03


def test_the_nearest_shape_stands_for_a_weight_up_to_a_bound() -> None:
    times = {1: {"dense": 1.0}}
    known = here(*(entry(times, n_out=n_out, n_in=n_in) for n_out, n_in in ((1000, 1000), (4000, 1000), (1000, 4000))))

    def found(n_out: int, n_in: int) -> tuple[int, int] | None:
        near = known.nearest(entry({}, n_out=n_out, n_in=n_in))
        return None if near is None else (near.n_out, near.n_in)

    assert found(1000, 1000) == (1000, 1000)
    assert found(1900, 1000) == (1000, 1000)
    assert found(2100, 1000) == (4000, 1000)
    assert found(900, 3000) == (1000, 4000)
    assert found(250, 1000) == (1000, 1000)
    assert found(249, 1000) is None
    assert found(16_001, 1000) is None
    assert found(8001, 2001) is None


def test_types_and_patterns_do_not_stand_for_each_other() -> None:
    known = here(entry({1: {"dense": 1.0}}))
    assert known.nearest(entry({})) is not None
    for change in ({"values": "i8"}, {"x": "f32"}, {"pattern": "1:4"}, {"pattern": "unstructured"}):
        assert known.nearest(entry({}, **change)) is None


def test_a_density_stands_for_lower_ones_only() -> None:
    times = {1: {"dense": 1.0}}
    known = here(*(entry(times, pattern="unstructured", density=density) for density in (0.3, 0.4, 0.5)))

    def found(density: float) -> float | None:
        near = known.nearest(entry({}, pattern="unstructured", density=density))
        return None if near is None else near.density

    assert [found(density) for density in (0.1, 0.3, 0.301, 0.35, 0.45, 0.5, 0.503)] == [
        0.3, 0.3, 0.3, 0.4, 0.5, 0.5, 0.5
    ]  # fmt: skip
    assert found(0.55) is None


# From times to a plan.


def test_the_fastest_way_of_each_number_of_tokens() -> None:
    times = {
        1: {"dense": 10.0, "bf16": 5.0, "amx": 6.0},
        4: {"dense": 10.0, "bf16": 5.5, "amx": 6.0},
        32: {"dense": 20.0, "bf16": 40.0, "amx": 12.0, "slices": 30.0},
        2048: {"dense": 100.0, "amx": 120.0, "slices": 101.0},
    }
    made = decide(entry(times), any_way)
    assert (made.plan, made.gain, made.reason) == ("bf16<=4,amx<=32,slices", 2.0, "")
    # Numbers in between do what the next larger measured one does.
    assert [native.way_for(made.plan, t) for t in (1, 4, 5, 32, 33, 9999)] == [
        "bf16", "bf16", "amx", "amx", "slices", "slices"
    ]  # fmt: skip


def test_a_way_that_this_machine_lacks_is_not_taken() -> None:
    times = {1: {"dense": 10.0, "amx": 5.0, "avx512": 6.0}, 512: {"dense": 10.0, "amx": 9.0, "slices": 10.0}}
    assert decide(entry(times), lambda tokens: ["avx512", "slices"]).plan == "avx512<=1,slices"
    nothing = decide(entry(times), lambda tokens: [])
    assert nothing.plan == ""
    assert nothing.reason


def test_dense_is_kept_beside_where_decode_gains_enough() -> None:
    for gained, plan in ((9.3, ""), (8.9, "bf16<=1,dense")):
        times = {1: {"dense": 10.0, "bf16": gained}, 512: {"dense": 100.0, "amx": 110.0, "slices": 120.0}}
        made = decide(entry(times), any_way)
        assert made.plan == plan
        assert bool(made.reason) == (not plan)
    # Only many tokens gain: decode pays for the memory, nothing else does.
    times = {1: {"dense": 10.0, "bf16": 12.0}, 512: {"dense": 100.0, "amx": 50.0}}
    assert decide(entry(times), any_way).plan == ""


def test_noise_is_no_reason_for_dense() -> None:
    for us, plan in ((100 / NOISE - 0.01, "bf16<=1,slices"), (100 / NOISE + 0.01, "bf16<=1,dense")):
        times = {1: {"dense": 10.0, "bf16": 5.0}, 512: {"dense": 100.0, "slices": us}}
        assert decide(entry(times), any_way).plan == plan
    # Without any gain it saves memory, and costs nothing.
    times = {1: {"dense": 10.0, "bf16": 10.1}, 512: {"dense": 100.0, "slices": 100.0}}
    assert decide(entry(times), any_way).plan == "bf16<=1,slices"


def test_nothing_is_measured_beyond_the_last_number_of_tokens() -> None:
    times = {1: {"dense": 10.0, "bf16": 5.0}, 8: {"dense": 10.0, "bf16": 5.0}}
    assert decide(entry(times), any_way).plan == "bf16<=8,dense"
    assert decide(entry(times), any_way, packed_only=True).plan == "bf16<=8,slices"
    times[512] = {"dense": 10.0, "amx": 5.0}
    assert decide(entry(times), any_way).plan == "bf16<=8,amx"


def test_the_order_of_columns_costs_what_was_measured() -> None:
    times = {1: {"dense": 10.0, "bf16": 5.0}, 512: {"dense": 100.0, "slices": 98.0}}
    assert decide(entry(times), any_way).plan == "bf16<=1,slices"
    assert "not measured" in decide(entry(times), any_way, permuted=True).reason
    for us, plan in ((0.1, "bf16<=1,slices"), (6.0, "")):
        both = {tokens: {**ways, "gather": us} for tokens, ways in times.items()}
        made = decide(entry(both), any_way, permuted=True)
        assert made.plan == plan
        assert bool(made.reason) == (not plan)


def test_a_kernel_by_name_is_never_dense() -> None:
    times = {1: {"dense": 1.0, "bf16": 5.0, "amx": 4.0}, 512: {"dense": 1.0, "slices": 3.0, "amx": 4.0}}
    assert decide(entry(times), any_way, packed_only=True).plan == "amx<=1,slices"
    assert decide(entry(times), any_way).plan == ""


def test_plans_can_be_read() -> None:
    for steps in ([(1, "amx")], [(1, "bf16"), (2, "bf16"), (8, "amx"), (9, "dense")]):
        assert native.parse_plan(plan_of(steps))[-1] == (None, steps[-1][1])
    assert plan_of([(1, "bf16"), (2, "bf16"), (8, "amx"), (9, "dense")]) == "bf16<=2,amx<=8,dense"


# What is chosen.

needs_native = pytest.mark.skipif(
    dispatch.NATIVE.absent(CPU) is not None, reason=native.missing() or "this processor has no AVX-512 with VBMI2"
)
WEIGHT = packed(64, 128, NofM(2, 4))


def ways() -> tuple[str, ...]:
    return native.ways(torch.bfloat16, torch.bfloat16, 1, 128)


@needs_native
def test_auto_is_dense_where_nothing_was_measured(folders: dict[str, Path]) -> None:
    choice = choose(WEIGHT, "auto")
    assert (choice.kernel, choice.name, choice.reason, choice.plan) == (None, "dense", NOT_MEASURED, "")
    write(here(entry({1: {"dense": 1.0}}, n_out=4096)), folders["shipped"])
    assert "run sparsify tune --shape 64x128" in choose(WEIGHT, "auto").reason


@needs_native
def test_auto_takes_what_was_measured_to_be_faster(folders: dict[str, Path]) -> None:
    first = ways()[0]
    times = {1: {"dense": 10.0, first: 5.0}, 512: {"dense": 100.0, "slices": 99.0}}
    write(here(entry(times)), folders["measured here"])
    choice = choose(WEIGHT, "auto")
    assert (choice.name, choice.plan, choice.reason) == ("native+expanded:2-", f"{first}<=1,slices", "")
    assert choice.kernel is not None
    state = choice.kernel.prepare(WEIGHT)
    assert "dense" not in state.tensors
    times[512]["slices"] = 200.0
    write(here(entry(times)), folders["measured here"])
    choice = choose(WEIGHT, "auto")
    assert (choice.name, choice.plan) == ("native+dense:2-", f"{first}<=1,dense")
    assert choice.kernel is not None
    assert "dense" in choice.kernel.prepare(WEIGHT).tensors
    times[1][first] = 20.0
    write(here(entry(times)), folders["measured here"])
    choice = choose(WEIGHT, "auto")
    assert choice.kernel is None
    assert choice.reason.startswith("dense is faster")
    # Other inputs were not measured, and this machine has no product of 16-bit weights with 32-bit inputs.
    assert "torch.float32 inputs" in choose(WEIGHT, "auto", torch.float32).reason


@needs_native
def test_native_by_name_says_that_nothing_was_measured(folders: dict[str, Path]) -> None:
    choice = choose(WEIGHT, "native")
    assert choice.kernel is not None
    assert choice.name == choice.kernel.reported
    assert choice.plan == native.plan_without_measurements(torch.bfloat16)
    assert choice.reason == NOT_MEASURED
    times = {1: {"dense": 1.0, ways()[0]: 5.0}, 512: {"dense": 1.0, "slices": 2.0}}
    write(here(entry(times)), folders["shipped"])
    choice = choose(WEIGHT, "native")
    assert (choice.name, choice.plan, choice.reason) == ("native+expanded:2-", f"{ways()[0]}<=1,slices", "")
    half = encode(torch.ones(8, 8).half())
    assert choose(half, "native").reason.startswith("native cannot take it: its values are torch.float16")
    assert "float16" in choose(half, "auto").reason


def test_auto_is_dense_where_the_kernels_are_missing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(dispatch.NATIVE, absent=lambda device: "this install has no compiled kernels")
    monkeypatch.setattr(dispatch, "NATIVE", absent)
    choice = choose(WEIGHT, "auto")
    assert (choice.kernel, choice.reason) == (None, "native: this install has no compiled kernels")


def test_weights_without_values_are_no_trouble(folders: dict[str, Path]) -> None:
    write(here(entry({1: {"dense": 1.0}})), folders["shipped"])
    assert choose(encode(torch.zeros(8, 16).bfloat16()), "auto").kernel is None


def test_a_gpu_kernel_is_chosen_if_it_is_faster_for_all_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tables and kernels of a GPU that is not here."""
    kernels = tuple(replace(k, absent=lambda device: None, refuse=lambda packed: None) for k in dispatch.GPU_KERNELS)
    monkeypatch.setattr(dispatch, "GPU_KERNELS", kernels)
    cases: list[tuple[dict[int, dict[str, float]], str, str]] = [
        ({1: {"dense": 9.0, "triton": 5.0}, 512: {"dense": 9.0, "triton": 9.0}}, "triton", ""),
        ({1: {"dense": 9.0, "triton": 5.0}, 512: {"dense": 9.0, "triton": 20.0}}, "dense", "triton: "),
        ({1: {"dense": 9.0, "triton": 8.0, "cutlass": 7.0}, 512: {"dense": 9.0, "triton": 9.0, "cutlass": 5.0}},
         "cutlass", ""),
    ]  # fmt: skip
    for times, name, why in cases:
        monkeypatch.setattr(dispatch, "table_for", lambda device, times=times: here(entry(times)))
        choice = dispatch._on_gpu(WEIGHT, torch.bfloat16)
        assert choice.name == (f"{name}+expanded:65-" if name == "triton" else name)
        assert choice.reason.startswith(why)
    monkeypatch.setattr(dispatch, "table_for", lambda device: None)
    assert dispatch._on_gpu(WEIGHT, torch.bfloat16).reason == NOT_MEASURED
