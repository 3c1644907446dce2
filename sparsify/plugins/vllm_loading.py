"""A model while vLLM loads it: what was asked for, what the checkpoint is, and what runs so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify.kernels.dispatch import AUTO
from sparsify.plugins.engaged import Record


@dataclass
class Loading:
    """What the layers of a model share.

    Attributes:
        compressed: the checkpoint holds packed weights; else it is plain, and weights are packed once they are loaded
            (``--quantization sparsify``).
        legacy: name of compressed-tensors' format, where that wrote the checkpoint.
        fused: linear of vLLM -> the stored linears that make it (``qkv_proj`` -> ``q_proj``, ``k_proj``, ``v_proj``).
        kernel: that was asked for.
        dummy: no weights are loaded; random ones stand in.
        record: what runs, for the log and ``engaged``.
    """

    compressed: bool
    legacy: str | None
    fused: dict[str, list[str]]
    kernel: str = AUTO
    dummy: bool = False
    record: Record = field(default_factory=Record)

    def stored_names(self, prefix: str) -> list[str]:
        """Names of the stored weights that make the linear ``prefix``."""
        stem, dot, leaf = prefix.rpartition(".")
        return [stem + dot + part for part in self.fused.get(leaf, [leaf])]
