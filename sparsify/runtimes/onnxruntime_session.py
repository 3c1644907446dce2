"""An exported decoder in ONNX Runtime: ``model.onnx`` with flat key/value cache tensors."""

import re
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import MissingExtraError, ModelError, UsageError
from sparsify.runtimes.session import check_count, check_ids, check_mask, positions

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# A weight reaches its product through these without its values being computed with.
_MOVES = {
    *("Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand"),
    *("Gather", "GatherND", "Slice", "Split"),
}
_SUFFIX = re.compile(r"(\.weight)?(\.transposed)?$")


class OnnxRuntimeSession:
    """``model.onnx`` of an artifact folder as a Session (see ``sparsify.runtimes.session``).

    Args:
        path: artifact folder.
        threads: threads of one operator; None leaves the choice to ONNX Runtime.
        providers: execution providers in order of preference. Each must be in use afterwards, and work is given to
            the CPU only when ``CPUExecutionProvider`` is named.

    Raises:
        MissingExtraError: onnxruntime is absent.
        UsageError: a provider is not in this build, or would not start.
        ModelError: the file is missing, truncated or not a decoder with a key/value cache.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, providers: tuple[str, ...] = ("CPUExecutionProvider",)
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError('onnxruntime is missing; pip install "sparsify-toolkit[onnx]"') from error
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads}: want at least 1")
        absent = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if absent or not providers:
            here = ", ".join(onnxruntime.get_available_providers())
            raise UsageError(f"provider {', '.join(absent) or '(none)'}: this onnxruntime offers {here}")
        self.path = path / "model.onnx"
        if not self.path.is_file():
            raise ModelError(f"{self.path}: no such file; export the model first")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # failures come as exceptions; the log would print them a second time
        if threads is not None:
            options.intra_op_num_threads = threads
        if "CPUExecutionProvider" not in providers:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(self.path, options, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            line = " ".join(str(error).split())[:300]
            raise ModelError(f"{self.path}: ONNX Runtime cannot load it: {line}") from error
        self._session.disable_fallback()
        active = self._session.get_providers()
        dropped = [name for name in providers if name not in active]
        if dropped:
            raise UsageError(
                f"provider {', '.join(dropped)}: did not start; ONNX Runtime would use {', '.join(active)}"
            )
        self.name = f"onnxruntime {' '.join(providers)}"
        self._read_interface()

    def _read_interface(self) -> None:
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        past = [name for name in inputs if re.fullmatch(r"past_key_values\.\d+\.(key|value)", name)]
        present = [name.replace("past_key_values", "present") for name in past]
        absent = {"input_ids", "attention_mask"} - set(inputs) | {"logits", *present} - set(outputs)
        if absent or not past:
            raise ModelError(
                f"{self.path}: not a decoder with a cache: lacks {', '.join(sorted(absent)) or 'the cache'}"
            )
        vocab_size = outputs["logits"].shape[-1]
        cache = {name: (inputs[name].shape[1], inputs[name].shape[3], _TYPES.get(inputs[name].type)) for name in past}
        if any(isinstance(x, str) or x is None for sizes in cache.values() for x in sizes) or isinstance(
            vocab_size, str
        ):
            raise ModelError(f"{self.path}: vocabulary and cache heads need fixed sizes and float types")
        self.vocab_size = int(vocab_size)
        self.n_layers = len(past) // 2
        self._past, self._present, self._cache = past, present, cache
        self._takes_positions = "position_ids" in inputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session = None

    def empty_past(self, batch: int) -> list[NDArray[Any]]:
        """A cache of no tokens: per layer key then value, [batch, heads, 0, dim] in the graph's float type."""
        return [np.empty((batch, heads, 0, dim), dtype=dtype) for heads, dim, dtype in self._cache.values()]

    def _feeds(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        past: list[NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:
        feeds = {"input_ids": ids, "attention_mask": mask, **dict(zip(self._past, past, strict=True))}
        return {**feeds, "position_ids": position_ids} if self._takes_positions else feeds

    def run(
        self,
        ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        past: list[NDArray[Any]],
    ) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        """One step of the graph as it is: (logits [batch, sequence, vocab], present cache).

        Args:
            ids: [batch, sequence] int64.
            attention_mask: [batch, past + sequence] int64.
            position_ids: [batch, sequence] int64; not used where the graph takes none.
            past: the cache of ``past`` tokens, as ``empty_past`` or the step before gave it.

        Raises:
            DataError: ids that are no int64 [batch, sequence] or lie outside the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        feeds = self._feeds(ids, attention_mask, position_ids, past)
        logits, *present = self._session.run(["logits", *self._present], feeds)
        return logits.astype(np.float32, copy=False), present

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See ``Session.logits``; the cache is not fetched and the logits are not copied."""
        check_ids(ids, self.vocab_size)
        mask = check_mask(attention_mask, ids)
        feeds = self._feeds(ids, mask, positions(mask), self.empty_past(ids.shape[0]))
        values: NDArray[np.float32] = self._session.run(["logits"], feeds)[0].astype(np.float32, copy=False)
        return values

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """See ``Session.generate``."""
        check_ids(ids, self.vocab_size)
        check_count(n)
        made = np.empty((ids.shape[0], n), dtype=np.int64)
        step, past = ids, self.empty_past(ids.shape[0])
        for i in range(n):
            mask = np.ones((ids.shape[0], ids.shape[1] + i), dtype=np.int64)
            logits, past = self.run(step, mask, positions(mask)[:, -step.shape[1] :], past)
            step = logits[:, -1].argmax(axis=-1)[:, None]
            made[:, i] = step[:, 0]
        return made

    def engaged(self) -> dict[str, str]:
        """``dense`` for each linear whose weight a MatMul or Gemm reads; ``unknown`` where it cannot be seen.

        Known from the graph that was loaded: ONNX Runtime has no kernel for the standard MatMul and Gemm that skips
        zeros. TensorRT providers choose tactics this session cannot see, hence ``unknown``. An operator outside the
        ONNX standard that takes a weight is reported by domain and name rather than taken for dense. An output layer
        that shares the embedding's weight goes by the embedding's name.
        """
        import onnx

        graph = onnx.load(self.path, load_external_data=False).graph
        carries = {tensor.name: tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
        # Rows gathered from a matrix are an embedding look-up, not a weight; experts are gathered from 3-D stacks.
        tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
        report: dict[str, str] = {}
        kernel = "unknown" if "tensorrt" in self.name.lower() else "dense"
        for node in graph.node:
            weights = [carries[name] for name in node.input if name in carries]
            if node.domain not in ("", "ai.onnx"):
                report.update(dict.fromkeys(weights, f"{node.domain}::{node.op_type}"))
            elif node.op_type in ("MatMul", "Gemm"):
                report.update(dict.fromkeys(weights, kernel))
            elif node.op_type in _MOVES and node.input[0] in carries:
                if "Gather" in node.op_type and node.input[0] in tables:
                    continue
                carries.update(dict.fromkeys(node.output, carries[node.input[0]]))
        return {_SUFFIX.sub("", weight): kernel for weight, kernel in report.items()}
