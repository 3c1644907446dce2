"""A compressed checkpoint read as if it were an ordinary one: dense tensors by name, decoded one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import torch

from sparsify.checkpoint import CheckpointReader, TensorInfo, read_config, read_tensors
from sparsify.errors import ModelError
from sparsify.format.packed import Packed, decode
from sparsify.format.record import CHECK, DTYPE_NAMES, MASK, PARTS, PERM, SCALE, VALUES, from_tensors, read_header
from sparsify.format.storage import KEY, read_storage


def digest(tensors: Mapping[str, tuple[str, tuple[int, ...]]], checks: Mapping[str, list[int]]) -> str:
    """SHA-256, hexadecimal, of what a checkpoint holds.

    Args:
        tensors: name -> dtype as safetensors names it, and shape.
        checks: name -> values of the check tensors among them.
    """
    entries = sorted(tensors.items())
    lines = (f"{name} {dtype} {list(shape)} {checks.get(name, '')}\n" for name, (dtype, shape) in entries)
    return sha256("".join(lines).encode()).hexdigest()


class CompressedReader(CheckpointReader):
    """The tensors of a compressed checkpoint; ``tensors`` and ``read`` show the dense model.

    Attributes:
        stored: name -> TensorInfo of what the files hold.
        packed: names of the modules whose weight is packed.
        digest: SHA-256, hexadecimal, of names, dtypes and shapes of all stored tensors and the checks of the packed
            ones. It tells a checkpoint from which a tensor or a shard is gone, and one model from another.

    Raises:
        ModelError: as ``CheckpointReader``, or a packed weight lacks a part or is not what its check tensor says.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored = self.tensors
        self.packed = sorted(name.removesuffix(f".{CHECK}") for name in self.stored if name.endswith(f".{CHECK}"))
        hidden = {f"{module}.{part}" for module in self.packed for part in PARTS}
        self.tensors = {name: info for name, info in self.stored.items() if name not in hidden}
        for name in self.tensors:
            if name.endswith((f".{MASK}", f".{PERM}", f".{SCALE}")):
                raise ModelError(f"{self.tensors[name].file}: tensor {name} has no {CHECK} beside it; export again")
        checks: dict[str, list[int]] = {}
        for name, check in read_tensors(self.stored, (f"{module}.{CHECK}" for module in self.packed)):
            module = name.removesuffix(f".{CHECK}")
            for part in (VALUES, MASK):
                if f"{module}.{part}" not in self.stored:
                    raise ModelError(f"{self.stored[name].file}: tensor {module}.{part} is missing; export again")
            values = self.stored[f"{module}.{VALUES}"]
            # Nothing is read from it before its dtype is known: there are some that torch cannot make numbers of.
            header = read_header(check)
            if header is None:
                raise ModelError(f"{self.stored[name].file}: tensor {name} is malformed; export the model again")
            shape, scaled_dtype = header
            dtype = DTYPE_NAMES[scaled_dtype] if scaled_dtype else values.dtype
            self.tensors[f"{module}.{VALUES}"] = TensorInfo(values.file, shape, dtype)
            checks[name] = check.tolist()
        self.digest = digest({name: (info.dtype, info.shape) for name, info in self.stored.items()}, checks)

    def _parts(self, module: str) -> list[str]:
        return [name for part in PARTS if (name := f"{module}.{part}") in self.stored]

    def _join(self, module: str, tensors: dict[str, torch.Tensor]) -> Packed:
        parts = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}
        return from_tensors(module, parts, where=self.stored[f"{module}.{CHECK}"].file)

    def read_packed(self, module: str) -> Packed:
        """The packed weight of ``module``, checked.

        Raises:
            ModelError: names the tensor that is missing, damaged or not what an encoder writes.
        """
        return self._join(module, dict(read_tensors(self.stored, self._parts(module))))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), dense and with the stored dtype, grouped by shard; each shard is opened once.

        Raises:
            ModelError: as ``read_packed``, and for a truncated shard.
        """
        packed = {f"{module}.{VALUES}": module for module in self.packed}
        wanted = list(dict.fromkeys(names))
        missing = {packed[name]: self._parts(packed[name]) for name in wanted if name in packed}
        owner = {part: module for module, parts in missing.items() for part in parts}
        stored = (part for name in wanted for part in (missing[packed[name]] if name in packed else [name]))
        # Parts of a weight whose others lie in a later shard.
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in read_tensors(self.stored, stored):
            if name not in owner:
                yield name, tensor
                continue
            module = owner[name]
            parts = found.setdefault(module, {})
            parts[name] = tensor
            if len(parts) == len(missing[module]):
                yield f"{module}.{VALUES}", decode(self._join(module, found.pop(module)))


def open_checkpoint(folder: Path) -> CheckpointReader:
    """The reader for the checkpoint in ``folder``: dense tensors, whether it is compressed or not.

    Raises:
        ModelError: as the readers.
    """
    storage = read_storage(read_config(folder).get(KEY), folder / "config.json")
    if storage is None:
        return CheckpointReader(folder)
    reader = CompressedReader(folder)
    if storage.digest and storage.digest != reader.digest:
        raise ModelError(
            f"{folder / 'config.json'}: key {KEY}.digest does not belong to the tensors beside it: one is missing, was "
            "added or is from another model; download or export all files again"
        )
    return reader
