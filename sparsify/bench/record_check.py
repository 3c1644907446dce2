"""Whether a line of JSON is a record: by the published schema, and by what a schema cannot say of one record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from math import fsum, isclose, isfinite, log
from statistics import median
from typing import Any

from sparsify.bench.latency import statistics
from sparsify.errors import DataError, MissingExtraError

Record = dict[str, Any]
FORMAT = 1
# Of what records repeat in another form.
_ROUNDING = 1e-6
KINDS = ("run", "artifact", "latency", "memory", "perplexity", "task", "kernel", "missing", "end")


def record_of(line: bytes) -> Any:
    """The JSON of a line, without what JSON in Python has and a record must not: NaN, Inf, numbers without bounds.

    Raises:
        ValueError, RecursionError: it is something else.
    """
    text = line.decode("utf-8")
    found = json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)
    if "\\u" in text:
        # Half a surrogate pair is no text, and could not be printed.
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _float(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)


def told(error: Exception) -> str:
    """What ``record_of`` met, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "its bytes are no UTF-8" if isinstance(error, UnicodeError) else str(error)


def check(record: Any, where: str) -> None:
    """Refuse what is no record by the schema.

    Raises:
        DataError: one line with ``where``, the key and what is wrong with it.
        MissingExtraError: jsonschema is not installed.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where} is no record but {type(record).__name__}; give a file that sparsify bench wrote")
    if record.get("format") != FORMAT:
        found = str(record.get("format"))[:40]
        raise DataError(f"{where}: format is {found}, this version reads {FORMAT}; use a sparsify that fits")
    kind = record.get("record")
    if kind not in KINDS:
        raise DataError(f"{where}: record is {str(kind)[:40]!r}, none of {', '.join(KINDS)}")
    try:
        error = min(_validator(kind).iter_errors(record), key=lambda error: error.json_path, default=None)
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply; remove the record, or measure again") from None
    key, message = kind, _contradiction(record) if error is None else error.message
    if error is not None and error.json_path != "$":
        key = ascii(error.json_path.removeprefix("$."))[1:-1]
    if message:
        raise DataError(f"{where}: {_short(key)}: {_short(message)}; remove the record, or measure again")


def _short(text: str) -> str:
    return text if len(text) < 200 else f"{text[:80]} ... {text[-80:]}"


def _contradiction(record: Record) -> str:
    """What is wrong within a record that the schema admits; empty where nothing is."""
    if record["record"] == "latency":
        times = [(each["round"], each["again"]) for each in record["rounds"]]
        if len(set(times)) < len(times):
            return "rounds: one is there twice"
        batch = record["scenario"]["batch"]
        if any(len(each[key]) != batch for each in record["rounds"] for key in ("ttft_s", "gaps_s")):
            return f"rounds: one has not the {batch} rows of its scenario"
        found = statistics(record["rounds"], batch * record["scenario"]["new_tokens"])
        for key, spread in found.items():
            if not _alike(record["statistics"][key], spread):
                return f"statistics.{key} is not that of rounds"
    if record["record"] == "perplexity":
        tokens = record["window_tokens"]
        if not len(record["window_nll"]) == len(tokens) == record["text"]["windows"]:
            return "window_nll, window_tokens and text.windows are of different numbers of windows"
        if sum(tokens) != record["n_tokens"]:
            return "n_tokens is not the sum of window_tokens"
        mean = sum(nll * n for nll, n in zip(record["window_nll"], tokens, strict=True)) / record["n_tokens"]
        if not isclose(mean, record["nll_mean"], rel_tol=_ROUNDING, abs_tol=1e-9):
            return "nll_mean is not the mean of window_nll"
        # The logarithm, since exp may be no number.
        if not isclose(log(max(record["perplexity"], 1e-300)), mean, rel_tol=_ROUNDING, abs_tol=1e-6):
            return "perplexity is not exp of nll_mean"
    if record["record"] == "task" and record["samples"] is not None:
        if len(record["samples"]) != record["n"]:
            return "samples are not n"
        if not isclose(fsum(record["samples"]) / record["n"], record["value"], rel_tol=_ROUNDING, abs_tol=1e-9):
            return "value is not the mean of samples"
    if record["record"] == "kernel":
        for key in ("best_dense", "auto"):
            if record[key] is not None and record[key] not in record["kernels"]:
                return f"{key} is none of kernels"
        for name, times in record["kernels"].items():
            if not isclose(times["median_us"], median(times["samples_us"]), rel_tol=_ROUNDING):
                return f"kernels.{name}.median_us is not the median of samples_us"
    return ""


def _alike(stated: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> bool:
    """Whether a ``spread`` is that of the samples. Percentiles are not compared: there are several ways to take one."""
    if stated is None or found is None:
        return stated is found
    return stated["n"] == found["n"] and all(
        isclose(stated[key], found[key], rel_tol=_ROUNDING) for key in ("median", "min", "max")
    )


@cache
def _validator(kind: str) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise MissingExtraError('records need jsonschema; run: pip install "sparsify-toolkit[bench]"') from error
    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema()["$defs"]})


@cache
def schema() -> dict[str, Any]:
    """The published JSON Schema of a record."""
    text = resources.files("sparsify.bench").joinpath("record.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
