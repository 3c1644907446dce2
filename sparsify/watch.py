"""Hooks that see the inputs of a block's linears while it runs, and collect statistics of them.

Linears that receive the same tensor (q, k, v; gate, up) share one accumulator, which is found out by identity at run
time and holds for any architecture; so is the place of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sparsify.errors import ModelError
from sparsify.stats import InputStats, Wanted
from sparsify.sums import Accumulator
from sparsify.types import LinearSpec


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


class _AllSeen(BaseException):
    """Leaves a forward pass whose remaining results nobody needs; no Exception, which a block might catch."""


Key = tuple[str, int | None]
"""Parameter name and expert of a linear."""


class Watcher(ABC):
    """Sees the inputs of linears while a block runs, pass by pass; subclasses say what to do with them.

    Args:
        keys: every linear whose input is wanted.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = sorted(set(keys), key=repr)
        # The calls of this pass, the tensor of the last, and how many calls there were when that tensor was new.
        self._called: list[Key] | None = None
        self._x: torch.Tensor | None = None
        self._n_new = 0
        # The calls after which the last complete pass brought nothing new; None where a pass may not end early.
        self._enough: list[Key] | None = None
        self._uneven = False

    @contextmanager
    def window(self, *, whole: bool = False) -> Iterator[None]:
        """One forward pass, for its inputs only: from the second on it ends where the last of them has been seen.

        The first pass is complete and shows which linears share an input, and whether each is called once, no more;
        where that does not hold (in mixtures of experts, mostly) all are complete. Nobody asks for what the last
        linear would compute, a quarter of a Llama block's work, or for that of others with the same input. A pass
        that is ``whole`` goes to the end: the text's last one, to see that it is still so.
        """
        enough, self._enough = self._enough, None if whole else self._enough
        self._called, self._n_new = [], 0
        try:
            yield
            self._uneven |= sorted(self._called, key=repr) != self._keys
            enough = None if self._uneven else self._called[: self._n_new]
        except _AllSeen:
            pass
        finally:
            self._called, self._x, self._enough = None, None, enough
            self.end_of_window()

    def see(self, key: Key, x: torch.Tensor) -> None:
        """``add``, and within ``window`` the end of the pass when this was the last input it is for."""
        self.add(key, x)
        if self._called is not None:
            self._called.append(key)
            if x is not self._x:
                # Held, so that its identity cannot be a recycled address.
                self._x, self._n_new = x, len(self._called)
            if self._called == self._enough:
                raise _AllSeen

    @abstractmethod
    def add(self, key: Key, x: torch.Tensor) -> None:
        """An input of ``key``."""

    @abstractmethod
    def end_of_window(self) -> None:
        """Called when a pass is over."""


