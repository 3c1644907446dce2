"""Compressed checkpoints in transformers: ``from_pretrained`` opens them, ``save_pretrained`` writes them again.

Decoding is made part of transformers' own conversions. A converter collects the stored tensors of a parameter; here it
hands decoded weights to what it does with them, so that experts are whole before transformers merges them. Everything
that is not packed is left to transformers.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.errors import ModelError, UsageError
from sparsify.format.packed import DTYPES, Packed, decode, encode, fits, quantise
from sparsify.format.reader import digest
from sparsify.format.record import CHECK, FORMAT, SCALE, VALUES, to_tensors
from sparsify.format.storage import KEY, METHOD, Storage, read_storage
from sparsify.kernels.dispatch import AUTO, DENSE, check_request
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.plugins.transformers_loading import Layout, Plan, Unpacking, Whole, put_kernel, scan

_LOG = logging.getLogger("sparsify")


_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class SparsifyConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed checkpoint, and how to open it.

    Args:
        kernel: what multiplies by the packed linears: a name in ``kernels.dispatch``, ``auto``, or None for dense
            weights. Not stored.
        ignore: modules that are stored dense.
        format: of the tensors.
        quant_method: ``sparsify``.
        digest: of the stored tensors; made anew when the model is saved.
        others: keys that this version does not know; a warning names them.

    Raises:
        ModelError: a format this version does not read, or a malformed list.
    """

    def __init__(
        self,
        kernel: str | None = None,
        ignore: Iterable[str] = (),
        format: int = FORMAT,
        quant_method: str = METHOD,
        digest: str = "",
        **others: Any,
    ) -> None:
        storage = read_storage({"quant_method": METHOD, "format": format, "ignore": ignore, "digest": digest})
        if others:
            _LOG.warning("%s.%s is unknown and ignored", KEY, ", ".join(others))
        self.quant_method = METHOD
        self.ignore = list(storage.ignore if storage else ())
        self.digest = storage.digest if storage else ""
        self.int8 = bool(storage and storage.int8)
        self.kernel = kernel

    def to_dict(self) -> dict[str, Any]:
        """What config.json stores."""
        return Storage(tuple(self.ignore), self.digest, self.int8).to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dict that transformers takes this for where a loaded config opens a second model."""
        return {**self.to_dict(), "kernel": self.kernel}.get(key, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained(quantization_config=...)`` changes in the config of the checkpoint."""
        return {} if self.kernel is None else {"kernel": self.kernel}


