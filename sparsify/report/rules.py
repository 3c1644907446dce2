"""What ``sparsify gate`` is asked, read from options; ``sparsify/report/gate.py`` decides."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from sparsify.errors import UsageError
from sparsify.report.pairs import MEASURES, Measure

Kind = Literal["speedup", "perplexity", "kl", "task", "memory", "file", "sparse", "finished"]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: as typed, option and value.
        kind: what it is about.
        limit: the number to meet: a ratio, a share, nats, points of perplexity, or of a task's metric.
        relative: ``limit`` is a share of the dense model's perplexity, or a difference from the dense model's metric.
        measure, scenario: of a speed-up; the scenario is a glob on ``pairs.scenario_name``.
        task, metric: of a task.
    """

    text: str
    kind: Kind
    limit: float
    relative: bool = False
    measure: Measure = "total"
    scenario: str = "*"
    task: str = ""
    metric: str = ""

    @property
    def wanted(self) -> str:
        """The limit, for people."""
        if self.kind == "perplexity":
            return f"at most +{self.limit * 100:g}%" if self.relative else f"at most +{self.limit:g}"
        if self.kind == "task":
            return f"{self.limit:+g} from dense or better" if self.relative else f"{self.limit:g} or better"
        return _WANTED[self.kind].format(self.limit * 100 if self.kind == "sparse" else self.limit)


_WANTED: dict[Kind, str] = {
    "speedup": "at least {:g} x",
    "kl": "at most {:g} nats",
    "memory": "at most {:g} x",
    "file": "at most {:g} x",
    "sparse": "at least {:g}%",
    "finished": "a finished run",
}


def speedup(value: str) -> Rule:
    """``[MEASURE][@SCENARIO]=X`` or ``X``, for ``--min-speedup``.

    Raises:
        UsageError: as every function here: what is wrong with the value, and how to write it.
    """
    text = f"--min-speedup {value}"
    head, _, number = value.rpartition("=")
    measure, _, scenario = head.partition("@")
    found = next((each for each in MEASURES if each == (measure or "total")), None)
    if found is None:
        raise UsageError(f"{text}: {measure!r} is no measure; choose {', '.join(MEASURES)}")
    return Rule(text, "speedup", _number(text, number, "1.1", above=0), measure=found, scenario=scenario or "*")


def perplexity(value: str) -> Rule:
    """``5%`` of the dense model's perplexity or ``0.5`` points, for ``--max-ppl-increase``."""
    text = f"--max-ppl-increase {value}"
    share = value.endswith("%")
    number = _number(text, value.removesuffix("%"), "5% or, in points of perplexity, 0.5")
    return Rule(text, "perplexity", number / 100 if share else number, relative=share)


def kl(value: str) -> Rule:
    """``0.3`` nats, for ``--max-kl``."""
    text = f"--max-kl {value}"
    return Rule(text, "kl", _number(text, value, "0.3"))


def task(value: str) -> Rule:
    """``TASK[:METRIC]=X`` for ``--min-task``; a signed X is a difference from the dense model's value."""
    text = f"--min-task {value}"
    head, _, number = value.rpartition("=")
    name, _, metric = head.partition(":")
    if not name:
        raise UsageError(f"{text}: names no task; write it like arc_easy:acc=-0.02 or arc_easy:acc=0.5")
    signed = number[:1] in ("+", "-")
    limit = _number(text, number, "-0.02 or 0.5", above=-math.inf)
    return Rule(text, "task", limit, relative=signed, task=name, metric=metric or "acc")


def ratio(option: Literal["--max-memory-ratio", "--max-file-ratio"], value: str) -> Rule:
    """``0.7`` or ``70%`` of the dense model's."""
    text = f"{option} {value}"
    number = _number(text, value.removesuffix("%"), "0.7 or 70%", above=0)
    kind: Kind = "memory" if option == "--max-memory-ratio" else "file"
    return Rule(text, kind, number / 100 if value.endswith("%") else number)


def sparse(value: str) -> Rule:
    """``100%`` of the pruned linears, for ``--min-sparse-linears``."""
    text = f"--min-sparse-linears {value}"
    number = _number(text, value.removesuffix("%"), "100%")
    if not value.endswith("%") or number > 100:
        # "1" could mean one linear or all of them.
        raise UsageError(f"{text}: is no share; write it like 100%")
    return Rule(text, "sparse", number / 100)


FINISHED = Rule("--require-finished", "finished", 0)


def _number(text: str, value: str, example: str, *, above: float | None = None) -> float:
    """A finite number; at least 0, or more than ``above`` where that is given."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value, re.ASCII):
        raise UsageError(f"{text}: {value[:40]!r} is no number; write it like {example}")
    number = float(value)
    low = number < 0 if above is None else number <= above
    if low or not math.isfinite(number):
        raise UsageError(f"{text}: {value[:40]} is out of range; write it like {example}")
    return number
