"""The options that commands share, and how a recipe file and the command line become one set of settings."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.errors import UsageError
from sparsify.methods import METHODS, PARTS, SETTINGS, setting_from
from sparsify.recipe import Recipe, from_mapping, read_yaml

_METHODS = f"{', '.join(METHODS)}; `sparsify methods` explains them"
_DEFAULT = Recipe()

Model = Annotated[
    str | None,
    typer.Argument(
        help="Model folder, hub id (owner/name), GGUF file, or smollm2-135m (embedded).", show_default=False
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder to create; it appears when everything in it is complete.")
]
Pattern = Annotated[
    str | None,
    typer.Option(
        help="N:M keeps N of M (2:4, 4:8, …); a sparsity such as 0.5 is unstructured.", show_default=_DEFAULT.pattern
    ),
]
MethodName = Annotated[str | None, typer.Option("--method", help=f"{_METHODS}.", show_default=_DEFAULT.method)]
Group = Annotated[
    str | None,
    typer.Option(
        help="For a sparsity: compare weights over the layer or per output row.", show_default="the method's own"
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="PART=CHOICE or SETTING=VALUE, such as solver=alps or ria.exponent=0.7; repeatable. "
        "`sparsify methods` lists them.",
        show_default="the method's own",
    ),
]
Include = Annotated[list[str] | None, typer.Option(help="Glob of linears to prune; repeatable.", show_default="all")]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Glob of linears to keep dense; repeatable.", show_default="none")
]
Override = Annotated[
    list[str] | None,
    typer.Option(help="GLOB=PATTERN for single linears; repeatable, the last match counts.", show_default="none"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text file, .jsonl, FILE.safetensors:KEY, pydoc (Python's help), self (model's own), hf:NAME[@CONFIG].",
        show_default=_DEFAULT.calibration,
    ),
]
WindowCount = Annotated[
    int | None, typer.Option("--windows", help="Calibration windows.", show_default=str(_DEFAULT.windows))
]
Length = Annotated[int | None, typer.Option(help="Tokens per calibration window.", show_default=str(_DEFAULT.length))]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Start each window with BOS.", show_default="as the tokenizer does"),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every draw.", show_default=str(_DEFAULT.seed))]
ComputeDtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16 for calibration passes.", show_default=_DEFAULT.compute_dtype)
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with any of these options; options given here win.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="cpu")]
Inputs = Annotated[
    str | None,
    typer.Option(
        help="dense or pruned: on which outputs of the blocks before it each block is calibrated; dense lets workers "
        "prune several blocks at the same time.",
        show_default="the method's own",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that share the work; on cuda each has a GPU.", show_default="1"),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Workers of Ray: local (this machine), auto (the cluster it is part of) or ray://HOST:PORT.",
        show_default="without Ray",
    ),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep matrices of wide inputs in files: slower, where memory is too small."),
]
NoBudget = Annotated[bool, typer.Option("--no-budget", help="Go on where memory or disk are not expected to suffice.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output; start again where it cannot resume.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")]
TrustEngine = Annotated[
    bool, typer.Option("--trust-engine", help="Load TensorRT engines that were not built here; an engine is code.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Target = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="hf, vllm, onnx, tensorrt; repeatable.", show_default="hf")
]
Dense = Annotated[bool, typer.Option("--dense", help="Target vllm: the plain checkpoint, for vLLM without the plugin.")]
Layout = Annotated[
    str | None,
    typer.Option(
        help="Target onnx: genai (ONNX Runtime's operators, fastest) or standard (ONNX's own, for every runtime).",
        show_default="genai where it knows the architecture",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Targets onnx, tensorrt: fp32, fp16, bf16; onnx in layout genai also int8, int4; vllm: int8.",
        show_default="onnx fp32, tensorrt fp16, vllm as it is",
    ),
]
Provider = Annotated[
    str | None,
    typer.Option(help="Target onnx: cpu, cuda or tensorrt, which is to run it.", show_default="what the precision has"),
]
Opset = Annotated[
    int | None, typer.Option(help="Targets onnx (layout standard), tensorrt: 18 to 24.", show_default="23")
]
Compress = Annotated[
    bool,
    typer.Option("--compress", help="Target onnx: store pruned weights packed; ONNX Runtime unpacks them on load."),
]
Engine = Annotated[
    list[str] | None,
    typer.Option(help="Target tensorrt: KEY=VALUE, see docs/tensorrt.md; repeatable.", show_default="none"),
]
RequireSparse = Annotated[
    bool, typer.Option("--require-sparse", help="Target tensorrt: fail unless a sparse tactic was chosen.")
]
EvalText = Annotated[str | None, typer.Option(help="As --calibration; none to skip.", show_default="pydoc")]
EvalWindows = Annotated[
    int | None, typer.Option(help="Evaluation windows, from the start of the text.", show_default="32")
]
EvalLength = Annotated[int | None, typer.Option(help="Tokens per evaluation window.", show_default="512")]
EvalStride = Annotated[int | None, typer.Option(help="Tokens between window starts.", show_default="no overlap")]

# How sessions are opened, by eval and bench.
Kernel = Annotated[
    str | None,
    typer.Option(help="torch, vllm: auto, dense or a kernel that `sparsify doctor` lists.", show_default="auto"),
]
TensorParallel = Annotated[int, typer.Option(help="vllm: processes that share the model.")]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="onnxruntime: let the CPU run what the provider cannot; reported.")
]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="tensorrt: decode in captured CUDA graphs.")
]

# Options of prune-and-export that are not part of how to prune, and their types in a recipe file.
_RUN_KEYS: dict[str, type] = {
    "model": str,
    "targets": list,
    "eval_text": str,
    "eval_windows": int,
    "eval_length": int,
    "eval_stride": int,
    "device": str,
    "workers": int,
    "cluster": str,
    "offload": bool,
    "dense": bool,
    "layout": str,
    "precision": str,
    "provider": str,
    "opset": int,
    "compress": bool,
    "engine": list,
    "require_sparse": bool,
}
_EXPORT_KEYS = ("dense", "layout", "precision", "provider", "opset", "compress", "engine", "require_sparse")


def merge_settings(recipe_file: Path | None, options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the run-level settings of a recipe file, with the command line's options on top.

    ``options`` are a command's own arguments by name; those that are neither are left alone.
    """
    values = read_yaml(recipe_file) if recipe_file else {}
    where = str(recipe_file) if recipe_file else "options"
    if "trust_remote_code" in values:
        # A recipe may come from anybody; running a model's code is for the person at the keyboard to decide.
        raise UsageError(f"{where}: key 'trust_remote_code' is not for recipes; pass --trust-remote-code yourself")
    run: dict[str, Any] = {}
    for key, kind in _RUN_KEYS.items():
        if key in values:
            run[key] = values.pop(key)
            if not isinstance(run[key], kind) or (isinstance(run[key], bool) and kind is not bool):
                raise UsageError(f"{where}: key {key!r} is {type(run[key]).__name__}, expected {kind.__name__}")
            if kind is list and not all(isinstance(item, str) for item in run[key]):
                raise UsageError(f"{where}: key {key!r} must be a list of strings")
    unknown = set(values) - {f.name for f in fields(Recipe)}
    if unknown:
        known = sorted({f.name for f in fields(Recipe)} | set(_RUN_KEYS))
        raise UsageError(f"{where}: unknown key {sorted(unknown)[0]!r}; known keys: {', '.join(known)}")
    names = {"override": "overrides", "target": "targets"}
    given = {
        names.get(key, key): value
        for key, value in options.items()
        if value is not None and value is not False and value != []
    }
    if "overrides" in given:
        given["overrides"] = _overrides(given["overrides"])
    if "changes" in given:
        _change(given, given.pop("changes"), values.get("settings"), where)
    if options.get("bos") is False:
        given["bos"] = False
    run |= {key: given[key] for key in _RUN_KEYS if key in given}
    recipe_keys = {f.name for f in fields(Recipe)}
    merged = values | {key: value for key, value in given.items() if key in recipe_keys}
    return from_mapping(merged, where), run


