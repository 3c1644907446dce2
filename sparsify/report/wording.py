"""Numbers, scenarios and states of kernels as people read them: every output of the report words them alike."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

from sparsify.bench.engaged import MEMORY_ONLY, expands, ran_sparse, runs_sparse
from sparsify.report.pairs import tokens_at_once

DENSE = "DENSE: asked to be sparse, no sparse kernel ran"
UNKNOWN = "UNKNOWN: asked to be sparse, it is not known which kernels ran"
EXPANDED = "DENSE: asked to be sparse, packed in memory only: no sparse kernel ran"
NOT_ASKED = "SPARSE: a sparse kernel ran where none was asked for"


def clean(value: Any) -> Any:
    """``value`` (JSON) with every character of its texts replaced that is no visible one.

    Labels are anybody's text: control characters, line breaks and half surrogates are no text of a report, and what
    turns the direction of writing would show another label than the one that was measured.
    """
    if isinstance(value, str):
        return "".join("\ufffd" if unicodedata.category(letter)[0] == "C" else letter for letter in value)
    if isinstance(value, dict):
        return {clean(key): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list | tuple) else value


def status(engaged: dict[str, str], asked: bool, pruned: int, scenario: dict[str, Any] | None = None) -> dict[str, Any]:
    """What really ran: ``state`` (sparse, partly, dense, DENSE, unknown, unasked), ``text`` for people, ``kernels``.

    Args:
        engaged: linear -> kernel, as the record has it.
        asked: whether it was to run sparse.
        pruned: linears of the artifact that were pruned.
        scenario: of a latency record: what decides is what ran for each new token, or for the prompt where a scenario
            has one new token.
    """
    n = pruned or len(engaged)
    tokens = tokens_at_once(scenario) if scenario else None
    n_sparse, n_known = ran_sparse(engaged, n, tokens)
    known = engaged and not any(kernel.startswith("unknown") for kernel in engaged.values())
    if not asked:
        state, text = (
            ("unasked", NOT_ASKED) if any(map(runs_sparse, engaged.values())) else ("dense", "dense, as asked")
        )
    elif not n_sparse:
        dense = EXPANDED if any(expands(kernel, tokens or 1) for kernel in engaged.values()) else DENSE
        state, text = ("DENSE", dense) if known else ("unknown", UNKNOWN)
    elif n_sparse < n:
        rest = f", {n - n_known} unknown" if n_known < n else ""
        state, text = "partly", f"partly sparse ({n_sparse} of {n}{rest})"
    else:
        state, text = "sparse", "sparse"
    if scenario and state in ("sparse", "partly"):
        in_prompt, _ = ran_sparse(engaged, n, tokens_at_once(scenario, "ttft"))
        text += f"; for the prompt, {n - in_prompt} of {n} dense" if in_prompt < n_sparse else ""
    return {"state": state, "text": text, "kernels": dict(sorted(Counter(engaged.values()).items()))}


def kernels(counts: dict[str, int]) -> str:
    """``210 x native``."""
    memory_only = {MEMORY_ONLY: f"{MEMORY_ONLY} (memory only)"}
    return ", ".join(f"{count} x {memory_only.get(name, name)}" for name, count in counts.items())


def scenario(value: dict[str, Any]) -> str:
    """``128+32 tokens, batch 1``."""
    many = "batch" if value["load"] == "batch" else "requests at once:"
    return f"{value['prompt_tokens']}+{value['new_tokens']} tokens, {many} {value['batch']}"


def figure(value: float) -> str:
    """Three significant digits, or all before the point."""
    if value == 0 or abs(value) >= 1e15:
        return f"{value:g}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.2g}"


def seconds(value: float) -> str:
    """A time with its unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{figure(value * factor)} {unit}"
    raise AssertionError


def times(value: float) -> str:
    """A ratio, as in ``1.54x``."""
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def relative(value: float) -> str:
    """A relative change in percent, with a digit after the point where it is small."""
    return f"{value:+,.1%}".replace("%", " %") if abs(value) < 0.1 else f"{value:+,.0%}".replace("%", " %")


def share(value: float) -> str:
    """A part of a whole in percent."""
    return f"{value:.0%}".replace("%", " %")
