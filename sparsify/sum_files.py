"""Sums of a shard of the text in a file, for the process that solves what they are of.

Such a file lives for the length of one step of one run, in its folder; whoever lost one makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparsify.checkpoint import open_shard
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
            with open_shard(path) as file:
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
        with ExitStack() as stack:
            files = [stack.enter_context(open_shard(path)) for path in self._paths]
            names = [set(file.keys()) for file in files]
            for spec in specs:
                key = _key(spec)
                entries = [inputs.get(key) for inputs in self._inputs]
                place = tuple(entry[0] if entry else None for entry in entries)
                if place in made:
                    made[place][0].append(key)
                    continue
                if not any(entries):
                    continue
                sums = Accumulator(spec.in_features, device, wanted)
                made[place] = [key], sums
                for file, known, entry in zip(files, names, entries, strict=True):
                    if entry is not None:
                        sums.merge(entry[1], partial(_read, file, known, entry[0]))
            return results(list(made.values()), specs, wanted)


def _read(file: Any, known: set[str], number: int, name: str) -> torch.Tensor | None:
    whole = f"{number}.{name}"
    tensor: torch.Tensor | None = file.get_tensor(whole) if whole in known else None
    return tensor


def _key(spec: LinearSpec) -> Key:
    return spec.parameter, spec.expert
