"""Bytes and operations of a model's steps, and the least time a device needs for them: arithmetic, nothing measured.

What only makes real steps slower (launches, the host, norms, activations that go through memory, caches that miss) is
left out, so that a roof stays one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsify.errors import ModelError
from sparsify.roofline.attention import Attention, attention_of
from sparsify.roofline.bounds import DENSE, Limit, Storage, Work, total
from sparsify.roofline.config import EXPERTS, whole
from sparsify.roofline.devices import DTYPE_BYTES, Device

if TYPE_CHECKING:
    from sparsify.model import Skeleton
    from sparsify.types import LinearSpec

_EXPERT = re.compile(r"\.experts\.\d+\.")
# A cache of keys and values is in 16 bits, whatever weights are in.
_LEAST_CACHE_BYTES = 2


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one shape, kind and storage.

    Attributes:
        kind: name within a block, ``mlp.down_proj``.
        n_out: rows of each.
        n_in: columns of each.
        count: how many there are in the model.
        storage: of each.
        stored_bytes: of each.
        share: of the tokens that reach each; below 1 for the experts of a mixture.
    """

    kind: str
    n_out: int
    n_in: int
    count: int
    storage: Storage
    stored_bytes: float
    share: float = 1.0

    def reached(self, tokens: int) -> float:
        """Share of the group that any of so many tokens reaches, if they choose experts evenly and independently."""
        return 1 - (1 - self.share) ** tokens if self.share < 1 else 1.0

    def work(self, tokens: int, dtype: str) -> Work:
        """Of all of the group in one step: weights that any token needs are read once, activations stay in cache."""
        n_bytes = self.count * self.reached(tokens) * self.stored_bytes
        flops = self.count * 2.0 * tokens * self.share * self.n_out * self.n_in
        return Work(n_bytes, flops, dtype, self.storage.sparse_cores)


class Roof(NamedTuple):
    """The least time to the first token and per further token, and what sets each."""

    ttft_s: float
    tpot_s: float
    ttft_limit: Limit
    tpot_limit: Limit


@dataclass(frozen=True)
class ModelWork:
    """A model as what its steps cost.

    Attributes:
        linears: of its blocks, those that patterns apply to.
        dense: all other matrices of its blocks: routers, and experts of a layout that is not understood.
        head: the product that gives logits; None where a model has none.
        attention: of all layers.
        dtype: of weights and inputs.
        kv_bytes: of one element of the cache of keys and values.
        other_bytes: of weights that are in no product (embedding, norms).
        n_weights: of the whole model, tied ones once.
        head_is_embedding: the head's bytes are counted among the others.
    """

    linears: tuple[LinearGroup, ...]
    dense: tuple[LinearGroup, ...]
    head: LinearGroup | None
    attention: Attention
    dtype: str
    kv_bytes: int
    other_bytes: float
    n_weights: int
    head_is_embedding: bool = False

    @classmethod
    def from_skeleton(
        cls,
        skeleton: Skeleton,
        dtype: str = "bfloat16",
        storage: Storage | Callable[[LinearSpec], Storage] = DENSE,
        stored_bytes: Mapping[str, float] | None = None,
    ) -> ModelWork:
        """The work of the model whose skeleton this is.

        Args:
            skeleton: of ``sparsify.model.load_skeleton``; no weights are needed.
            dtype: of weights and inputs, a key of ``DTYPE_BYTES``.
            storage: of its prunable linears, of all or of each.
            stored_bytes: name of a linear -> bytes that its weight really has; ``storage`` tells those of the rest.

        Raises:
            ModelError: a number in the config makes no sense.
        """
        size = DTYPE_BYTES[dtype]
        n_experts_of_token = whole(skeleton.text_config, "num_experts_per_tok")
        groups: dict[LinearGroup, int] = {}
        for index, block in enumerate(skeleton.linears):
            prefix = skeleton.prefix(index)
            n_experts = len({_expert(spec) for spec in block} - {None})
            for spec in block:
                if min(spec.out_features, spec.in_features) < 1:
                    raise ModelError(f"config.json: makes {spec.name} {spec.out_features} x {spec.in_features}")
                stored = storage(spec) if callable(storage) else storage
                n_bytes = stored.n_bytes(spec.out_features, spec.in_features, size)
                n_bytes = (stored_bytes or {}).get(spec.name, n_bytes)
                routed = _expert(spec) is not None
                share = min(1.0, n_experts_of_token / n_experts) if routed and n_experts_of_token else 1.0
                kind = _EXPERT.sub(".experts.", spec.name.removeprefix(prefix))
                group = LinearGroup(kind, spec.out_features, spec.in_features, 0, stored, n_bytes, share)
                groups[group] = groups.get(group, 0) + 1
        linears = tuple(replace(group, count=count) for group, count in groups.items())
        dense = tuple(_unrecognised(skeleton, size, n_experts_of_token))
        head, tied = _head(skeleton.model, size)
        n_weights = sum(parameter.numel() for parameter in skeleton.model.parameters())
        inside = sum(group.count * group.n_out * group.n_in for group in (*linears, *dense))
        inside += head.n_out * head.n_in if head and not tied else 0
        attention = attention_of(skeleton.text_config, skeleton.n_blocks)
        kv_bytes = max(_LEAST_CACHE_BYTES, size)
        return cls(linears, dense, head, attention, dtype, kv_bytes, (n_weights - inside) * size, n_weights, tied)

    @property
    def linear_bytes(self) -> float:
        """Of the stored weights of all linears of blocks."""
        return sum(group.count * group.stored_bytes for group in self.linears)

    @property
    def weight_bytes(self) -> float:
        """Of all stored weights."""
        head = self.head.stored_bytes if self.head and not self.head_is_embedding else 0
        dense = sum(group.count * group.stored_bytes for group in self.dense)
        return self.linear_bytes + dense + self.other_bytes + head

    def cache_bytes(self, batch: int, context: int) -> float:
        """Of the keys and values of ``batch`` sequences of ``context`` tokens."""
        return batch * self.attention.cached(context, self.kv_bytes)

    def prefill(self, batch: int, prompt: int) -> Iterator[Work]:
        """Kernels of the step that reads the prompts: linears, then what sparsity leaves as it is."""
        yield from (group.work(batch * prompt, self.dtype) for group in self.linears)
        yield from self.rest_of_prefill(batch, prompt)

    def decode(self, batch: int, context: float) -> Iterator[Work]:
        """Kernels of a step that adds a token to sequences of ``context`` tokens: linears, then the rest."""
        yield from (group.work(batch, self.dtype) for group in self.linears)
        yield from self.rest_of_decode(batch, context)

    def rest_of_prefill(self, batch: int, prompt: int) -> Iterator[Work]:
        """Other matrices, attention, and logits of the last token of each prompt."""
        yield from (group.work(batch * prompt, self.dtype) for group in self.dense)
        each = self.attention
        flops = batch * 4.0 * each.n_heads * each.head_dim * each.seen_by_all(prompt)
        yield self._attend(flops, self.cache_bytes(batch, prompt))
        yield from self._logits(batch)

    def rest_of_decode(self, batch: int, context: float) -> Iterator[Work]:
        """Other matrices, attention, which reads all keys and values, and logits."""
        yield from (group.work(batch, self.dtype) for group in self.dense)
        each = self.attention
        flops = batch * 4.0 * each.n_heads * each.head_dim * each.seen(context)
        yield self._attend(flops, batch * each.cached(context, self.kv_bytes))
        yield from self._logits(batch)

    def _attend(self, flops: float, n_bytes: float) -> Work:
        # Attention is computed in 16 bits where weights are in 8.
        return Work(n_bytes, flops, self.dtype if DTYPE_BYTES[self.dtype] > 1 else "bfloat16")

    def _logits(self, tokens: int) -> Iterator[Work]:
        if self.head:
            yield self.head.work(tokens, self.dtype)


