"""Our model of lm-eval against its own HFLM on the same checkpoint, its tasks from local files, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import huggingface_hub
import lm_eval.tasks
import numpy as np
import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from numpy.typing import NDArray

from sparsify.bench import accuracy
from sparsify.bench.accuracy import samples
from sparsify.bench.lm_eval_model import SessionLM
from sparsify.bench.perplexity import perplexity
from sparsify.bench.record_check import check
from sparsify.bench.request import Request
from sparsify.bench.scoring import score
from sparsify.bench.zero_shot_tasks import ask, load_tasks, ready_tasks, run_tasks
from sparsify.errors import DataError, NumericsError, UsageError
from sparsify.runtimes.torch_session import TorchSession
from tests.conftest import SHARED
from tests.fakes import FakeSession

ZEROSHOT = SHARED / "data/zeroshot"
LENGTH = 48
TEXT = " ".join(topics["while"].split())


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def session(stories: Path) -> Iterator[TorchSession]:
    with TorchSession(stories) as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(stories: Path, tokenizer: Any) -> HFLM:
    return HFLM(str(stories), tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=1, max_length=LENGTH)


@pytest.fixture(scope="module")
def ours(session: TorchSession, tokenizer: Any) -> SessionLM:
    def generate(ids: NDArray[np.int64], n: int) -> Iterable[int]:
        return list(session.generate(ids, n)[0])

    return SessionLM(partial(score, session), tokenizer, max_length=LENGTH, generate=generate)


def _requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_hflm(ours: SessionLM, theirs: HFLM) -> None:
    pairs = [
        ("Once upon a time", " there was a cat."),
        ("The dog ran ", "home"),
        ("", "She said hello"),
        ("<s>Once upon", " a"),
        (TEXT[:300], " and then"),  # more than the model is allowed to see
        (TEXT[:90], TEXT[90:150]),
        ("Once upon a", " time"),
    ]
    asked = _requests("loglikelihood", *pairs)
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len(ours.tok_encode(TEXT[:300])) > LENGTH


def test_greedy_continuations_are_seen_as_such(ours: SessionLM, theirs: HFLM, session: TorchSession) -> None:
    ids = np.array([ours.tok_encode("Once upon a time")], dtype=np.int64)
    made = session.generate(ids, 6)[0].tolist()
    requests = [(("", ""), ids[0].tolist(), made), (("", ""), ids[0].tolist(), [*made[:-1], (made[-1] + 1) % 512])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(requests)] == [True, False]
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(requests)] == [True, False]


def test_rolling_log_likelihoods_are_those_of_hflm(ours: SessionLM, theirs: HFLM) -> None:
    asked = _requests("loglikelihood_rolling", ("Hello",), (TEXT[:1200],), (TEXT[:LENGTH],))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), rel=1e-5)


def test_texts_are_those_of_hflm(ours: SessionLM, theirs: HFLM) -> None:
    def asked() -> list[Instance]:  # HFLM writes into the options
        return _requests(
            "generate_until",
            ("Once upon a time", {"until": ["."], "max_gen_toks": 24}),
            ("Once upon a time", {"until": [" a", "e"], "max_gen_toks": 24}),
            (TEXT[:300], {"until": ["no such text"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}),
        )

    found = ours.generate_until(asked())
    assert found == theirs.generate_until(asked())
    assert "." not in found[0]
    assert all(found)


def test_perplexity_is_lm_evals(ours: SessionLM, theirs: HFLM, session: TorchSession) -> None:
    """Its rolling windows are ours of one token more, which overlap by that token."""
    tokens: list[int] = []
    text = TEXT
    while len(tokens) % LENGTH or len(tokens) < 4 * LENGTH:
        text = text[:-1]
        tokens = theirs.tok_encode(text)
    (total,) = theirs.loglikelihood_rolling(_requests("loglikelihood_rolling", (text,)))
    chain = np.array([theirs.prefix_token_id, *tokens], dtype=np.int64)
    windows = np.stack([chain[i : i + LENGTH + 1] for i in range(0, len(tokens), LENGTH)])
    found = perplexity(session, windows, stride=LENGTH)
    assert found.n_tokens == len(tokens)
    assert found.perplexity == pytest.approx(math.exp(-total / len(tokens)), rel=1e-4)


class Counting:
    """A tokenizer of letters, with an end of text."""

    bos_token_id = None
    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        kept = [ids] if isinstance(ids, int) else [token for token in ids if token or not skip_special_tokens]
        return "".join(chr(96 + token) for token in kept)


def test_text_ends_at_a_stop_or_the_end_of_text_and_no_more_is_made() -> None:
    made: list[int] = []

    def generate(ids: NDArray[np.int64], n: int) -> Iterator[int]:
        for token in [3, 1, 2, 5, 0, 7][:n]:
            made.append(token)
            yield token

    model = SessionLM(partial(score, FakeSession(np.zeros_like)), Counting(), max_length=20, generate=generate)

    def text(**options: Any) -> str:
        made.clear()
        return model.generate_until(_requests("generate_until", ("xyz", options)))[0]

    assert (text(until=["ab"], max_gen_toks=6), made) == ("c", [3, 1, 2])
    assert (text(until=[], max_gen_toks=6), made) == ("cabe", [3, 1, 2, 5, 0])
    assert (text(until=[], max_gen_toks=2), made) == ("ca", [3, 1])
    with pytest.raises(UsageError, match="samples"):
        text(do_sample=True, temperature=0.7)
    with pytest.raises(DataError, match="256 new tokens of a model that sees 20"):
        text()
    silent = SessionLM(partial(score, FakeSession(np.zeros_like)), Counting(), max_length=20)
    with pytest.raises(UsageError, match="generates no text"):
        silent.generate_until(_requests("generate_until", ("xyz", {})))


def test_what_the_model_cannot_see_is_refused() -> None:
    model = SessionLM(partial(score, FakeSession(np.zeros_like)), Counting(), max_length=3)
    with pytest.raises(DataError, match="4 tokens, of which the model sees 3"):
        model.loglikelihood(_requests("loglikelihood", ("a", "bcde")))
    with pytest.raises(DataError, match="a token each"):
        model.loglikelihood(_requests("loglikelihood", (" ", "")))
    nameless = Counting()
    nameless.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(DataError, match="neither a BOS nor an EOS"):
        SessionLM(partial(score, FakeSession(np.zeros_like)), nameless, max_length=3).tok_encode("a")


CHOICES = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/letters.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{options}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "task": "texts",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/texts.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files, which JSON is YAML enough for, and their data."""
    questions = [
        {"question": TEXT[i : i + 30], "options": [TEXT[i + 30 : i + 36], "cats", "a dog"], "answer": i % 3}
        for i in range(6)
    ]
    (tmp_path / "data").mkdir()
    for name, rows in (("letters", questions), ("texts", [{"text": TEXT[:n]} for n in (40, 90, 250, 400)])):
        (tmp_path / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(json.dumps(CHOICES))
    (tmp_path / "texts.yaml").write_text(json.dumps(ROLLING))
    return tmp_path


def test_local_tasks_give_values_with_standard_errors(
    folder: Path, ours: SessionLM, theirs: HFLM, session: TorchSession, tokenizer: Any
) -> None:
    tasks = load_tasks(["letters", "texts"], folder)
    ticks: list[tuple[int, int]] = []
    rows = run_tasks(
        partial(score, session), tokenizer, tasks, max_length=LENGTH, progress=lambda *tick: ticks.append(tick)
    )
    assert (18, 18) in ticks
    assert (4, 4) in ticks
    names = [(row["task"], row["metric"], row["n"]) for row in rows]
    assert names == [
        ("letters", "acc", 6), ("letters", "acc_norm", 6),
        ("texts", "byte_perplexity", 4), ("texts", "bits_per_byte", 4),
    ]  # fmt: skip
    for row, other in zip(rows, ask(theirs, tasks), strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-5)
        assert row["samples_sha256"] == other["samples_sha256"]
        assert row["harness"] == f"lm-eval {lm_eval.__version__}"
    hits = np.array(rows[0]["samples"])
    assert rows[0]["value"] == hits.mean()
    assert rows[0]["standard_error"] == pytest.approx(hits.std(ddof=1) / math.sqrt(6))
    assert [row["higher_is_better"] for row in rows] == [True, True, False, False]
    # Texts are the sampling unit: the delta method against leaving each out in turn.
    sums, sizes = (np.array(column, dtype=float) for column in zip(*rows[2]["samples"], strict=True))
    left_out = np.exp(-(sums.sum() - sums) / (sizes.sum() - sizes))
    jackknife = math.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum())
    assert rows[2]["standard_error"] == pytest.approx(jackknife, rel=0.5)
    bits = rows[2]["standard_error"] / rows[2]["value"] / math.log(2)
    assert rows[3]["standard_error"] == pytest.approx(bits)


