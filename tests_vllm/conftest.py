"""The real vLLM on this machine's CPU. These tests run in an environment of their own, see ``make test-vllm``.

The engine runs in this process (3 s to start instead of 10) except where several ranks need several processes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Workers of pytest-xdist share that of the process that started them.
_CACHE = os.environ["VLLM_CACHE_ROOT"] if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="vllm-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # More than one spinning thread on shared cores is slower than one, by a factor of forty.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CACHE_ROOT": _CACHE,
    "VLLM_CONFIG_ROOT": _CACHE,
}

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm.model_executor.models import registry  # noqa: E402

from sparsify.kernels.dispatch import NATIVE  # noqa: E402
from sparsify.pipeline import export  # noqa: E402
from sparsify.plugins.engaged import RECORDS, Engaged  # noqa: E402
from sparsify.prune import prune  # noqa: E402
from sparsify.recipe import Recipe  # noqa: E402
from sparsify.source import resolve  # noqa: E402
from sparsify.targets import Options  # noqa: E402
from tests import conftest as ordinary  # noqa: E402

PROMPT = 40
NEW = 16
NO_NATIVE = NATIVE.absent(torch.device("cpu"))

# vLLM looks at the class of a model in a process of its own, for 12 s each, so as not to touch CUDA in this one.
registry._run_in_subprocess = lambda look: look()


@dataclass(frozen=True)
class Answer:
    """What an engine says to the prompts of ``ask``: new tokens, and log-probabilities of the prompts' tokens.

    ``seen`` is what a function made of the model on each rank.
    """

    tokens: list[list[int]]
    logprobs: torch.Tensor
    engaged: dict[str, Engaged]
    seen: tuple[Any, ...] = ()


def prompts(vocabulary: int = 100) -> list[list[int]]:
    """Four prompts of 40 tokens that differ early."""
    return [[1 + (i * i * k + 7 * i) % (vocabulary - 2) for i in range(PROMPT)] for k in range(1, 5)]


def ask(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    kernel: str | None = None,
    look: Callable[[torch.nn.Module], Any] | None = None,
    **options: Any,
) -> Answer:
    """Start an engine on ``folder``, ask it, stop it; ``look`` sees the model on each rank."""
    if kernel:
        options["additional_config"] = {"sparsify": {"kernel": kernel}}
    settings: dict[str, Any] = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8, "seed": 0}
    RECORDS.clear()
    engine = vllm.LLM(model=str(folder), dtype=dtype, skip_tokenizer_init=True, **{**settings, **options})
    try:
        found = answer(engine)
        return found if look is None else replace(found, seen=tuple(engine.apply_model(look)))
    finally:
        stop(engine)


def ask_apart(folder: Path, **options: Any) -> Answer:
    """``ask`` in a process of its own: what vLLM changes in other libraries stays there."""
    code = (
        "import json, dataclasses\nfrom pathlib import Path\nfrom tests_vllm.conftest import ask\n"
        f"found = ask(Path({str(folder)!r}), **{options!r})\n"
        "engaged = {name: dataclasses.asdict(entry) for name, entry in found.engaged.items()}\n"
        "print('answer', json.dumps([found.tokens, found.logprobs.tolist(), engaged]))"
    )
    result = run_python(code, PYTHONPATH=str(Path(__file__).parents[1]))
    line = next((line for line in result.stdout.splitlines() if line.startswith("answer ")), None)
    assert line is not None, result.stderr[-3000:]
    tokens, logprobs, engaged = json.loads(line.removeprefix("answer "))
    return Answer(tokens, torch.tensor(logprobs), {name: Engaged(**entry) for name, entry in engaged.items()})


def answer(engine: Any) -> Answer:
    """What a running engine says."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    ids = prompts()
    outputs = engine.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
    logprobs = [[outputs[i].prompt_logprobs[j][row[j]].logprob for j in range(1, PROMPT)] for i, row in enumerate(ids)]
    linears = {name: entry for record in RECORDS for name, entry in record.linears.items()}
    return Answer([list(output.outputs[0].token_ids) for output in outputs], torch.tensor(logprobs), linears)


def stop(engine: Any) -> None:
    """End the engine; its weights go."""
    engine.llm_engine.engine_core.shutdown()
    gc.collect()
    # What is left are modules. vLLM collects garbage several times a start and would go through them each time.
    gc.freeze()


def same(one: Answer, other: Answer) -> None:
    """Two engines computed the same, to the last bit."""
    assert one.tokens == other.tokens
    assert torch.equal(one.logprobs, other.logprobs)


def close(one: Answer, other: Answer) -> None:
    """Two engines computed the same but for the order of sums in bfloat16, in which near ties may fall either way."""
    difference = (one.logprobs - other.logprobs).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 1
    assert [row[0] for row in one.tokens] == [row[0] for row in other.tokens]


def kernels(answer: Answer) -> set[str]:
    """The kernels that ran."""
    return {entry.kernel for entry in answer.engaged.values()}


