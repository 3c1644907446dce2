"""What attention reads and computes, from a model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.errors import ModelError
from sparsify.roofline.config import whole


@dataclass(frozen=True)
class Attention:
    """What attention reads and computes.

    Attributes:
        n_heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        full: layers that see everything before.
        windows: for each other layer the most tokens that it sees.
    """

    n_heads: int
    kv_heads: int
    head_dim: int
    full: int
    windows: tuple[int, ...] = ()

    def seen(self, context: float) -> float:
        """Tokens that all layers together see from behind ``context`` tokens."""
        return self.full * context + sum(min(context, window) for window in self.windows)

    def seen_by_all(self, prompt: int) -> float:
        """Tokens that all layers together see from all tokens of a prompt."""
        return sum(_triangle(prompt, window) for window in (*[prompt] * self.full, *self.windows))

    def cached(self, context: float, element_bytes: int) -> float:
        """Bytes of the keys and values of one sequence of ``context`` tokens."""
        return 2 * self.kv_heads * self.head_dim * element_bytes * self.seen(context)


def _triangle(prompt: int, window: int) -> float:
    """Tokens that all tokens of a prompt see of themselves and those before, at most ``window`` each."""
    window = min(prompt, window)
    return window * (window + 1) / 2 + (prompt - window) * window


def attention_of(config: Any, n_layers: int) -> Attention:
    """That of a model with this text config and so many layers.

    Raises:
        ModelError: a number in the config makes no sense.
    """
    n_heads = whole(config, "num_attention_heads")
    if n_heads is None:
        raise ModelError("config.json: key num_attention_heads is missing; planning needs it")
    kv_heads = whole(config, "num_key_value_heads", "num_kv_heads") or n_heads
    head_dim = whole(config, "head_dim") or (whole(config, "hidden_size") or 0) // n_heads
    window = whole(config, "sliding_window", "attention_chunk_size", off=0)
    # Layers of other kinds (linear attention, state spaces) have a state whose size does not grow.
    kinds = getattr(config, "layer_types", None) or ["sliding" if window else "full"] * n_layers
    sliding = sum("sliding" in str(kind) or "chunked" in str(kind) for kind in kinds)
    full = sum("full" in str(kind) for kind in kinds) + (0 if window else sliding)
    return Attention(n_heads, kv_heads, head_dim, full, (window,) * sliding if window else ())
