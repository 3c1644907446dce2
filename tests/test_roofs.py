"""Where a latency record has a roof: of one device, the one that was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.request import Request, Scenario
from sparsify.bench.roofs import Roofs
from sparsify.bench.subjects import identify
from sparsify.roofline.devices import Device
from sparsify.runtimes import Runtime

DEVICE = Device("here", "some CPU", 1e10, {"float32": 1e11}, {}, 1 << 34, "made up", kind="cpu", how="measured")
SCENARIO = Scenario(8, 3, 1)


@pytest.fixture
def roof(random_models: Callable[[str], Path]) -> Callable[..., Any]:
    """The roof of the tiny llama in a runtime, with options."""
    (subject,) = identify([str(random_models("llama"))])

    def found(runtime: str, device: str = "cpu", measured: Device | None = DEVICE, **options: Any) -> Any:
        request = Request((SCENARIO,), (runtime,), Runtime(**{"dtype": "float32", **options}))
        opened = {"device": device, "session": runtime, "engaged": {}}
        return Roofs(measured).step(subject, opened, SCENARIO, request, runtime)

    return found


def test_a_roof_is_that_of_one_device(roof: Callable[..., Any]) -> None:
    alone = roof("vllm")
    assert alone["tpot_s"] > 0
    for runtime in ("vllm", "vllm-server"):
        assert roof(runtime, tensor_parallel=1) == alone
        assert roof(runtime, tensor_parallel=2) is None
    # Of other runtimes this is no option.
    assert roof("torch", tensor_parallel=2) == alone


def test_without_a_measured_device_there_is_none(roof: Callable[..., Any]) -> None:
    assert roof("torch", measured=None) is None
    assert roof("torch", device="cuda") is None
    assert roof("torch", dtype="float16") is None
