"""Models whose linears are coupled: opened whole, run, folded, pruned with an order of inputs and taken apart again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsify import manifest
from sparsify.checkpoint import read_permutations
from sparsify.couplings import Coupling, couplings, fold_attention, fold_mlp, in_stream_order
from sparsify.model import Skeleton, load_skeleton, weight_view
from sparsify.permute import inverse
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source

# Couplings a block: of attention (+ whole heads move, - they do not), of MLPs, and producers of one of those.
EXPECTED = {
    "llama": ("+", 1, 2), "mistral": ("+", 1, 2), "qwen2": ("+", 1, 2), "qwen3": ("+", 1, 2), "gemma": ("+", 1, 2),
    "gemma2": ("+", 1, 2), "gemma3_text": ("+", 1, 2), "phi": ("+", 1, 1), "phi3": ("+", 1, 2), "opt": ("+", 1, 1),
    "gpt_neox": ("", 1, 1), "gpt2": ("+", 1, 1), "mixtral": ("+", 4, 2), "qwen2_moe": ("+", 5, 2),
    "qwen3_moe": ("+", 4, 2), "olmoe": ("-", 4, 2), "bloom": ("", 0, 0),
    "llama-nine-heads": ("+", 1, 2), "llama-mha": ("+", 1, 2), "llama-mqa": ("+", 1, 2), "llama-one-head": ("+", 1, 2),
    "phi-norms": ("+", 1, 1), "starcoder2": ("+", 1, 1), "olmo2": ("-", 1, 2), "cohere": ("-", 1, 2),
    "smollm3": ("+", 1, 2), "stablelm": ("-", 1, 2),
}  # fmt: skip
FOLDABLE = [name for name, (attention, n_mlp, _) in EXPECTED.items() if attention or n_mlp]
# Those whose residual stream can be reordered.
STREAMED = ["llama-nine-heads", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"]
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4))


def open_model(folder: Path, dtype: torch.dtype = torch.float64) -> Skeleton:
    """The model with all its weights, as a skeleton."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return replace(load_skeleton(folder), model=model.eval())


def logits(skeleton: Skeleton, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = skeleton.model(ids, use_cache=False).logits
    return result


def all_couplings(skeleton: Skeleton) -> list[Coupling]:
    return [coupling for index in range(skeleton.n_blocks) for coupling in couplings(skeleton, index).values()]


def weight_of(skeleton: Skeleton, spec: Any) -> torch.Tensor:
    return weight_view(skeleton.model.get_parameter(spec.parameter), spec)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def reorder_stream(skeleton: Skeleton, perm: torch.Tensor, left_out: str = "") -> list[str]:
    """Reorder the residual stream in place; the names of the parameters that had to follow."""
    changed = []
    for name, parameter in skeleton.model.named_parameters():
        moved = in_stream_order(skeleton, perm, name, parameter.data).clone()
        if not torch.equal(moved, parameter.data) and name != left_out:
            parameter.data = moved
            changed.append(name)
    return changed


def run(folder: Path, recipe: Recipe, out: Path) -> Path:
    return prune(Source(folder.name, folder, "folder"), recipe, out)


def orders_in(out: Path) -> dict[str, torch.Tensor]:
    return read_permutations(out / manifest.PERMUTATIONS)


def kinds(out: Path) -> dict[str, str]:
    return {row["name"]: row["permuted"] for row in manifest.read(out)["linears"]}


def unfolded(out: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The artifact with every folded order taken back, so that it has the dense model's order throughout."""
    skeleton, orders, folded = open_model(out, dtype), orders_in(out), kinds(out)
    if "residual" in orders:
        reorder_stream(skeleton, inverse(orders["residual"]))
    for coupling in all_couplings(skeleton):
        name = coupling.consumer.name
        if folded.get(name) != "folded":
            continue
        back = inverse(orders[name])
        if coupling.heads is None:
            fold_mlp(skeleton.model, coupling, back)
            continue
        repeat, size = coupling.heads.n_query // coupling.heads.n_key, coupling.heads.head_dim
        within = back.reshape(-1, size) - size * torch.arange(coupling.heads.n_query)[:, None]
        # The driver's orders stay within heads and are alike for query heads that share a key head.
        assert torch.equal(within, within[::repeat].repeat_interleave(repeat, dim=0))
        fold_attention(skeleton.model, coupling, list(within[::repeat]))
    return skeleton