class SparsifyQuantizer(HfQuantizer):
    """Opens compressed checkpoints and writes them; transformers makes one for each model."""

    plan: Plan | None = None
    has_kernels = False
    # Made for a model that was dense and whose linears were packed in memory.
    adopted = False
    conversions: list[Any] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **others: Any) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            UsageError: an ordinary checkpoint, or a kernel that does not exist or cannot run there.
        """
        if not self.pre_quantized:
            raise UsageError(
                "SparsifyConfig opens compressed checkpoints, and this one is not; leave it out, or compress the "
                "pruned checkpoint with sparsify export --target vllm"
            )
        kernel = self.quantization_config.kernel or DENSE
        for device in _devices(device_map):
            if device == "disk":
                if kernel not in (AUTO, DENSE):
                    raise UsageError(f"kernel {kernel} keeps its weights in memory; take disk out of device_map")
            else:
                check_request(kernel, torch.device(device))

    def preprocess_model(
        self, model: Any, dtype: Any = None, checkpoint_files: Iterable[str] | None = None, **others: Any
    ) -> None:
        """Read the names of what is packed.

        Raises:
            ModelError: a shard is truncated.
            UsageError: weights are to be divided between processes.
        """
        super().preprocess_model(model, dtype=dtype, checkpoint_files=checkpoint_files, **others)
        if getattr(model.config, "distributed_config", None) is not None:
            raise UsageError(
                "a compressed checkpoint cannot be divided between processes; write an ordinary one with sparsify "
                "export --target hf"
            )
        files, dtypes = scan(checkpoint_files or ())
        strict = {re.compile(k.replace("*", ".*")): v for k, v in model._get_dtype_plan(dtype).items()}
        skeleton = {}
        for name, tensor in model.state_dict().items():
            special = (wanted for pattern, wanted in strict.items() if pattern.search(name))
            skeleton[name] = tensor.shape, next(special, tensor.dtype)
        self.plan = Plan(self.quantization_config.kernel or DENSE, files, dtypes, skeleton)
        self.ignore = tuple(self.quantization_config.ignore)
        if not hasattr(HfQuantizer, "get_new_dtype"):
            # transformers before 5.21 casts a tensor to the dtype of its parameter as it is read, and checksums are of
            # what is stored. Decoded weights are cast by the plan.
            for module in files:
                parameter = model.get_parameter(f"{module}.{VALUES}") if f"{module}.{VALUES}" in skeleton else None
                if parameter is not None and module in dtypes:
                    parameter.data = parameter.data.to(dtypes[module])

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for what is decoded: it is cast afterwards."""
        return None if isinstance(converter, Unpacking) else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """``weight_conversions`` with decoding before whatever they do."""
        if self.plan is None or not self.plan.files:
            return weight_conversions
        names = [f"{module}.{VALUES}" for module in self.plan.files]
        # Copies: renaming leaves marks on the entries.
        for entry in copy.deepcopy(weight_conversions):
            if isinstance(entry, WeightRenaming):
                names = [entry.rename_source_key(name)[0] for name in names]
        self.plan.renamed = frozenset(name.removesuffix(f".{VALUES}") for name in names)
        conversions = []
        for entry in weight_conversions:
            probe = copy.deepcopy(entry) if isinstance(entry, WeightConverter) else None
            touched = probe is not None and any(probe.rename_source_key(name)[1] is not None for name in names)
            conversions.append(Unpacking(entry, self.plan) if touched else entry)
        return [*conversions, Whole(self.plan)]

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> Any:
        plan = self.plan
        assert plan is not None
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            shape, dtype = plan.skeleton.get(name, (tensor.shape, tensor.dtype))
            # transformers before 5.21 checks neither shapes nor dtypes under a quantizer.
            if tensor.shape != shape:
                raise ModelError(
                    f"{model.config.name_or_path}: tensor {name} is {list(tensor.shape)}, config.json asks for "
                    f"{list(shape)}; they do not belong together"
                )
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        # save_pretrained would reverse them once more: get_state_dict_and_metadata gives what is stored already.
        self.conversions = [
            entry.inner if isinstance(entry, Unpacking) else entry
            for entry in model._weight_conversions
            if not isinstance(entry, Whole)
        ]
        model._weight_conversions = []
        self.note_kernels(model)
        if plan.refused:
            _LOG.warning("%d of %d linears stay dense: %s", len(plan.refused), len(plan.linears), plan.refused[0])
        return model

    def note_kernels(self, model: Any) -> None:
        """A model of dense weights is like any other, and may be cast and trained; one with kernels may not."""
        self.has_kernels = model.is_quantized = any(isinstance(module, SparseLinear) for module in model.modules())

    def is_serializable(self, *args: Any, **others: Any) -> bool:
        """True: see ``get_state_dict_and_metadata``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether every weight has gradients, which is not so with a kernel."""
        return not self.has_kernels

    @property
    def is_compileable(self) -> bool:
        """True: kernels are operators that torch.compile knows."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes: the tensors of a compressed checkpoint.

        A weight is packed as it was stored. One that has been changed and no longer fits its pattern is packed
        unstructured, or dense where that is smaller; ``ignore`` of ``model.config`` then lists it.

        Raises:
            UsageError: parts of the model are not in memory, or a kernel keeps weights in a form of its own.
        """
        if self.plan is None or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        tensors: dict[str, torch.Tensor] = {}
        dense = []
        for name, value in self._as_stored(model):
            module = name.removesuffix(f".{VALUES}")
            layout = None if module == name else self._layout(module, model)
            packed = value if isinstance(value, Packed) else None if layout is None else _repack(value, layout)
            if packed is not None:
                tensors |= {f"{module}.{part}": tensor for part, tensor in to_tensors(packed).items()}
                if not len(packed.values):
                    # transformers takes all tensors without storage for one.
                    tensors[name] = packed.values.new_empty(1)[:0]
                continue
            assert isinstance(value, torch.Tensor)
            tensors[name] = value
            if layout is not None:
                dense.append(module)
        self.quantization_config.ignore = [*self.ignore, *sorted(set(dense) - set(self.ignore))]
        self.quantization_config.digest = _digest(tensors)
        self.quantization_config.int8 = any(name.endswith(f".{SCALE}") for name in tensors)
        setattr(model.config, KEY, self.quantization_config)
        return tensors, {}

    def _layout(self, module: str, model: Any) -> Layout | None:
        """How ``module`` was stored, also where the checkpoint was of a model with a head and this one has none."""
        assert self.plan is not None
        prefix = f"{model.base_model_prefix}."
        names = (module, prefix + module, module.removeprefix(prefix))
        return next((self.plan.layouts[name] for name in names if name in self.plan.layouts), None)

    def _as_stored(self, model: Any) -> Iterator[tuple[str, torch.Tensor | Packed]]:
        """Names of the checkpoint and their tensors; weights that kernels hold come packed."""
        layers = {name: part for name, part in model.named_modules() if isinstance(part, SparseLinear)}
        hidden = {f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.state_names}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in hidden}
        for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
            state.pop(name, None)
        if any(tensor.is_meta for tensor in state.values()):
            raise UsageError("parts of the model are not in memory; open it without device_map to save it")
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = remove_tied_weights_from_state_dict(state, model)
        # Renamed like weights, and recognised afterwards.
        marks = {name: torch.empty(1, 1) for name in layers}
        held = {id(mark): layers[name].packed() for name, mark in marks.items()}
        state |= {f"{name}.{VALUES}": mark for name, mark in marks.items()}
        model._weight_conversions = self.conversions
        try:
            state = revert_weight_conversion(model, state)
        finally:
            model._weight_conversions = []
        if not held.keys() <= {id(tensor) for tensor in state.values()}:
            raise UsageError(
                "the architecture stores its linears in another form than kernels hold them; open the model without a "
                "kernel to save it"
            )
        for name, tensor in state.items():
            yield name, held.get(id(tensor), tensor)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """``model.dequantize()``: an ordinary model of dense weights, which is saved as one."""
        for name in [name for name, part in model.named_modules() if isinstance(part, SparseLinear)]:
            model.set_submodule(name, model.get_submodule(name).to_linear())
        self.note_kernels(model)
        model._weight_conversions = self.conversions
        return model


