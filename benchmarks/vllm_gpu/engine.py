"""What runs in the process of an engine: start it, ask it, time it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_machine.llama import Llama


class Probe:
    """Added to vLLM's worker: what is in the memory of the process that computes."""

    def sparsify_memory(self) -> dict[str, Any]:
        """Bytes of the model's tensors, each storage once, and what the allocator and the process hold."""
        import torch

        worker: Any = self
        model = worker.model_runner.get_model()
        storages = {}
        # Where vLLM has laid a weight out anew it may be an attribute that is no parameter.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.device.type != "meta":
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        found: dict[str, Any] = {"model_tensor_bytes": sum(storages.values())}
        usage = getattr(worker.model_runner, "model_memory_usage", None)
        found["vllm_model_bytes"] = None if usage is None else int(usage)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            found["allocated_bytes"] = torch.cuda.memory_allocated()
            found["reserved_bytes"] = torch.cuda.memory_reserved()
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if "kB" in line}
        return {**found, "rss_anon_bytes": sizes.get("RssAnon")}


def start_engine(arguments: dict[str, Any]) -> Any:
    """An engine on the checkpoint; CUDA graphs for the batch sizes that are asked for."""
    from vllm import LLM

    batch, length = arguments["max_batch"], arguments["max_length"]
    options: dict[str, Any] = {
        "model": arguments["folder"],
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enforce_eager": arguments["eager"],
        "max_model_len": length,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(length, arguments["batched_tokens"]),
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "seed": 0,
        "worker_extension_cls": "vllm_gpu.engine.Probe",
    }
    if arguments["kernel"]:
        options["additional_config"] = {"sparsify": {"kernel": arguments["kernel"]}}
    if arguments["device"] == "cuda":
        per_token = Llama(**arguments["sizes"]).cache_bytes_per_token
        # The same for all variants, and known: else vLLM takes what is left of the GPU.
        options["kv_cache_memory_bytes"] = per_token * arguments["cache_tokens"]
        if not arguments["eager"]:
            options["compilation_config"] = {"cudagraph_capture_sizes": arguments["graph_batches"]}
        if arguments["attention"]:
            options["attention_config"] = {"backend": arguments["attention"]}
    return LLM(**options)


def _prompts(n: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    import torch

    ids = torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def ask_engine(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Greedy tokens after a few prompts, and log-probabilities of the prompts' tokens."""
    from vllm import SamplingParams

    engine = start_engine(arguments)
    prompts = _prompts(8, 48, arguments["sizes"]["vocabulary"], 0)
    sampling = SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    logprobs = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt["prompt_token_ids"]
        logprobs.append([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    yield {"tokens": tokens, "logprobs": logprobs, "memory": engine.collective_rpc("sparsify_memory")[0]}


def time_engine(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Start an engine and time it: decoding at several batch sizes, prefill at several lengths."""
    started = time.perf_counter()
    from vllm import SamplingParams

    import_s = time.perf_counter() - started
    started = time.perf_counter()
    engine = start_engine(arguments)
    start_s = time.perf_counter() - started
    vocabulary = arguments["sizes"]["vocabulary"]

    def seconds(prompts: list[dict[str, list[int]]], n_tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == n_tokens for output in outputs)
        return taken

    decode: dict[str, list[float]] = {}
    prefill: dict[str, list[float]] = {}
    n_new = arguments["new_tokens"]
    for batch in arguments["batches"]:
        seconds(_prompts(batch, arguments["prompt"], vocabulary, 0), 4)
        for repeat in range(arguments["repeats"]):
            prompts = _prompts(batch, arguments["prompt"], vocabulary, repeat)
            # The prompts' own pass and the first token are in both, and fall out.
            first = seconds(prompts, 1)
            decode.setdefault(str(batch), []).append(batch * n_new / (seconds(prompts, 1 + n_new) - first))
    for length in arguments["lengths"]:
        seconds(_prompts(1, length, vocabulary, 0), 1)
        for repeat in range(arguments["repeats"]):
            taken = seconds(_prompts(1, length, vocabulary, 1 + repeat), 1)
            prefill.setdefault(str(length), []).append(length / taken)
    yield {
        "import_s": import_s,
        "start_s": start_s,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": prefill,
        "memory": engine.collective_rpc("sparsify_memory")[0],
    }
