"""The report: what it claims, what it does not, and what it warns of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.bench.records import read
from sparsify.report import markdown, page
from tests.bench_records import write_example
from tests.reporting import Raw, edited, lines_of, only, slowed, summary_of


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (1.0, "2of4 decodes 1.53x as fast as dense in torch (95 % interval 1.5"),
        (2.5, "2of4 decodes 0.6"),
        (1 / 0.65, "2of4 shows no difference to dense in decoding in torch (1.0"),
    ],
)
def test_verdict_says_faster_slower_or_neither(example: Path, tmp_path: Path, by: float, words: str) -> None:
    one = edited(example, tmp_path / "one.jsonl", only("torch", "2of4"))
    summary = summary_of(edited(one, tmp_path / "b.jsonl", slowed(by)))
    assert summary["verdict"].startswith(words)
    assert "at +44 % perplexity" in summary["verdict"]
    claims = {row["measures"]["tpot"]["comparison"]["claim"] for row in summary["latency"][1::2]}
    assert claims == {{1.0: "faster", 2.5: "slower"}.get(by, "no difference shown")}


def test_what_ran_dense_is_red_and_gains_nothing(example: Path, tmp_path: Path) -> None:
    one = edited(example, tmp_path / "one.jsonl", only("onnxruntime", "2of4"))
    summary = summary_of(one)
    assert summary["verdict"] == "2of4 ran dense in onnxruntime and is not faster at +44 % perplexity."
    assert [row["status"]["state"] for row in summary["latency"]] == ["dense", "DENSE"] * 3
    (warning,) = summary["warnings"]
    assert warning["text"] == "2of4 in onnxruntime: DENSE: asked to be sparse, no sparse kernel ran."
    assert len(warning["from"]) == 6
    html = page.render(read([one]), summary)
    assert '<span class="line bad">✖ DENSE: asked to be sparse, no sparse kernel ran</span>' in html
    assert "**✖ DENSE: asked to be sparse, no sparse kernel ran**" in markdown.render(summary)
    # Faster for another reason, it is still no gain by sparse kernels.
    fast = edited(example, tmp_path / "fast.jsonl", slowed(0.5))
    verdicts = summary_of(edited(fast, tmp_path / "c.jsonl", only("onnxruntime", "2of4", "half")))
    assert "none is shown to be faster than dense with sparse kernels" in verdicts["verdict"]
    assert "2of4 ran dense in onnxruntime and decodes 2.0" in verdicts["verdicts"][0]["sentence"]


@pytest.mark.parametrize(
    ("engaged", "state", "text"),
    [
        ({"a": "native", "b": "dense"}, "partly", "partly sparse (1 of 2)"),
        ({"a": "unknown", "b": "unknown"}, "unknown", "UNKNOWN"),
        ({}, "unknown", "UNKNOWN"),
        ({"a": "com.microsoft::MatMulNBits"}, "DENSE", "DENSE"),
        ({"a": "dense", "b": "dense"}, "DENSE", "DENSE"),
    ],
)
def test_status_is_what_ran(example: Path, tmp_path: Path, engaged: dict[str, str], state: str, text: str) -> None:
    def change(record: Raw) -> Raw | None:
        if record["record"] == "latency" and record["baseline"]:
            record["engaged"] = engaged
        return only("torch", "2of4")(record)

    found = summary_of(edited(example, tmp_path / "a.jsonl", change))["latency"][1]["status"]
    assert found["state"] == state
    assert found["text"].startswith(text)


def near(record: Raw) -> Raw:
    """Roofs of 1.28 to 1, which do not explain 1.54x; those of 1.78 to 1 do."""
    if record["record"] == "latency" and record["baseline"]:
        record["roof"]["tpot_s"] = 0.02 / 1.28
    return record


def test_what_fewer_bytes_do_not_explain_is_said(example: Path, tmp_path: Path) -> None:
    said = "more than fewer bytes explain: why was not measured"
    one = edited(example, tmp_path / "one.jsonl", only("torch", "2of4"))
    summary = summary_of(one)
    assert summary["latency"][1]["measures"]["tpot"]["roof_ratio"] == pytest.approx(16 / 9)
    assert "more than fewer bytes" not in summary["verdict"] + markdown.render(summary)
    more = summary_of(edited(one, tmp_path / "b.jsonl", near))
    assert said in more["verdict"]
    assert said in markdown.render(more)
    assert [row["measures"]["ttft"]["unexplained"] for row in more["latency"]] == [None] * 6
    # Without a difference shown, and without roofs, there is nothing to explain.
    same = summary_of(edited(tmp_path / "b.jsonl", tmp_path / "c.jsonl", slowed(1 / 0.65)))
    assert "more than fewer bytes" not in same["verdict"]
    bare = summary_of(edited(one, tmp_path / "d.jsonl", lambda r: {**r, "roof": None} if "roof" in r else r))
    assert "more than fewer bytes" not in bare["verdict"]
    assert bare["latency"][1]["measures"]["tpot"]["roof_ratio"] is None


def test_why_a_gain_exceeds_its_roof_is_said_where_records_show_it(example: Path, tmp_path: Path) -> None:
    one = edited(edited(example, tmp_path / "one.jsonl", only("torch", "2of4")), tmp_path / "near.jsonl", near)

    def own_loop(by: float) -> Callable[[Raw], Raw]:
        """The best dense kernel of each linear is ``by`` as fast as torch's."""

        def change(record: Raw) -> Raw:
            if record["record"] == "kernel":
                torch = record["kernels"]["dense torch"]
                found = {**torch, "samples_us": [us / by for us in torch["samples_us"]]}
                found["median_us"] = torch["median_us"] / by
                record["kernels"]["dense own loop"], record["best_dense"] = found, "dense own loop"
            return record

        return change

    slow = summary_of(edited(one, tmp_path / "a.jsonl", own_loop(1.5)))
    text = "more than fewer bytes explain: torch's dense products of its linears, by themselves, took 1.50x as long"
    assert text in slow["verdict"]
    assert "why was not measured" in summary_of(edited(one, tmp_path / "b.jsonl", own_loop(1.05)))["verdict"]
    # Of 32 tokens nothing is said of one.
    few = edited(tmp_path / "a.jsonl", tmp_path / "c.jsonl", lambda r: None if r.get("tokens") == 1 else r)
    assert "why was not measured" in summary_of(few)["verdict"]

    def cached(n_bytes: int) -> Callable[[Raw], Raw]:
        def change(record: Raw) -> Raw:
            if record["record"] == "run":
                record["environment"]["host"]["last_level_cache_bytes"] = n_bytes
            return record

        return change

    large = summary_of(edited(tmp_path / "a.jsonl", tmp_path / "d.jsonl", cached(163_000_000)))
    assert text in large["verdict"]
    assert "; its weights (163 MB) fit the last-level cache (163 MB), which no roof counts" in large["verdict"]
    assert "last-level cache" in markdown.render(large)
    small = summary_of(edited(one, tmp_path / "e.jsonl", cached(162_999_999)))
    assert "more than fewer bytes explain: why was not measured" in small["verdict"]