def _devices(device_map: Any) -> set[Any]:
    if device_map is None:
        return {"cpu"}
    if isinstance(device_map, Mapping):
        return {f"cuda:{device}" if isinstance(device, int) else str(device) for device in device_map.values()}
    return {"cuda" if torch.cuda.is_available() else "cpu"}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """As a reader will compute it; empty where a dtype has no name that is known here."""
    if any(tensor.dtype not in _NAMES for tensor in tensors.values()):
        return ""
    checks = {name: tensor.tolist() for name, tensor in tensors.items() if name.endswith(f".{CHECK}")}
    return digest({name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}, checks)


def _repack(weight: torch.Tensor, layout: Layout) -> Packed | None:
    """``weight`` packed as ``layout`` says if it fits, unstructured if not; None where dense is smaller.

    Values stay in 8 bits where those are the weight: one that was changed since is stored as it is.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        return None
    pattern, perm = layout.pattern, None if layout.perm is None else layout.perm.to(weight.device)
    whole = pattern is not None and fits(weight if perm is None else weight[:, perm.long()], pattern)
    packed = encode(weight, pattern, perm) if whole else encode(weight)
    scale = layout.scale
    if scale is not None and len(scale) == len(weight) and bool(torch.isfinite(packed.values).all()):
        codes = quantise(packed, scale.to(weight.device))
        packed = codes if torch.equal(decode(codes), weight) else packed
    return packed if packed.n_bytes < weight.nbytes else None


def sparsify_linears(model: Any, kernel: str) -> dict[str, str]:
    """Let ``kernel`` multiply by the packed linears of a model that was opened from a compressed checkpoint.

    The same as opening it with the kernel, with dense weights in memory before. Experts and weights that are no longer
    sparse stay dense; ``dense`` brings every linear back to its dense weight.

    Returns:
        linear -> the kernel's name, or ``dense``.

    Raises:
        UsageError: another model, an unknown kernel or one that cannot run on the model's device, or the model has a
            kernel whose weights cannot be decoded.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, SparsifyQuantizer) or quantizer.plan is None or quantizer.adopted:
        raise UsageError("the model was not opened from a compressed checkpoint; write one with sparsify export")
    check_request(kernel, model.device)
    report = {}
    refused = []
    for name, layout in quantizer.plan.linears.items():
        layer = model.get_submodule(name)
        if isinstance(layer, SparseLinear):
            packed: Packed | None = layer.packed()
            model.set_submodule(name, layer.to_linear())
        elif not isinstance(layer, nn.Linear) or layer.weight.is_meta:
            continue
        else:
            packed = None if kernel == DENSE else _repack(layer.weight.data, layout)
        reason = "it is not sparse" if packed is None else put_kernel(model, name, packed, kernel)
        report[name] = DENSE if reason is not None else model.get_submodule(name).kernel_name
        refused += [reason] if reason and kernel != DENSE else []
    quantizer.note_kernels(model)
    if refused:
        _LOG.warning("%d of %d linears stay dense: %s", len(refused), len(report), refused[0])
    return report


