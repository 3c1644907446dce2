"""Numbers that work is computed from, out of a config that may hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify.checkpoint import read_config
from sparsify.errors import ModelError

_LARGEST = 2**31
# Three times what the largest models have. Planning more takes minutes.
_MOST_LINEARS = 200_000
_LINEARS_OF_EXPERT = 3
_LAYERS, EXPERTS = "num_hidden_layers", ("num_local_experts", "num_experts", "n_routed_experts")


def whole(config: Any, *keys: str, off: int | None = None) -> int | None:
    """The first of ``keys`` that the config sets, to something else than ``off``; None where it sets none.

    Raises:
        ModelError: it is no whole number above 0, or too large.
    """
    for key in keys:
        value = getattr(config, key, None)
        if value is not None and value != off:
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
                raise ModelError(
                    f"config.json: key {key} is {value!r:.40}, no whole number from 1 to {_LARGEST}; download it again"
                )
            return value
    return None


def check_size(folder: Path) -> None:
    """Refuse a config of more linears than any model has, before they are built.

    Raises:
        ModelError: it is one, or there is no config.
    """
    raw = read_config(folder)
    inner = raw.get("text_config")
    for config in (raw, inner if isinstance(inner, dict) else {}):
        layers = config.get(_LAYERS)
        for key in EXPERTS:
            experts = config.get(key)
            if isinstance(layers, int) and isinstance(experts, int):
                n_linears = layers * experts * _LINEARS_OF_EXPERT
                if n_linears > _MOST_LINEARS:
                    raise ModelError(
                        f"{folder / 'config.json'}: keys {_LAYERS} and {key} are {layers} and {experts}, which makes "
                        f"more than {_MOST_LINEARS} linears; download it again"
                    )
