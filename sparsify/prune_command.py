"""The commands that prune: into a checkpoint, and on to every target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.options import (
    Bos,
    Calibration,
    Changes,
    Cluster,
    Compress,
    ComputeDtype,
    Dense,
    Device,
    Engine,
    EvalLength,
    EvalStride,
    EvalText,
    EvalWindows,
    Exclude,
    Group,
    Include,
    Inputs,
    Json,
    Layout,
    Length,
    MethodName,
    Model,
    NoBudget,
    Offload,
    Opset,
    Out,
    Override,
    Overwrite,
    Pattern,
    Precision,
    Provider,
    RecipeFile,
    RequireSparse,
    Seed,
    Target,
    Trust,
    WindowCount,
    Workers,
    check_device,
    export_options,
    merge_settings,
    required,
)

if TYPE_CHECKING:
    from sparsify.progress import Progress
    from sparsify.recipe import Recipe
    from sparsify.source import Source


def prune_command(
    model: Model = None,
    out: Out = None,
    pattern: Pattern = None,
    method: MethodName = None,
    group: Group = None,
    changes: Changes = None,
    include: Include = None,
    exclude: Exclude = None,
    override: Override = None,
    calibration: Calibration = None,
    windows: WindowCount = None,
    length: Length = None,
    bos: Bos = None,
    seed: Seed = None,
    compute_dtype: ComputeDtype = None,
    inputs: Inputs = None,
    recipe: RecipeFile = None,
    device: Device = None,
    workers: Workers = None,
    cluster: Cluster = None,
    offload: Offload = False,
    no_budget: NoBudget = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Prune MODEL into a checkpoint with a manifest. Interrupted, the same command resumes."""
    settings, run = merge_settings(recipe, locals())
    from sparsify import manifest
    from sparsify.bench.report import size
    from sparsify.console import print_json, print_line, progress_bars
    from sparsify.files import read_json
    from sparsify.prune import prune

    out = required(out, "--out")
    with progress_bars() as progress:
        source, how = _announced(settings, run, out, progress, no_budget=no_budget, trust=trust_remote_code)
        prune(source, settings, out, overwrite=overwrite, **how)
    body, timing = manifest.read(out), read_json(out / manifest.RUN)
    if json:
        print_json(
            {"out": str(out), **{key: body[key] for key in ("source", "recipe", "calibration", "coverage")}, **timing}
        )
        return
    covered = body["coverage"]
    print_line(
        f"{out}: {settings.pattern} by {settings.method}, {covered['zeros'] / covered['selected']:.2%} of "
        f"{covered['selected']:,} weights are zero ({covered['zero_share']:.1%} of the model); "
        f"{timing['seconds']:.0f} s, peak memory {size(timing['peak_memory_bytes'])}"
    )


def prune_and_export_command(
    model: Model = None,
    out: Out = None,
    target: Target = None,
    pattern: Pattern = None,
    method: MethodName = None,
    group: Group = None,
    changes: Changes = None,
    include: Include = None,
    exclude: Exclude = None,
    override: Override = None,
    calibration: Calibration = None,
    windows: WindowCount = None,
    length: Length = None,
    bos: Bos = None,
    seed: Seed = None,
    compute_dtype: ComputeDtype = None,
    inputs: Inputs = None,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = None,
    eval_length: EvalLength = None,
    eval_stride: EvalStride = None,
    recipe: RecipeFile = None,
    device: Device = None,
    workers: Workers = None,
    cluster: Cluster = None,
    dense: Dense = False,
    layout: Layout = None,
    precision: Precision = None,
    provider: Provider = None,
    opset: Opset = None,
    compress: Compress = False,
    engine: Engine = None,
    require_sparse: RequireSparse = False,
    offload: Offload = False,
    no_budget: NoBudget = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Prune MODEL, export it for each target, measure accuracy, and write report.md and report.json to --out."""
    settings, run = merge_settings(recipe, locals())
    from sparsify.bench.report import HEAD, rows, summary
    from sparsify.console import print_json, print_line, print_table, progress_bars
    from sparsify.pipeline import Evaluation, prune_and_export

    out = required(out, "--out")
    with progress_bars() as progress:
        targets, measures = run.get("targets", ["hf"]), run.get("eval_text") != "none"
        source, how = _announced(
            settings, run, out, progress, no_budget=no_budget, trust=trust_remote_code, targets=targets,
            measures=measures,
        )  # fmt: skip
        report = prune_and_export(
            source,
            settings,
            targets,
            out,
            evaluation=Evaluation(
                **{k.removeprefix("eval_"): v for k, v in run.items() if k.startswith("eval_")}, bos=settings.bos
            ),
            overwrite=overwrite,
            options=export_options(run),
            **how,
        )
    if json:
        print_json(report)
        return
    print_line(summary(report))
    print_table(HEAD, rows(report))
    print_line(f"report: {out / 'report.md'} and {out / 'report.json'}")


def _announced(
    settings: Recipe,
    run: dict[str, Any],
    out: Path,
    progress: Progress,
    *,
    no_budget: bool,
    trust: bool,
    targets: Sequence[str] = (),
    measures: bool = False,
) -> tuple[Source, dict[str, Any]]:
    """The model, and how it is pruned as ``prune`` takes it, after the run's budget was said."""
    from sparsify.budget.estimate import announce
    from sparsify.source import resolve

    how = {"device": run.get("device", "cpu"), "workers": run.get("workers"), "cluster": run.get("cluster")}
    how |= {"offload": run.get("offload", False), "trust_remote_code": trust, "progress": progress}
    check_device(how["device"])
    source = resolve(required(run.get("model"), "MODEL"))
    after: dict[str, Any] = {"targets": targets, "measures": measures}
    return source, how | {"worker_bytes": announce(source, settings, out, enforce=not no_budget, **after, **how)}
