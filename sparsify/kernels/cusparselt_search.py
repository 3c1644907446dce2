"""Which of cuSPARSELt's algorithms multiplies a shape fastest: searched once, in a process of its own, and remembered.

The library's default is often a slow one, some of its algorithms end the CUDA context and some never come back. So the
search runs in a child process that answers line by line; one that stops answering is killed, the shape it was at is
noted as failed, and the next child goes on behind it. Results lie in the user's cache folder, per GPU and version of
the library. Nothing is searched while a model runs. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from sparsify.kernels import device_cache
from sparsify.kernels.gpu_timing import timed_us

# The child's own start, which imports torch and opens the GPU, is within its first answer's time.
TIMEOUT_S = 120.0
# A process that has closed its output ends.
_ENDING_S = 10.0
# A product that differs by more, relatively, from the dense one is wrong; 8-bit values are coarser than 16-bit ones.
_TOLERANCE = {"bfloat16": 0.02, "float16": 0.02, "float8_e4m3fn": 0.08}
_COMMAND = [sys.executable, "-m", "sparsify.kernels.cusparselt_search"]


@dataclass(frozen=True)
class Problem:
    """A product cuSPARSELt is asked for.

    Attributes:
        n_out: rows of the weight.
        n_in: its columns.
        tokens: rows of the input, padded as the library wants them.
        dtype: of weight and input, torch's name.
        bias: added by the library.
    """

    n_out: int
    n_in: int
    tokens: int
    dtype: str
    bias: bool = False

    @property
    def key(self) -> str:
        """In the cache."""
        return f"{self.dtype} {self.n_out}x{self.n_in} {self.tokens}{' bias' if self.bias else ''}"


@dataclass(frozen=True)
class Algorithm:
    """What torch's operator calls ``alg_id``, ``split_k`` and ``split_k_mode``; by default the library's default."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1

    def options(self) -> dict[str, Any]:
        """For ``torch._cslt_sparse_mm``."""
        return {} if self == DEFAULT else asdict(self)


DEFAULT = Algorithm()


def _kind() -> str:
    return f"cusparselt-{torch.backends.cusparselt.version()}"


@functools.cache
def _known(kind: str, name: str) -> dict[str, Any]:
    return device_cache.read(kind, name)


@functools.cache
def _name(device: torch.device) -> str:
    return device_cache.device_name(device)


def _row(device: torch.device, problem: Problem) -> dict[str, Any]:
    row = _known(_kind(), _name(device)).get(problem.key)
    return row if isinstance(row, dict) else {}


def algorithm(device: torch.device, problem: Problem) -> Algorithm:
    """The fastest known for ``problem``, else for the next power of two of tokens, else the library's default.

    An algorithm that splits the columns is used for the very number of tokens only.
    """
    if device.type != "cuda":
        return DEFAULT
    found = _parse(_row(device, problem))
    if found is not None:
        return found
    power = 1 << (problem.tokens - 1).bit_length()
    found = _parse(_row(device, Problem(problem.n_out, problem.n_in, power, problem.dtype, problem.bias)))
    return found if found is not None and found.split_k == 1 else DEFAULT


def trouble(device: torch.device, problem: Problem) -> str | None:
    """Why the search found nothing for exactly this problem; None if it was not searched or found something."""
    return _row(device, problem).get("failed")


def _parse(row: dict[str, Any]) -> Algorithm | None:
    try:
        return Algorithm(**row["algorithm"])
    except (KeyError, TypeError):  # failed, or of another version
        return None


def search(
    problems: Sequence[Problem],
    device: torch.device,
    timeout_s: float = TIMEOUT_S,
    told: Callable[[Problem, dict[str, Any]], None] = lambda problem, row: None,
) -> dict[str, dict[str, Any]]:
    """Search for those of ``problems`` that are not in the cache, failures included, and add them to it.

    Args:
        problems: each is searched on its own.
        device: a GPU.
        timeout_s: for one problem.
        told: called after each.

    Returns:
        Key of each problem -> its row: ``algorithm``, ``us`` and ``default_us`` (medians) and how many were ``tried``,
        or ``failed`` with the reason.
    """
    kind, name = _kind(), _name(device)
    known = _known(kind, name)
    left = [problem for problem in problems if problem.key not in known]
    while left:
        answers = 0
        for row in _answers(left, device, timeout_s):
            problem = left[answers]
            answers += 1
            device_cache.add(kind, name, {problem.key: row})
            known[problem.key] = row
            told(problem, row)
        # A child that has failed has answered for the problem that it failed at, so that this ends.
        left = left[answers:]
    return {problem.key: known[problem.key] for problem in problems}


