"""Zero-shot scoring against transformers' own probabilities, and the clean-up of its texts."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from sparsify.bench.zeroshot import (
    Question,
    accuracy,
    encode_pair,
    hellaswag,
    lambada,
    log_likelihoods,
    multiple_choice,
)
from sparsify.errors import DataError
from sparsify.runtimes.torch_session import TorchSession
from tests.fakes import FakeSession


def test_scores_are_the_models_probabilities(stories: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    pairs = [("Once upon a time", " there was a cat."), ("The dog ran ", "home"), ("She said", " hello")]
    with TorchSession(stories) as session:
        found = log_likelihoods(session, encode, pairs)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = encode(context + continuation)
        first = len(encode(context.rstrip()))
        with torch.inference_mode():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        expected = sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == all(int(logs[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))


def test_accuracy_counts_by_likelihood_and_by_likelihood_per_character() -> None:
    def of(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        # Every next token is "a" with certainty e, "b" with 1, whatever came before.
        return np.broadcast_to(np.array([0.0, 1.0, 0.0], dtype=np.float32), (1, ids.shape[1], 3))

    def encode(text: str) -> list[int]:
        return [{" ": 0, "a": 1, "b": 2}[letter] for letter in text]

    # "aa" has two likely tokens, "b" one unlikely one: b is likelier as a whole, aa per character.
    questions = [
        Question("b", (" aaaa", " b"), 0),
        Question("b", (" aaaa", " b"), 1),
        Question("b", ("a",)),
    ]
    both = accuracy(FakeSession(of), encode, questions[:2])
    assert (both.acc, both.acc_norm, both.n) == (0.5, 0.5, 2)
    first = accuracy(FakeSession(of), encode, questions[:1])
    assert (first.acc, first.acc_norm) == (0.0, 1.0)
    assert accuracy(FakeSession(of), encode, questions[2:]).acc == 1.0
    with pytest.raises(DataError, match="no questions"):
        accuracy(FakeSession(of), encode, [])
    with pytest.raises(DataError, match="a token each"):
        accuracy(FakeSession(of), encode, [Question("", ("a",))])


def test_the_model_sees_as_much_as_it_can_and_no_more() -> None:
    seen = []

    def of(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        seen.append(ids[0].tolist())
        return np.zeros((1, ids.shape[1], 256), dtype=np.float32)

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    log_likelihoods(FakeSession(of), encode, [("abcdef", "gh")], context_length=4)
    # What predicts h is the last token seen: of eight the last five, without h.
    assert seen == [encode("defg")]
    with pytest.raises(DataError, match="5 tokens, of which the model sees 4"):
        log_likelihoods(FakeSession(of), encode, [("a", "bcdef")], context_length=4)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "q", "choices": ["a"], "gold": 1}, "key gold is '1'"),
        ({"query": "q", "choices": ["a"], "gold": ""}, "key gold is ''"),
        ({"query": "q", "choices": ["a"], "gold": -1}, "key gold is '-1'"),
        ({"query": "q", "choices": 3, "gold": 0}, "key choices is no list"),
        ({"query": "q", "choices": [1], "gold": 0}, "key choices is no list"),
        ({"query": "q", "gold": 0}, "lacks key choices"),
    ],
)
def test_malformed_questions_are_refused(row: dict[str, object], words: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"query": "q\u2028r", "choices": ["a", "b"], "gold": 1}, ensure_ascii=False) + "\n")
    assert multiple_choice(file) == [Question("q\u2028r", (" a", " b"), 1)]
    with file.open("a") as lines:
        lines.write(json.dumps(row))
    with pytest.raises(DataError, match=f"line 2.*{words}"):
        multiple_choice(file)


def test_spaces_at_the_end_of_a_context_go_to_the_continuation() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    assert encode_pair(encode, "ab  ", "c") == ([97, 98], [32, 32, 99])


def test_files_are_read_and_cleaned(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "One two three"}) + "\n")
    assert lambada(tmp_path / "l.jsonl") == [Question("One two", (" three",))]
    row = {
        "activity_label": "Roof",
        "ctx_a": "A man [header] sits.",
        "ctx_b": "he",
        "endings": ["x [title] y", "z"],
        "label": "1",
    }
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert hellaswag(tmp_path / "h.jsonl.gz") == [Question("Roof: A man sits. He", (" x. y", " z"), 1)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "Q", "choices": ["a", "b"], "gold": 1}))
    assert multiple_choice(tmp_path / "a.jsonl") == [Question("Q", (" a", " b"), 1)]


@pytest.mark.parametrize("content", [b"{", b'{"query": 1}', b"[]", b"\xff\xfe"])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        multiple_choice(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not readable"):
        lambada(tmp_path / "absent.jsonl")
