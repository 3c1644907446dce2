"""A decoder engine in TensorRT or TensorRT-RTX: ``model.engine`` of an artifact folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import ModelError
from sparsify.exporters.tensorrt_api import TensorRt, load_tensorrt
from sparsify.exporters.tensorrt_engine import ENGINE
from sparsify.exporters.tensorrt_header import EngineHeader, check, read_header
from sparsify.exporters.tensorrt_log import BuildLog
from sparsify.exporters.tensorrt_trust import load_plan
from sparsify.files import read_json, sha256_file
from sparsify.runtimes.session import Stream, check_count, check_ids, check_mask, collect, positions
from sparsify.runtimes.tensorrt_cache import Buffers
from sparsify.runtimes.tensorrt_decode import Bucketed, Growing, order_is_free
from sparsify.runtimes.tensorrt_device import Device
from sparsify.runtimes.tensorrt_engaged import engaged
from sparsify.runtimes.tensorrt_execution import Engine, Execution, set_weight_budget
from sparsify.runtimes.tensorrt_interface import DECODE, PREFILL, read_interface, read_limits
from sparsify.runtimes.tensorrt_prefill import first_token, prefill


class TensorRtSession:
    """``model.engine`` as a Session (see ``sparsify.runtimes.session``).

    Weights, activations, inputs, logits and key/value cache are allocated when the session opens, for the largest
    request that the engine's profiles allow. Contexts and CUDA graphs are made when a batch and length first need them,
    and torch takes memory for copies and maxima. The cache stays on the device; a generation's tokens come back one by
    one, while the next step runs.

    Args:
        path: artifact folder.
        trust_engine: deserialise an engine that this user did not build.
        cuda_graphs: decode in captured graphs, on a cache of fixed lengths; else step by step on one that grows.
        weight_budget: bytes of the streamable weights that stay on the GPU, for an engine with weight streaming; None
            is as many as there is room for.
        device: the GPU, as torch names it. ``cpu`` is for stand-ins of TensorRT.
        api: the TensorRT to use; None is the installed one of the kind that built the engine.
        engine: file to open; ``dense.engine`` is the twin of the sparse one.

    Attributes:
        limits: how large a request may be.

    Raises:
        MissingExtraError: TensorRT is absent.
        UsageError: no such device, the engine is not trusted, or the weight budget means nothing.
        ModelError: the file is missing, truncated, for another TensorRT or GPU, from another ONNX file than the one
            beside it, or not a decoder with a key/value cache.
        SparsifyError: out of GPU memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        trust_engine: bool = False,
        cuda_graphs: bool = True,
        weight_budget: int | None = None,
        device: str = "cuda",
        api: TensorRt | None = None,
        engine: str = ENGINE,
    ) -> None:
        self.path = path / engine
        header = read_header(self.path)
        api = api or load_tensorrt(header.kind)
        self._device = Device(device)
        check(
            self.path,
            header,
            kind=api.kind,
            version=api.version,
            compute_capability=self._device.compute_capability,
            source_sha256=_sources(path, header),
        )
        plan = load_plan(self.path, header, trust_engine=trust_engine)
        self._log = BuildLog()
        self._logger = api.logger(self._log)
        with self._device.scope(str(self.path)):
            # Trusted by now: such an engine brings its own runtime, which is code for the CPU.
            self._runtime: Any = api.runtime(self._logger, self._log, host_code=header.version_compatible)
            native = api.deserialize(self._runtime, plan, self.path, self._log)
            del plan
            self._interface = read_interface(native, api.module, self.path)
            names = [profile.name for profile in header.profiles]
            self.limits = read_limits(native, self._interface, names, self.path)
            self._buffers: Buffers | None = Buffers(self._device, self._interface, self.limits)
            streamed = set_weight_budget(api, native, weight_budget, self._device, self.path)
            self._engine: Engine | None = Engine(self.path, api, native, self._device, self._log)
            self._prefill: Execution | None = Execution(self._engine, names.index(PREFILL))
            common = self._engine, self._interface, self._buffers, names.index(DECODE)
            self._decoder: Bucketed | Growing | None = (
                Bucketed(*common, self.limits.max_past, order_is_free(_config(path), self._interface))
                if cuda_graphs
                else Growing(*common)
            )
        self._header = header
        # Counts prompts, each of which takes the buffers from the stream before, and the end of the session.
        self._turn = 0
        self.vocab_size = self._interface.vocab_size
        graphs = " CUDA graphs" if cuda_graphs and self._device.is_cuda else ""
        streams = f", {streamed / 1e6:.0f} MB of weights in host memory" if streamed else ""
        self.name = f"{api.label} {header.precision}{graphs}{streams}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._decoder is None:
            return
        self._turn += 1
        self._device.synchronize()
        self._decoder.close()
        # Contexts before the engine, the engine before the runtime.
        self._decoder = self._prefill = self._buffers = self._engine = self._runtime = None

    @property
    def memory_bytes(self) -> dict[str, int]:
        """What the session holds on the device besides the weights: ``buffers`` and ``activations``, in bytes."""
        engine, buffers = self._opened()
        return {"buffers": buffers.device_bytes, "activations": engine.activation_bytes}

    def _opened(self) -> tuple[Engine, Buffers]:
        if self._engine is None or self._buffers is None:
            raise RuntimeError("the session is closed")
        return self._engine, self._buffers

    def _run_prompt(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
        """Logits of the prompt on the device, in the session's own buffer."""
        _, buffers = self._opened()
        assert self._prefill is not None
        self._turn += 1
        return prefill(self._prefill, self._interface, buffers, ids, mask, positions(mask))

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See ``Session.logits``.

        Raises:
            UsageError: larger than the engine's prefill profile.
        """
        check_ids(ids, self.vocab_size)
        mask = check_mask(attention_mask, ids)
        self.limits.check(self.path, *ids.shape)
        with self._device.scope(str(self.path)):
            # Copied to the host before the conversion, which would need as much memory again on the device.
            values: NDArray[np.float32] = self._run_prompt(ids, mask).to("cpu", copy=True).float().numpy()
        return values

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``Session.stream``; from the second token on, the step that follows is enqueued before one is waited for.

        Raises:
            DataError: as there.
            UsageError: larger than the engine's profiles.
            RuntimeError: the session was closed or asked something else meanwhile.
        """
        check_ids(ids, self.vocab_size)
        check_count(n)
        batch, length = ids.shape
        self.limits.check(self.path, batch, length, n)
        waiting = [self._enqueue_prompt(ids)]
        turn = self._turn
        # Before anything follows: the first token's time is the prompt's, and to begin takes the host a while.
        yield waiting.pop()()
        for cached in range(length, length + n - 1):
            if self._turn != turn:
                raise RuntimeError("the session was closed or asked something else before this stream was over")
            waiting.append(self._enqueue(batch, cached, begin=cached == length))
            if len(waiting) > 1:
                yield waiting.pop(0)()
        for arrive in waiting:
            yield arrive()

    def _enqueue_prompt(self, ids: NDArray[np.int64]) -> Callable[[], list[list[int]]]:
        """The first step; what comes back waits for its tokens."""
        _, buffers = self._opened()
        with self._device.scope(str(self.path)):
            first_token(buffers, self._run_prompt(ids, np.ones_like(ids)))
            return self._device.fetch(buffers.ids[: len(ids), None])

    def _enqueue(self, batch: int, cached: int, *, begin: bool) -> Callable[[], list[list[int]]]:
        """The step after ``cached`` tokens; what comes back waits for its tokens."""
        _, buffers = self._opened()
        assert self._decoder is not None
        with self._device.scope(str(self.path)):
            if begin:
                self._decoder.begin(batch, cached)
            self._decoder.step(batch, cached)
            return self._device.fetch(buffers.ids[:batch, None])

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """See ``Session.generate``; errors as ``stream``."""
        return collect(self.stream(ids, n), len(ids), n)

    def engaged(self) -> dict[str, str]:
        """Per linear ``sparse in PROFILE (TACTIC)``, ``dense``, or ``unknown (WHY)``.

        Known from the proof that was written when the engine was built, and from the tactics that the loaded engine
        names; see ``sparsify.runtimes.tensorrt_engaged``.
        """
        engine, _ = self._opened()
        return engaged(self.path, self._header, engine.api.inspect(engine.native))


def _sources(folder: Path, header: EngineHeader) -> dict[str, str]:
    """File name -> SHA-256 of the ONNX files as the header has them, and as they are where they lie in ``folder``."""
    found = dict(header.source_sha256)
    for name in found:
        if Path(name).name == name and (folder / name).is_file():
            try:
                found[name] = sha256_file(folder / name)
            except OSError as error:
                raise ModelError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
    return found


def _config(folder: Path) -> dict[str, Any]:
    """The model's config; empty where there is none."""
    value: Any = None
    with contextlib.suppress(OSError, ValueError):
        value = read_json(folder / "config.json")
    return value if isinstance(value, dict) else {}
