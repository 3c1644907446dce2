"""The report in one sentence, and one for each candidate: from the summary's rows, with its claims and no others.

A runtime is judged by its first scenario, the one that was asked for first, so that nobody picks the best; how many of
its scenarios agree is said beside it. Where several runs have measured the same, only what all of them claim is a gain.
"""

from __future__ import annotations

from typing import Any

from sparsify.report import wording
from sparsify.report.pairs import Measure

Row = dict[str, Any]
_DOES: dict[Measure, tuple[str, str]] = {
    "tpot": ("decodes", "decoding"), "ttft": ("takes in prompts", "taking in prompts")
}  # fmt: skip


def headline(rows: list[Row], run: int, runtime: str) -> tuple[str, Measure] | None:
    """The scenario (as worded) and measure that a run's runtime is judged by; None where it was not timed."""
    for row in rows:
        if (row["run"], row["runtime"]) == (run, runtime):
            decodes = row["measures"]["tpot"]["statistics"] is not None
            return wording.scenario(row["scenario"]), "tpot" if decodes else "ttft"
    return None


def is_headline(rows: list[Row], row: Row) -> bool:
    """Whether its runtime is judged by the scenario of this row."""
    found = headline(rows, row["run"], row["runtime"])
    return found is not None and found[0] == wording.scenario(row["scenario"])


