"""Whether records meet rules: by the comparisons of the report, a finding for each artifact, runtime and scenario.

A rule never passes on nothing: every selected artifact, and every runtime that was named, needs a record to hold the
rule against. A point estimate has to meet its limit; with ``confident`` the worse end of its 95 % interval has to: of
paired ratios that of the sign test, elsewhere 1.96 standard errors from the estimate. A speed-up above 1 also has to
be one that may be claimed (``spread.compare``), unless ``claim`` is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsify.bench.records import Record, Records
from sparsify.report.asked import Asked, Finding, Selection
from sparsify.report.findings import FINDERS
from sparsify.report.pairs import scenario_name
from sparsify.report.rules import Rule
from sparsify.report.wording import clean


def gate(records: Records, rules: Sequence[Rule], selection: Selection) -> list[Finding]:
    """Every finding of every rule, in the order of the rules; at least one for each.

    Raises:
        UsageError: ``selection`` names an artifact or a runtime that the records do not have.
    """
    asked = Asked(records, selection)
    found: list[Finding] = []
    for rule in rules:
        mine = list(FINDERS[rule.kind](asked, rule))
        found += mine
        if rule.kind != "finished":
            found += _lacking(asked, rule, mine)
    # Labels are anybody's text, and go to a terminal.
    return [Finding(**clean(each.to_dict())) for each in found]


def _lacking(asked: Asked, rule: Rule, found: Sequence[Finding]) -> Iterator[Finding]:
    """What the rule was not held against though it was selected."""
    why = "no record to hold the rule against"
    if rule.kind == "speedup" and rule.scenario != "*":
        scenarios = dict.fromkeys(scenario_name(each["scenario"]) for each in asked.records.of("latency"))
        why = f"no scenario matches; there are {', '.join(scenarios) or 'none'}"
    covered = {_identity(asked.described[each.run, each.artifact]) for each in found}
    for candidate in {_identity(each): each for each in asked.candidates}.values():
        if _identity(candidate) not in covered:
            yield asked.nothing(rule, run=candidate["run"], artifact=candidate["artifact"], why=why)
    if rule.kind != "file":
        for name in asked.selection.runtimes:
            if all(each.runtime != name for each in found):
                yield asked.nothing(rule, runtime=name, why=why)
    if not asked.candidates:
        yield asked.nothing(rule, why="the records have no candidate")


def _identity(artifact: Record) -> tuple[str, str]:
    # The same artifact may have been measured in several runs, and another one under its label.
    return artifact["artifact"], artifact["sha256"]
