"""Decoding steps that leave nothing to the host: the next token, its position and its cache entry stay on the device.

What a step does besides the engine's own work is enqueued behind it on the same stream: the largest logit's index
becomes the next input, in ``ids``. So no step waits for the host, and a step whose shapes stay the same can be captured
as a CUDA graph. There are two ways to hold the cache:

``Growing``: past and present swap after each step and grow by a token. Nothing is copied, but every step has shapes of
its own.

``Bucketed``: the past has a fixed length, the bucket, of which the mask shows what is filled; positions are explicit.
A bucket that is full is followed by one of twice the length. Where only mask and positions say what attends to what,
the order of the entries means nothing: a new one goes into the next free slot, one entry a layer. Where the graph
counts places itself (sliding windows, ALiBi) distances must stay right: the filled part lies at the end and the whole
cache moves by one place in each step, which reads and writes it once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsify.runtimes.tensorrt_cache import Buffers
from sparsify.runtimes.tensorrt_execution import Engine, Execution
from sparsify.runtimes.tensorrt_interface import Interface

# Shorter ones would save nothing: a step's time is that of the weights.
SMALLEST_BUCKET = 64
# Each has a context and a graph; which ones a caller needs follows from its batches and lengths.
MOST_GRAPHS = 32
# Keys of a config under which attention depends on places in the cache, not only on mask and positions.
_PLACES = ("sliding_window", "attention_chunk_size", "alibi")


def order_is_free(config: Mapping[str, Any], interface: Interface) -> bool:
    """Whether the order of cache entries means nothing: positions are explicit and every layer attends to all.

    Args:
        config: the model's ``config.json``; without one nothing is known, and the answer is no.
        interface: of the engine.
    """
    kinds = config.get("layer_types") or ["full_attention"]
    everywhere = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    windows = [key for key in _PLACES if config.get(key)]
    if windows == ["sliding_window"] and config.get("use_sliding_window") is False:
        windows = []
    return bool(config) and interface.takes_positions and everywhere and not windows


class Decoder:
    """What both ways share.

    Args:
        engine: deserialised.
        interface: its tensors.
        buffers: its memory.
        profile: number of the decode profile.
    """

    def __init__(self, engine: Engine, interface: Interface, buffers: Buffers, profile: int) -> None:
        self._engine, self._interface, self._buffers, self._profile = engine, interface, buffers, profile

    def _bind(self, execution: Execution, batch: int, past: int, halves: tuple[int, int]) -> None:
        """Past from the first of ``halves``, present into the second."""
        interface, buffers = self._interface, self._buffers
        inputs: dict[str, tuple[tuple[int, ...], int]] = {
            "input_ids": ((batch, 1), buffers.ids.data_ptr()),
            "attention_mask": ((batch, past + 1), buffers.mask.data_ptr()),
        }
        if interface.takes_positions:
            inputs["position_ids"] = ((batch, 1), buffers.positions.data_ptr())
        outputs = {"logits": buffers.logits.data_ptr()}
        for group in buffers.groups:
            shape = (batch, group.heads, past, group.dim)
            for place, address in group.addresses(halves[0]):
                inputs[interface.past[place]] = (shape, address)
            for place, address in group.addresses(halves[1]):
                outputs[interface.present[place]] = address
        execution.bind(inputs, outputs)

    def begin(self, batch: int, length: int) -> None:
        """Take over from the prefill of ``length`` tokens: its cache lies in half B, its logits' maxima in ``ids``."""
        self._buffers.positions[:batch].fill_(length)

    def close(self) -> None:
        """Let go of contexts and graphs now, in time for the engine to go after them."""

    def _advance(self, batch: int) -> None:
        buffers = self._buffers
        width = self._interface.vocab_size
        buffers.ids[:batch].copy_(buffers.logits[: batch * width].view(batch, width).argmax(dim=-1))
        buffers.positions[:batch].add_(1)


class Growing(Decoder):
    """Cache that grows by a token a step, in turn in both halves."""

    def __init__(self, engine: Engine, interface: Interface, buffers: Buffers, profile: int) -> None:
        super().__init__(engine, interface, buffers, profile)
        self._execution = Execution(engine, profile)
        self._past_half = 1

    def begin(self, batch: int, length: int) -> None:
        """See ``Decoder.begin``."""
        super().begin(batch, length)
        self._past_half = 1
        self._buffers.mask.fill_(1)

    def step(self, batch: int, length: int) -> None:
        """One token more for each of ``batch`` sequences, of which ``length`` tokens are cached."""
        self._bind(self._execution, batch, length, (self._past_half, 1 - self._past_half))
        self._execution.run()
        self._past_half = 1 - self._past_half
        self._advance(batch)


