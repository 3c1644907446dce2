"""vLLM's offline engine as a session: started in this process, or where that would be slow in processes of its own."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import MissingExtraError, ModelError, SparsifyError
from sparsify.memory import return_freed_memory
from sparsify.runtimes.session import Stream
from sparsify.runtimes.vllm_runtime import LISTED, Completion, VllmRuntime, pick
from sparsify.runtimes.vllm_settings import INSTALL, cause, check_settings, read_report

# Open sessions whose engine is in this process.
_INSIDE: list[VllmSession] = []
# Engines of closed ones that have to wait for the others.
_ENDED: list[Any] = []
_STREAMED = itertools.count()


class VllmSession(VllmRuntime):
    """A Hugging Face folder in vLLM's offline engine; one process may open several, at a time or one after the other.

    While it starts, what vLLM prints is kept from the terminal, and environment variables that are unset are set.

    The engine runs in this process; in processes of its own with ``tensor_parallel`` above 1, beside another session,
    and on CPUs where torch was imported earlier with OpenMP threads that spin while they wait. Those processes import
    the main module again: a script needs its ``if __name__ == "__main__"``. ``VLLM_ENABLE_V1_MULTIPROCESSING``, 0 or 1,
    overrides the choice: whoever times two sessions wants both alike.

    Args:
        path: local folder with config and safetensors.
        dtype: parameters, arithmetic and key/value cache: float32, bfloat16 or float16.
        tensor_parallel: processes that share the model.
        kernel: what Sparsify's vLLM plugin is asked to run; None leaves it to the plugin.
        max_length: longest sequence in tokens, at most the positions of the model; None takes that, up to 2048.
        eager: no torch.compile and no CUDA graphs.
        quantization: vLLM's name of a quantisation method; None takes what config.json says.
        max_batch: sequences in flight, and sequences of ``max_length`` that the key/value cache has room for.

    Raises:
        MissingExtraError: vLLM is not installed.
        UsageError: an option out of range.
        ModelError: vLLM refuses the model; holds its reason.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "bfloat16",
        tensor_parallel: int = 1,
        kernel: str | None = None,
        max_length: int | None = None,
        eager: bool = True,
        quantization: str | None = None,
        max_batch: int = 8,
    ) -> None:
        spinning = _may_spin()
        self.settings = check_settings(
            path, dtype=dtype, tensor_parallel=tensor_parallel, kernel=kernel, max_length=max_length, eager=eager,
            quantization=quantization, max_batch=max_batch,
        )  # fmt: skip
        self._llm: Any = None
        # Requests of the open stream that are not over.
        self._streaming: set[str] = set()
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="sparsify-vllm-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._log = folder / "log"
            stack.callback(self._stop)
            with _variables(self.settings.environment(folder, "ERROR")), _printing_to(self._log), self._reasons():
                self._start(spinning)
            self._report = read_report(self.settings, folder / "engaged")
            self._opened = stack.pop_all()

    def _start(self, spinning: bool) -> None:
        import vllm
        from vllm.platforms import current_platform

        # vLLM's process groups belong to the process: the first of two engines to end takes them from the other.
        # A process of its own takes some 10 s longer to start.
        inside = not _INSIDE and self.settings.tensor_parallel == 1 and not (spinning and current_platform.is_cpu())
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if inside else "1")
        vllm.envs.disable_envs_cache()  # an engine before this one has frozen the variables as they were for it
        if not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            _INSIDE.append(self)
        shared = f" x{self.settings.tensor_parallel}" if self.settings.tensor_parallel > 1 else ""
        self.name = f"vllm {vllm.__version__} {current_platform.device_type}{shared} {self.settings.dtype}"
        # Ids go in and out: no tokenizer is needed, and one that knows fewer ids than the model would refuse some.
        self._llm = vllm.LLM(**self.settings.arguments(), skip_tokenizer_init=True, use_tqdm_on_load=False)
        # Some refusals come with the first tokens only: attention for a head size that no kernel knows, for one.
        self._complete(np.zeros((1, 1), dtype=np.int64), 1, scored=False)

    @contextmanager
    def _reasons(self) -> Iterator[None]:
        """Raise what vLLM raises as one of our errors; an engine in another process leaves its reason in the log."""
        try:
            yield
        except SparsifyError:
            raise
        except Exception as error:  # vLLM's exceptions share no base class but Exception
            if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
                raise MissingExtraError(f"vllm is missing from {sys.executable}; {INSTALL}") from error
            logged = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
            reason = cause(f"{type(error).__name__}: {error}") or cause(logged) or type(error).__name__
            raise ModelError(f"{self.settings.path}: vLLM: {reason}") from error

    def _complete(self, ids: NDArray[np.int64], n: int, *, scored: bool) -> list[Completion]:
        from vllm import SamplingParams

        self._take()
        sampling = SamplingParams(
            temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False,
            prompt_logprobs=LISTED if scored else None,
        )  # fmt: skip
        rows = ids.tolist()
        with self._reasons():
            outputs = self._llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        return [
            (
                list(output.outputs[0].token_ids),
                # The token that stands there is among the log-probabilities whatever its rank.
                [
                    pick({other: entry.logprob for other, entry in at.items()}, token)
                    for at, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)
                ]
                if scored
                else [],
            )
            for row, output in zip(rows, outputs, strict=True)
        ]

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``VllmRuntime.stream``; closing it early makes the engine forget the requests.

        Raises:
            RuntimeError: the session was closed or asked something else before the stream was over.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._check(ids, n)
        self._take()
        sampling = SamplingParams(
            temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        rows = {f"stream-{next(_STREAMED)}": row for row in ids.tolist()}
        places = {request: place for place, request in enumerate(rows)}
        self._streaming = running = set(rows)
        try:
            with self._reasons():
                for request, row in rows.items():
                    self._llm.llm_engine.add_request(request, tokens_input(row), sampling)
            while running:
                if self._streaming is not running:
                    raise RuntimeError("the session was closed or asked something else before this stream was over")
                with self._reasons():
                    outputs = self._llm.llm_engine.step()
                step: list[list[int]] = [[] for _ in rows]
                for output in outputs:
                    step[places[output.request_id]] += output.outputs[0].token_ids
                    if output.finished:
                        running.discard(output.request_id)
                if any(step):
                    yield step
        finally:
            if self._streaming is running:
                self._forget()

    def _take(self) -> None:
        """Have the engine to oneself: it steps all its requests together, and hands out what any of them made."""
        if self._llm is None:
            raise ModelError(f"{self.name}: the session is closed")
        self._forget()

    def _forget(self) -> None:
        """End the stream that is open, if one is."""
        requests, self._streaming = list(self._streaming), set()
        if requests and self._llm is not None:
            with suppress(Exception):  # an engine that has died runs nothing any more
                self._llm.llm_engine.abort_request(requests)

    def _stop(self) -> None:
        self._forget()
        ended, inside = [self._llm], self in _INSIDE
        self._llm = None
        if inside:
            _INSIDE.remove(self)
            _ENDED.extend(ended)
            # Ended one by one, the first would take vLLM's process groups from the others.
            ended = [] if _INSIDE else [_ENDED.pop() for _ in range(len(_ENDED))]
        while ended:
            with suppress(Exception):  # an engine that has died cannot be asked to stop
                ended.pop().llm_engine.engine_core.shutdown()
        if inside and not _INSIDE:
            with suppress(Exception):
                from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                # Process groups and cached variables, which the next engine would find.
                cleanup_dist_env_and_memory()
        gc.collect()
        return_freed_memory()

    def close(self) -> None:
        """See ``VllmRuntime.close``; vLLM's modules stay in this process."""
        self._opened.close()


def _may_spin() -> bool:
    """Whether torch has started with several OpenMP threads that nobody told to sleep while they wait."""
    torch = sys.modules.get("torch")
    return (
        torch is not None and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive" and torch.get_num_threads() > 1
    )


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """``wanted`` in this process's environment; afterwards it is as before, also where vLLM has changed it."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in [*wanted, "LD_PRELOAD", *(name for name in os.environ if name.startswith("VLLM_"))]:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Standard output and error of this process and of those it starts, in ``log``.

    By descriptor: vLLM's C++ and its processes print past ``sys.stderr``, and standard output may be somebody's JSON.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        with log.open("ab") as file:
            for number, _ in kept:
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
