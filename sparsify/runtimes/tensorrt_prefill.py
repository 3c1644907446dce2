"""The prompt in one step, on an empty cache."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.runtimes.tensorrt_cache import Buffers
from sparsify.runtimes.tensorrt_device import fill
from sparsify.runtimes.tensorrt_execution import Execution
from sparsify.runtimes.tensorrt_interface import Interface


def prefill(
    execution: Execution,
    interface: Interface,
    buffers: Buffers,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> torch.Tensor:
    """Run the prompt on an empty cache; the cache it makes is half B.

    Args:
        execution: in the prefill profile.
        interface: its tensors.
        buffers: its memory.
        ids: [batch, length] int64 on the host.
        mask: as ``ids``.
        positions: as ``ids``.

    Returns:
        The logits [batch, length, vocab] in the engine's dtype, in the session's own buffer.
    """
    batch, length = ids.shape
    inputs: dict[str, tuple[tuple[int, ...], int]] = {}
    values = {"input_ids": ("ids", ids), "attention_mask": ("mask", mask), "position_ids": ("positions", positions)}
    for name in interface.linear_inputs:
        key, array = values[name]
        flat = getattr(buffers, key)
        fill(flat[: ids.size].view(batch, length), buffers.staging[key], array)
        inputs[name] = ((batch, length), flat.data_ptr())
    outputs = {"logits": buffers.logits.data_ptr()}
    for group in buffers.groups:
        for place, address in group.addresses(0):
            inputs[interface.past[place]] = ((batch, group.heads, 0, group.dim), address)
        for place, address in group.addresses(1):
            outputs[interface.present[place]] = address
    execution.bind(inputs, outputs)
    execution.run()
    count = batch * length * interface.vocab_size
    return buffers.logits[:count].view(batch, length, interface.vocab_size)


def first_token(buffers: Buffers, logits: torch.Tensor) -> None:
    """Make the maxima of the last row of ``logits`` [batch, length, vocab] the first generated tokens, in ``ids``."""
    token = logits[:, -1].argmax(dim=-1)
    buffers.ids[: token.shape[0]].copy_(token)