def test_what_was_asked_to_run_dense_gains_nothing_by_zeros(example: Path, tmp_path: Path) -> None:
    def dense(record: Raw) -> Raw:
        if record.get("artifact") == "2of4" and "engaged" in record:
            record["engaged"] = dict.fromkeys(record["engaged"], "dense")
        return {**record, "asked_sparse": False} if record["record"] == "latency" else record

    one = edited(edited(example, tmp_path / "one.jsonl", only("torch", "2of4")), tmp_path / "a.jsonl", dense)
    summary = summary_of(one)
    assert summary["verdict"].startswith("2of4 ran dense, as asked, in torch and decodes 1.5")
    assert [each["faster_in"] for each in summary["verdicts"]] == [[]]
    assert summary["warnings"] == []
    # What was not pruned was compared with dense by what it is.
    other = edited(one, tmp_path / "b.jsonl", lambda r: {**r, "linears": 0} if r["record"] == "artifact" else r)
    assert summary_of(other)["verdict"].startswith("2of4 decodes 1.5")


def test_what_only_saves_memory_is_not_sparse(example: Path, tmp_path: Path) -> None:
    def packed(record: Raw) -> Raw:
        if record.get("artifact") == "2of4" and "engaged" in record:
            record["engaged"] = dict.fromkeys(record["engaged"], "packed")
        return record

    one = edited(edited(example, tmp_path / "one.jsonl", only("torch", "2of4")), tmp_path / "a.jsonl", packed)
    summary = summary_of(one)
    assert [each["text"] for each in summary["warnings"]] == [
        "2of4 in torch: DENSE: asked to be sparse, packed in memory only: no sparse kernel ran."
    ]
    assert "2 x packed (memory only)" in markdown.render(summary)
    assert summary["verdict"].startswith("2of4 ran dense in torch and decodes")
    # What multiplies with a dense weight that it keeps saves none.
    kept = edited(
        one, tmp_path / "b.jsonl", lambda r: json.loads(json.dumps(r).replace('"packed"', '"native+dense:1-"'))
    )
    assert {each["text"] for each in summary_of(kept)["warnings"]} == {
        "2of4 in torch: DENSE: asked to be sparse, no sparse kernel ran."
    }


