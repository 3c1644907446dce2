"""What of the records a gate looks at, and one finding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from sparsify.bench.records import Record, Records
from sparsify.errors import UsageError
from sparsify.report.rules import Rule

# With fewer the standard error itself is hardly known.
FEWEST_SAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """A rule held against one measurement.

    Attributes:
        rule: as typed.
        run, artifact, runtime, scenario: of what was measured; empty where it is about no one of them.
        measured: the estimate; None where there is none.
        judged: what was held against the limit: the estimate, or its worse end.
        limit: of the rule.
        shown, wanted: measured and limit for people.
        passed: whether the rule is met here.
        why: what keeps it from being met besides the figure; else empty.
        source: ``file:line`` of the record; empty where there is none.
    """

    rule: str
    run: str
    artifact: str
    runtime: str
    scenario: str
    measured: float | None
    judged: float | None
    limit: float
    shown: str
    wanted: str
    passed: bool
    why: str
    source: str

    @property
    def subject(self) -> str:
        """What it is about."""
        return ", ".join(filter(None, (self.artifact, self.runtime, self.scenario))) or "the run"

    def sentence(self) -> str:
        """The finding in one line."""
        what = ", ".join(filter(None, (self.shown, self.why)))
        at = f" ({self.source})" if self.source else ""
        return f"{self.rule}: {self.subject}: {what}; wanted {self.wanted}{at}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """What rules are held against, and how.

    Attributes:
        artifacts: globs of candidates' labels; none: every candidate.
        runtimes: names; none: every runtime there are records of.
        confident: judge the worse end of the 95 % interval.
        claim: a speed-up above 1 has to be one that may be claimed.
    """

    artifacts: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    confident: bool = False
    claim: bool = True


class Asked:
    """Records, and what is selected of them.

    Attributes:
        candidates: the ``artifact`` records of those that are selected, of every run.
        described: (run, label) -> ``artifact`` record.

    Raises:
        UsageError: ``selection`` names an artifact or a runtime that the records do not have.
    """

    def __init__(self, records: Records, selection: Selection) -> None:
        self.records, self.selection = records, selection
        artifacts = records.of("artifact")
        self.described = {(each["run"], each["artifact"]): each for each in artifacts}
        candidates = [each for each in artifacts if each["role"] == "candidate"]
        self.candidates = [each for each in candidates if self._named(each["artifact"])]
        labels = [each["artifact"] for each in candidates]
        for glob in selection.artifacts:
            if not any(fnmatchcase(label, glob) for label in labels):
                raise UsageError(f"--artifact {glob}: no candidate has that name; there are {_listed(labels)}")
        runtimes = [each["runtime"] for each in records.lines if each.get("runtime")]
        for name in selection.runtimes:
            if name not in runtimes:
                raise UsageError(f"--runtime {name}: the records have none of it; there are {_listed(runtimes)}")

    def _named(self, label: str) -> bool:
        globs = self.selection.artifacts
        return not globs or any(fnmatchcase(label, glob) for glob in globs)

    def _dense(self, run: str, label: str) -> bool:
        return bool(self.described[run, label]["role"] == "baseline")

    def selects(self, record: Record) -> bool:
        """Whether a record of a runtime is of a selected candidate there."""
        label, runtimes = record["artifact"], self.selection.runtimes
        dense = self._dense(record["run"], label)
        return not dense and self._named(label) and (not runtimes or record["runtime"] in runtimes)

    def concerns(self, missing: Record) -> bool:
        """Whether a ``missing`` record is of what is selected, or of a baseline or the run, on which all depends."""
        label, runtime, runtimes = missing["artifact"], missing["runtime"], self.selection.runtimes
        mine = label is None or self._dense(missing["run"], label) or self._named(label)
        return mine and (runtime is None or not runtimes or runtime in runtimes)

    def finding(
        self,
        rule: Rule,
        record: Record,
        measured: float,
        worse: float | None,
        shown: str,
        *,
        at_least: bool,
        why: str = "",
        scenario: str = "",
    ) -> Finding:
        """Hold ``measured``, or with ``confident`` the ``worse`` end of its interval, against the rule.

        ``why`` says what keeps the rule from being met whatever was measured.
        """
        judged = worse if self.selection.confident else measured
        if judged is None:
            why = why or f"no interval for --confident: fewer than {FEWEST_SAMPLES} samples, or no standard error"
            met = False
        else:
            met = judged >= rule.limit if at_least else judged <= rule.limit
            if not met and judged != measured:
                shown += f", at worst {judged:.4g}"
        return Finding(
            rule.text, record["run"], record["artifact"], record.get("runtime") or "", scenario, measured, judged,
            rule.limit, shown, rule.wanted, met and not why, why, self.records.source(record),
        )  # fmt: skip

    def unmet(self, rule: Rule, record: Record, why: str, *, scenario: str = "") -> Finding:
        """A record that the rule cannot be held against."""
        return Finding(
            rule.text, record["run"], record["artifact"], record.get("runtime") or "", scenario, None, None,
            rule.limit, "", rule.wanted, False, why, self.records.source(record),
        )  # fmt: skip

    def nothing(self, rule: Rule, *, run: str = "", artifact: str = "", runtime: str = "", why: str) -> Finding:
        """There is no record to hold the rule against."""
        scenario = "" if rule.scenario == "*" else rule.scenario
        return Finding(
            rule.text, run, artifact, runtime, scenario, None, None, rule.limit, "", rule.wanted, False, why, ""
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"
