"""An artifact served by onnxruntime-genai: its own model, cache and generator, from ``genai_config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError, MissingExtraError, ModelError, UsageError
from sparsify.runtimes.onnxruntime_errors import load_error, run_error
from sparsify.runtimes.onnxruntime_graph import read_graph
from sparsify.runtimes.onnxruntime_interface import read_genai
from sparsify.runtimes.onnxruntime_settings import CPU, CUDA
from sparsify.runtimes.session import Stream, check_count, check_ids, check_mask, collect

_NAMES = {"cpu": CPU, "cuda": CUDA}


class GenaiSession:
    """A folder of layout ``genai`` as a Session (see ``sparsify.runtimes.session``).

    Rows of a batch run one after the other, each without its padding. Greedy choices are made here, from the logits
    that onnxruntime-genai gives, because its own search stops at the end-of-sequence token.

    Args:
        path: artifact folder with genai_config.json.
        provider: ``cpu`` or ``cuda``; None takes what genai_config.json says.
        threads: threads of one operator; None is one for each core.
        spinning: idle threads poll for work.

    Attributes:
        path: the ONNX file.
        vocab_size: logits of each token.
        context: longest sequence in tokens.

    Raises:
        MissingExtraError: onnxruntime-genai is absent.
        UsageError: a setting is out of range, or the provider is not in this build.
        ModelError: the folder has no genai_config.json, or its files are damaged.
        SparsifyError: not enough memory.
    """

    def __init__(
        self, path: Path, *, provider: str | None = None, threads: int | None = None, spinning: bool = True
    ) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise MissingExtraError("onnxruntime-genai is missing; pip install onnxruntime-genai") from error
        if provider is not None and provider not in _NAMES:
            raise UsageError(f"provider {provider!r} is not for onnxruntime-genai; choose one of {', '.join(_NAMES)}")
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads}: want at least 1")
        if not (path / "genai_config.json").is_file():
            raise ModelError(f"{path}: has no genai_config.json; export it with layout genai")
        self._genai: Any = onnxruntime_genai
        facts = read_genai(path)
        self.path = path / facts.file
        self.vocab_size, self.context = facts.vocab_size, facts.context
        self._graph = read_graph(self.path)
        options: dict[str, Any] = {
            "session.intra_op.allow_spinning": str(int(spinning)),
            "session.inter_op.allow_spinning": str(int(spinning)),
        }
        if threads is not None:
            options["intra_op_num_threads"] = threads
        try:
            config = onnxruntime_genai.Config(str(path))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            if provider is not None:
                config.clear_providers()
                if provider != "cpu":
                    config.append_provider(provider)
            self._model: Any = onnxruntime_genai.Model(config)
        except Exception as error:  # all of its own are RuntimeErrors, and memory errors are not
            if "interface not available" in str(error):
                raise UsageError(
                    f"{path}: provider {provider or 'of genai_config.json'}: not in this onnxruntime-genai; "
                    "pip install onnxruntime-genai-cuda"
                ) from error
            raise load_error(self.path, error) from error
        device = self._model.device_type.lower()
        if device not in _NAMES:
            raise UsageError(f"{path}: genai_config.json is for {device}; choose --provider cpu or cuda")
        self._provider = _NAMES[device]
        self.name = f"onnxruntime-genai {self._provider}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._model = None

    def _generator(self, ids: NDArray[np.int64], more: int) -> Any:
        """A generator that has run ids [length], with room for ``more`` tokens."""
        length = len(ids) + more
        if length > self.context:
            raise DataError(f"{self.path}: {length} tokens are more than the {self.context} the model takes")
        try:
            parameters = self._genai.GeneratorParams(self._model)
            parameters.set_search_options(max_length=length, do_sample=False)
            generator = self._genai.Generator(self._model, parameters)
            generator.append_tokens(ids.astype(np.int32))
        except Exception as error:
            raise run_error(self.path, (1, length), error) from error
        return generator

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See ``Session.logits``; at padded positions they are 0."""
        check_ids(ids, self.vocab_size)
        mask = check_mask(attention_mask, ids)
        values = np.zeros((*ids.shape, self.vocab_size), dtype=np.float32)
        for row, kept, tokens in zip(values, mask == 1, ids, strict=True):
            row[kept] = self._generator(tokens[kept], 0).get_output("logits")[0]
        return values

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``Session.stream``; all tokens of a row come before the first of the next.

        Raises:
            DataError: as there, or the model has not room for so many tokens.
        """
        check_ids(ids, self.vocab_size)
        check_count(n)
        for row, tokens in enumerate(ids):
            for token in self._row(tokens, n):
                step: list[list[int]] = [[] for _ in ids]
                step[row].append(token)
                yield step

    def _row(self, ids: NDArray[np.int64], n: int) -> Iterator[int]:
        """The tokens that follow ids [length]."""
        generator = self._generator(ids, n - 1)
        for i in range(n):
            token = int(generator.get_logits()[0, -1].argmax())
            yield token
            if i < n - 1:
                try:
                    generator.append_tokens(np.array([token], dtype=np.int32))
                except Exception as error:
                    raise run_error(self.path, (1, len(ids) + i), error) from error

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """See ``Session.generate``; errors as ``stream``."""
        return collect(self.stream(ids, n), len(ids), n)

    def engaged(self) -> dict[str, str]:
        """As ``OnnxRuntimeSession.engaged``: onnxruntime-genai runs the same graph in ONNX Runtime."""
        return self._graph.engaged({}, self._provider)
