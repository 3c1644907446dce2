"""``quantization_config`` of a compressed checkpoint: which format, and which linears are stored dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import ModelError
from sparsify.format.record import FORMAT

METHOD = "sparsify"
KEY = "quantization_config"


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores its linears.

    Attributes:
        ignore: names of the modules whose 2-D weight is stored dense.
    """

    ignore: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As it is written to config.json."""
        return {"quant_method": METHOD, "format": FORMAT, "ignore": list(self.ignore)}


def read_storage(value: Any, where: object = "config.json") -> Storage | None:
    """The storage that ``quantization_config`` describes; None where another method wrote it, or none did.

    Raises:
        ModelError: it is ours and malformed, or of a format this version does not read.
    """
    if not isinstance(value, Mapping) or value.get("quant_method") != METHOD:
        return None
    version, ignore = value.get("format"), value.get("ignore", [])
    if type(version) is not int or version != FORMAT:
        raise ModelError(
            f"{where}: key {KEY}.format is {version!r}, this version of sparsify reads {FORMAT}; upgrade it"
        )
    if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
        raise ModelError(f"{where}: key {KEY}.ignore is not a list of module names; export the model again")
    return Storage(tuple(ignore))
