"""Zero-shot accuracy: which of several continuations a model finds likeliest, scored as EleutherAI's lm-eval does.

A continuation's score is its log-likelihood after its context. Context and continuation are encoded together and split
at the length of the context alone, trailing spaces of a context belonging to the continuation. ``acc`` takes the
likeliest, ``acc_norm`` the likeliest per character; a task with one continuation (LAMBADA) asks whether it is what the
model would say greedily.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError
from sparsify.runtimes.session import Session

Encode = Callable[[str], list[int]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """One item: ``choices`` follow ``context`` as they are, with their space; ``gold`` is the right one's index."""

    context: str
    choices: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions answered rightly, ``acc_norm`` per character; standard errors; number of questions.

    With a single choice both are the share of greedy matches. ``hits`` are the questions that ``acc`` counts, and
    ``log_likelihoods`` those of all choices, in nats, question after question.
    """

    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    n: int
    hits: tuple[bool, ...]
    log_likelihoods: tuple[float, ...]


def lambada(path: Path) -> list[Question]:
    """LAMBADA: the last word of a passage. JSON lines with ``text``.

    Raises:
        DataError: missing file or malformed line.
    """
    questions = []
    for row in _rows(path, "text"):
        context, _, word = str(row["text"]).rpartition(" ")
        questions.append(Question(context, (f" {word}",)))
    return questions


def hellaswag(path: Path) -> list[Question]:
    """HellaSwag in its original columns: the ending of a description, with lm-eval's clean-up of the text.

    Raises:
        DataError: missing file or malformed line.
    """
    questions = []
    for row in _rows(path, "activity_label", "ctx_a", "ctx_b", "endings", "label"):
        context = _clean(f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}")
        endings, gold = _choices(row, "endings", "label")
        questions.append(Question(context, tuple(f" {_clean(ending)}" for ending in endings), gold))
    return questions


def multiple_choice(path: Path) -> list[Question]:
    """Items as ``{query, choices, gold}`` (ARC, OpenBookQA), JSON lines.

    Raises:
        DataError: missing file or malformed line.
    """
    questions = []
    for row in _rows(path, "query", "choices", "gold"):
        choices, gold = _choices(row, "choices", "gold")
        questions.append(Question(str(row["query"]), tuple(f" {choice}" for choice in choices), gold))
    return questions


def _rows(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # Not splitlines: a JSON string may hold other separators of lines as they are.
        lines = data.decode("utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not readable ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"{path}: line {number} lacks key {missing[0]}")
        yield row | {"where": f"{path}: line {number}"}


def _choices(row: dict[str, Any], choices: str, gold: str) -> tuple[tuple[str, ...], int]:
    """The continuations and the index of the right one, under the keys ``choices`` and ``gold`` of a row."""
    texts, index = row[choices], str(row[gold])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{row['where']}: key {choices} is no list of texts")
    if not index.isascii() or not index.isdigit() or int(index) >= len(texts):
        raise DataError(f"{row['where']}: key {gold} is {index[:20]!r}, expected the index of one of {len(texts)}")
    return tuple(texts), int(index)


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation; encoded together, so that the boundary is tokenised as in running text."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    first = encode(context)
    return first, encode(context + continuation)[len(first) :]


def log_likelihoods(
    session: Session,
    encode: Encode,
    pairs: Sequence[tuple[str, str]],
    *,
    context_length: int = 2048,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """Of each (context, continuation): Σ log p of the continuation's tokens in nats, and whether each is the argmax.

    Args:
        session: opened.
        encode: text to token ids, without special tokens.
        pairs: what to score. An empty context is an error: there is nothing to predict the first token from.
        context_length: tokens the model sees at most; longer inputs lose some at their start.
        progress: called with (pairs done, pairs).

    Raises:
        DataError: an empty context or continuation, or a continuation longer than the model sees.
    """
    results = []
    for done, (context, continuation) in enumerate(pairs, 1):
        before, after = encode_pair(encode, context, continuation)
        if not before or not after:
            raise DataError(f"{(context + continuation)[:60]!r}: context and continuation need a token each")
        if len(after) > context_length:
            raise DataError(f"{continuation[:60]!r}: {len(after)} tokens, of which the model sees {context_length}")
        # Logits of a place predict the next token, and the last token, which predicts nothing that is asked, stays out.
        ids = np.array([(before + after)[-context_length - 1 :]], dtype=np.int64)
        logits = session.logits(ids[:, :-1])[0, -len(after) :].astype(np.float64)
        results.append(_score(logits, ids[0, -len(after) :]))
        if progress is not None:
            progress(done, len(pairs))
    return results


def _score(logits: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, bool]:
    top = logits.max(axis=1)
    normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    chosen = logits[np.arange(len(tokens)), tokens]
    return float((chosen - normaliser).sum()), bool((logits.argmax(axis=1) == tokens).all())


def accuracy(
    session: Session,
    encode: Encode,
    questions: Sequence[Question],
    *,
    context_length: int = 2048,
    progress: Progress | None = None,
) -> Accuracy:
    """Zero-shot accuracy on ``questions``; arguments as in ``log_likelihoods``.

    Raises:
        DataError: no questions, or one that ``log_likelihoods`` refuses.
    """
    if not questions:
        raise DataError("no questions to ask")
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    every = log_likelihoods(session, encode, pairs, context_length=context_length, progress=progress)
    scores = iter(every)
    plain, normed = [], []
    for question in questions:
        found = [next(scores) for _ in question.choices]
        if len(found) == 1:
            plain.append(found[0][1])
            normed.append(found[0][1])
            continue
        values = np.array([value for value, _ in found])
        # lm-eval divides by the length of the choice without the space that joins it to its context.
        lengths = np.array([len(choice.removeprefix(" ")) for choice in question.choices])
        plain.append(bool(values.argmax() == question.gold))
        normed.append(bool((values / lengths).argmax() == question.gold))
    return Accuracy(
        float(np.mean(plain)),
        float(np.mean(normed)),
        _stderr(plain),
        _stderr(normed),
        len(questions),
        tuple(plain),
        tuple(value for value, _ in every),
    )


def _stderr(hits: Sequence[bool]) -> float:
    if len(hits) < 2:
        return float("nan")
    return float(np.std(hits, ddof=1) / np.sqrt(len(hits)))
