"""Commands that only inform: the methods there are, and what this machine can run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsify.options import Json


def methods_command(
    method: Annotated[str | None, typer.Argument(help="Show one method's parts.", show_default="all")] = None,
    json: Json = False,
) -> None:
    """List the methods, the parts they are made of, and every setting."""
    from dataclasses import asdict

    from sparsify.console import print_json, print_line, print_table
    from sparsify.methods import COSTS, METHODS, PARTS, SETTINGS, resolve

    if method is not None:
        plan, other = resolve(method, {}, {}), resolve(method, {}, {}, grouped=False)
        both = ((plan, "N:M"), (other, "unstructured"))
        if json:
            print_json({"method": method, "grouped": asdict(plan), "unstructured": asdict(other)})
            return
        print_line(f"{method}: {plan.summary}. {plan.paper}".rstrip())
        rows = [
            (part, choice, kind + meanings[choice])
            for part, meanings in PARTS.items()
            for choice, kind in _by_kind([(getattr(each, part), kind) for each, kind in both])
        ]
        print_table(("part", "choice", "meaning"), rows)
        rows = [
            (name, str(value), kind + setting.help)
            for name, setting in SETTINGS.items()
            for value, kind in _by_kind([(each.setting(name), kind) for each, kind in both if each.uses(name)])
        ]
        print_table(("setting", "value", "meaning"), rows)
        return
    if json:
        print_json(
            {
                "methods": {name: asdict(plan) for name, plan in METHODS.items()},
                "parts": PARTS,
                "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
            }
        )
        return
    print_table(
        ("method", "cost", "what it does", "paper"),
        [(name, plan.cost, plan.summary, plan.paper) for name, plan in METHODS.items()],
    )
    print_line("cost: " + "; ".join(f"{name}: {text}" for name, text in COSTS.items()))
    print_table(
        ("--set", "choice", "meaning"),
        [(part, choice, text) for part, choices in PARTS.items() for choice, text in choices.items()],
    )
    print_table(
        ("--set", "default", "meaning", "belongs to"),
        [(name, str(setting.default), setting.help, setting.part) for name, setting in SETTINGS.items()],
    )


def _by_kind(values: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Each value with the kind of pattern it holds for as ``KIND: ``; one without where it holds for both."""
    if len(values) == 2 and values[0][0] == values[1][0]:
        return [(values[0][0], "")]
    return [(value, f"{kind}: ") for value, kind in values]


def compiled_kernels() -> str:
    """Whether this install has the compiled kernels, and which instructions they find here; without torch."""
    try:
        from sparsify import _kernels
    except ImportError:
        return "without compiled kernels"
    return f"with compiled kernels ({', '.join(_kernels.features()) or 'none that this CPU can run'})"


def doctor_command(json: Json = False) -> None:
    """Say what this machine can run and what is missing."""
    from sparsify.console import print_json, print_line, print_table
    from sparsify.doctor import diagnose

    state = diagnose()
    if json:
        print_json(state)
        return
    machine = state["machine"]
    print_line(
        f"{machine['cpus']} CPUs ({', '.join(machine['cpu_features']) or 'no AVX'}), "
        f"{machine['memory_bytes'] / 1e9:.0f} GB memory, {len(machine['gpus'])} GPUs"
    )
    print_line(", ".join(f"{name} {value}" for name, value in state["versions"].items()))
    print_table(
        ("can it", "", "detail"), [(c["what"], "yes" if c["ok"] else "no", c["detail"]) for c in state["checks"]]
    )