def _answers(problems: Sequence[Problem], device: torch.device, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Rows of the first ``problems``, up to one that failed with the child."""
    request = {"device": device.index or 0, "problems": [asdict(problem) for problem in problems]}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        assert child.stdin is not None
        assert child.stdout is not None
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # The end is an empty line, as for ``readline``.
        reader = threading.Thread(target=_read, args=(child.stdout, lines))
        reader.start()
        try:
            with suppress(BrokenPipeError):  # it has died already, which the missing answer will tell
                child.stdin.write(json.dumps(request))
                child.stdin.close()
            for _ in problems:
                try:
                    row = json.loads(lines.get(timeout=timeout_s))
                except queue.Empty:
                    yield {"failed": f"no answer after {timeout_s:g} s"}
                    return
                except ValueError:
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(_ENDING_S)
                    log.seek(0)
                    last = (log.read().strip() or "it said nothing").splitlines()[-1]
                    yield {"failed": f"the search ended with status {child.returncode}: {last[-300:]}"}
                    return
                yield row
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            reader.join()
            child.stdout.close()
            with suppress(BrokenPipeError):
                child.stdin.close()


def _read(pipe: Iterable[str], lines: queue.SimpleQueue[str]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put("")


def measure(problem: Problem, device: torch.device) -> dict[str, Any]:
    """A row of the cache; in the child. Every algorithm is checked against the dense product before it is timed."""
    dtype: torch.dtype = getattr(torch, problem.dtype)
    eight_bits = dtype.itemsize == 1
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    groups = random(problem.n_out, problem.n_in // 4, 4)
    smallest = groups.abs().topk(2, dim=2, largest=False).indices
    weight = groups.scatter(2, smallest, 0.0).view(problem.n_out, problem.n_in).to(dtype)
    x = random(problem.tokens, problem.n_in).to(dtype)
    bias = random(problem.n_out).to(dtype) if problem.bias else None
    wide = torch.bfloat16 if eight_bits else dtype
    wanted = torch.nn.functional.linear(x.to(wide), weight.to(wide), bias).float()
    blob = torch._cslt_compress(weight)
    # What the product asks for in ``semi_structured``.
    alpha = torch.ones(problem.n_out, device=device) if eight_bits else None
    out_dtype = torch.bfloat16 if eight_bits else None

    def product(found: Algorithm) -> torch.Tensor:
        return torch._cslt_sparse_mm(
            blob, x.t(), bias=bias, alpha=alpha, out_dtype=out_dtype, transpose_result=True, **found.options()
        )

    def right(found: Algorithm) -> bool:
        error = (product(found).float() - wanted).norm() / wanted.norm()
        return bool(error <= _TOLERANCE[problem.dtype])  # not if it is NaN

    def median_us(found: Algorithm) -> float:
        return statistics.median(timed_us(partial(product, found), device))

    if not right(DEFAULT):
        return {"failed": "the default algorithm gives a wrong product"}
    library: Any = torch._C
    alg_id, split_k, mode, last = library._cusparselt.mm_search(blob, x.t(), bias, alpha, out_dtype, True)
    own = Algorithm(int(alg_id), int(split_k), int(mode) if split_k != 1 else -1)
    default_us = median_us(DEFAULT)
    best, best_us, tried = DEFAULT, default_us, 1
    for found in dict.fromkeys([own, *(Algorithm(i) for i in range(1, int(last) + 1))]):
        with suppress(RuntimeError):  # not every algorithm takes every shape
            if found != DEFAULT and right(found):
                us = median_us(found)
                tried += 1
                if us < best_us:
                    best, best_us = found, us
    return {"algorithm": asdict(best), "us": best_us, "default_us": default_us, "tried": tried}


def main() -> None:
    """The child: problems from the standard input, a row a line to the standard output."""
    request = json.load(sys.stdin)
    # A library that prints must not end up between the rows.
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    device = torch.device("cuda", request["device"])
    for problem in request["problems"]:
        rows.write(json.dumps(measure(Problem(**problem), device)) + "\n")
        rows.flush()


if __name__ == "__main__":
    main()