class _Bucket:
    """The step of one batch size and one length of cache, captured after it has run once."""

    def __init__(self, execution: Execution, work: Callable[[], None]) -> None:
        self.execution = execution
        self.work = work
        self.replay: Callable[[], None] | None = None
        self.has_run = False


class Bucketed(Decoder):
    """Cache of a fixed length, in half A; half B receives what a step puts out.

    Args:
        engine: deserialised.
        interface: its tensors.
        buffers: its memory.
        profile: number of the decode profile.
        longest: the profile's most cached tokens.
        free_order: see ``order_is_free``.
    """

    def __init__(
        self, engine: Engine, interface: Interface, buffers: Buffers, profile: int, longest: int, free_order: bool
    ) -> None:
        super().__init__(engine, interface, buffers, profile)
        self._longest, self._free_order = longest, free_order
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._most = MOST_GRAPHS if engine.shares_profiles else 1
        self._current: tuple[int, int] | None = None

    def begin(self, batch: int, length: int) -> None:
        """See ``Decoder.begin``."""
        super().begin(batch, length)
        self._load(batch, self._fitting(length), length)

    def step(self, batch: int, length: int) -> None:
        """One token more for each of ``batch`` sequences, of which ``length`` tokens are cached."""
        size = self._fitting(length)
        if self._current != (batch, size):
            self._unload(batch, length)
            self._load(batch, size, length)
        bucket = self._bucket(batch, size)
        if bucket.replay:
            bucket.replay()
        elif bucket.has_run:
            # TensorRT finishes a change of shapes in the run before.
            bucket.execution.check_capturable()
            bucket.replay = self._engine.device.capture(bucket.work, f"{self._engine.path}: decoding")
            bucket.replay()
        else:
            bucket.work()
            bucket.has_run = True

    def close(self) -> None:
        """See ``Decoder.close``."""
        self._buckets.clear()

    def _fitting(self, length: int) -> int:
        """The bucket for a step on ``length`` cached tokens, with a place for the token that the step adds."""
        size = SMALLEST_BUCKET
        while size <= length:
            size *= 2
        return min(size, self._longest)

    def _filled(self, size: int, length: int) -> slice:
        return slice(0, length) if self._free_order else slice(size - length, size)

    def _unload(self, batch: int, length: int) -> None:
        """Copy what the current bucket holds into half B, as a cache of ``length`` tokens."""
        assert self._current is not None
        size = self._current[1]
        for group in self._buffers.groups:
            filled = group.view(0, batch, size)[..., self._filled(size, length), :]
            group.view(1, batch, length).copy_(filled)

    def _load(self, batch: int, size: int, length: int) -> None:
        """Fill bucket ``size`` with the cache of ``length`` tokens in half B."""
        filled = self._filled(size, length)
        for group in self._buffers.groups:
            past = group.view(0, batch, size)
            # What is masked is still multiplied, by zero: it must be finite.
            past.zero_()
            past[..., filled, :].copy_(group.view(1, batch, length))
        mask = self._mask(batch, size)
        mask.zero_()
        mask[:, filled].fill_(1)
        mask[:, -1].fill_(1)
        self._buffers.slot.fill_(length)
        self._current = batch, size

    def _mask(self, batch: int, size: int) -> torch.Tensor:
        return self._buffers.mask[: batch * (size + 1)].view(batch, size + 1)

    def _bucket(self, batch: int, size: int) -> _Bucket:
        key = batch, size
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            while len(self._buckets) >= self._most:
                # The least recently used comes first.
                self._engine.device.synchronize()
                del self._buckets[next(iter(self._buckets))]
            execution = Execution(self._engine, self._profile, fixed=True)
            self._bind(execution, batch, size, (0, 1))
            bucket = _Bucket(execution, lambda: self._work(execution, batch, size))
        self._buckets[key] = bucket
        return bucket

    def _work(self, execution: Execution, batch: int, size: int) -> None:
        execution.run()
        self._advance(batch)
        buffers, mask = self._buffers, self._mask(batch, size)
        for group in buffers.groups:
            past, present = group.view(0, batch, size), group.view(1, batch, size + 1)
            if self._free_order:
                past.index_copy_(3, buffers.slot, present[..., -1:, :])
            else:
                past.copy_(present[..., 1:, :])
        if self._free_order:
            mask.index_fill_(1, buffers.slot, 1)
            buffers.slot.add_(1)
        else:
            mask[:, :-1].copy_(mask[:, 1:].clone())