def as_stored(model: Any, name: str) -> Callable[[torch.Tensor], Packed | None] | None:
    """How to pack the weight of the linear ``name`` as the checkpoint held it that the model was opened from, if any.

    What it returns gives None for a weight that is smaller dense.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    plan = quantizer.plan if isinstance(quantizer, SparsifyQuantizer) else None
    layout = None if plan is None else plan.linears.get(name)
    return None if layout is None else partial(_repack, layout=layout)


def follow(model: Any) -> None:
    """Tell the quantizer of ``model`` that linears were packed or unpacked in memory.

    A model that was opened dense gets a quantizer with its first packed linear, so that ``save_pretrained`` writes a
    compressed checkpoint, and loses it with the last.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    packed = any(isinstance(module, SparseLinear) for module in model.modules())
    if quantizer is None and packed:
        quantizer = SparsifyQuantizer(SparsifyConfig(), pre_quantized=True)
        quantizer.adopted = True
        quantizer.plan, quantizer.ignore = Plan(DENSE, {}, {}, {}), ()
        quantizer.conversions, model._weight_conversions = getattr(model, "_weight_conversions", None), []
        model.hf_quantizer = quantizer
        setattr(model.config, KEY, quantizer.quantization_config)
    if not isinstance(quantizer, SparsifyQuantizer) or quantizer.plan is None:
        return
    quantizer.note_kernels(model)
    if quantizer.adopted and not packed:
        model._weight_conversions = quantizer.conversions
        del model.hf_quantizer, model.is_quantized
        delattr(model.config, KEY)


def register() -> None:
    """Make ``quant_method: sparsify`` known to transformers; may be called again, and after a reload."""
    # transformers' own functions for this refuse a second time.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SparsifyConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = SparsifyQuantizer
    # Whose attributes may be given in from_pretrained(quantization_config=...); of others transformers uses what
    # config.json says, and a kernel that was asked for would be forgotten.
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if isinstance(types, tuple) and SparsifyConfig not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, SparsifyConfig)


register()
