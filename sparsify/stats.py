"""Statistics of a linear's inputs, collected by hooks while a block runs.

Sums, never running means: ``sq_norm`` and ``n_tokens`` do not depend on how tokens were split into calls beyond
float64 rounding. Linears that receive the same tensor (q, k, v; gate, up) share one accumulator, which is found
out by identity at run time and holds for any architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sparsify.errors import ModelError, NumericsError
from sparsify.types import LinearSpec


@dataclass(frozen=True)
class InputStats:
    """Sums over the calibration tokens that reached a linear.

    Attributes:
        sq_norm: [in] float32, sum of x_j^2.
        n_tokens: number of tokens.
    """

    sq_norm: torch.Tensor
    n_tokens: int

    @property
    def rms(self) -> torch.Tensor:
        """[in] float32: sqrt(sq_norm / n_tokens).

        Ones where no token arrived (an expert that was never routed to): without data, every input counts the same.
        """
        if self.n_tokens == 0:
            return torch.ones_like(self.sq_norm)
        return (self.sq_norm / self.n_tokens).sqrt()


class Accumulator:
    """Running sum of squares of the tokens of one input."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.sq_norm = torch.zeros(n_in, dtype=torch.float64, device=device)
        self.n_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of ``x`` [..., in]."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        self.sq_norm += torch.linalg.vector_norm(tokens, dim=0).double().square()
        self.n_tokens += tokens.shape[0]

    def result(self, name: str) -> InputStats:
        """The sums as float32.

        Raises:
            NumericsError: a channel is NaN or Inf; ``name`` says where.
        """
        sq_norm = self.sq_norm.float()
        bad = (~torch.isfinite(sq_norm)).nonzero()
        if len(bad):
            raise NumericsError(
                f"{name}: the activations of input channel {int(bad[0])} are NaN or Inf ({len(bad)} such channels); "
                "try --compute-dtype float32 or check the source model"
            )
        return InputStats(sq_norm, self.n_tokens)


class _FusedExperts(TorchFunctionMode):
    """Sees ``linear(x, parameter[expert])`` inside fused mixtures, where there is no module to hook."""

    def __init__(self, parameters: Mapping[int, tuple[str, torch.Tensor]], add: Any) -> None:
        super().__init__()
        self._parameters = parameters
        self._add = add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight = args[0], args[1]
            owner = self._parameters.get(weight.untyped_storage().data_ptr())
            if owner is not None:
                name, parameter = owner
                expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
                self._add((name, expert), x)
        return func(*args, **(kwargs or {}))


class _AllSeen(Exception):
    """Leaves a forward pass whose remaining results nobody needs."""


class Collector:
    """What ``collect`` fills; ``result`` is read after the block has run.

    Args:
        keys: every (parameter name, expert) whose input is wanted.
    """

    def __init__(self, keys: Iterable[tuple[str, int | None]]) -> None:
        self._keys = sorted(set(keys), key=repr)
        self._accumulators: list[Accumulator] = []
        self._index: dict[tuple[str, int | None], int] = {}
        self._owners: set[tuple[str, int | None]] = set()
        self._last: tuple[torch.Tensor, int] | None = None
        self._called: list[tuple[str, int | None]] | None = None
        self._may_stop: bool | None = None

    @contextmanager
    def window(self) -> Iterator[None]:
        """One forward pass, for its inputs only: from the second on it ends where the last of them has been seen.

        The first pass is complete and shows whether each linear is called once, no more; where that does not hold (in
        mixtures of experts, mostly) all are complete. Nobody asks for what the last linear would compute, a quarter of
        a Llama block's work.
        """
        self._called = []
        try:
            yield
            each_once = sorted(self._called, key=repr) == self._keys
            self._may_stop = each_once and self._may_stop is not False
        except _AllSeen:
            pass
        finally:
            self._called = self._last = None

    def see(self, key: tuple[str, int | None], x: torch.Tensor) -> None:
        """``add``, and within ``window`` the end of the pass when this was the last input it is for."""
        self.add(key, x)
        if self._called is not None:
            self._called.append(key)
            if self._may_stop and len(self._called) == len(self._keys) == len(set(self._called)):
                raise _AllSeen

    def add(self, key: tuple[str, int | None], x: torch.Tensor) -> None:
        """Count ``x`` as input of ``key`` = (parameter name, expert); the same tensor object is counted once.

        Raises:
            ModelError: two linears share their input in one call and not in another.
        """
        # The reference held in _last keeps the object alive, so identity cannot be a recycled address.
        if self._last and self._last[0] is x and self._index.setdefault(key, self._last[1]) == self._last[1]:
            return
        if key not in self._index:
            self._index[key] = len(self._accumulators)
            self._accumulators.append(Accumulator(x.shape[-1], x.device))
            self._owners.add(key)
        index = self._index[key]
        if key not in self._owners:
            raise ModelError(f"{key[0]}: shares its input with another linear in some calls only; exclude it")
        self._accumulators[index].add(x)
        self._last = (x, index)

    def result(self, specs: Sequence[LinearSpec]) -> dict[str, InputStats]:
        """Statistics by linear name; a linear that saw no token (an expert never routed to) has n_tokens = 0.

        Raises:
            NumericsError: NaN or Inf in an input; names linear and channel.
        """
        finished: dict[int, InputStats] = {}
        stats = {}
        device = self._accumulators[0].sq_norm.device if self._accumulators else "cpu"
        for spec in specs:
            index = self._index.get((spec.parameter, spec.expert))
            if index is None:
                stats[spec.name] = InputStats(torch.zeros(spec.in_features, device=device), 0)
                continue
            if index not in finished:
                finished[index] = self._accumulators[index].result(spec.name)
            stats[spec.name] = finished[index]
        return stats


@contextmanager
def collect(block: nn.Module, prefix: str, specs: Sequence[LinearSpec]) -> Iterator[Collector]:
    """Collect input statistics of ``specs`` while ``block`` runs inside the context; removes its hooks at the end.

    Args:
        block: a decoder block with its weights loaded.
        prefix: its full name with a trailing dot, ``model.layers.0.``.
        specs: its linears.
    """
    collector = Collector((spec.parameter, spec.expert) for spec in specs)
    handles = []
    fused: dict[int, tuple[str, torch.Tensor]] = {}
    for parameter in dict.fromkeys(spec.parameter for spec in specs):
        local = parameter.removeprefix(prefix)
        tensor = block.get_parameter(local)
        if tensor.dim() == 3:
            fused[tensor.untyped_storage().data_ptr()] = (parameter, tensor)
        else:
            module = block.get_submodule(local.rpartition(".")[0])

            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], parameter: str = parameter) -> None:
                collector.see((parameter, None), inputs[0])

            handles.append(module.register_forward_pre_hook(hook))
    try:
        if fused:
            with _FusedExperts(fused, collector.see):
                yield collector
        else:
            yield collector
    finally:
        for handle in handles:
            handle.remove()