def export_options(run: dict[str, Any]) -> Any:
    """The ``targets.Options`` among run-level settings, with the targets' own defaults for the rest."""
    from sparsify.targets import Options

    chosen = {key: run[key] for key in _EXPORT_KEYS if run.get(key) is not None}
    if "engine" in chosen:
        chosen["engine"] = tuple(chosen["engine"])
    return Options(**chosen)


def _change(given: dict[str, Any], pairs: list[str], settings: Any, where: str) -> None:
    """Sort ``--set`` into parts and settings; the latter go on top of those of the recipe file."""
    if settings is not None and not isinstance(settings, dict):
        raise UsageError(f"{where}: key 'settings' is {type(settings).__name__}, expected dict")
    merged = dict(settings or {})
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair!r}: write PART=CHOICE or SETTING=VALUE, such as solver=alps")
        if name in PARTS:
            given[name] = text
        elif name in SETTINGS:
            merged[name] = setting_from(name, text)
        else:
            raise UsageError(f"--set {pair!r}: {name} is neither a part nor a setting; `sparsify methods` lists them")
    if merged:
        given["settings"] = merged


def _overrides(pairs: list[str]) -> dict[str, str]:
    result = {}
    for pair in pairs:
        glob, equals, pattern = pair.rpartition("=")
        if not equals or not glob:
            raise UsageError(f"--override {pair!r}: write GLOB=PATTERN, such as '*.down_proj=0.3'")
        result[glob] = pattern
    return result


def required(value: Any, what: str) -> Any:
    """``value``, or a ``UsageError`` that names ``what`` is missing."""
    if value is None:
        raise UsageError(f"{what} is missing; see --help")
    return value


def check_device(device: str) -> None:
    """Refuse a device that is not known or not there (``UsageError``)."""
    import torch

    if device != "cpu":
        match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device)
        if match is None:
            raise UsageError(f"device {device!r} is unknown; choose cpu, cuda or cuda:N")
        if int(match[1] or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
            )
