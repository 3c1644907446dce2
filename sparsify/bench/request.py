"""What a benchmark is asked to measure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from sparsify.bench.subjects import RUNTIMES_OF, Subject
from sparsify.data import Windows
from sparsify.errors import UsageError
from sparsify.runtimes import Runtime

DEFAULT_DTYPE = "bfloat16"
_SERVER = "vllm-server"
_VLLM = ("vllm", _SERVER)


@dataclass(frozen=True)
class Scenario:
    """Prompts of one length, continued by so many tokens.

    Attributes:
        prompt_tokens: of each row.
        new_tokens: generated for each row.
        batch: rows of one call, or requests at a server at once.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int

    def record(self, runtime: str) -> dict[str, Any]:
        """As a record says it."""
        return {**asdict(self), "load": "concurrency" if runtime == _SERVER else "batch"}


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        scenarios: the grid.
        runtimes: to measure in; each artifact in those that open it.
        runtime: options of all runtimes, of which each takes its own; ``name`` is not looked at.
        rounds: of each scenario.
        twin: hold the baseline twice; without, no difference can be claimed.
        warm_up: calls of each scenario before its rounds.
        seed: of prompts and windows.
        windows: text for perplexity, or None.
        stride: of the windows.
        tasks: zero-shot, of ``zero_shot_tasks.load_tasks``; None asks none.
        task_limit: questions of each task; None is all.
        task_length: longest sequence of a task.
        kernel_tokens: rows of the inputs of single linears; none leaves those out.
        python: interpreter of the environment with vLLM; None is this one.
        timeout_s: longest wait for one answer.
        trust_remote_code: let the model's own code run, in PyTorch.
    """

    scenarios: tuple[Scenario, ...]
    runtimes: tuple[str, ...]
    runtime: Runtime = field(default_factory=Runtime)
    rounds: int = 7
    twin: bool = True
    warm_up: int = 1
    seed: int = 0
    windows: Windows | None = None
    stride: int | None = None
    tasks: Any = None
    task_limit: int | None = None
    task_length: int = 0
    kernel_tokens: tuple[int, ...] = ()
    python: str | None = None
    timeout_s: float = 1800.0
    trust_remote_code: bool = False

    @property
    def dtype(self) -> str:
        """Of weights and arithmetic in PyTorch and vLLM."""
        return self.runtime.dtype or DEFAULT_DTYPE

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in any scenario or window."""
        lengths = [each.prompt_tokens + each.new_tokens for each in self.scenarios]
        lengths.append(0 if self.windows is None else int(self.windows.ids.shape[1]))
        return max(*lengths, self.task_length, self.probe)

    @property
    def probe(self) -> int:
        """Tokens that have to come out finite before anything is measured."""
        return max([2, *(each.prompt_tokens for each in self.scenarios)])

    def interpreter(self, runtime: str) -> str:
        """Python of the processes of a runtime."""
        return self.python if self.python is not None and runtime in _VLLM else sys.executable

    def options(self, runtime: str) -> Runtime:
        """How a runtime is opened: its own options, and no other's."""
        given = self.runtime
        options = Runtime(name=runtime)
        if runtime == "torch":
            return replace(options, dtype=self.dtype, kernel=given.kernel, device=given.device)
        if runtime in _VLLM:
            most = max((each.batch for each in self.scenarios), default=1)
            return replace(
                options, dtype=self.dtype, kernel=given.kernel, tensor_parallel=given.tensor_parallel,
                eager=given.eager, max_length=self.longest, max_batch=max(1, most),
            )  # fmt: skip
        if runtime == "tensorrt":
            return replace(
                options, trust_engine=given.trust_engine, cuda_graphs=given.cuda_graphs,
                weight_budget=given.weight_budget,
            )  # fmt: skip
        options = replace(options, provider=given.provider, threads=given.threads)
        return replace(options, allow_fallback=given.allow_fallback) if runtime == "onnxruntime" else options


def grid(prompts: Sequence[int], new: Sequence[int], batches: Sequence[int]) -> tuple[Scenario, ...]:
    """Every combination, each once, in order.

    Raises:
        UsageError: a number below 1.
    """
    for name, values in (("--prompt", prompts), ("--new", new), ("--batch", batches)):
        for value in values:
            if value < 1:
                raise UsageError(f"{name} {value} is below 1")
    return tuple(dict.fromkeys(Scenario(*each) for each in product(prompts, new, batches)))


def opens(runtime: str, subject: Subject) -> bool:
    """Whether a runtime opens a subject at all."""
    if runtime == "onnxruntime-genai":
        return subject.kind == "onnx" and (subject.body or {}).get("onnx", {}).get("layout") == "genai"
    return runtime in RUNTIMES_OF[subject.kind]
