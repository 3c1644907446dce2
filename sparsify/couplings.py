"""Which reorderings of a linear's inputs the neighbouring weights can take over, and taking them over.

The inputs of an MLP's last linear are the outputs of its first ones, through an elementwise activation: their rows
follow any order. The inputs of attention's last linear are values that attention mixes over tokens and not over
channels: the rows of v follow an order within a head, the same for every query head that reads that key-value head,
and whole heads may move together with their queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.errors import UsageError
from sparsify.model import FAMILIES, Skeleton, weight_view
from sparsify.types import LinearSpec

# Last linear of an MLP -> those whose outputs, activated and multiplied, are its inputs; names below the same module.
_MLP = {
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "fc2": (("fc1",),),
    "c_proj": (("c_fc",),),
    "dense_4h_to_h": (("dense_h_to_4h",),),
}
_ATTENTION_OUT = ("o_proj", "out_proj", "dense", "c_proj")
# One linear for queries, keys and values, whose rows are in this order.
_FUSED_QKV = ("qkv_proj", "c_attn")


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer: where queries and keys come from, counts, and whether whole heads may move.

    ``query`` and ``key`` are linears and the first row of theirs, as ``Coupling.producers``.
    """

    query: tuple[LinearSpec, int]
    key: tuple[LinearSpec, int]
    n_query: int
    n_key: int
    head_dim: int
    movable: bool


@dataclass(frozen=True)
class Coupling:
    """A linear whose input order its ``producers`` can follow.

    Attributes:
        consumer: the linear.
        producers: linears and the first row of theirs that delivers its inputs (a fused gate and up deliver twice).
        heads: for attention, where orders are restricted; None where any order will do.
    """

    consumer: LinearSpec
    producers: tuple[tuple[LinearSpec, int], ...]
    heads: Heads | None = None


def couplings(skeleton: Skeleton, index: int) -> dict[str, Coupling]:
    """The couplings of a block, by name of the consumer; none for architectures that are not in the table."""
    if skeleton.config["model_type"] not in FAMILIES:
        return {}
    specs = {spec.name: spec for spec in skeleton.linears[index]}
    found = {}
    for name, spec in specs.items():
        stem, _, leaf = name.rpartition(".")
        for leaves in _MLP.get(leaf, ()):
            producers = [specs.get(f"{stem}.{producer}") for producer in leaves]
            if all(producer is not None for producer in producers):
                entries = [(p, start) for p in producers if p for start in range(0, p.out_features, spec.in_features)]
                if len(entries) == max(len(leaves), 2 if leaves == ("gate_up_proj",) else 1):
                    found[name] = Coupling(spec, tuple(entries))
        if leaf in _ATTENTION_OUT:
            coupling = _attention(skeleton, stem, specs, spec)
            if coupling is not None:
                found[name] = coupling
    return found


def _attention(skeleton: Skeleton, stem: str, specs: dict[str, LinearSpec], out: LinearSpec) -> Coupling | None:
    config = skeleton.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_query, width = out.in_features // head_dim, out.in_features
    fused = next((specs[name] for leaf in _FUSED_QKV if (name := f"{stem}.{leaf}") in specs), None)
    if fused is not None:
        n_values = (fused.out_features - width) // 2
        n_queries, n_keys = fused.out_features - 2 * n_values, n_values
        query, key, value = (fused, 0), (fused, width), (fused, width + n_values)
    else:
        q, k, v = (specs.get(f"{stem}.{leaf}_proj") for leaf in "qkv")
        if q is None or k is None or v is None:
            return None
        n_queries, n_keys, n_values = q.out_features, k.out_features, v.out_features
        query, key, value = (q, 0), (k, 0), (v, 0)
    n_key = n_values // head_dim
    fits = width == n_query * head_dim == n_queries and n_keys == n_values == n_key * head_dim
    if not fits or n_key == 0 or n_query % n_key:
        return None
    own = {f"{spec.name}.{kind}" for spec in (query[0], key[0], value[0], out) for kind in ("weight", "bias")}
    others = {
        name: tuple(parameter.shape)
        for name, parameter in skeleton.model.named_parameters()
        if name.startswith(f"{stem}.") and name not in own
    }
    if any("v_norm" in name for name in others):
        return None
    # A norm over all heads, a list of norms, or a parameter per head would have to move too; a norm within heads, of
    # which there is one for all of them, stays.
    movable = all(
        shape == (head_dim,) and "norm" in name and not any(part.isdigit() for part in name[len(stem) :].split("."))
        for name, shape in others.items()
    )
    return Coupling(out, (value,), Heads(query, key, n_query, n_key, head_dim, movable))