def test_a_limit_takes_the_first_and_other_questions_have_another_hash(folder: Path, ours: SessionLM) -> None:
    (every, _), (first, _), (one, _) = (ask(ours, load_tasks(["letters"], folder), limit=n) for n in (None, 4, 1))
    assert first["samples"] == every["samples"][:4]
    assert first["samples_sha256"] != every["samples_sha256"]
    assert (one["n"], one["standard_error"]) == (1, None)
    data = folder / "data/letters.jsonl"
    data.write_text(data.read_text().replace("a dog", "a cow"))
    (other, _) = ask(ours, load_tasks(["letters"], folder))
    assert other["samples_sha256"] != every["samples_sha256"]
    with pytest.raises(UsageError, match="limit 0"):
        ask(ours, load_tasks(["letters"], folder), limit=0)


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def _edit(**keys: Any) -> Callable[[Path], Any]:
    return _write("letters.yaml", json.dumps({**CHOICES, **keys}))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_write("letters.yaml", "task: [letters"), DataError, r"letters\.yaml: not readable as YAML .*line 1"),
        (_write("letters.yaml", "- letters"), DataError, r"letters\.yaml: holds no task"),
        (_edit(task="letter"), UsageError, "has no task 'letters'; choose letter"),
        (lambda folder: (folder / "data/letters.jsonl").unlink(), DataError, r"cannot be loaded .*letters\.jsonl"),
        (_write("data/letters.jsonl", "{"), DataError, "letters cannot be loaded"),
        (_edit(metric_list=[{"metric": "no such metric"}]), DataError, "letters cannot be loaded"),
        (_edit(test_split="absent"), DataError, "letters"),
        (_edit(doc_to_text="{{question.no.such}}"), DataError, "letters"),
        (_edit(process_docs="!function nowhere.f"), DataError, "letters"),
    ],
)  # fmt: skip
def test_damaged_tasks_are_one_line(
    damage: Callable[[Path], Any], error: type[Exception], words: str, folder: Path, ours: SessionLM
) -> None:
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        ask(ours, load_tasks(["letters"], folder))
    assert "\n" not in str(caught.value)