def run_python(code: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def build(model: Path | str, root: Path, **recipe: Any) -> tuple[Path, Path]:
    """Prune a model; folders of the plain and of the compressed artifact, in ``root``."""
    prune(resolve(str(model)), Recipe(**recipe), root / "pruned")
    export(root / "pruned", "vllm", root / "plain", options=Options(dense=True))
    export(root / "pruned", "vllm", root / "compressed")
    return root / "plain", root / "compressed"


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(model folder, recipe) -> folders of the plain and of the compressed artifact."""
    return lambda model, **recipe: build(model, tmp_path_factory.mktemp("artifact"), **recipe)


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Name of a pruned SmolLM2-135M -> (plain, compressed), made once."""
    recipes: dict[str, dict[str, Any]] = {
        "2:4": {"pattern": "2:4"},
        "0.5": {"pattern": "0.5"},
        # q pruned to 2:4, k dense, v unstructured: all three fused into one linear by vLLM; and all of one kind dense.
        "mixed": {
            "pattern": "2:4",
            "exclude": ("*.k_proj", "*.o_proj"),
            "overrides": {"*.v_proj": "0.5", "*.up_proj": "4:8"},
        },
    }

    def get(name: str) -> tuple[Path, Path]:
        # One worker dequantises and prunes, then the next one finds what it made.
        with ordinary.alone(tmp_path_factory, "smollm2") as root:
            folder = root / name.replace(":", "-")
            if not (folder / "compressed").exists():
                build("smollm2-135m", folder, method="wanda", windows=4, length=256, **recipes[name])
        return folder / "plain", folder / "compressed"

    return get


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained Llama (8 query and 4 key heads), its heads as wide as vLLM's CPU attention wants them."""
    if not ordinary.STORIES.exists():
        pytest.skip("the shared models are not here")
    return widen(ordinary.STORIES, tmp_path_factory.mktemp("stories") / "wide")


def widen(source: Path, out: Path, factor: int = 4) -> Path:
    """The same function with heads ``factor`` times as wide, the new channels zero.

    Rotary channel j of d turns with frequency theta^(-2j/d): it goes to ``factor`` * j, where the wide head has the
    same one. Scores are divided by the root of the width, so queries are multiplied by what that root grew.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = LlamaConfig.from_pretrained(source)
    narrow = config.hidden_size // config.num_attention_heads
    wide, half = narrow * factor, narrow // 2
    places = torch.tensor([factor * (j % half) + (j // half) * half * factor for j in range(narrow)])

    def spread(weight: torch.Tensor, heads: int, scale: float = 1.0) -> torch.nn.Parameter:
        result = torch.zeros(heads, wide, weight.shape[1])
        result[:, places] = weight.view(heads, narrow, -1) * scale
        return torch.nn.Parameter(result.view(heads * wide, -1))

    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight = spread(attention.q_proj.weight, config.num_attention_heads, factor**0.5)
            attention.k_proj.weight = spread(attention.k_proj.weight, config.num_key_value_heads)
            attention.v_proj.weight = spread(attention.v_proj.weight, config.num_key_value_heads)
            heads = attention.o_proj.weight.T.contiguous()
            attention.o_proj.weight = torch.nn.Parameter(spread(heads, config.num_attention_heads).T.contiguous())
    model.config.head_dim = wide
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def families(
    tmp_path_factory: pytest.TempPathFactory, make: Callable[..., tuple[Path, Path]]
) -> Callable[[str], tuple[Path, Path]]:
    """Model type -> (plain, compressed) of a tiny random model whose heads vLLM's CPU attention takes."""
    root = tmp_path_factory.mktemp("families")
    size = {**ordinary._SIZE, "hidden_size": 128, "intermediate_size": 96, "vocab_size": 128}
    size["max_position_embeddings"] = 128
    # vLLM 0.24 computes experts of some widths only.
    size |= {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}

    def get(model_type: str) -> tuple[Path, Path]:
        known: dict[str, Callable[[], Any]] = {
            **ordinary.CONFIGS,
            **ordinary.EXTRA,
            "granite": transformers.GraniteConfig,
        }
        config = known[model_type]()
        for key, value in size.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if getattr(config, "head_dim", None):
            config.head_dim = 32
        if model_type == "stablelm":
            config.qk_layernorm = False  # vLLM does not know it
        if model_type == "opt":
            config.word_embed_proj_dim = 128
        folder = ordinary.save_random_model(root / model_type, config)
        return make(folder, pattern="2:4", method="magnitude")

    return get


@pytest.fixture
def engaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Where engines of other processes write what runs; calling it reads the records, by rank."""
    folder = tmp_path / "engaged"
    folder.mkdir()
    monkeypatch.setenv("SPARSIFY_ENGAGED_DIR", str(folder))

    def read() -> list[dict[str, Any]]:
        records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        return sorted(records, key=lambda record: int(record["rank"]))

    return read
