"""Llamas of random weights: their sizes, and checkpoints of them, plain and compressed."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_machine.weights import pruned

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Llama:
    """Sizes of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of a block's linears, by their stored names."""
        head = self.hidden // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv_heads * head, self.hidden),
            "self_attn.v_proj": (self.kv_heads * head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def fused(self, ranks: int = 1) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] as inference engines run them, on each of ``ranks`` GPUs: q, k and v in one, gate and up."""
        head = self.hidden // self.heads
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * head // ranks, self.hidden),
            "o": (self.hidden, self.hidden // ranks),
            "gate_up": (2 * self.intermediate // ranks, self.hidden),
            "down": (self.hidden, self.intermediate // ranks),
        }

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in 16 bits."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * 2


# Of Llama-3.1.
LLAMA_8B = Llama(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = Llama(8192, 28672, 80, 64, 8, 128256)


def write_dense_model(folder: Path, sizes: Llama, device: str) -> dict[str, Any]:
    """A Llama of random bfloat16 weights, none of them zero, to be pruned; a block at a time."""
    import torch

    from sparsify.checkpoint import write_index, write_shard

    started = time.perf_counter()
    generator = torch.Generator(device=device).manual_seed(0)
    _config(sizes).save_pretrained(folder)
    norm = torch.ones(sizes.hidden, dtype=torch.bfloat16)
    outside: dict[str, tuple[int, int]] = {
        "model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden),
        "lm_head.weight": (sizes.vocabulary, sizes.hidden),
    }
    files: dict[str, dict[str, tuple[int, int]]] = {"model-rest.safetensors": outside}
    for i in range(sizes.layers):
        linears = {f"model.layers.{i}.{name}.weight": shape for name, shape in sizes.linears.items()}
        files[f"model-{i:05d}.safetensors"] = linears
    shards = {}
    for file, shapes in files.items():
        tensors = {
            name: torch.randn(shape, generator=generator, device=device).mul_(1 / math.sqrt(shape[1])).bfloat16().cpu()
            for name, shape in shapes.items()
        }
        if shapes is outside:
            tensors["model.norm.weight"] = norm.clone()
        else:
            stem = next(iter(shapes)).split(".self_attn")[0]
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{stem}.{name}.weight"] = norm.clone()
        write_shard(folder / file, tensors)
        shards[file] = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_index(folder, shards)
    size = sum(sum(names.values()) for names in shards.values())
    return {"sizes": asdict(sizes), "bytes": size, "seconds": round(time.perf_counter() - started, 2)}


def _config(sizes: Llama) -> Any:
    import transformers

    return transformers.LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, vocab_size=sizes.vocabulary,
        max_position_embeddings=16384, rms_norm_eps=1e-5, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def write_model(root: Path, sizes: Llama, device: str) -> dict[str, Any]:
    """A Llama of random bfloat16 weights with 2:4 zeros, as folders ``plain`` and ``compressed``, a block at a time.

    Activations keep their size from block to block, and logits have a standard deviation of about 2.
    """
    import torch

    from sparsify.checkpoint import write_index, write_shard
    from sparsify.files import read_json, write_json
    from sparsify.format.packed import encode
    from sparsify.format.record import to_tensors
    from sparsify.format.storage import KEY, Storage
    from sparsify.types import NofM

    started = time.perf_counter()
    generator = torch.Generator(device=device).manual_seed(0)
    two_of_four = NofM(2, 4)
    shards: dict[str, dict[str, dict[str, int]]] = {"plain": {}, "compressed": {}}

    def random(shape: tuple[int, int], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale)

    def write(variant: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
        write_shard(root / variant / file, tensors)
        shards[variant][file] = {name: tensor.nbytes for name, tensor in tensors.items()}

    config = _config(sizes)
    for variant in shards:
        shutil.rmtree(root / variant, ignore_errors=True)
        (root / variant).mkdir(parents=True)
        config.save_pretrained(root / variant)
    norm = torch.ones(sizes.hidden, dtype=torch.bfloat16)
    for i in range(sizes.layers):
        block = f"model.layers.{i}"
        plain = {f"{block}.{name}.weight": norm.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        packed = dict(plain)
        for name, shape in sizes.linears.items():
            weight = pruned(random(shape, 1 / math.sqrt(shape[1])), two_of_four).bfloat16()
            plain[f"{block}.{name}.weight"] = weight.cpu()
            for part, tensor in to_tensors(encode(weight, two_of_four)).items():
                packed[f"{block}.{name}.{part}"] = tensor.cpu()
        write("plain", f"model-{i:05d}.safetensors", plain)
        write("compressed", f"model-{i:05d}.safetensors", packed)
    rest = {
        "model.embed_tokens.weight": random((sizes.vocabulary, sizes.hidden), 1).bfloat16().cpu(),
        "lm_head.weight": random((sizes.vocabulary, sizes.hidden), 2 / math.sqrt(sizes.hidden)).bfloat16().cpu(),
        "model.norm.weight": norm,
    }
    for variant in shards:
        write(variant, "model-rest.safetensors", rest)
        write_index(root / variant, shards[variant])
    storage = Storage(("model.embed_tokens", "lm_head")).to_dict()
    file = root / "compressed/config.json"
    write_json(file, {**read_json(file), KEY: storage})
    size = {variant: sum(sum(names.values()) for names in files.values()) for variant, files in shards.items()}
    return {"sizes": asdict(sizes), "bytes": size, "seconds": round(time.perf_counter() - started, 2)}