def fold_mlp(model: Any, coupling: Coupling, perm: torch.Tensor) -> None:
    """Reorder the inputs of an MLP's last linear by ``perm`` [in] and the outputs of those before it; in place.

    The model computes what it did, up to the order of sums.
    """
    _permute_columns(model, coupling.consumer, perm)
    for producer, start in coupling.producers:
        _permute_rows(model, producer, perm, start)


def fold_attention(
    model: Any,
    coupling: Coupling,
    within: Sequence[torch.Tensor],
    key_order: Sequence[int] | None = None,
    query_order: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Reorder the inputs of attention's last linear and everything that has to follow; in place.

    Args:
        model: the model or skeleton with the block's weights loaded.
        coupling: of the linear.
        within: for each key-value head an order [head_dim] of its channels, which all query heads that read it share.
        key_order: order of the key-value heads; query heads go with theirs.
        query_order: for each key-value head (as it was) an order of the query heads that read it.

    Returns:
        perm [in] of the linear's inputs.

    Raises:
        UsageError: whole heads are to move in an attention layer with parameters that would not follow.
    """
    heads = coupling.heads
    assert heads is not None
    repeat, size = heads.n_query // heads.n_key, heads.head_dim
    keys = list(key_order) if key_order is not None else list(range(heads.n_key))
    queries = [list(order) for order in query_order] if query_order is not None else [list(range(repeat))] * heads.n_key
    moves = keys != sorted(keys) or any(order != sorted(order) for order in queries)
    if moves and not heads.movable:
        raise UsageError(f"{coupling.consumer.name}: whole heads cannot move, its norms belong to single heads")
    order = [key * repeat + query for key in keys for query in queries[key]]
    channels = torch.arange(heads.n_query * size).reshape(heads.n_query, size)
    perm = torch.cat([channels[head][within[head // repeat].cpu()] for head in order])
    of_keys = torch.arange(heads.n_key * size).reshape(heads.n_key, size)
    values = torch.cat([of_keys[key][within[key].cpu()] for key in keys])
    _permute_columns(model, coupling.consumer, perm)
    for producer, start in coupling.producers:
        _permute_rows(model, producer, values, start)
    if moves:
        # Queries and keys move by whole heads only: rotary embeddings pair channels within one.
        _permute_rows(model, heads.query[0], channels[order].reshape(-1), heads.query[1])
        _permute_rows(model, heads.key[0], of_keys[keys].reshape(-1), heads.key[1])
    return perm


def _permute_columns(model: Any, spec: LinearSpec, perm: torch.Tensor) -> None:
    weight = weight_view(model.get_parameter(spec.parameter), spec)
    weight.copy_(weight[:, perm.to(weight.device)])


def _permute_rows(model: Any, spec: LinearSpec, perm: torch.Tensor, start: int) -> None:
    weight = weight_view(model.get_parameter(spec.parameter), spec)[start : start + len(perm)]
    weight.copy_(weight[perm.to(weight.device)])
    if spec.expert is None:
        bias = getattr(model.get_submodule(spec.parameter.rpartition(".")[0]), "bias", None)
        if bias is not None:
            part = bias.data[start : start + len(perm)]
            part.copy_(part[perm.to(part.device)])


# Families whose blocks are x + o(attention(norm(x))) and x + down(f(norm(x))) with these names, norms of the stream
# being the modules called ...layernorm; nothing else in them sees the stream.
_STREAM = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"})
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITERS = ("o_proj", "down_proj")


def reads_residual(skeleton: Skeleton, spec: LinearSpec) -> bool:
    """Whether a linear's input is the (normalised) residual stream.

    Raises:
        UsageError: an architecture for which that is not known.
    """
    model_type = skeleton.config["model_type"]
    if model_type not in _STREAM:
        raise UsageError(
            f"permute residual: not known for model type {model_type} (known: {', '.join(sorted(_STREAM))}); "
            "use --set permute=fold"
        )
    return spec.name.endswith(_READERS)


def in_stream_order(skeleton: Skeleton, perm: torch.Tensor, name: str, value: torch.Tensor) -> torch.Tensor:
    """The parameter ``name`` for a residual stream whose channels are in the order ``perm`` [width].

    Embeddings, norms, readers, writers and head all follow, so that the model computes what it did.
    """
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    embeddings = skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings()
    reads = leaf in _READERS or any(skeleton.model.get_submodule(module) is other for other in embeddings)
    if reads and kind == "weight":
        return value[:, perm.to(value.device)]
    norm = leaf == "norm" or leaf.endswith("layernorm")
    if leaf in _WRITERS or norm:
        return value[perm.to(value.device)]
    return value
