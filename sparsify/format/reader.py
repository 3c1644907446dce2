"""A compressed checkpoint read as if it were an ordinary one: dense tensors by name, decoded one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from sparsify.checkpoint import CheckpointReader, TensorInfo, read_config, read_tensors
from sparsify.errors import ModelError
from sparsify.format.packed import Packed, decode
from sparsify.format.record import CHECK, MASK, PERM, VALUES, from_tensors
from sparsify.format.storage import KEY, read_storage


class CompressedReader(CheckpointReader):
    """The tensors of a compressed checkpoint; ``tensors`` and ``read`` show the dense model.

    Attributes:
        stored: name -> TensorInfo of what the files hold.
        packed: names of the modules whose weight is packed.

    Raises:
        ModelError: as ``CheckpointReader``, or a packed weight lacks a part or is not what its check tensor says.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored = self.tensors
        self.packed = sorted(name.removesuffix(f".{CHECK}") for name in self.stored if name.endswith(f".{CHECK}"))
        hidden = {f"{module}.{part}" for module in self.packed for part in (VALUES, MASK, CHECK, PERM)}
        self.tensors = {name: info for name, info in self.stored.items() if name not in hidden}
        for name in self.tensors:
            if name.endswith((f".{MASK}", f".{PERM}")):
                raise ModelError(f"{self.tensors[name].file}: tensor {name} has no {CHECK} beside it; export again")
        for name, check in read_tensors(self.stored, (f"{module}.{CHECK}" for module in self.packed)):
            module = name.removesuffix(f".{CHECK}")
            values = self.stored.get(f"{module}.{VALUES}")
            if values is None:
                raise ModelError(f"{self.stored[name].file}: tensor {module}.{VALUES} is missing; export again")
            shape = tuple(check.flatten()[1:3].tolist())
            if check.dtype != torch.int64 or tuple(check.shape) != (8,) or min(shape) < 1:
                raise ModelError(f"{self.stored[name].file}: tensor {name} is malformed; export the model again")
            self.tensors[f"{module}.{VALUES}"] = TensorInfo(values.file, shape, values.dtype)

    def read_packed(self, module: str) -> Packed:
        """The packed weight of ``module``, checked.

        Raises:
            ModelError: names the tensor that is missing, damaged or not what an encoder writes.
        """
        names = [name for part in (VALUES, MASK, CHECK, PERM) if (name := f"{module}.{part}") in self.stored]
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in read_tensors(self.stored, names)}
        return from_tensors(module, tensors, where=self.stored[f"{module}.{CHECK}"].file)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), dense and with the stored dtype.

        Raises:
            ModelError: as ``read_packed``, and for a truncated shard.
        """
        packed = {f"{module}.{VALUES}": module for module in self.packed}
        wanted = list(names)
        yield from read_tensors(self.stored, (name for name in wanted if name not in packed))
        for name in wanted:
            if name in packed:
                yield name, decode(self.read_packed(packed[name]))


def open_checkpoint(folder: Path) -> CheckpointReader:
    """The reader for the checkpoint in ``folder``: dense tensors, whether it is compressed or not.

    Raises:
        ModelError: as the readers.
    """
    storage = read_storage(read_config(folder).get(KEY), folder / "config.json")
    return CheckpointReader(folder) if storage is None else CompressedReader(folder)