def step_roof(model: ModelWork, device: Device, prompt_tokens: int, batch: int = 1, new_tokens: int = 1) -> Roof:
    """The least times of a generation.

    Args:
        model: its work.
        device: published or measured.
        prompt_tokens: of each sequence.
        batch: sequences at once.
        new_tokens: of each sequence; the time per token is that of the mean length.

    Raises:
        UsageError: the device has no known peak for the model's type.
    """
    first = total(model.prefill(batch, prompt_tokens), device)
    further = total(model.decode(batch, prompt_tokens + (new_tokens + 1) / 2), device)
    return Roof(first.seconds, further.seconds, first.limited_by, further.limited_by)


def _expert(spec: LinearSpec) -> str | int | None:
    """What tells an expert of a mixture from the others of its block; None where a linear is in none."""
    if spec.expert is not None:
        return spec.expert
    found = _EXPERT.search(spec.name)
    return found[0] if found else None


def _unrecognised(skeleton: Skeleton, size: int, n_experts_of_token: int | None) -> Iterator[LinearGroup]:
    """The matrices of blocks that are in none of the linears; of experts each token reaches some."""
    known = {spec.parameter for block in skeleton.linears for spec in block}
    n_experts = whole(skeleton.text_config, *EXPERTS)
    for index in range(skeleton.n_blocks):
        for name, parameter in skeleton.block(index).named_parameters():
            if parameter.dim() < 2 or not parameter.numel() or skeleton.prefix(index) + name in known:
                continue
            n_out, n_in = parameter.shape[-2:]
            routed = parameter.dim() == 3 and len(parameter) == n_experts and n_experts_of_token
            share = min(1.0, n_experts_of_token / n_experts) if routed and n_experts_of_token and n_experts else 1.0
            count = parameter.numel() // (n_out * n_in)
            yield LinearGroup(name, n_out, n_in, count, DENSE, float(n_out * n_in * size), share)


def _head(model: Any, size: int) -> tuple[LinearGroup | None, bool]:
    """The product that gives logits, and whether its weight is the embedding's."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        return None, False
    n_out, n_in = weight.shape
    tied = weight is getattr(model.get_input_embeddings(), "weight", None)
    return LinearGroup("lm_head", n_out, n_in, 1, DENSE, float(n_out * n_in * size)), tied
