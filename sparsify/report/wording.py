"""Numbers, scenarios and states of kernels as people read them: every output of the report words them alike."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

from sparsify.bench.engaged import runs_sparse
from sparsify.report.pairs import ran_sparse

DENSE = "DENSE: asked to be sparse, no sparse kernel ran"
UNKNOWN = "UNKNOWN: asked to be sparse, it is not known which kernels ran"
WEAK_DENSE = "more than fewer bytes explain: part of it is that the runtime's own dense product is not the best"
# By so much a ratio may exceed that of the roofs, which are measured too.
_MARGIN = 1.1
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


def status(engaged: dict[str, str], asked: bool, pruned: int) -> dict[str, Any]:
    """What really ran: ``state`` (sparse, partly, dense, DENSE, unknown, unasked), ``text`` for people, ``kernels``.

    Args:
        engaged: linear -> kernel, as the record has it.
        asked: whether it was to run sparse.
        pruned: linears of the artifact that were pruned.
    """
    n = pruned or len(engaged)
    n_sparse, n_known = ran_sparse(engaged, n)
    known = engaged and not any(kernel.startswith("unknown") for kernel in engaged.values())
    if not asked:
        state, text = (
            ("unasked", NOT_ASKED) if any(map(runs_sparse, engaged.values())) else ("dense", "dense, as asked")
        )
    elif not n_sparse:
        state, text = ("DENSE", DENSE) if known else ("unknown", UNKNOWN)
    elif n_sparse < n:
        rest = f", {n - n_known} unknown" if n_known < n else ""
        state, text = "partly", f"partly sparse ({n_sparse} of {n}{rest})"
    else:
        state, text = "sparse", "sparse"
    return {"state": state, "text": text, "kernels": dict(sorted(Counter(engaged.values()).items()))}


def exceeds_roofs(values: dict[str, Any]) -> bool:
    """Whether one of a row's ``measures`` gained clearly more than it would if dense and sparse reached their roofs."""
    compared, roofs = values["comparison"], values["roof_ratio"]
    return bool(compared and roofs and compared["claim"] == "faster" and compared["ratio"] > _MARGIN * roofs)


def kernels(counts: dict[str, int]) -> str:
    """``210 x native``."""
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


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
