"""What Sparsify knows of architectures: where the decoder blocks are and which linears may be pruned.

``FAMILIES`` is the table. A model type that is not in it is handled by walking its repeated blocks, with a notice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsify.checkpoint import read_config
from sparsify.errors import ModelError, SparsifyError
from sparsify.format.reader import open_checkpoint
from sparsify.format.storage import KEY, read_storage
from sparsify.types import LinearSpec

# Fused experts of current transformers: parameter -> the linears stacked along its rows.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# More than any model has; checked where there are no weights to tell.
_MOST_BLOCKS = 1000


@dataclass(frozen=True)
class Family:
    """A row of the architecture table.

    Attributes:
        blocks: path of the ModuleList of decoder blocks.
        dense: globs, relative to a block, of linears that are never pruned (routers: tiny and decisive).
        fused_experts: experts are 3-D parameters [expert, out, in] named as in ``FUSED``.
    """

    blocks: str
    dense: tuple[str, ...] = ()
    fused_experts: bool = False


_LLAMA = Family("model.layers")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "stablelm"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "phi", "phi3", "cohere", "starcoder2"), _LLAMA),
    "opt": Family("model.decoder.layers"),
    "gpt_neox": Family("gpt_neox.layers"),
    "gpt2": Family("transformer.h"),
    "mixtral": Family("model.layers", dense=("*.gate",), fused_experts=True),
    "qwen2_moe": Family("model.layers", dense=("*.gate", "*.shared_expert_gate"), fused_experts=True),
    "qwen3_moe": Family("model.layers", dense=("*.gate",), fused_experts=True),
    "olmoe": Family("model.layers", dense=("*.gate",), fused_experts=True),
}


@dataclass
class Skeleton:
    """A model without weights, and the plan of its blocks.

    Attributes:
        model: the ``PreTrainedModel`` on the meta device.
        config: ``config.json`` as read.
        blocks: path of the block list.
        linears: prunable linears of each block, in forward order of definition.
        notices: what a user should know about how the architecture was understood.
    """

    model: Any
    config: dict[str, Any]
    blocks: str
    linears: list[list[LinearSpec]]
    notices: list[str] = field(default_factory=list)

    @property
    def text_config(self) -> Any:
        """The loaded config of the language model, which is the config itself unless the model sees images too."""
        return self.model.config.get_text_config()

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.linears)

    def prefix(self, block: int) -> str:
        """Full name of a block with trailing dot, ``model.layers.0.``."""
        return f"{self.blocks}.{block}."

    def block(self, index: int) -> nn.Module:
        """The block module."""
        module: nn.Module = self.model.get_submodule(f"{self.blocks}.{index}")
        return module


def load_skeleton(folder: Path, *, trust_remote_code: bool = False, weights: bool = True) -> Skeleton:
    """The model of ``folder`` on the meta device, with its blocks and prunable linears found.

    Args:
        folder: with config.json.
        trust_remote_code: build a model that brings its own code.
        weights: they are there too, and the config is compared with them.

    Raises:
        ModelError: config missing or not understood, a quantised checkpoint, or no decoder blocks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    raw = _plain_config(folder)
    # A model that transformers knows by itself may bring code all the same; its own class is then used.
    if raw.get("auto_map") and raw["model_type"] not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(f"{folder}: the model brings its own code; pass --trust-remote-code if you trust it")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            # The eager expert loop calls linear() once per expert, which is where its inputs can be seen.
            for part in (config, config.get_text_config()):
                part._experts_implementation = "eager"
            _refuse_more_blocks_than_tensors(config, folder, weights=weights)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        # transformers raises any of a dozen types for a config it cannot use.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder / 'config.json'}: transformers cannot build this model: {reason[0]}") from error
    model.eval()
    family, notices = _family(model, raw["model_type"], folder)
    blocks = model.get_submodule(family.blocks)
    linears = [list(_linears(block, f"{family.blocks}.{i}.", family)) for i, block in enumerate(blocks)]
    if not any(linears):
        raise ModelError(f"{folder}: no prunable linear layer in its decoder blocks")
    if raw["model_type"] not in FAMILIES:
        n_kinds = len({spec.name.split(f"{family.blocks}.", 1)[1].split(".", 1)[1] for b in linears for spec in b})
        notices.append(
            f"model type {raw['model_type']} is not in the architecture table; found {len(linears)} repeated blocks at "
            f"{family.blocks} with {n_kinds} kinds of linear layers by walking the model"
        )
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 3 and not any(spec.parameter == f"{family.blocks}.{name}" for b in linears for spec in b):
            notices.append(f"{family.blocks}.{name}: a 3-D parameter of unknown layout stays dense")
            break
    return Skeleton(model, raw, family.blocks, linears, notices)


