"""Export of a checkpoint to ONNX with standard operators only: what ONNX Runtime, OpenVINO and TensorRT all read.

The graph is a decoder with a key/value cache as flat tensors, float32, float16 or bfloat16 throughout:

    input_ids [batch, sequence] int64, attention_mask [batch, total_sequence] int64, position_ids [batch, sequence]
    int64 (absent where the architecture takes none), past_key_values.{i}.key/value [batch, heads, past_sequence, dim]
    -> logits [batch, sequence, vocab], present.{i}.key/value [batch, heads, total_sequence, dim]

with total_sequence = past_sequence + sequence. Sliding-window layers keep their whole cache; the mask does the
sliding. Mixture-of-experts layers gather the weights of each token's experts, so memory at prefill grows with
tokens x experts per token x expert size.
"""

import contextlib
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify import __version__
from sparsify.checkpoint import copy_side_files, portable_config, read_config
from sparsify.errors import MissingExtraError, ModelError, NumericsError, OutputError, UsageError
from sparsify.exporters.onnx_forms import MAX_OPSET, MIN_OPSET, OPSET
from sparsify.exporters.onnx_graph import check_standard, first_line, rename_axes, rename_weights
from sparsify.files import write_json, writing
from sparsify.model import load_model

if TYPE_CHECKING:
    import torch

