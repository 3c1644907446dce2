"""``quantization_config`` of a compressed checkpoint: which format, and which linears are stored dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import ModelError
from sparsify.format.record import FORMAT, INT8_FORMAT

METHOD = "sparsify"
KEY = "quantization_config"
# Model types whose loader in vLLM hands each tensor over unchanged. Each is served in the tests; a loader that
# transposes or interleaves weights (GPT-2, GPT-NeoX, Falcon) would be given packed values to do it with.
SERVED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "stablelm", "gemma", "gemma2", "gemma3_text", "phi3"}
    | {"cohere", "starcoder2", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
)


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores its linears.

    Attributes:
        ignore: names of the modules whose 2-D weight is stored dense.
        digest: of names, shapes, dtypes and checks of all tensors (``CompressedReader.digest``); empty where whoever
            wrote the checkpoint did not know them.
        int8: values of some linears are 8 bits and a scale. Only then is the checkpoint of format 2, which versions
            that know no scale refuse.
    """

    ignore: tuple[str, ...] = ()
    digest: str = ""
    int8: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As it is written to config.json."""
        stored = {"quant_method": METHOD, "format": INT8_FORMAT if self.int8 else FORMAT, "ignore": list(self.ignore)}
        return {**stored, "digest": self.digest} if self.digest else stored


def read_storage(value: Any, where: object = "config.json") -> Storage | None:
    """The storage that ``quantization_config`` describes; None where another method wrote it, or none did.

    Raises:
        ModelError: it is ours and malformed, or of a format this version does not read.
    """
    if not isinstance(value, Mapping) or value.get("quant_method") != METHOD:
        return None
    version, ignore = value.get("format"), value.get("ignore", [])
    if type(version) is not int or version not in (FORMAT, INT8_FORMAT):
        raise ModelError(
            f"{where}: key {KEY}.format is {version!r}, this version of sparsify reads {FORMAT} and {INT8_FORMAT}; "
            "upgrade it"
        )
    if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
        raise ModelError(f"{where}: key {KEY}.ignore is not a list of module names; export the model again")
    digest = value.get("digest", "")
    if not isinstance(digest, str):
        raise ModelError(f"{where}: key {KEY}.digest is not a string; export the model again")
    return Storage(tuple(ignore), digest, version == INT8_FORMAT)