def test_a_warning_names_the_scenarios_that_it_is_of(example: Path, tmp_path: Path) -> None:
    def eight(record: Raw) -> Raw:
        if record.get("artifact") == "2of4" and "engaged" in record:
            record["engaged"] = dict.fromkeys(record["engaged"], "native+expanded:8-")
        return record

    one = edited(edited(example, tmp_path / "one.jsonl", only("torch", "2of4")), tmp_path / "a.jsonl", eight)
    (warning,) = summary_of(one)["warnings"]
    assert warning["text"].startswith("2of4 in torch at 128+32 tokens, batch 8: DENSE: asked to be sparse, packed in")
    assert len(warning["from"]) == 1
    states = {row["status"]["text"] for row in summary_of(one)["latency"] if row["artifact"] == "2of4"}
    assert "sparse; for the prompt, 2 of 2 dense" in states


def test_only_what_every_run_claims_is_a_gain(tmp_path: Path) -> None:
    made = [write_example(tmp_path / f"{seed}.jsonl", seed=seed, runtimes=("torch",)) for seed in (0, 5)]
    first, second = (edited(path, tmp_path / f"a{path.name}", only("torch", "2of4")) for path in made)
    both = summary_of(first, second)
    assert [each["faster_in"] for each in both["verdicts"]] == [["torch"]] * 2
    assert "both are faster than dense" in both["verdict"]
    same = edited(second, tmp_path / "same.jsonl", slowed(1 / 0.65))
    found = summary_of(first, same)
    assert [each["faster_in"] for each in found["verdicts"]] == [[], []]
    assert "none is shown to be faster" in found["verdict"]
    # Each run is shown with its own figures.
    assert "2of4 decodes 1.5" in found["verdicts"][0]["sentence"]
    assert "(not in run 2: no difference shown)" in found["verdicts"][0]["sentence"]
    # Another artifact under that name is another.
    other = edited(same, tmp_path / "b.jsonl", lambda r: {**r, "sha256": "9" * 64} if "sha256" in r else r)
    assert summary_of(first, other)["verdicts"][0]["faster_in"] == ["torch"]


