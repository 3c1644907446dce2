"""The sizes that a budget is computed from, out of a skeleton on the meta device; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.model import Skeleton
    from sparsify.types import LinearSpec, Pattern

# Linears that read one tensor, by the last part of their names. Others count as reading one each, which is an upper
# bound: the driver finds out at run time.
_SHARING = (frozenset(("q_proj", "k_proj", "v_proj")), frozenset(("gate_proj", "up_proj")), frozenset(("w1", "w3")))
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Linear:
    """A prunable linear of a block.

    Attributes:
        kind: name within the block, ``mlp.down_proj``.
        n_out: rows of its weight.
        n_in: columns.
        source: linears of a block with the same one read the same tensor.
        m: inputs of a group of its N:M pattern; 0 for a sparsity.
        pruned: whether the recipe prunes it.
        expert: which expert of a mixture it is in, None where in none.
    """

    kind: str
    n_out: int
    n_in: int
    source: str
    m: int = 0
    pruned: bool = True
    expert: str | None = None

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.n_out * self.n_in


@dataclass(frozen=True)
class Block:
    """A decoder block, and how many there are of its kind.

    Attributes:
        n_values: of all its parameters.
        largest: values of the largest of its stored tensors.
        fused: values of parameters that are stored in several tensors (experts).
        linears: in order of definition.
        reached: whether the calibration text goes through it; behind the last that is pruned it does not.
        count: blocks of this kind.
    """

    n_values: int
    largest: int
    fused: int
    linears: tuple[Linear, ...]
    reached: bool = True
    count: int = 1

    @property
    def pruned(self) -> tuple[Linear, ...]:
        """Linears that the recipe prunes."""
        return tuple(linear for linear in self.linears if linear.pruned)


@dataclass(frozen=True)
class Shapes:
    """A model as what pruning it costs.

    Attributes:
        name: what the user called it.
        blocks: every kind of block.
        width: channels of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        around: values of what runs around the blocks (embeddings, norms).
        around_largest: of the largest tensor among them.
        outside: values of all tensors outside the blocks, the head included.
        outside_largest: of the largest tensor among them.
        vocabulary: tokens of the model.
        value_bytes: of a stored value.
        stored_bytes: of the whole checkpoint.
        eager: attention forms a matrix of scores for every head.
        share: of the tokens that reach an expert.
    """

    name: str
    blocks: tuple[Block, ...]
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    around: int
    around_largest: int
    outside: int
    outside_largest: int
    vocabulary: int
    value_bytes: int
    stored_bytes: int
    eager: bool = False
    share: float = 1.0

    @property
    def n_values(self) -> int:
        """Values of all tensors."""
        return self.outside + sum(block.count * block.n_values for block in self.blocks)

    @property
    def n_blocks(self) -> int:
        """Blocks of all kinds."""
        return sum(block.count for block in self.blocks)


def shapes_of(skeleton: Skeleton, patterns: Mapping[str, Pattern], name: str, stored: Stored | None = None) -> Shapes:
    """The sizes of a model.

    Args:
        skeleton: of ``sparsify.model.load_skeleton``, with or without weights beside it.
        patterns: of the linears that the recipe prunes, by name.
        name: what the user calls the model.
        stored: what the checkpoint's headers say; without, values are stored as the config says, else as float32.

    Raises:
        ModelError: a number in the config makes no sense.
    """
    from sparsify.roofline.attention import attention_of
    from sparsify.roofline.config import EXPERTS, whole

    config = skeleton.text_config
    attention = attention_of(config, skeleton.n_blocks)
    last = max(
        (i for i, block in enumerate(skeleton.linears) if any(spec.name in patterns for spec in block)), default=-1
    )
    kinds: dict[Block, int] = {}
    for index in range(skeleton.n_blocks):
        block = replace(_block(skeleton, index, patterns), reached=index <= last)
        kinds[block] = kinds.get(block, 0) + 1
    model = skeleton.model
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = {key: value.numel() for key, value in model.named_parameters() if key not in tied}
    outside = {key: size for key, size in parameters.items() if not key.startswith(f"{skeleton.blocks}.")}
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    around = [size for key, size in outside.items() if key.startswith(prefix)]
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    value_bytes = stored.value_bytes if stored else _VALUE_BYTES.get(dtype, 4)
    n_experts, chosen = whole(config, *EXPERTS), whole(config, "num_experts_per_tok")
    return Shapes(
        name,
        tuple(replace(block, count=count) for block, count in kinds.items()),
        width=whole(config, "hidden_size") or attention.n_heads * attention.head_dim,
        heads=attention.n_heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        around=sum(around),
        around_largest=max(around, default=0),
        outside=sum(outside.values()),
        outside_largest=max(outside.values(), default=0),
        vocabulary=whole(config, "vocab_size") or 0,
        value_bytes=value_bytes,
        stored_bytes=stored.n_bytes if stored else value_bytes * sum(parameters.values()),
        eager=getattr(model.config, "_attn_implementation", None) != "sdpa",
        share=min(1.0, chosen / n_experts) if n_experts and chosen else 1.0,
    )


@dataclass(frozen=True)
class Stored:
    """What the headers of a checkpoint say: bytes of its widest float, and bytes in all."""

    value_bytes: int
    n_bytes: int


def stored_in(tensors: Iterable[Any]) -> Stored:
    """``Stored`` of the entries of ``CheckpointReader.tensors``."""
    entries = list(tensors)
    widest = max((entry.n_bytes // entry.n_values for entry in entries if entry.n_values), default=4)
    return Stored(widest, sum(entry.n_bytes for entry in entries))


def _block(skeleton: Skeleton, index: int, patterns: Mapping[str, Pattern]) -> Block:
    prefix = skeleton.prefix(index)
    sizes = {name: parameter.numel() for name, parameter in skeleton.block(index).named_parameters()}
    fused = {spec.parameter.removeprefix(prefix) for spec in skeleton.linears[index] if spec.expert is not None}
    single = [spec.n_weights for spec in skeleton.linears[index] if spec.expert is not None]
    linears = tuple(_linear(spec, prefix, patterns.get(spec.name)) for spec in skeleton.linears[index])
    largest = [size for name, size in sizes.items() if name not in fused] + single
    return Block(sum(sizes.values()), max(largest, default=0), sum(sizes[name] for name in fused), linears)


def _linear(spec: LinearSpec, prefix: str, pattern: Pattern | None) -> Linear:
    kind = spec.name.removeprefix(prefix)
    stem, _, leaf = kind.rpartition(".")
    same = next(("|".join(sorted(leaves)) for leaves in _SHARING if leaf in leaves), leaf)
    expert = _EXPERT.search(f".{kind}")
    return Linear(
        kind,
        spec.out_features,
        spec.in_features,
        f"{stem}.{same}",
        getattr(pattern, "m", 0),
        pattern is not None,
        expert[1] if expert else None,
    )
