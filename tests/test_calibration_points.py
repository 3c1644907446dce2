"""What records and tables say of products near those that they hold."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sparsify.errors import UsageError
from sparsify.kernels import table
from sparsify.roofline.calibration import Point, efficiency, from_records, from_table, near, raised
from tests.test_plan import H200, HERE, kernel, lines


def found_near(points: list[Point], tokens: float, shape: tuple[int, int] = (4096, 4096)) -> tuple[float, float] | None:
    return near(points, shape, "bfloat16", 0.5, "2:4", tokens)


def test_a_near_shape_stands_for_another_and_a_far_one_does_not() -> None:
    points = from_records(lines([kernel(shape=(4096, 4096)), kernel(sparse=50, shape=(8192, 8192))]), H200)
    assert found_near(points, 1, (4096, 5000)) == (1.25, 1.25)
    assert found_near(points, 1, (8000, 9000)) == (2.0, 2.0)
    assert found_near(points, 1, (40960, 4096)) is None
    assert found_near(points, 2) == (1.25, 1.25)
    assert found_near(points, 3) is None


def test_between_two_numbers_of_tokens_the_range_holds_both() -> None:
    points = from_records(lines([kernel(8), kernel(32, sparse=50)]), H200)
    assert found_near(points, 16) == (1.25, 2.0)


def test_records_go_before_tables_and_together() -> None:
    first, second, beyond = from_records(lines([kernel(), kernel(sparse=50), kernel(2, sparse=25)]), H200)
    shipped = replace(first, low=9.0, high=9.0, in_table=True)
    for points in ([first, second, shipped], [shipped, second, first]):
        assert found_near(points, 1) == (1.25, 2.0)
    assert found_near([shipped, beyond], 1) == (9.0, 9.0)
    assert found_near([shipped, beyond], 2) == (4.0, 4.0)


def _one(dense: list[float], sparse: list[float]) -> Point:
    record = kernel()
    record["kernels"]["dense torch"]["samples_us"], record["kernels"]["native"]["samples_us"] = dense, sparse
    (point,) = from_records(lines([record]), H200)
    return point


def test_what_a_record_says_of_noise_is_in_the_range() -> None:
    point = _one([100.0] * 3, [70.0, 80.0, 100.0])
    assert point.low < 100 / 80 < point.high
    assert point.fastest_us == (100.0, 70.0)
    # What hit both in a round says nothing of their ratio; what hit one does, though their quartiles be alike.
    point = _one([100.0, 200.0, 150.0], [80.0, 160.0, 120.0])
    assert (point.low, point.high) == (1.25, 1.25)
    point = _one([100.0, 200.0, 150.0], [160.0, 80.0, 120.0])
    assert [point.low, point.high] == pytest.approx([(0.625 + 1.25) / 2, (1.25 + 2.5) / 2])
    # Without pairs either may have been slow.
    point = _one([100.0, 150.0, 200.0], [80.0, 80.0, 120.0, 120.0])
    assert [point.low, point.high] == pytest.approx([125 / 120, 175 / 80])


def test_records_that_are_of_something_else_are_left_out() -> None:
    assert len(from_records(lines([kernel()]), H200)) == 1
    assert from_records(lines([kernel()], device="NVIDIA H100 PCIe"), H200) == []
    # Their rival is a weight in 16 bits.
    assert from_records(lines([kernel()], precision="int8"), H200) == []
    dense = kernel()
    del dense["kernels"]["native"], dense["kernels"]["packed"]
    assert from_records(lines([dense]), H200) == []
    here = lines([kernel(threads=2), kernel(tokens=2, threads=4)], device="A processor")
    assert [point.tokens for point in from_records(here, HERE)] == [1]
    with pytest.raises(UsageError, match="malformed"):
        from_records(lines([{"threads": None, "device": "cuda"}]), H200)


def test_a_machine_of_the_same_name_is_another_by_what_its_record_says() -> None:
    def own(change: dict[str, Any], part: str) -> list[bool]:
        run, *rest = lines([kernel(threads=2)], device="A processor")
        place = run["environment"]["host"] if part == "host" else run["ceilings"][0]
        place.update(change)
        return [point.own for point in from_records([run, *rest], HERE)]

    assert own({}, "host") == own({"memory_bytes": int(1.01 * HERE.memory_bytes)}, "host") == [True]
    assert own({"bytes_per_s": HERE.bytes_per_s / 1.9}, "ceilings") == [True]
    assert own({"flops": {"float16": 1.0}}, "ceilings") == [True]
    assert own({"last_level_cache_bytes": HERE.cache_bytes}, "host") == [True]
    for change in ({"cores": 8}, {"memory_bytes": 2 * HERE.memory_bytes}, {"last_level_cache_bytes": 1 << 20}):
        assert own(change, "host") == [False]
    others: list[dict[str, Any]]
    others = [{"bytes_per_s": 2.1 * HERE.bytes_per_s}, {"flops": {"bfloat16": 1e11}}, {"how": "published"}]
    for other in others:
        assert own(other, "ceilings") == [False]
    # All cards of a name are one device by its published peaks.
    assert [point.own for point in from_records(lines([kernel()]), H200)] == [True]


def test_of_another_machine_only_ratios_count() -> None:
    us = 1e6 * 4096 * 4096 * 2 / HERE.bytes_per_s
    other = Point((4096, 4096), "bfloat16", "2:4", 0.5, 1, 3 * us, 1.2, 1.4, (us / 9, us / 9), own=False)
    assert raised(HERE, [other]) == HERE
    assert efficiency([other], HERE, (4096, 4096), "bfloat16", 1) == 1
    assert found_near([other], 1) == (1.2, 1.4)
    mine = replace(other, own=True)
    assert raised(HERE, [mine]) != HERE
    assert efficiency([mine], HERE, (4096, 4096), "bfloat16", 1) == pytest.approx(1 / 3, rel=0.01)


def test_the_tables_that_are_shipped_are_understood() -> None:
    paths = list(table.SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        points = from_table(table.parse(json.loads(path.read_text())))
        assert {point.pattern for point in points} >= {"2:4", "unstructured"}
        assert all(0 < point.low <= point.high and point.dense_us > 0 for point in points)


def test_ceilings_rise_to_what_products_reached() -> None:
    n_bytes = 4096 * 4096 * 2
    us = 1e6 * n_bytes / 1e9
    # What no sample reached, a median over an end of a range, is no bandwidth.
    slow = Point((4096, 4096), "bfloat16", "2:4", 0.5, 1, us, 1.0, 99.0, (us, us))
    assert raised(HERE, [slow]) == HERE
    fast = replace(slow, fastest_us=(us / 20, us))
    better = raised(HERE, [slow, fast])
    assert better.bytes_per_s == pytest.approx(2e10, rel=0.01)
    assert "raised" in better.source
    # A half and a mask, in no more time.
    assert raised(HERE, [replace(slow, fastest_us=(us, us / 20))]).bytes_per_s == pytest.approx(2e10 * 9 / 16, rel=0.01)
    assert efficiency([slow], better, (4096, 4096), "bfloat16", 1) == pytest.approx(1 / 20, rel=0.01)
    assert efficiency([slow], HERE, (4096, 4096), "bfloat16", 9) == 1
    assert raised(H200, [replace(fast, fastest_us=(0.001, 0.001))]) == H200
