"""What ONNX Runtime is given to load: the file itself, or a packed one unpacked weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.runtimes.onnxruntime_graph import Graph


@dataclass(frozen=True)
class Source:
    """Of a session.

    Attributes:
        model: path, or the bytes of a model whose weights are in ``initializers``.
        folder: where the external data of such bytes lie.
        initializers: name -> OrtValue; they must live until the session is made.
    """

    model: Path | bytes
    folder: Path
    initializers: dict[str, Any]

    def apply(self, options: Any) -> None:
        """Tell the ``onnxruntime.SessionOptions`` where the weights are."""
        if isinstance(self.model, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
            options.add_external_initializers(list(self.initializers), list(self.initializers.values()))


def open_source(graph: Graph, *, unpack: bool = True) -> Source:
    """The source for ``graph``; without ``unpack`` the file as it is.

    ONNX Runtime would unpack weights by itself, all at once in several times their dense size. Here it is one at a
    time, into arrays that ONNX Runtime then copies: twice the dense size until the source is dropped.

    Raises:
        ModelError: a packed weight is damaged.
    """
    if not graph.packed or not unpack:
        return Source(graph.path, graph.path.parent, {})
    from onnxruntime import OrtValue

    from sparsify.exporters.onnx_packed_session import dense_for_session

    dense = dense_for_session(graph.path)
    values = (
        OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
        for array, kind in zip(dense.arrays, dense.data_types, strict=True)
    )
    return Source(dense.proto, dense.folder, dict(zip(dense.names, values, strict=True)))