def test_other_work_on_the_machine_is_a_warning(example: Path, tmp_path: Path) -> None:
    def busy(record: Raw) -> Raw:
        if record["record"] == "run":
            record["environment"]["host"]["load_1m"] = 1.1
        return record

    def beyond(record: Raw) -> Raw:
        if record["record"] == "latency" and record["artifact"] == "dense":
            record["roof"]["tpot_s"] = 0.055
        return record

    one = edited(example, tmp_path / "one.jsonl", only("torch", "2of4"))
    assert summary_of(one)["warnings"] == []
    (warning,) = summary_of(edited(one, tmp_path / "b.jsonl", busy))["warnings"]
    assert warning["text"].startswith("Other work ran when it began: load 1.1 on 2 cores.")
    (warning,) = summary_of(edited(one, tmp_path / "c.jsonl", beyond))["warnings"]
    assert warning["text"].startswith("The ceiling was measured too low: other work ran (dense in torch reached 11")
    (record,) = lines_of(tmp_path / "c.jsonl", warning["from"])
    assert record["artifact"] == "dense"


def test_warnings_of_several_runs_name_theirs(example: Path, tmp_path: Path) -> None:
    alone = summary_of(example)["warnings"]
    assert alone
    assert not any("run 1" in warning["text"] for warning in alone)
    other = write_example(tmp_path / "b.jsonl", seed=5, runtimes=("onnxruntime",))
    summary = summary_of(example, other)
    texts = [warning["text"] for warning in summary["warnings"]]
    assert [text.count("(run 1)") + 2 * text.count("(run 2)") for text in texts] == [1, 1, 2, 2]
    # A row is of its artifact; which run it is from stands before it.
    html = page.render(read([example, other]), summary)
    assert '<th scope="row"><span class="line short">2of4</span>' in html
    assert '<th scope="row"><span class="line short">run 1</span>' not in html


def test_few_rounds_and_turns_not_taken_claim_nothing(tmp_path: Path, example: Path) -> None:
    few = summary_of(write_example(tmp_path / "few.jsonl", rounds=5, runtimes=("torch",)))
    values = few["latency"][1]["measures"]["tpot"]
    assert values["comparison"]["claim"] == "too few rounds"
    assert values["comparison"]["low"] is None
    assert values["why_no_claim"] == "5 rounds, 6 are the fewest"
    assert "none is shown to be faster" in few["verdict"]
    assert "cannot be judged in torch (5 rounds, 6 are the fewest)" in few["verdicts"][0]["sentence"]

    def apart(record: Raw) -> Raw:
        return {**record, "interleaved": False} if record["record"] == "latency" else record

    summary = summary_of(edited(example, tmp_path / "apart.jsonl", apart))
    assert {row["measures"]["tpot"]["why_no_claim"] for row in summary["latency"] if row["baseline"]} == {
        "candidate and baseline were not measured in turn"
    }
    assert "none is shown to be faster" in summary["verdict"]


def test_other_prompts_are_not_compared(tmp_path: Path, example: Path) -> None:
    def change(record: Raw) -> Raw:
        return {**record, "trace_sha256": "0" * 64} if record.get("baseline") == "dense" else record

    summary = summary_of(edited(example, tmp_path / "a.jsonl", change))
    for row in summary["latency"]:
        assert row["measures"]["tpot"]["comparison"] is None
    assert "cannot be compared in torch (dense was not measured in this scenario)" in summary["verdicts"][0]["sentence"]


def test_another_text_gives_no_increase(tmp_path: Path, example: Path) -> None:
    def change(record: Raw) -> Raw | None:
        if record["record"] == "perplexity" and record["artifact"] == "2of4":
            record["text"]["sha256"] = "0" * 64
        return only("torch", "2of4")(record)

    summary = summary_of(edited(example, tmp_path / "a.jsonl", change))
    row = summary["accuracy"]["perplexity"][1]
    assert (row["increase"], row["why_no_increase"]) == (
        None,
        "not the same windows of the same text as its baseline's",
    )
    assert "its cost in accuracy was not measured" in summary["verdict"]


def test_the_published_report_is_that_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run by an earlier version; README quotes it."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    folder = Path("benchmarks/results/bench_demo")
    summary = summary_of(folder / "records.jsonl")
    assert markdown.render(summary) == (folder / "report.md").read_text(encoding="utf-8")
    quoted = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    for each in summary["verdicts"]:
        assert f"- {each['sentence']}" in quoted
