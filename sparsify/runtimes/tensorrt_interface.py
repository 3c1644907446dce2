"""What an engine takes and gives, and how large a request may be, read from the engine itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import ModelError, UsageError
from sparsify.exporters.tensorrt_options import PAST

PREFILL, DECODE = "prefill", "decode"
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}
_FLOATS = ("FLOAT", "HALF", "BF16")
_INTEGERS = ("INT32", "INT64")
# Far beyond any model: larger numbers are damage, and must not become allocations.
_MOST = 1 << 31


@dataclass(frozen=True)
class Limits:
    """How large a request may be.

    Attributes:
        min_batch: fewest sequences.
        max_batch: most sequences.
        min_prompt: fewest tokens of a prompt.
        max_prompt: most tokens of a prompt.
        max_past: most cached tokens of a decoding step.
    """

    min_batch: int
    max_batch: int
    min_prompt: int
    max_prompt: int
    max_past: int

    @property
    def max_tokens(self) -> int:
        """Most tokens of a sequence, prompt and generated ones; what the last one adds to the cache is not needed."""
        return self.max_past + 1

    def check(self, path: Path, batch: int, prompt: int, new: int = 0) -> None:
        """Refuse a request that the profiles do not cover.

        Args:
            path: of the engine, for messages.
            batch: sequences.
            prompt: tokens of each.
            new: tokens to generate for each.

        Raises:
            UsageError: which limit, and the option of the build that moves it.
        """
        wanted = [("batch", batch, self.max_batch, "batch"), ("prompt", prompt, self.max_prompt, "prompt")]
        if new:
            wanted.append(("prompt and new tokens", prompt + new, self.max_tokens, "total"))
        for what, value, most, option in wanted:
            if value > most:
                raise UsageError(f"{path}: {what} {value}: the engine takes {most}; build it with {option}={value}")
        for what, value, least in (("batch", batch, self.min_batch), ("prompt", prompt, self.min_prompt)):
            if value < least:
                raise UsageError(f"{path}: {what} {value}: the engine takes {least} and more")


@dataclass(frozen=True)
class Interface:
    """The engine's tensors.

    Attributes:
        past: cache inputs, key then value of each layer.
        present: the outputs that continue them, in the same order.
        cache: cache input -> (heads, dim).
        dtypes: tensor -> dtype, outputs too.
        vocab_size: width of the logits.
        takes_positions: whether there is an input ``position_ids``.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]
    cache: Mapping[str, tuple[int, int]]
    dtypes: Mapping[str, torch.dtype]
    vocab_size: int
    takes_positions: bool

    @property
    def linear_inputs(self) -> tuple[str, ...]:
        """The inputs that are not cache."""
        return ("input_ids", "attention_mask", *(("position_ids",) if self.takes_positions else ()))


def read_interface(engine: Any, trt: Any, path: Path) -> Interface:
    """The tensors of a decoder engine.

    Args:
        engine: deserialised.
        trt: TensorRT's module.
        path: of the engine, for messages.

    Raises:
        ModelError: not a decoder with a key/value cache in a layout that this session knows.
    """
    inputs: dict[str, list[int]] = {}
    outputs: dict[str, list[int]] = {}
    types: dict[str, str] = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        side[name] = list(engine.get_tensor_shape(name))
        types[name] = engine.get_tensor_dtype(name).name
    past = sorted((name for name in inputs if PAST.fullmatch(name)), key=_layer)
    present = [name.replace("past_key_values", "present") for name in past]
    wanted, given = {"input_ids", "attention_mask", *past}, {"logits", *present}
    absent = wanted - set(inputs) | given - set(outputs)
    if absent or not past:
        raise ModelError(f"{path}: not a decoder with a cache: lacks {', '.join(sorted(absent)) or 'the cache'}")
    takes_positions = "position_ids" in inputs
    if strange := set(inputs) - wanted - {"position_ids"}:
        raise ModelError(f"{path}: takes {', '.join(sorted(strange))}, which this session cannot give")
    for name in (*inputs, *given):
        allowed = _FLOATS if name in past or name in given else _INTEGERS
        if types[name] not in allowed:
            raise ModelError(f"{path}: {name} is {types[name]}, want {' or '.join(allowed)}")
    for name, continued in zip(past, present, strict=True):
        one, other = inputs[name], outputs[continued]
        fits = len(one) == len(other) == 4 and (one[1], one[3]) == (other[1], other[3])
        if not fits or not all(0 < size < _MOST for size in (one[1], one[3])) or types[name] != types[continued]:
            raise ModelError(f"{path}: {name} {one} and {continued} {other}: want [batch, heads, tokens, dim] alike")
    logits = outputs["logits"]
    if len(logits) != 3 or not 0 < logits[2] < _MOST:
        raise ModelError(f"{path}: logits {logits}: want [batch, sequence, vocabulary] with a fixed vocabulary")
    return Interface(
        tuple(past),
        tuple(present),
        {name: (inputs[name][1], inputs[name][3]) for name in past},
        {name: _DTYPES[types[name]] for name in (*inputs, *given)},
        logits[2],
        takes_positions,
    )


def _layer(name: str) -> tuple[int, str]:
    return int(name.split(".")[1]), name


def read_limits(engine: Any, interface: Interface, names: Sequence[str], path: Path) -> Limits:
    """What the engine's profiles allow.

    Args:
        engine: deserialised.
        interface: its tensors.
        names: of its profiles by the header, in order.
        path: of the engine, for messages.

    Raises:
        ModelError: the profiles are not the two of a decoder, or differ from what the header says.
    """
    if len(names) != engine.num_optimization_profiles or {PREFILL, DECODE} - set(names):
        raise ModelError(
            f"{path}: has {engine.num_optimization_profiles} profiles, its header names {', '.join(names) or 'none'}; "
            f"want {PREFILL} and {DECODE}; build it again"
        )

    def bounds(profile: str, name: str, axis: int) -> tuple[int, int]:
        low, _, high = engine.get_tensor_profile_shape(name, names.index(profile))
        return int(low[axis]), int(high[axis])

    def common(ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    inputs = (*interface.linear_inputs, *interface.past)
    batch = common([bounds(profile, name, 0) for profile in (PREFILL, DECODE) for name in inputs])
    steps = [name for name in interface.linear_inputs if name != "attention_mask"]
    prompt = common([bounds(PREFILL, name, 1) for name in interface.linear_inputs])
    low, high = bounds(DECODE, "attention_mask", 1)
    past = common([(low - 1, high - 1), *(bounds(DECODE, name, 2) for name in interface.past)])
    empty = all(bounds(PREFILL, name, 2)[0] == 0 for name in interface.past)
    single = all(bounds(DECODE, name, 1)[0] <= 1 <= bounds(DECODE, name, 1)[1] for name in steps)
    if not (empty and single and 0 < batch[1] < _MOST and 0 < prompt[1] < _MOST and past[0] <= 1 <= past[1] < _MOST):
        raise ModelError(
            f"{path}: want a profile {PREFILL} that takes an empty cache and a profile {DECODE} of one token a step; "
            "build it with sparsify"
        )
    return Limits(max(batch[0], 1), batch[1], max(prompt[0], 1), prompt[1], past[1])
