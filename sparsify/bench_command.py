"""The command that measures artifacts against their dense model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsify.errors import MeasurementError, UsageError
from sparsify.options import (
    AllowFallback,
    Bos,
    CudaGraphs,
    Device,
    EvalStride,
    Json,
    Kernel,
    TensorParallel,
    Trust,
    TrustEngine,
    check_device,
)

_RUNTIMES = "torch, onnxruntime, onnxruntime-genai, tensorrt, vllm or vllm-server"
_KERNEL_TOKENS = (1, 8, 32, 512)


def bench_command(
    artifacts: Annotated[
        list[str],
        typer.Argument(help="Folders that prune or export wrote; also a model, such as a dense one in 8 bits."),
    ],
    baseline: Annotated[
        list[str],
        typer.Option(
            help="The dense model that they were pruned from. For ONNX artifacts its graph is exported the same way; "
            "repeatable, with an artifact of --pattern 0, for the others."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of records (JSON lines), as for `sparsify report`.")],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_RUNTIMES}; repeatable. Each artifact is measured in those that open it.",
            show_default="torch, onnxruntime, tensorrt; vllm with --python",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; repeatable.", show_default="128, 512")
    ] = None,
    new: Annotated[list[int] | None, typer.Option(help="Tokens to generate; repeatable.", show_default="32")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Prompts at once, for a server requests at once; repeatable.", show_default="1, 4"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each combination; a difference can be claimed from 6 on.")] = 7,
    twin: Annotated[
        bool,
        typer.Option(
            "--twin/--no-twin", help="Hold the baseline twice; without, there is no noise to compare with and no claim."
        ),
    ] = True,
    warm_up: Annotated[int, typer.Option(help="Calls before them that do not count.")] = 1,
    text: Annotated[str, typer.Option(help="Text for perplexity, as --calibration of prune; none to skip.")] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows of text, from its start.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: EvalStride = None,
    bos: Bos = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Zero-shot task of lm-eval; repeatable.", show_default="none")
    ] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(help="Folder of task files (YAML), or of data for the built-in ones.", show_default="lm-eval's"),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="Questions of each task, from its start.", show_default="all")
    ] = None,
    kernel_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Rows of the input for times of single linears; repeatable.",
            show_default=", ".join(map(str, _KERNEL_TOKENS)),
        ),
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels/--no-kernels", help="Time single linears.")] = True,
    dtype: Annotated[str, typer.Option(help="torch, vllm: of weights and arithmetic.")] = "bfloat16",
    kernel: Kernel = None,
    device: Device = None,
    provider: Annotated[
        str | None, typer.Option(help="onnxruntime: auto, cpu, cuda or tensorrt.", show_default="auto")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of every runtime.", show_default="as each decides")
    ] = None,
    tensor_parallel: TensorParallel = 1,
    python: Annotated[
        str | None, typer.Option(help="vllm: Python of the environment that has it.", show_default="this one")
    ] = None,
    eager: Annotated[
        bool | None,
        typer.Option(
            "--eager/--compiled",
            help="vllm: without or with torch.compile and CUDA graphs.",
            show_default="compiled where there is a GPU",
        ),
    ] = None,
    allow_fallback: AllowFallback = False,
    cuda_graphs: CudaGraphs = True,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that a runtime may take for one answer.")] = 1800.0,
    append: Annotated[bool, typer.Option("--append", help="Add a run to --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    trust_engine: TrustEngine = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure latency, memory, accuracy and kernels of ARTIFACTS against their dense model.

    Dense and sparse take turns on the same prompts, each in a process of its own. Every record is written as soon as
    it is complete: what an interrupted run has finished stays. `sparsify report FILE` reads the records.
    """
    if rounds < 1 or warm_up < 0:
        raise UsageError(f"--rounds {rounds} --warm-up {warm_up}: want at least 1 round and 0 calls before")
    # NaN is neither above 0 nor below.
    if not 0 < timeout < math.inf:
        raise UsageError(f"--timeout {timeout:g}: want a number of seconds above 0")
    if seed < 0:
        raise UsageError(f"--seed {seed} is below 0")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} is below 1")
    from sparsify.bench.host import gpu
    from sparsify.bench.records import writer
    from sparsify.bench.request import Request, grid
    from sparsify.extras import require
    from sparsify.runtimes import Runtime

    scenarios = grid(prompt or (128, 512), new or (32,), batch or (1, 4))
    require("bench", "sparsify bench")
    check_device(device or "cpu")
    on_gpu = gpu() is not None
    runtimes = _runtimes(runtime, python)
    options = Runtime(
        dtype=dtype, kernel=kernel, tensor_parallel=tensor_parallel, provider=provider, threads=threads,
        allow_fallback=allow_fallback, trust_engine=trust_engine, cuda_graphs=cuda_graphs, device=device or "cpu",
        eager=not on_gpu if eager is None else eager,
    )  # fmt: skip
    request = Request(
        scenarios, runtimes, options, rounds=rounds, twin=twin, warm_up=warm_up, seed=seed, stride=stride,
        python=python,
        kernel_tokens=tuple(dict.fromkeys(kernel_tokens or _KERNEL_TOKENS)) if kernels else (), timeout_s=timeout,
        trust_remote_code=trust_remote_code, task_limit=task_limit,
    )  # fmt: skip
    if any(tokens < 1 for tokens in request.kernel_tokens):
        raise UsageError("--kernel-tokens: want numbers above 0")
    from dataclasses import replace

    from sparsify.baselines import dense_graphs
    from sparsify.bench.accuracy import load_tokenizer, task_length
    from sparsify.bench.run import run
    from sparsify.bench.subjects import check_baseline, identify
    from sparsify.console import print_json, print_line, progress_bars
    from sparsify.data import load_windows

    with (
        progress_bars(after="finished records stay") as progress,
        writer(out, append=append, overwrite=overwrite) as to,
    ):
        subjects = identify([*baseline, *artifacts], progress)
        dense, candidates = subjects[: len(baseline)], subjects[len(baseline) :]
        for candidate in candidates:
            for each in dense:
                check_baseline(candidate, each)
        folder = dense[0].folder
        if task:
            from sparsify.bench.zero_shot_tasks import load_tasks

            load_tokenizer(folder, trust_remote_code=trust_remote_code)
            # vLLM has to see the last token too, which it does not predict from.
            request = replace(request, tasks=load_tasks(task, task_files), task_length=task_length(folder) + 1)
        if text != "none":
            loaded = load_windows(
                text, folder, n_windows=windows, length=length, split="evaluation", bos=bos, stride=stride,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            request = replace(request, windows=loaded)
        if any(name.startswith("onnxruntime") for name in runtimes):
            work = out.with_name(f"{out.name}.baselines")
            dense += dense_graphs(candidates, dense, work, trust_remote_code=trust_remote_code, progress=progress)
        failed = run(candidates, dense, request, to, command=["sparsify", *sys.argv[1:]], progress=progress)
        name = to.run
    if json:
        print_json({"out": str(out), "run": name, "failed": failed})
    else:
        print_line(f"{out}: run {name}; `sparsify report {out} --out DIR` shows it")
    if failed:
        raise MeasurementError(f"{out}: {failed} measurements failed, see the notices; what was measured is there")


def _runtimes(given: list[str] | None, python: str | None) -> tuple[str, ...]:
    """The runtimes to measure in.

    Raises:
        UsageError: an unknown one.
    """
    from sparsify.runtimes import AUTO, RUNTIMES

    known = [name for name in RUNTIMES if name != AUTO]
    if given:
        for name in given:
            if name not in known:
                raise UsageError(f"--runtime {name!r} is unknown; choose {', '.join(known)}")
        return tuple(dict.fromkeys(given))
    found = ["torch", "onnxruntime", "tensorrt"]
    if python is not None or _has_vllm():
        found.append("vllm")
    return tuple(found)


def _has_vllm() -> bool:
    import importlib.util

    return importlib.util.find_spec("vllm") is not None