def _plain_config(folder: Path) -> dict[str, Any]:
    raw = read_config(folder)
    if read_storage(raw.get(KEY), folder / "config.json") is not None:
        # Compressed is not quantised: the weights are those of an ordinary checkpoint, stored smaller.
        return {key: value for key, value in raw.items() if key != KEY}
    if raw.get(KEY):
        raise ModelError(
            f"{folder / 'config.json'}: quantization_config is set; prune the unquantised model and quantise afterwards"
        )
    return raw


def _refuse_more_blocks_than_tensors(config: Any, folder: Path, *, weights: bool) -> None:
    # Building a hundred thousand blocks takes minutes, on the meta device too; each has a tensor at least.
    n_blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not weights:
        if isinstance(n_blocks, int) and n_blocks > _MOST_BLOCKS:
            raise ModelError(f"{folder / 'config.json'}: key num_hidden_layers is {n_blocks}, above {_MOST_BLOCKS}")
    elif isinstance(n_blocks, int) and n_blocks > len(open_checkpoint(folder).tensors):
        raise ModelError(
            f"{folder / 'config.json'}: key num_hidden_layers is {n_blocks}, more than the checkpoint has tensors; "
            "they do not belong together"
        )


def load_model(folder: Path, dtype: torch.dtype | str, *, trust_remote_code: bool = False) -> Any:
    """The whole model of ``folder`` in memory, in eval mode; every parameter comes from safetensors or it is refused.

    Raises:
        ModelError: not a model folder, quantised, not loadable, or weights missing from the files.
    """
    from transformers import AutoModelForCausalLM

    _plain_config(folder)
    open_checkpoint(folder)  # its errors name the file; transformers' do not
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except SparsifyError:
        raise
    except Exception as error:
        # Any model's own code may run here, and transformers raises a dozen types itself.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{folder}: cannot be loaded: {type(error).__name__}: {reason}") from error
    if report["missing_keys"]:
        absent = sorted(report["missing_keys"])
        raise ModelError(f"{folder}: lacks {len(absent)} weights, first {absent[0]}; download it again")
    return model.eval()


def _family(model: nn.Module, model_type: str, folder: Path) -> tuple[Family, list[str]]:
    if model_type in FAMILIES:
        family = FAMILIES[model_type]
        try:
            found = model.get_submodule(family.blocks)
        except AttributeError:
            found = None
        if isinstance(found, nn.ModuleList) and len(found):
            return family, []
    candidates = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(child) for child in module}) == 1:
            n_weights = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
            # The outermost list holds every weight of those inside it, and comes first among equals.
            candidates.append((n_weights, name))
    if not candidates or max(candidates, key=lambda c: c[0])[0] == 0:
        raise ModelError(f"{folder}: no repeated decoder blocks found in model type {model_type}; it cannot be pruned")
    blocks = max(candidates, key=lambda c: c[0])[1]
    fused = any(name.rpartition(".")[2] in FUSED and p.dim() == 3 for name, p in model.named_parameters())
    return Family(blocks, dense=("*.gate", "*router*", "*.shared_expert_gate"), fused_experts=fused), []


def _linears(block: nn.Module, prefix: str, family: Family) -> Iterator[LinearSpec]:
    for name, module in block.named_modules():
        if any(fnmatchcase("." + name, glob) or fnmatchcase(name, glob) for glob in family.dense):
            continue
        if isinstance(module, nn.Linear):
            n_out, n_in = module.weight.shape
            yield LinearSpec(prefix + name, f"{prefix}{name}.weight", n_out, n_in)
        elif isinstance(module, Conv1D):
            n_in, n_out = module.weight.shape
            yield LinearSpec(prefix + name, f"{prefix}{name}.weight", n_out, n_in, transposed=True)
        elif family.fused_experts and all(isinstance(getattr(module, key, None), nn.Parameter) for key in FUSED):
            yield from _fused_experts(module, prefix + name)


def _fused_experts(module: nn.Module, name: str) -> Iterator[LinearSpec]:
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    # [expert, 2I, H] with [expert, H, I]; the transposed layout of some families does not satisfy this.
    if gate_up.dim() != 3 or gate_up.shape[1] != 2 * down.shape[2] or gate_up.shape[2] != down.shape[1]:
        return
    for expert in range(gate_up.shape[0]):
        for key, parts in FUSED.items():
            rows, n_in = module.get_parameter(key).shape[1:]
            for i, part in enumerate(parts):
                n_out = rows // len(parts)
                yield LinearSpec(
                    f"{name}.{expert}.{part}", f"{name}.{key}", n_out, n_in, expert=expert, row_start=i * n_out
                )


def weight_view(parameter: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
    """``weight`` [out, in] of one linear as a view of the parameter that holds it; writing to it writes the model."""
    tensor = parameter.data
    if spec.expert is not None:
        tensor = tensor[spec.expert, spec.row_start : spec.row_start + spec.out_features]
    return tensor.t() if spec.transposed else tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal; its errors are raised, not logged."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