class Tape(Watcher):
    """Keeps the inputs of one pass, for another pass over the same tokens to be compared with.

    Attributes:
        stream: the residual stream at the places that ``watch`` was told of, by place.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        super().__init__(keys)
        self._inputs: dict[Key, list[torch.Tensor]] = {}
        self.stream: dict[str, torch.Tensor] = {}

    def add(self, key: Key, x: torch.Tensor) -> None:
        """Keep ``x``."""
        self._inputs.setdefault(key, []).append(x)

    def end_of_window(self) -> None:
        """Keep everything: the other pass is still to come."""

    def rewind(self) -> None:
        """Forget the last pass."""
        self._inputs.clear()
        self.stream.clear()

    def next(self, key: Key) -> torch.Tensor | None:
        """The next input of ``key`` in the order of its calls; None when there is none."""
        kept = self._inputs.get(key)
        return kept.pop(0) if kept else None


class Collector(Watcher):
    """Accumulates statistics; ``result`` is read after the block has run.

    Args:
        keys: every linear whose input is wanted.
        wanted: which sums.
        dense: the inputs of the same linears in the dense model, pass by pass, where ``wanted.drift``.
        places: parameter name -> where the residual stream is that the linear's output is added to.
        length: tokens of a window. Inputs of fewer are a selection of tokens, which the dense model makes otherwise
            (it routes other tokens to an expert), so there is nothing to compare them with.
    """

    def __init__(
        self,
        keys: Iterable[Key],
        wanted: Wanted | None = None,
        dense: Tape | None = None,
        places: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(keys)
        self._length = length
        self._wanted = wanted or Wanted()
        self._dense = dense
        self._places = places or {}
        self.stream: dict[str, torch.Tensor] = {}
        self._accumulators: list[Accumulator] = []
        self._index: dict[Key, int] = {}
        self._owners: set[Key] = set()
        self._last: tuple[torch.Tensor, int] | None = None

    def end_of_window(self) -> None:
        """Let the last input go."""
        self._last = None
        self.stream.clear()

    def end_of_shard(self) -> None:
        """The windows since the last call were a shard of the text."""
        for accumulator in self._accumulators:
            accumulator.flush()

    def inputs(self) -> list[tuple[list[Key], Accumulator]]:
        """Every distinct input that was seen: the linears that share it, and its sums."""
        found: list[tuple[list[Key], Accumulator]] = [([], accumulator) for accumulator in self._accumulators]
        for key, index in self._index.items():
            found[index][0].append(key)
        return found

    def add(self, key: Key, x: torch.Tensor) -> None:
        """Count ``x`` as input of ``key``; the same tensor object is counted once.

        Raises:
            ModelError: two linears share their input in one call and not in another.
        """
        dense = self._dense.next(key) if self._dense is not None else None
        n_tokens = x.numel() // x.shape[-1]
        if key[1] is not None or (self._length is not None and n_tokens != self._length):
            dense = None
        # The reference held in _last keeps the object alive, so identity cannot be a recycled address.
        if self._last and self._last[0] is x and self._index.setdefault(key, self._last[1]) == self._last[1]:
            return
        if key not in self._index:
            self._index[key] = len(self._accumulators)
            self._accumulators.append(Accumulator(x.shape[-1], x.device, self._wanted))
            self._owners.add(key)
        index = self._index[key]
        if key not in self._owners:
            raise ModelError(f"{key[0]}: shares its input with another linear in some calls only; exclude it")
        place = self._places.get(key[0]) if self._wanted.shift else None
        shift = None
        if place is not None and self._dense is not None:
            shift = self._dense.stream[place] - self.stream[place]
        self._accumulators[index].add(x, dense, shift)
        self._last = (x, index)

    def order(self, specs: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
        """``specs`` that saw tokens, grouped by the input they share, in the order in which the block computes them."""
        groups: dict[int, list[LinearSpec]] = {}
        for spec in specs:
            index = self._index.get((spec.parameter, spec.expert))
            if index is not None:
                groups.setdefault(index, []).append(spec)
        return [groups[index] for index in sorted(groups)]

    def result(self, specs: Sequence[LinearSpec]) -> dict[str, InputStats]:
        """As ``results``."""
        device = self._accumulators[0].device if self._accumulators else "cpu"
        return results(self.inputs(), specs, self._wanted, device)


def results(
    inputs: Sequence[tuple[Sequence[Key], Accumulator]],
    specs: Sequence[LinearSpec],
    wanted: Wanted,
    device: torch.device | str,
) -> dict[str, InputStats]:
    """Statistics by linear name, one object for those that share an input.

    A linear that saw no token (an expert never routed to) has n_tokens = 0.

    Raises:
        NumericsError: NaN or Inf in an input; names linear and channel.
    """
    of = {key: i for i, (sharing, _) in enumerate(inputs) for key in sharing}
    finished: dict[int, InputStats] = {}
    stats = {}
    for spec in specs:
        index = of.get((spec.parameter, spec.expert))
        if index is None:
            stats[spec.name] = Accumulator(spec.in_features, device, wanted).result(spec.name)
            continue
        if index not in finished:
            finished[index] = inputs[index][1].result(spec.name)
        stats[spec.name] = finished[index]
    return stats


def keys(specs: Iterable[LinearSpec]) -> list[Key]:
    """The keys of ``specs``."""
    return [(spec.parameter, spec.expert) for spec in specs]


@contextmanager
def watch(
    block: nn.Module,
    prefix: str,
    specs: Sequence[LinearSpec],
    watcher: Watcher,
    places: Iterable[str] = (),
) -> Iterator[None]:
    """Show ``watcher`` the inputs of ``specs`` while ``block`` runs inside the context; removes its hooks at the end.

    Args:
        block: a decoder block with its weights loaded.
        prefix: its full name with a trailing dot, ``model.layers.0.``.
        specs: its linears.
        watcher: what sees them.
        places: modules of the block, by path, whose input (the residual stream) it keeps too; "" is the block itself.
    """
    handles = []
    fused: dict[int, tuple[str, torch.Tensor]] = {}
    for place in set(places):

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: str = place) -> None:
            assert isinstance(watcher, Tape | Collector)
            watcher.stream[place] = first_tensor(args, kwargs)

        handles.append(block.get_submodule(place).register_forward_pre_hook(keep, with_kwargs=True))
    for parameter in dict.fromkeys(spec.parameter for spec in specs):
        local = parameter.removeprefix(prefix)
        tensor = block.get_parameter(local)
        if tensor.dim() == 3:
            fused[tensor.untyped_storage().data_ptr()] = (parameter, tensor)
        else:
            module = block.get_submodule(local.rpartition(".")[0])

            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], parameter: str = parameter) -> None:
                watcher.see((parameter, None), inputs[0])

            handles.append(module.register_forward_pre_hook(hook))
    try:
        if fused:
            with _FusedExperts(fused, watcher.see):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among a module's arguments: the first, whichever way it is passed."""
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if not isinstance(value, torch.Tensor):
        raise ModelError("a module of the block takes no tensor first; use --set aim=dense")
    return value


