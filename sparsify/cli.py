"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify import __version__
from sparsify.artifacts import decompress_command, inspect_command, refit_command
from sparsify.bench_command import bench_command
from sparsify.errors import SparsifyError
from sparsify.gate_command import gate_command
from sparsify.inform import compiled_kernels, doctor_command, methods_command
from sparsify.options import (
    AllowFallback,
    Bos,
    Compress,
    CudaGraphs,
    Dense,
    Engine,
    EvalStride,
    Json,
    Kernel,
    Layout,
    Opset,
    Overwrite,
    Precision,
    Provider,
    RequireSparse,
    TensorParallel,
    Trust,
    TrustEngine,
    export_options,
)
from sparsify.plan_command import plan_command
from sparsify.plan_memory_command import plan_memory_command
from sparsify.prune_command import prune_and_export_command, prune_command
from sparsify.report_command import report_command
from sparsify.status_command import status_command
from sparsify.tuning_command import tune_command

EXIT_CODES = """
Exit codes: 0 done, 2 wrong option or recipe, 3 model cannot be used, 4 text cannot be used, 5 output cannot be
written, 6 NaN or Inf, 7 a package is missing, 8 verification or parity failed, 9 a rule of gate is not met, 10 a
measurement failed (the others are recorded), 11 a worker died, and those in its place, 12 it does not fit this
machine, 130 interrupted (the same command resumes), 1 a fault in sparsify.
"""

app = typer.Typer(
    name="sparsify",
    help="Prune language models without retraining and take them to the runtimes that serve them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sparsify {__version__}, {compiled_kernels()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


app.command("prune")(prune_command)


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that prune or --target hf or vllm wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    target: Annotated[str, typer.Option("--target", "-t", help="hf, vllm, onnx or tensorrt.")],
    dense: Dense = False,
    layout: Layout = None,
    precision: Precision = None,
    provider: Provider = None,
    opset: Opset = None,
    compress: Compress = False,
    engine: Engine = None,
    require_sparse: RequireSparse = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Export a pruned CHECKPOINT for a runtime; its outputs are compared with PyTorch's first."""
    options = export_options(locals())
    from sparsify.bench.report import size
    from sparsify.console import print_json, print_line, progress_bars
    from sparsify.files import folder_bytes
    from sparsify.pipeline import export

    with progress_bars() as progress:
        body = export(
            checkpoint,
            target,
            out,
            overwrite=overwrite,
            options=options,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    result = {"out": str(out), "target": target, "bytes": folder_bytes(out), "parity": body.get("parity")}
    result |= {key: body[key] for key in ("storage", "rounding", "tensorrt") if key in body}
    if "onnx" in body:
        result["onnx"] = {key: value for key, value in body["onnx"].items() if key != "weights"}
    if json:
        print_json(result)
    else:
        print_line(f"{out}: {target}, {size(folder_bytes(out))}{_cost(body.get('rounding'))}")


def _cost(rounding: dict[str, Any] | None) -> str:
    """What the precision of an ONNX artifact costs, for the line that announces it."""
    if not rounding:
        return ""
    if "not_run" in rounding:
        return "; its own arithmetic cannot run here"
    return (
        f"; rounding on random tokens: KL {rounding['mean_kl_nats']:.2g} nats, "
        f"same first choice {rounding['top1_agreement']:.0%}"
    )


app.command("prune-and-export")(prune_and_export_command)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Artifact folder, model folder, hub id, GGUF file or short name.")],
    text: Annotated[str, typer.Option(help="As --calibration of prune.")] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows, from the start of the text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: EvalStride = None,
    bos: Bos = None,
    against: Annotated[str | None, typer.Option(help="Dense model to measure the KL divergence from.")] = None,
    runtime: Annotated[
        str, typer.Option(help="auto, torch, onnxruntime, onnxruntime-genai, tensorrt, vllm or vllm-server.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="torch, vllm: of weights and arithmetic.", show_default="float32; vllm: bfloat16")
    ] = None,
    kernel: Kernel = None,
    tensor_parallel: TensorParallel = 1,
    python: Annotated[
        str | None, typer.Option(help="vllm-server: Python of the environment with vLLM.", show_default="this one")
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime: auto, cpu, cuda or tensorrt; onnxruntime-genai: cpu or cuda.", show_default="auto"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="onnxruntime: threads of one operator.", show_default="one for each core")
    ] = None,
    allow_fallback: AllowFallback = False,
    cuda_graphs: CudaGraphs = True,
    weight_budget: Annotated[
        str | None,
        typer.Option(
            help="tensorrt, built with weight-streaming=on: weights that stay on the GPU, as 4GiB.",
            show_default="as many as there is room for",
        ),
    ] = None,
    trust_engine: TrustEngine = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure perplexity of an artifact in the runtime that serves it.

    That is TensorRT for an engine, ONNX Runtime for ONNX, vLLM for a compressed checkpoint where vLLM is installed,
    else PyTorch.
    """
    from sparsify.bench.report import kernels
    from sparsify.console import print_json, print_table, progress_bars
    from sparsify.data import load_windows
    from sparsify.exporters.tensorrt_options import memory_bytes
    from sparsify.pipeline import evaluate
    from sparsify.runtimes import Runtime
    from sparsify.source import resolve

    budget = None if weight_budget is None else memory_bytes("--weight-budget", weight_budget)
    with progress_bars() as progress:
        folder = resolve(model).folder
        reference = resolve(against).folder if against else None
        ids = load_windows(
            text,
            folder,
            n_windows=windows,
            length=length,
            split="evaluation",
            bos=bos,
            stride=stride,
            trust_remote_code=trust_remote_code,
        )
        result = evaluate(
            folder,
            ids,
            stride=stride,
            against=reference,
            runtime=Runtime(
                runtime,
                dtype,
                kernel,
                tensor_parallel,
                python,
                provider=provider,
                threads=threads,
                allow_fallback=allow_fallback,
                trust_engine=trust_engine,
                cuda_graphs=cuda_graphs,
                weight_budget=budget,
            ),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    result = {"model": model, "text": ids.describe(), **result}
    if json:
        print_json(result)
        return
    table = [
        ("perplexity", f"{result['perplexity']:.3f}"),
        ("predicted tokens", f"{result['n_tokens']:,}"),
        ("windows", f"{result['n_windows']} of {result['length']}, stride {result['stride']}"),
        ("BOS", {True: "yes", False: "no", None: "as in the ids"}[ids.bos]),
        ("runtime", result["runtime"]),
        ("kernels that ran", kernels(result["engaged"])),
    ]
    if result["kl_to_reference"]:
        kl = result["kl_to_reference"]
        table.append(("KL to reference", f"{kl['mean_nats']:.4f} nats, same first choice {kl['top1_agreement']:.1%}"))
    print_table(("", model), table)


app.command("bench")(bench_command)
app.command("gate")(gate_command)
app.command("plan")(plan_command)
app.command("plan-memory")(plan_memory_command)
app.command("report")(report_command)
app.command("inspect")(inspect_command)
app.command("status")(status_command)
app.command("decompress")(decompress_command)
app.command("refit")(refit_command)
app.command("tune")(tune_command)
app.command("methods")(methods_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """Run the command line; errors a user can mend become one line and an exit code."""
    # Threads that spin while they wait burn the cores of a shared machine. Set before torch loads its thread pool.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except SparsifyError as error:
        if os.environ.get("SPARSIFY_DEBUG"):
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)
