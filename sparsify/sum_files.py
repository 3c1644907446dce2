"""Sums of a shard of the text in a file, for the process that solves what they are of.

Such a file lives for the length of one step of one run, in its folder; whoever lost one makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsify.errors import ModelError
from sparsify.files import temporary_beside, writing
from sparsify.stats import InputStats, Wanted
from sparsify.sums import Accumulator
from sparsify.types import LinearSpec
from sparsify.watch import Key, results

_KEY = "inputs"


def write_sums(path: Path, inputs: Sequence[tuple[Sequence[Key], Accumulator]]) -> None:
    """Write the sums of one shard, of ``Collector.inputs``.

    Raises:
        OutputError: disk full, not writable.
    """
    tensors = {f"{i}.{name}": piece.contiguous() for i, (_, sums) in enumerate(inputs) for name, piece in sums.pieces()}
    about = [{"keys": list(keys), "n_tokens": sums.n_tokens} for keys, sums in inputs]
    with writing(path), temporary_beside(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(about)})
        temporary.replace(path)


class SumFiles:
    """The sums of every shard of a text, in order.

    Args:
        paths: one file a shard.

    Raises:
        ModelError: one is missing, or not what was written.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._inputs: list[dict[Key, tuple[int, int]]] = []
        for path in paths:
            with _open(path) as file:
                try:
                    found = json.loads((file.metadata() or {})[_KEY])
                    self._inputs.append(
                        {
                            (str(parameter), expert): (i, int(entry["n_tokens"]))
                            for i, entry in enumerate(found)
                            for parameter, expert in entry["keys"]
                        }
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise ModelError(f"{path}: not sums of this run ({error}); run the command again") from None

    def n_tokens(self, spec: LinearSpec) -> int:
        """Tokens that reached a linear."""
        return sum(inputs.get(_key(spec), (0, 0))[1] for inputs in self._inputs)

    def statistics(self, specs: Sequence[LinearSpec], wanted: Wanted, device: str) -> dict[str, InputStats]:
        """Statistics of ``specs`` over all shards, to the bit those of a process that has summed all of them.

        Raises:
            NumericsError: NaN or Inf in an input; names linear and channel.
            ModelError: a file that is truncated.
        """
        # By its number in each file: linears that share an input have the same ones.
        made: dict[tuple[int | None, ...], tuple[list[Key], Accumulator]] = {}
        for spec in specs:
            entries = [inputs.get(_key(spec)) for inputs in self._inputs]
            place = tuple(entry[0] if entry else None for entry in entries)
            if any(entries):
                sums = made[place][1] if place in made else Accumulator(spec.in_features, device, wanted)
                made.setdefault(place, ([], sums))[0].append(_key(spec))
        for numbers in zip(*made, strict=True):
            present = [number for number in numbers if number is not None]
            if len(set(present)) < len(present):
                name = next(iter(specs)).parameter
                raise ModelError(f"{name}: shares its input with another linear in some calls only; exclude it")
        for shard, path in enumerate(self._paths):
            # One at a time: what is read of a file may stay in memory until it is closed.
            with _open(path) as file:
                known = set(file.keys())
                for place, (sharing, sums) in made.items():
                    number = place[shard]
                    if number is not None:
                        sums.merge(self._inputs[shard][sharing[0]][1], partial(_read, path, file, known, number))
        return results(list(made.values()), specs, wanted, device)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not sums of this run ({error}); run the command again") from None


def _read(path: Path, file: Any, known: set[str], number: int, name: str) -> torch.Tensor | None:
    whole = f"{number}.{name}"
    if whole not in known:
        return None
    try:
        tensor: torch.Tensor = file.get_tensor(whole)
    except SafetensorError as error:
        raise ModelError(f"{path}: tensor {whole}: {error}; run the command again") from None
    return tensor


def _key(spec: LinearSpec) -> Key:
    return spec.parameter, spec.expert