@contextmanager
def collect(
    block: nn.Module,
    prefix: str,
    specs: Sequence[LinearSpec],
    wanted: Wanted | None = None,
    dense: Tape | None = None,
    places: Mapping[str, str] | None = None,
    length: int | None = None,
) -> Iterator[Collector]:
    """Collect input statistics of ``specs`` while ``block`` runs inside the context.

    Args:
        block: a decoder block with its weights loaded.
        prefix: its full name with a trailing dot, ``model.layers.0.``.
        specs: its linears.
        wanted: which sums, beside the squares.
        dense: what the same linears see in the dense model, for ``wanted.drift``.
        places: as in ``Collector``, for ``wanted.shift``.
        length: as in ``Collector``.
    """
    collector = Collector(keys(specs), wanted, dense, places, length)
    with watch(block, prefix, specs, collector, (places or {}).values()):
        yield collector


def stream_places(
    block: nn.Module, prefix: str, specs: Sequence[LinearSpec], run: Callable[[], torch.Tensor]
) -> dict[str, str]:
    """Where the residual stream is that each linear's output is added to, found out by one pass over a window.

    A linear writes to the stream if two values that modules of the block receive or that the block returns differ by
    its output; the earlier one is the stream before it. This holds for any block of the form x + f(norm(x)); where an
    output is normalised or scaled before it is added, or two are added at once, nothing is found.

    Args:
        block: a decoder block with its weights loaded.
        prefix: its full name with a trailing dot.
        specs: its linears.
        run: runs it on a window and returns its output.

    Returns:
        parameter name -> path of the module that receives the stream before; "" is the block itself.
    """
    seen: list[tuple[str, torch.Tensor]] = []
    outputs: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in block.named_modules():

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            value = args[0] if args else kwargs.get("hidden_states")
            if isinstance(value, torch.Tensor) and not any(value is other for _, other in seen):
                seen.append((path, value))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    for spec in specs:
        if spec.expert is None:
            local = spec.parameter.removeprefix(prefix).rpartition(".")[0]

            def after(_module: nn.Module, args: Any, output: Any, parameter: str = spec.parameter) -> None:
                outputs[parameter] = output

            handles.append(block.get_submodule(local).register_forward_hook(after))
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    values = [(path, value) for path, value in seen if value.shape == result.shape]
    later = [*values[1:], ("", result)]
    found = {}
    for parameter, output in outputs.items():
        if output.numel() != result.numel():
            continue
        for index, (path, value) in enumerate(values):
            moved = value + output.reshape(value.shape)
            if any(torch.equal(moved, other) for _, other in later[index:]):
                found[parameter] = path
                break
    return found