def sentences(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """For each candidate of each run: its sentence, the claim it rests on, and where that is from."""
    found = []
    for made in summary["artifacts"]:
        if made["role"] != "candidate":
            continue
        parts = _parts(summary, made)
        text = "; ".join(part["text"] for part in parts) or f"was not timed as a whole{_linears(summary, made)}"
        if not any(part["accuracy"] for part in parts):
            text += f"; {_accuracy_anywhere(summary, made)}"
        gains = [part for part in parts if part["gains"]]
        if len(parts) > 1 and gains:
            text += f"; faster with sparse kernels {_of_runtimes(len(gains), len(parts))}"
        unfinished = not summary["runs"][made["run"] - 1]["finished"]
        found.append(
            {
                "run": made["run"],
                "artifact": made["artifact"],
                "sentence": f"{made['artifact']} {text}{' (the run did not finish)' if unfinished else ''}.",
                "best": max(gains, key=lambda part: float(part["ratio"]), default=None),
                "faster_in": [part["runtime"] for part in gains],
                "runtimes": [part["runtime"] for part in parts],
                "dense_in": [part["runtime"] for part in parts if part["state"] == "DENSE"],
                "from": sorted({source for part in parts for source in part["from"]}),
            }
        )
    return found


def verdict(summary: dict[str, Any]) -> str:
    """One sentence on everything; ``summary`` has ``verdicts`` already."""
    each = summary["verdicts"]
    if not each:
        return "No candidate was measured, so that there is nothing to compare."
    if len(each) == 1:
        return str(each[0]["sentence"])
    best = [entry for entry in each if entry["best"]]
    runs = f" in {len(summary['runs'])} runs" if len(summary["runs"]) > 1 else ""
    text = f"Of {len(each)} candidates{runs}, none is shown to be faster than dense with sparse kernels"
    if best:
        most = max(best, key=lambda entry: float(entry["best"]["ratio"]))
        count = f"{len(best)} {'is' if len(best) == 1 else 'are'}"
        if len(best) == len(each):
            count = "both are" if len(each) == 2 else "all are"
        text = f"Of {len(each)} candidates{runs}, {count} faster than dense with sparse kernels, "
        where = _of_runtimes(len(most["faster_in"]), len(most["runtimes"]))
        text += f"{most['artifact']} most{f', {where}' if len(most['runtimes']) > 1 else ''}: it "
        text += str(most["best"]["full"])
    dense: dict[str, list[str]] = {}
    for entry in each:
        for runtime in entry["dense_in"]:
            dense.setdefault(runtime, []).append(entry["artifact"])
    for runtime, names in dense.items():
        text += f"; in {runtime} {_listed(list(dict.fromkeys(names)))} ran dense"
    unfinished = [str(run["number"]) for run in summary["runs"] if not run["finished"]]
    if unfinished:
        text += f" (run {', '.join(unfinished)} did not finish)"
    return text + "."


def _of_runtimes(count: int, runtimes: int) -> str:
    if count == runtimes:
        return "in both runtimes" if count == 2 else f"in all {count} runtimes"
    return f"in {count} of {runtimes} runtimes"


def _listed(names: list[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _parts(summary: dict[str, Any], made: Row) -> list[dict[str, Any]]:
    """What is said of a candidate in each of its runtimes."""
    rows = [row for row in summary["latency"] if (row["run"], row["artifact"]) == (made["run"], made["artifact"])]
    found: list[dict[str, Any]] = []
    said: set[str] = set()
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        mine = [row for row in rows if row["runtime"] == runtime]
        judged = headline(summary["latency"], made["run"], runtime)
        assert judged is not None
        scenario, measure = judged
        row = next((row for row in mine if wording.scenario(row["scenario"]) == scenario), mine[0])
        values, state = row["measures"][measure], row["status"]["state"]
        compared = values["comparison"] or {}
        accuracy = _accuracy(summary, made, runtime)
        others = _otherwise(summary, made, row, measure)
        text = _clause(made, mine, row, measure, first=not found) + others
        cost = f" {accuracy['text']}" if accuracy else ""
        found.append(
            {
                "runtime": runtime,
                # What was said for one runtime is not repeated for the next where it is the same.
                "text": text.replace(f", {scenario}", "" if scenario in said else f", {scenario}")
                + ("" if cost in said else cost),
                "full": _clause(made, mine, row, measure, first=True) + cost,
                "accuracy": accuracy is not None,
                "state": state,
                "gains": compared.get("claim") == "faster" and state in ("sparse", "partly") and not others,
                "ratio": compared.get("ratio"),
                "from": [*values["from"], *(accuracy["from"] if accuracy else [])],
            }
        )
        said |= {scenario, cost}
    return found


def _otherwise(summary: dict[str, Any], made: Row, row: Row, measure: Measure) -> str:
    """What other runs of the same say that is not claimed alike; empty where all agree, or nothing is claimed."""

    def same(other: Row) -> bool:
        keys = ("artifact", "runtime", "baseline", "scenario")
        there = next(
            each for each in summary["artifacts"] if all(each[key] == other[key] for key in ("run", "artifact"))
        )
        return all(other[key] == row[key] for key in keys) and there["sha256"] == made["sha256"]

    compared = row["measures"][measure]["comparison"]
    if compared is None or compared["claim"] not in ("faster", "slower"):
        return ""
    claims = {
        other["run"]: found["claim"]
        for other in summary["latency"]
        if same(other) and (found := other["measures"][measure]["comparison"])
    }
    differing = [f"run {number}: {claim}" for number, claim in claims.items() if claim != compared["claim"]]
    return f" (not in {_listed(differing)})" if differing else ""


def _clause(made: Row, mine: list[Row], row: Row, measure: Measure, *, first: bool) -> str:
    """What is said of one runtime: ``decodes ... in torch``, or after another ``in torch it decodes ...``."""
    values = row["measures"][measure]
    compared = values["comparison"]
    ran = {"DENSE": "ran dense", "unknown": "ran unknown kernels"}.get(row["status"]["state"])
    if made["linears"] and row["status"]["state"] == "dense":
        ran = "ran dense, as asked,"

    def say(does: str) -> str:
        return f"{does} in {row['runtime']}" if first else f"in {row['runtime']} it {does}"

    if compared is None or values["why_no_claim"]:
        unknown = f"cannot be {'judged' if compared else 'compared'}"
        return f"{f'{say(ran)} and {unknown}' if ran else say(unknown)} ({values['why_no_claim']})"
    does, doing = _DOES[measure]
    claim, ratio = compared["claim"], wording.times(compared["ratio"])
    interval = f"95 % interval {compared['low']:.2f} to {compared['high']:.2f}, n = {compared['n']}"
    if claim == "no difference shown":
        noise = f"dense against itself {compared['noise_low']:.2f} to {compared['noise_high']:.2f}"
        shows = f"shows no difference to dense in {doing}"
        return f"{say(ran)} and is not faster" if ran else f"{say(shows)} ({ratio}, {interval}, {noise})"
    agree = [each["measures"][measure]["comparison"] for each in mine]
    count = sum(each is not None and each["claim"] == claim for each in agree)
    scenarios = f"; {claim} in {count} of {len(mine)} scenarios" if len(mine) > 1 else ""
    about = f"({interval}, {wording.scenario(row['scenario'])}{scenarios})"
    fast = f"{does} {ratio} as fast as dense"
    about += f", {values['unexplained']}," if values["unexplained"] else ""
    return f"{say(ran)} and {fast} {about}" if ran else f"{say(fast)} {about}"


def _accuracy(summary: dict[str, Any], made: Row, runtime: str | None) -> dict[str, Any] | None:
    """``at +44 % perplexity`` in this runtime, or in the first that measured it; None where it was not compared."""
    for row in summary["accuracy"]["perplexity"]:
        same = (row["run"], row["artifact"]) == (made["run"], made["artifact"]) and runtime in (None, row["runtime"])
        if same and row["increase"]:
            text = f"at {wording.relative(row['increase']['relative'])} perplexity"
            return {"text": text, "runtime": row["runtime"], "from": row["increase"]["from"]}
    return None


def _accuracy_anywhere(summary: dict[str, Any], made: Row) -> str:
    found = _accuracy(summary, made, None)
    return f"{found['text']} in {found['runtime']}" if found else "its cost in accuracy was not measured"


def _linears(summary: dict[str, Any], made: Row) -> str:
    """What sparse kernels of single linears gain, in words; empty where none was timed."""
    ratios = sorted(
        each["speedup"]["ratio"]
        for row in summary["kernels"]
        for each in row["kernels"]
        if (row["run"], row["artifact"]) == (made["run"], made["artifact"])
        and each["kernel"] == row["shown"]
        and each["speedup"]
    )
    if not ratios:
        return ""
    span = wording.times(ratios[0])
    span += f" to {wording.times(ratios[-1])}" if wording.times(ratios[-1]) != span else ""
    return f"; its single linears are {span} as fast as the best dense ones in {len(ratios)} measurements"
