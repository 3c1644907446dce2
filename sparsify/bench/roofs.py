"""The least time the device could need for a scenario, from what it was measured to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.bench.engaged import reads_packed
from sparsify.bench.request import Request, Scenario
from sparsify.bench.subjects import Subject
from sparsify.errors import ModelError, SparsifyError, UsageError
from sparsify.roofline.bounds import DENSE, Storage, storage_of
from sparsify.roofline.devices import Device
from sparsify.roofline.work import ModelWork, step_roof
from sparsify.types import LinearSpec, parse_pattern

# Precision of a graph -> type of weights and arithmetic, where both are the same.
_GRAPH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Roofs:
    """Roofs of subjects on one device.

    Args:
        device: what was measured; None gives no roofs.
    """

    def __init__(self, device: Device | None) -> None:
        self._device = device
        self._work: dict[tuple[str, str], ModelWork | None] = {}

    def records(self) -> list[dict[str, Any]]:
        """The ``ceilings`` of a ``run`` record."""
        return [] if self._device is None else [self._device.to_record()]

    def step(
        self, subject: Subject, opened: dict[str, Any], scenario: Scenario, request: Request, runtime: str
    ) -> dict[str, Any] | None:
        """The ``roof`` of a ``latency`` record.

        None where arithmetic or model is not one of those that are understood, or runs on another device than the one
        that was measured, or on several: what they reach together was not measured.

        Args:
            subject: the artifact.
            opened: what its worker said: device, and the kernel of each linear, for only a sparse one reads weights
                without their zeros.
            scenario: what runs.
            request: options of the runtimes.
            runtime: the one that it runs in.
        """
        if self._device is None or self._device.kind != opened["device"]:
            return None
        if request.options(runtime).tensor_parallel > 1:
            return None
        dtype = request.dtype
        if subject.kind in ("onnx", "tensorrt"):
            precision = (subject.body or {}).get("onnx", {}).get("precision")
            if precision not in _GRAPH_DTYPES:
                return None
            dtype = _GRAPH_DTYPES[precision]
        key = (subject.label, opened["session"])
        try:
            if key not in self._work:
                self._work[key] = _work(subject, dtype, opened["engaged"], request)
            work = self._work[key]
            if work is None:
                return None
            roof = step_roof(work, self._device, scenario.prompt_tokens, scenario.batch, scenario.new_tokens)
        except (UsageError, ModelError):  # no peak of this type is known, or a config that says odd things
            return None
        return {**roof._asdict(), "ceilings": self._device.how}


def _work(subject: Subject, dtype: str, engaged: Mapping[str, str], request: Request) -> ModelWork | None:
    from sparsify.model import load_skeleton

    try:
        skeleton = load_skeleton(subject.folder, trust_remote_code=request.trust_remote_code, weights=False)
    except SparsifyError:
        return None
    # Linears that a runtime fuses go by another name there: the roof is one for the best that can have run.
    any_sparse = any(map(reads_packed, engaged.values()))
    rows: Sequence[dict[str, Any]] = (subject.body or {}).get("linears", ())
    patterns = {
        row["name"]: pattern
        for row in rows
        if (pattern := parse_pattern(row["pattern"])).sparsity > 0
        and (reads_packed(engaged[row["name"]]) if row["name"] in engaged else any_sparse)
    }

    def storage(spec: LinearSpec) -> Storage:
        return storage_of(patterns[spec.name]) if spec.name in patterns else DENSE

    stored = {}
    if (subject.body or {}).get("storage", {}).get("values") == "int8":
        specs = [spec for block in skeleton.linears for spec in block if spec.name in patterns]
        stored = {spec.name: storage(spec).n_bytes(spec.out_features, spec.in_features, 1) for spec in specs}
    return ModelWork.from_skeleton(skeleton, dtype, storage, stored)
