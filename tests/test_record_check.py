"""Records: the schema describes them whole, and a damaged one is named with the key that is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sparsify.bench.record_check import FORMAT, KINDS, check, schema
from sparsify.bench.records import Record, Records, read
from sparsify.errors import DataError
from sparsify.report.summary import summarise
from tests.bench_records import write_example
from tests.record_files import dump, refused


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """One record of every kind, in order."""
    path = write_example(tmp_path_factory.mktemp("records") / "r.jsonl", rounds=2, runtimes=("torch",))
    found: dict[str, Record] = {}
    for record in read([path]).lines:
        if record["record"] != "artifact" or record["role"] == "baseline":
            found.setdefault(record["record"], record)
    found["kernel"]["artifact"] = "dense"
    assert set(found) == set(KINDS)
    return list(found.values())


def test_the_schema_is_valid_and_published_whole() -> None:
    Draft202012Validator.check_schema(schema())
    kinds = [entry["$ref"].removeprefix("#/$defs/") for entry in schema()["oneOf"]]
    assert sorted(kinds) == sorted(KINDS)
    for kind in KINDS:
        body = schema()["$defs"][kind]
        assert body["properties"]["record"] == {"const": kind}
        assert body["properties"]["format"] == {"const": FORMAT}
        # Nothing may be there that nobody described, and nothing left out silently.
        assert body["additionalProperties"] is False
        assert sorted(body["required"]) == sorted(body["properties"])


def test_whole_schema_and_reader_agree(lines: list[Record]) -> None:
    whole = Draft202012Validator(schema())
    for record in lines:
        assert whole.is_valid(record)
        for key in record:
            less = {name: value for name, value in record.items() if name != key}
            assert not whole.is_valid(less)
            with pytest.raises(DataError):
                check(less, "x")


def test_nested_within_what_a_record_may_hold(tmp_path: Path, lines: list[Record]) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"x": [deep]}
    path = dump(tmp_path / "r.jsonl", {**lines[0], "environment": deep})
    refused(path, "line 1", "environment")


Damage = Callable[[Record], object]

DAMAGE: list[tuple[str, str, Damage]] = [
    ("run", "rounds", lambda r: r.update(rounds="7")),
    ("run", "rounds", lambda r: r.update(rounds=0)),
    ("run", "run", lambda r: r.update(run="x")),
    ("run", "environment.host", lambda r: r["environment"]["host"].pop("cores")),
    ("run", "environment.host.cores", lambda r: r["environment"]["host"].update(cores=1.5)),
    ("run", "ceilings[0].bytes_per_s", lambda r: r["ceilings"][0].update(bytes_per_s=0)),
    ("run", "'surprise'", lambda r: r.update(surprise=1)),
    ("artifact", "sha256", lambda r: r.update(sha256="A" * 64)),
    ("artifact", "artifact", lambda r: r.update(artifact="")),
    ("artifact", "artifact", lambda r: r.update(artifact="a" * 201)),
    ("artifact", "role", lambda r: r.update(role="bystander")),
    ("artifact", "file_bytes", lambda r: r.update(file_bytes=1e307)),
    ("artifact", "sparsity", lambda r: r.update(sparsity=1.01)),
    ("latency", "rounds", lambda r: r.update(rounds=[])),
    ("latency", "rounds[0].total_s", lambda r: r["rounds"][0].update(total_s=0)),
    ("latency", "rounds[0].ttft_s[0]", lambda r: r["rounds"][0].update(ttft_s=[-1e-9])),
    ("latency", "rounds[0].total_s", lambda r: r["rounds"][0].update(total_s=5e-324)),
    ("latency", "rounds[0].gaps_s[0][0]", lambda r: r["rounds"][0]["gaps_s"][0].__setitem__(0, 5e-324)),
    ("latency", "roof", lambda r: r["roof"].update(ttft_s=1e308)),
    ("latency", "one is there twice", lambda r: r["rounds"].append(r["rounds"][0])),
    ("latency", "not the 1 rows", lambda r: r["rounds"][0].update(ttft_s=[1, 2])),
    ("latency", "not the 1 rows", lambda r: r["rounds"][1].update(gaps_s=[[1], [2]])),
    ("latency", "statistics.ttft_s", lambda r: r["statistics"]["ttft_s"].pop("median")),
    ("latency", "statistics.ttft_s is not", lambda r: r["statistics"]["ttft_s"].update(median=1e-6)),
    ("latency", "statistics.tpot_s is not", lambda r: r["statistics"]["tpot_s"].update(min=0)),
    ("latency", "statistics.tpot_s is not", lambda r: r["statistics"].update(tpot_s=None)),
    ("latency", "statistics.total_s is not", lambda r: r["statistics"]["total_s"].update(n=1)),
    ("latency", "statistics.total_s is not", lambda r: r["rounds"][0].update(total_s=1e-3)),
    ("latency", "statistics.tokens_per_s is not", lambda r: r["statistics"]["tokens_per_s"].update(max=1e6)),
    ("latency", "scenario.load", lambda r: r["scenario"].update(load="heavy")),
    ("latency", "engaged", lambda r: r["engaged"].update(x=None)),
    ("latency", "engaged", lambda r: r["engaged"].update(x="")),
    ("kernel", "kernels", lambda r: r["kernels"].update({"": r["kernels"]["native"]})),
    ("run", "last_level_cache_bytes", lambda r: r["environment"]["host"].update(last_level_cache_bytes=0)),
    ("memory", "peak_resident_bytes", lambda r: r.update(peak_resident_bytes=0)),
    ("perplexity", "window_nll", lambda r: r["window_nll"].pop()),
    ("perplexity", "window_tokens", lambda r: r["window_tokens"].append(3)),
    ("perplexity", "n_tokens", lambda r: r.update(n_tokens=r["n_tokens"] + 1)),
    ("perplexity", "nll_mean is not", lambda r: r["window_nll"].__setitem__(0, 1e308)),
    ("perplexity", "nll_mean is not", lambda r: r.update(nll_mean=r["nll_mean"] * 1.001)),
    ("perplexity", "is not exp of", lambda r: r.update(perplexity=r["perplexity"] * 1.001)),
    ("perplexity", "is not exp of", lambda r: r.update(perplexity=0)),
    ("perplexity", "1e+308", lambda r: r["kl"].update(standard_error_nats=1e308)),
    ("perplexity", "kl", lambda r: r["kl"].update(top1_agreement=2)),
    ("task", "value", lambda r: r.update(value=None)),
    ("task", "samples: [1e+308", lambda r: r.update(samples=[1e308] * r["n"])),
    ("task", "standard_error", lambda r: r.update(standard_error=1e308)),
    ("task", "samples", lambda r: r.pop("samples")),
    ("task", "samples", lambda r: r.update(samples=["right"])),
    ("task", "samples are not n", lambda r: r["samples"].pop()),
    ("task", "value is not the mean", lambda r: r["samples"].__setitem__(0, 0.0)),
    ("kernel", "shape", lambda r: r.update(shape=[1])),
    ("kernel", "kernels.native.median_us is not", lambda r: r["kernels"]["native"].update(median_us=1e-3)),
    ("kernel", "best_dense is none", lambda r: r.update(best_dense="x")),
    ("kernel", "auto is none", lambda r: r.update(auto="x")),
    ("kernel", "kernels", lambda r: r.update(kernels={})),
    ("missing", "why", lambda r: r.update(why=5)),
    ("end", "seconds", lambda r: r.update(seconds=-1)),
]


@pytest.mark.parametrize(("kind", "key", "damage"), DAMAGE, ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(DAMAGE)])
def test_a_damaged_record_is_named(tmp_path: Path, lines: list[Record], kind: str, key: str, damage: Damage) -> None:
    records = json.loads(json.dumps(lines))
    read([dump(tmp_path / "whole.jsonl", *records)])
    at = next(i for i, record in enumerate(records) if record["record"] == kind)
    damage(records[at])
    refused(dump(tmp_path / "r.jsonl", *records), f"line {at + 1}", key)


def test_long_and_hostile_keys_are_shortened(tmp_path: Path, lines: list[Record]) -> None:
    engaged = {"\x1b[2J" + "k" * 5000: "v" * 5000, "x" * 3000: 4}
    latency = {**next(line for line in lines if line["record"] == "latency"), "engaged": engaged}
    message = refused(dump(tmp_path / "r.jsonl", *lines[:2], latency), "line 3", "engaged")
    assert message.isprintable()


def test_records_name_what_was_described(tmp_path: Path, lines: list[Record]) -> None:
    path = tmp_path / "r.jsonl"
    run, artifact = lines[0], next(line for line in lines if line["record"] == "artifact")
    memory = next(line for line in lines if line["record"] == "memory")
    latency = next(line for line in lines if line["record"] == "latency")
    perplexity = next(line for line in lines if line["record"] == "perplexity")
    end = next(line for line in lines if line["record"] == "end")
    candidate = {**artifact, "artifact": "2of4", "role": "candidate"}
    for records, words in (
        ([artifact], ["no run record"]),
        ([memory, run], ["no run record", ":1"]),
        ([run, {**artifact, "run": "0" * 16}], ["0000000000000000", "no run record"]),
        ([run, memory], ["'dense' is not described"]),
        ([run, artifact, {**latency, "baseline": "other"}], ["'other' is not described", ":3"]),
        ([run, artifact, {**perplexity, "kl": {**perplexity["kl"], "reference": "other"}}], ["'other'"]),
        ([run, artifact, candidate, {**latency, "baseline": "2of4"}], ["'2of4'", "is no baseline"]),
        ([run, artifact, artifact], ["described twice"]),
        ([run, run], ["is there twice"]),
        ([run, end, artifact], ["has ended before", ":3"]),
        ([run, end, end], ["has ended before"]),
    ):
        refused(dump(path, *records), *words)


def attempt(path: Path) -> tuple[Records | None, str]:
    """The records, or else what the error says; any other exception is a fault."""
    try:
        return read([path]), ""
    except DataError as error:
        return None, str(error)


def _mutated(data: bytes, where: list[tuple[int, int]], cuts: tuple[int, int], swap: bool) -> bytes:
    changed = bytearray(data)
    for place, value in where:
        changed[place % len(changed)] = value
    low, high = sorted(cut % (len(changed) + 1) for cut in cuts)
    return bytes(changed[high:] + changed[low:high] + changed[:low]) if swap else bytes(changed[:low] + changed[high:])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    cuts=st.tuples(st.integers(0, 1 << 16), st.integers(0, 1 << 16)) | st.just((0, 0)),
    swap=st.booleans(),
)
def test_random_damage_is_an_error_or_records(
    tmp_path: Path, fuzzed: bytes, where: list[tuple[int, int]], cuts: tuple[int, int], swap: bool
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(_mutated(fuzzed, where, cuts, swap))
    found, message = attempt(path)
    if found is None:
        assert str(path) in message
        assert message.isprintable()
        return
    for line in found.lines:
        check(line, "x")
        assert found.source(line).startswith(str(path))


@pytest.fixture(scope="module")
def fuzzed(lines: list[Record]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_place_of_another_is_an_error_or_a_record(
    tmp_path: Path, lines: list[Record], data: st.DataObject
) -> None:
    record = json.loads(json.dumps(data.draw(st.sampled_from(lines))))
    place, key = record, data.draw(st.sampled_from(sorted(record)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(_JSON)
    path = tmp_path / "r.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in (*lines[:2], record))
    path.write_text(text)
    found, message = attempt(path)
    assert (found is not None) or (str(path) in message and message.isprintable())


def test_documented_record_is_one_and_every_kind_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    section = text.split("## Records of measurements", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("{")]
    assert lines
    for line in lines:
        check(json.loads(line), "docs/formats.md")
    documented = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert documented >= {*KINDS}
    keys = {key for line in section.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line)}
    assert summary_keys() <= keys


def summary_keys() -> set[str]:
    nothing = summarise(Records((), ()))
    return set(nothing) - {"format"}
