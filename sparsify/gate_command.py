"""The command that decides by records: for pipelines, with an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsify.errors import GateError, UsageError
from sparsify.options import Json

if TYPE_CHECKING:
    from sparsify.report.rules import Rule


def gate_command(
    records: Annotated[list[Path], typer.Argument(help="Files that sparsify bench wrote.")],
    min_speedup: Annotated[
        list[str] | None,
        typer.Option(
            help="X, or [MEASURE][@SCENARIO]=X: measures are total, ttft, tpot and throughput, scenarios globs of "
            "PROMPT+NEWxBATCH, such as tpot@*x1=1.2; repeatable."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="5%: of the dense model's perplexity; 0.5: in points of perplexity.")
    ] = None,
    max_kl: Annotated[str | None, typer.Option(help="KL divergence from the dense model, in nats.")] = None,
    min_task: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK:METRIC=X; with a sign X is a difference from the dense model: arc_easy:acc=-0.02; repeatable."
        ),
    ] = None,
    max_memory_ratio: Annotated[
        str | None, typer.Option(help="Of peak memory (of the device, where one was used) to the dense model's: 0.8.")
    ] = None,
    max_file_ratio: Annotated[str | None, typer.Option(help="Of file size to the dense model's: 0.7.")] = None,
    min_sparse_linears: Annotated[
        str | None, typer.Option(help="Share of the pruned linears that ran by a sparse kernel: 100%.")
    ] = None,
    require_finished: Annotated[
        bool | None,
        typer.Option(
            "--require-finished/--allow-unfinished",
            help="Refuse runs without an end, and failed measurements of what is selected.",
            show_default="require-finished",
        ),
    ] = None,
    require_claim: Annotated[
        bool,
        typer.Option(
            "--require-claim/--allow-noise", help="A speed-up above 1 has to stand out from the baseline's own noise."
        ),
    ] = True,
    confident: Annotated[
        bool, typer.Option("--confident", help="Hold the worse end of the 95 % interval against the limit.")
    ] = False,
    artifact: Annotated[
        list[str] | None, typer.Option(help="Glob of artifacts' names; repeatable.", show_default="all")
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Only what ran there; repeatable.", show_default="all")
    ] = None,
    json: Json = False,
) -> None:
    """Hold RECORDS against rules; exit code 9 and the first rule that is not met, where one is not.

    A rule without a record fails.
    """
    from sparsify.bench.records import read
    from sparsify.console import print_json, print_table
    from sparsify.report.asked import Selection
    from sparsify.report.gate import gate
    from sparsify.report.rules import FINISHED, kl, perplexity, ratio, sparse, speedup, task

    asked: list[Rule] = [speedup(value) for value in min_speedup or []]
    asked += [perplexity(max_ppl_increase)] if max_ppl_increase is not None else []
    asked += [kl(max_kl)] if max_kl is not None else []
    asked += [task(value) for value in min_task or []]
    asked += [ratio("--max-memory-ratio", max_memory_ratio)] if max_memory_ratio is not None else []
    asked += [ratio("--max-file-ratio", max_file_ratio)] if max_file_ratio is not None else []
    asked += [sparse(min_sparse_linears)] if min_sparse_linears is not None else []
    if not asked and not require_finished:
        raise UsageError("no rule is given; name one, such as --min-speedup 1.1 or --max-ppl-increase 5%")
    rules = [FINISHED, *asked] if require_finished is not False else asked
    selection = Selection(tuple(artifact or ()), tuple(runtime or ()), confident=confident, claim=require_claim)
    found = gate(read(records), rules, selection)
    failed = [each for each in found if not each.passed]
    if json:
        print_json({"passed": not failed, "findings": [each.to_dict() for each in found]})
    else:
        print_table(
            ("rule", "what", "measured", "wanted", "result"),
            [
                (
                    each.rule,
                    each.subject,
                    ", ".join(filter(None, (each.shown, each.why))),
                    each.wanted,
                    "pass" if each.passed else "FAIL",
                )
                for each in found
            ],
        )
    if failed:
        more = f"; {len(failed) - 1} more fail" if len(failed) > 1 else ""
        raise GateError(f"{failed[0].sentence()}{more}")