def test_a_relative_folder(folder: Path, ours: SessionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(ours, load_tasks(["letters"], folder))
    monkeypatch.chdir(folder.parent)
    assert ask(ours, load_tasks(["letters"], Path(folder.name))) == expected
    (folder / "letters.yaml").write_text("task: [letters")
    with pytest.raises(DataError, match=f"^{folder.name}/letters.yaml: not readable"):
        load_tasks(["letters"], Path(folder.name))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("arc_easy.yaml", "task: [arc", "not readable as YAML"),
        ("mine.yaml", "task: arc_easy\nother: [", "not readable as YAML"),
        ("arc_easy.yaml", "task: [arc_easy]", r"task is \['arc_easy'\], want a name"),
        ("arc_easy.yaml", "dataset_path: json", "finds no task arc_easy in it"),
        ("arc_easy.yaml", "task: arc_easi", "finds no task arc_easy in it"),
        ("arc_easy.yaml", "task: arc_easy\ninclude: absent", "finds no task arc_easy in it"),
        ("other.yaml", "task: 5", "task is 5, want a name"),
    ],
)
def test_a_broken_file_is_not_replaced_by_a_task_that_is_ready(folder: Path, name: str, text: str, words: str) -> None:
    rows = [{"query": TEXT[i : i + 30], "choices": ["cats", "a dog"], "gold": i % 2} for i in range(4)]
    with gzip.open(folder / "arc_easy.test.jsonl.gz", "wt") as data:
        data.write("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "group.yaml").write_text(json.dumps({"group": "some", "task": ["arc_easy"]}))
    assert (
        list(load_tasks(["some"], folder)["tasks"]) == list(load_tasks(["arc_easy"], folder)["tasks"]) == ["arc_easy"]
    )
    (folder / name).write_text(text)
    for asked in ("arc_easy", "some"):
        with pytest.raises(DataError, match=rf"{name}: .*{words}") as caught:
            load_tasks([asked], folder)
        assert "\n" not in str(caught.value)


def test_a_broken_file_of_another_task_is_in_no_ones_way(folder: Path) -> None:
    (folder / "other.yaml").write_text("task: [other, letters_of_others")
    assert list(load_tasks(["letters"], folder)["tasks"]) == ["letters"]
    with pytest.raises(UsageError, match=r"no task 'letter'; choose letters.*; or else .*other\.yaml: not readable"):
        load_tasks(["letter"], folder)


def test_requests_that_lose_tokens_are_counted(folder: Path, session: TorchSession, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    tasks = load_tasks(["letters"], folder)
    asked = partial(run_tasks, partial(score, session), tokenizer, tasks, cut=lambda *cut: told.append(cut))
    asked(max_length=200)
    assert told == []
    asked(max_length=10)
    lengths = [len(tokenizer.encode("".join(each.args))) for each in tasks["tasks"]["letters"].instances]
    assert told == [(sum(length > 11 for length in lengths), 18)]
    assert told[0][0] > 0
    writing = SessionLM(partial(score, session), tokenizer, max_length=12, generate=lambda ids, n: [0] * n)
    options = {"until": ["."], "max_gen_toks": 4}
    writing.generate_until(_requests("generate_until", (TEXT[:90], options), ("Hello", options)))
    assert (writing.cut, writing.asked) == (1, 2)


def test_fields_of_records(folder: Path, stories: Path, session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        def ask(self, do: str, ids: list[list[int]], last: int) -> dict[str, Any]:
            logprobs, greedy = score(session, np.array(ids), last)
            return {"logprobs": logprobs.tolist(), "greedy": greedy.tolist()}

    monkeypatch.setattr(accuracy, "TASK_LENGTH", 10)
    told: list[str] = []
    request = Request((), ("torch",), tasks=load_tasks(["letters", "texts"], folder))
    rows = list(accuracy.task_records(Worker(), stories, request, told.append))  # type: ignore[arg-type]
    assert [len(row["samples"] or ()) for row in rows] == [6, 6, 0, 0]
    (cut,) = told
    assert re.fullmatch("[1-9][0-9]* of 22 requests have more than 10 tokens and lost those at their start", cut)
    for row in rows:
        head = {"format": 1, "record": "task", "run": "0" * 16, "time": "", "artifact": "a", "runtime": "torch"}
        check({**head, "session": "", "engaged": {}, **row}, "here")


def test_samples_are_kept_where_the_value_is_their_mean() -> None:
    assert samples([1, 0.0, np.bool_(True), np.float64(0)], 0.5) == [1.0, 0.0, 1.0, 0.0]
    assert samples([(-3.0, 2), (-4.0, 1)], 0.5) is None
    assert samples([-1.0, -2.0], math.exp(1.5)) is None
    assert samples([math.nan, 1.0], math.nan) is None


def test_there_must_be_something_to_ask(folder: Path) -> None:
    with pytest.raises(UsageError, match="no tasks"):
        load_tasks([], folder)
    with pytest.raises(DataError, match="no such folder"):
        load_tasks(["letters"], folder / "absent")


def test_a_standard_task_needs_a_network_or_files(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Path(lm_eval.tasks.__file__).parent / "lambada"
    # All of lm-eval's own tasks take ten seconds to list.
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: _few(known, include_defaults)
    )
    with pytest.raises(DataError, match=r"task lambada_openai: .*without a network, .*--task-files DIR") as caught:
        load_tasks(["lambada_openai"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="lm-eval has no task 'lambada_opena'; choose lambada_openai"):
        load_tasks(["lambada_opena"])


def _few(folder: Path, include_defaults: bool, manager: Any = lm_eval.tasks.TaskManager) -> Any:
    assert include_defaults
    return manager(include_path=folder, include_defaults=False)


def test_nan_is_a_numerics_error_and_not_an_accuracy(folder: Path, tokenizer: Any) -> None:
    broken = FakeSession(lambda ids: np.full((1, ids.shape[1], 512), np.nan, dtype=np.float32))
    with pytest.raises(NumericsError, match="NaN"):
        run_tasks(partial(score, broken), tokenizer, load_tasks(["letters"], folder), max_length=LENGTH)


@pytest.mark.skipif(not ZEROSHOT.is_dir(), reason="the shared zero-shot data is not here")
def test_ready_tasks_are_lm_evals_own(session: TorchSession, tokenizer: Any, theirs: HFLM, tmp_path: Path) -> None:
    """Same figures from both models, and the prompts of lm-eval's own definitions."""
    for source in ZEROSHOT.iterdir():
        opened = gzip.open if source.suffix == ".gz" else open
        with opened(source, "rt", encoding="utf-8") as lines:
            few = "".join(line for line, _ in zip(lines, range(3), strict=False))
        data = few.encode()
        (tmp_path / source.name).write_bytes(gzip.compress(data) if source.suffix == ".gz" else data)
    tasks = load_tasks(ready_tasks(), tmp_path)
    assert set(tasks["tasks"]) == set(ready_tasks())
    found = run_tasks(partial(score, session), tokenizer, tasks, max_length=512, limit=2)
    expected = ask(HFLM(theirs.model, tokenizer=tokenizer, batch_size=1, max_length=512), tasks, limit=2)
    assert len(found) == 12
    for row, other in zip(found, expected, strict=True):
        assert (row["task"], row["metric"], row["n"]) == (other["task"], other["metric"], 2)
        assert row["value"] == pytest.approx(other["value"], rel=1e-4)
    prompts = {name: task.instances[0].args for name, task in tasks["tasks"].items()}
    text = json.loads((tmp_path / "lambada_test.jsonl").read_text().split("\n")[0])["text"]
    assert "".join(prompts["lambada_openai"]) == text
    assert prompts["boolq"][0].endswith("?\nAnswer:")
    assert prompts["piqa"][0].startswith("Question: ")
    assert not prompts["openbookqa"][0].startswith("Question: ")
    assert not prompts["openbookqa"][0].endswith("Answer:")
    assert [instance.args[1] for instance in tasks["tasks"]["boolq"].instances[:2]] == [" no", " yes"]
