"""Whether records meet rules: by the comparisons of the report, a finding for each artifact, runtime and scenario.

A rule never passes on nothing: every selected artifact, every runtime that was named, and each pair of them where both
were named needs a record to hold the rule against. A point estimate has to meet its limit; with ``confident`` the worse
end of its 95 % interval has to: of paired ratios that of the sign test, elsewhere that of Student's t. A speed-up above
1 also has to be one that may be claimed (``spread.compare``), unless ``claim`` is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsify.bench.records import Record, Records
from sparsify.bench.subjects import RUNTIMES_OF
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
        if asked.selection.artifacts:
            yield from _unpaired(asked, rule, found, why)
    if not asked.candidates:
        yield asked.nothing(rule, why="the records have no candidate")


def _unpaired(asked: Asked, rule: Rule, found: Sequence[Finding], why: str) -> Iterator[Finding]:
    """Of artifacts and runtimes that were both named, the pairs that could have been measured and were not."""
    covered = {(_identity(asked.described[each.run, each.artifact]), each.runtime) for each in found}
    for candidate in {_identity(each): each for each in asked.candidates}.values():
        for name in asked.selection.runtimes:
            opens = name in RUNTIMES_OF.get(candidate["kind"], ())
            if opens and (_identity(candidate), name) not in covered:
                run, label = candidate["run"], candidate["artifact"]
                yield asked.nothing(rule, run=run, artifact=label, runtime=name, why=f"not held: {why}")


def _identity(artifact: Record) -> tuple[str, str]:
    # The same artifact may have been measured in several runs, and another one under its label.
    return artifact["artifact"], artifact["sha256"]
