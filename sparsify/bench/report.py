"""``report.md`` from ``report.json``: a pure function, nothing is measured here."""

from __future__ import annotations

from typing import Any


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The report's table without its head: what, runtime, perplexity, size, sparse kernels that ran."""
    perplexity = report["perplexity"]
    table = [
        ("dense (source)", "PyTorch", _number(perplexity["dense"]), size(report["source_bytes"]), ""),
        ("pruned", "PyTorch", _number(perplexity["pruned"]), "", ""),
    ]
    for artifact in report["artifacts"]:
        table.append(
            (
                f"artifact {artifact['target']}",
                artifact["runtime"] or "not run",
                _number(artifact["perplexity"]),
                size(artifact["bytes"]),
                kernels(artifact["engaged"]),
            )
        )
    return table


HEAD = ("", "runtime", "perplexity", "size", "kernels that ran")


def kernels(engaged: dict[str, int] | None) -> str:
    """``210 x dense`` and the like."""
    if not engaged:
        return ""
    return ", ".join(f"{count} x {kernel}" for kernel, count in engaged.items())


def size(n_bytes: int) -> str:
    """Bytes as people read them, in decimal units."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _bos(windows: dict[str, Any]) -> str:
    return {True: "with BOS", False: "no BOS", None: "BOS as in the ids"}[windows["bos"]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def summary(report: dict[str, Any]) -> str:
    """One sentence: what was pruned, how far, what it costs in accuracy, and whether sparsity speeds anything up."""
    covered, perplexity = report["coverage"], report["perplexity"]
    text = (
        f"{report['model']} pruned to {report['pattern']} by {report['method']}: "
        f"{report['sparsity']:.2%} of {covered['selected']:,} weights in its linear layers are zero "
        f"({covered['zero_share']:.1%} of all {covered['total']:,})"
    )
    if perplexity["dense"] is not None:
        text += f"; perplexity {perplexity['dense']:.2f} → {perplexity['pruned']:.2f}"
    return text + "."


def render_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    covered = report["coverage"]
    lines = ["# Sparsify report", "", summary(report), "", "| " + " | ".join(HEAD) + " |", "|---|---|--:|--:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(report)]
    engaged = {kernel for artifact in report["artifacts"] for kernel in (artifact["engaged"] or {})}
    if engaged == {"dense"}:
        lines += ["", "**No sparse kernel ran:** the runtimes above compute with the zeros as if they were weights."]
    lines += ["", "## How it was measured", ""]
    if report["evaluation"] is None:
        lines.append("Accuracy was not measured (evaluation text: none).")
    else:
        e = report["evaluation"]
        lines.append(
            f"- Perplexity: text `{e['source']}`, {e['windows']} windows of {e['length']} tokens, "
            f"stride {e['stride']}, {e['n_tokens']:,} predicted tokens, {_bos(e)}, float32; "
            f"ids sha256 `{e['sha256'][:16]}`."
        )
        kl = report["kl_pruned_to_dense"]
        error = "" if kl["standard_error_nats"] is None else f" ± {kl['standard_error_nats']:.3f} (standard error)"
        lines.append(
            f"- Pruned against dense: KL divergence {kl['mean_nats']:.3f}{error} nats per token, "
            f"same first choice in {kl['top1_agreement']:.1%} of positions."
        )
    if report["calibration"] is not None:
        c = report["calibration"]
        lines.append(
            f"- Calibration: text `{c['source']}`, {c['windows']} windows of {c['length']} tokens, "
            f"{_bos(c)}, seed {c['seed']}; ids sha256 `{c['sha256'][:16]}`."
        )
    lines.append(
        f"- Coverage: {covered['prunable_share']:.1%} of all stored weights were prunable, "
        f"{covered['pruned_share']:.1%} were selected, {covered['zero_share']:.1%} are zero now."
    )
    for artifact in report["artifacts"]:
        if artifact["parity"]:
            p = artifact["parity"]
            # Some graphs take no padding on the left, and then none was compared.
            padding = "right padding" if p["left_padding"] is None else "left and right padding"
            lines.append(
                f"- Parity of {artifact['target']} with PyTorch: largest difference {p['max_abs_diff']:.2g} over "
                f"{p['n_compared']:,} logits (prefill, decode with cache, {padding}, batch)."
            )
    lines += [f"- Notice: {text}" for text in report["notices"]]
    lines += [
        f"- {'Last process of a resumed run' if report['resumed'] else 'Whole run'}: {report['seconds']:.0f} s, "
        f"peak memory {size(report['peak_memory_bytes'])}.",
        "- Versions: " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"