# Protobuf stops at 2 GiB, and readers keep a parsed copy of what lies inside the file until the session is made, so
# larger models pay for a single file in load time and memory. Below this size one file is the handier artifact.
EXTERNAL_DATA_BYTES = 512 * 1024**2
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's prints, warnings, log records and progress bars; failures come as exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _cache_shapes(model: Any) -> list[tuple[int, int, int, int]]:
    """Per layer (key heads, key dim, value heads, value dim), from a run on one token: configs name them unevenly."""
    import torch

    with torch.no_grad():
        outputs = model(input_ids=torch.ones(1, 1, dtype=torch.int64), use_cache=True)
    layers = getattr(getattr(outputs, "past_key_values", None), "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise ModelError("its layers keep states other than keys and values")
    return [(x.keys.shape[1], x.keys.shape[3], x.values.shape[1], x.values.shape[3]) for x in layers]


def _trace(model: Any, opset: int) -> Any:
    """The exported program (torch.onnx.ONNXProgram) of the model with flat cache tensors."""
    import torch
    from transformers import DynamicCache

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: "torch.Tensor", attention_mask: "torch.Tensor", *rest: "torch.Tensor"
        ) -> tuple["torch.Tensor", ...]:
            past = rest[1:] if takes_positions else rest
            positions = {"position_ids": rest[0]} if takes_positions else {}
            # Made without the config: with it, sliding layers would cut the cache at a traced, thus frozen, length.
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
            )
            layers = outputs.past_key_values.layers
            return (outputs.logits, *(t for layer in layers for t in (layer.keys, layer.values)))

    # Sizes that differ from each other and from 0 and 1, which torch.export would freeze.
    batch, sequence, past_sequence = 2, 3, 5
    ids = torch.ones(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past_sequence + sequence, dtype=torch.int64)
    example, names, outputs = [ids, mask], ["input_ids", "attention_mask"], ["logits"]
    if takes_positions:
        example.append(torch.arange(past_sequence, past_sequence + sequence).expand(batch, sequence))
        names.append("position_ids")
    axes: list[tuple[int, int]] = [(0, 1)] * (len(example) - 2)
    for i, (key_heads, key_dim, value_heads, value_dim) in enumerate(_cache_shapes(model)):
        example.append(torch.randn(batch, key_heads, past_sequence, key_dim, dtype=model.dtype))
        example.append(torch.randn(batch, value_heads, past_sequence, value_dim, dtype=model.dtype))
        axes += [(0, 2), (0, 2)]
        names += [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        outputs += [f"present.{i}.key", f"present.{i}.value"]
    dynamic = torch.export.Dim.DYNAMIC
    flat = {0: dynamic, 1: dynamic}
    with torch.no_grad():
        return torch.onnx.export(
            Flat().eval(),
            tuple(example),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=names,
            output_names=outputs,
            dynamic_shapes={
                "input_ids": flat,
                "attention_mask": flat,
                "rest": tuple({a: dynamic, b: dynamic} for a, b in axes),
            },
        )


def _finish(program: Any, model: Any, path: Path) -> None:
    """Name, label and write the traced graph to ``path``; weights go beside it when they are large."""
    import onnx_ir

    exported = program.model
    rename_axes(exported.graph)
    rename_weights(exported.graph, model)
    graphs = (exported.graph, *(function.graph for function in exported.functions.values()))
    # Tracing notes hold stack traces, that is, paths of the exporting machine; they also double the graph's size.
    for graph in graphs:
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()
    exported.producer_name, exported.producer_version = "sparsify", __version__
    exported.metadata_props["sparsify.opset"] = str(exported.opset_imports[""])
    exported.metadata_props["sparsify.ir_version"] = str(exported.ir_version)
    weight_bytes = sum(value.const_value.nbytes for value in exported.graph.initializers.values())
    external = f"{path.name}.data" if weight_bytes > EXTERNAL_DATA_BYTES else None
    with writing(path):
        onnx_ir.save(exported, path, external_data=external)


def export_onnx(
    checkpoint: Path, out: Path, *, precision: str = "fp32", opset: int = OPSET, trust_remote_code: bool = False
) -> None:
    """Write ``model.onnx`` (and ``model.onnx.data`` for large weights) into the existing folder ``out``.

    Config, generation config, tokenizer files and chat template are copied beside it where the checkpoint has them.
    Peak memory is the weights once, and once more while a file without external data is serialised.

    Args:
        checkpoint: Hugging Face folder (config, safetensors).
        out: existing folder; files of the same names in it are replaced.
        precision: fp32, fp16 or bf16: weights, cache and arithmetic of the graph.
        opset: ONNX operator set, 18 to 24; 18 is for runtimes without ``Attention``, as TensorRT 8.6.
        trust_remote_code: run the modelling code that the checkpoint brings.

    Raises:
        UsageError: opset out of range, or a precision that this layout has not.
        MissingExtraError: onnx or onnxscript is absent.
        ModelError: the checkpoint cannot be loaded, or its architecture cannot be traced.
        NumericsError: a weight is NaN or infinite, or too large for float16.
        OutputError: ``out`` is not a folder or cannot be written.
        VerificationError: the graph has non-standard operators or is refused by ONNX's checker.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset}: choose {MIN_OPSET} to {MAX_OPSET}")
    if precision not in _DTYPES:
        raise UsageError(f"precision {precision!r}: layout standard has {', '.join(_DTYPES)}")
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f'{package} is missing; pip install "sparsify-toolkit[onnx]"')
    import torch

    with _quiet():
        model = load_model(checkpoint, getattr(torch, _DTYPES[precision]), trust_remote_code=trust_remote_code)
        # Experts chosen by an indexed product can be traced; the default kernels choose them by data-dependent sizes.
        model.set_experts_implementation("batched_mm")
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                remedy = "" if precision == "fp32" else f" in {precision}; bf16 holds larger values than fp16"
                raise NumericsError(f"{checkpoint}: {name} holds NaN or Inf{remedy}")
        try:
            program = _trace(model, opset)
        except ModelError as error:
            raise ModelError(f"{checkpoint}: {model.config.model_type} cannot be exported to ONNX: {error}") from error
        except Exception as error:  # tracing runs the model's code: whatever it raises, the architecture is unfit
            kind = model.config.model_type
            raise ModelError(f"{checkpoint}: {kind} cannot be exported to ONNX: {first_line(error)}") from error
        path = out / "model.onnx"
        _finish(program, model, path)
        del program, model
        check_standard(path)
        write_json(out / "config.json", portable_config(read_config(checkpoint)))
        copy_side_files(checkpoint, out)
