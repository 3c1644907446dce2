"""What streaming, resuming and the manifest cost: seconds of `prune` over those of a plain loop with all in memory.

    python benchmarks/streaming_overhead.py --model smollm2-135m --out benchmarks/results/streaming_overhead.json

The loop is what a research script does, for models built like Llama: it loads the model by transformers, runs the
windows through one block after the other with hooks on its linears, solves, runs the block again for what the next one
sees, and ends in `save_pretrained`. Model and hidden states stay in memory; nothing is hashed, nothing could be
resumed. Solver, windows, dtype and threads are those of `prune`. Two shortcuts of the driver are none that scripts
take: a pass ends where the last input has been seen, and of a Gram matrix the upper triangle is summed. A second loop
takes them too, which leaves nothing but the overhead.

Every run is a process of its own, all ways in turn, in an order drawn anew in each round; seconds are those between
the imports and the end of the output. Rounds are added to those that FILE has of the same commit and arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import commit, earlier

from sparsify.bench.host import environment
from sparsify.bench.spread import spread

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparsify.recipe import Recipe
    from sparsify.source import Source
    from sparsify.stats import InputStats

STREAMED, LOOPS = "prune", ("loop", "loop with shortcuts")
# Linears of a block that share an input.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class _SeenError(Exception):
    """All that a pass is for has been seen."""


def loop(source: Source, recipe: Recipe, out: Path, *, short: bool) -> None:
    """Prune as a research script does; ``short``: with the driver's shortcuts."""
    import torch
    from transformers import AutoModelForCausalLM

    from sparsify.data import load_windows
    from sparsify.layer import prune_layer
    from sparsify.solvers.quadratic import Gram

    plan, pattern = recipe.plan, recipe.parsed
    stored = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    dtype, model = stored.dtype, stored.float().eval()
    ids = load_windows(
        recipe.calibration, source.folder, n_windows=recipe.windows, length=recipe.length, split="calibration",
        seed=recipe.seed,
    ).ids  # fmt: skip
    blocks = model.model.layers
    hidden, call = _entering(model, torch.from_numpy(ids))
    for index, block in enumerate(blocks):
        stats = _statistics(block, hidden, call, gram=plan.needs_gram, short=short)
        for group, entry in zip(GROUPS, stats, strict=True):
            gram = Gram(entry.gram, entry.n_tokens, plan.setting("damping")) if entry.gram is not None else None
            for name in group:
                weight = block.get_submodule(name).weight
                outcome = prune_layer(weight.data, entry, gram, pattern, plan, length=recipe.length)
                weight.data.copy_(outcome.weight.to(dtype))
        if index + 1 < len(blocks):
            for i, window in enumerate(hidden):
                hidden[i] = block(window, **call)
    model.to(dtype).save_pretrained(out)


def _entering(model: nn.Module, ids: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What enters the first block for each window of ids, and what it is called with beside that."""
    hidden: list[torch.Tensor] = []
    call: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        call.update(kwargs)
        raise _SeenError

    base: Any = model.model
    handle = base.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for window in ids:
        try:
            base(input_ids=window[None], use_cache=False)
        except _SeenError:
            continue
    handle.remove()
    return hidden, call


class _Sums:
    """Of the tokens of one input."""

    def __init__(self, n_in: int, *, gram: bool, short: bool) -> None:
        import torch

        self.sq_norm, self.n_tokens = torch.zeros(n_in, dtype=torch.float64), 0
        self.gram = torch.zeros(n_in, n_in) if gram else None
        self.strip = -(-n_in // 4) if short else n_in

    def add(self, x: torch.Tensor) -> None:
        tokens = x.flatten(0, -2)
        self.sq_norm += tokens.norm(dim=0).double().square()
        self.n_tokens += len(tokens)
        if self.gram is not None:
            for a in range(0, len(self.gram), self.strip):
                self.gram[a : a + self.strip, a:].addmm_(tokens[:, a : a + self.strip].t(), tokens[:, a:])

    def result(self) -> InputStats:
        from sparsify.stats import InputStats

        gram = self.gram
        if gram is not None and self.strip < len(gram):
            gram = gram.triu_()
            gram += gram.triu(1).t()
        return InputStats(self.sq_norm.float(), self.n_tokens, gram=gram)


def _statistics(
    block: nn.Module, hidden: list[torch.Tensor], call: dict[str, Any], *, gram: bool, short: bool
) -> list[InputStats]:
    """Of the input of each of ``GROUPS``, from one pass of all windows."""
    found, handles = [], []
    for group in GROUPS:
        module: Any = block.get_submodule(group[0])
        found.append(_Sums(module.in_features, gram=gram, short=short))

        def see(
            _module: nn.Module,
            args: tuple[torch.Tensor, ...],
            sums: _Sums = found[-1],
            last: bool = group is GROUPS[-1],
        ) -> None:
            sums.add(args[0])
            if last and short:
                raise _SeenError

        handles.append(module.register_forward_pre_hook(see))
    for window in hidden:
        try:
            block(window, **call)
        except _SeenError:
            continue
    for handle in handles:
        handle.remove()
    return [sums.result() for sums in found]


def child(way: str, model: str, method: str, options: argparse.Namespace) -> None:
    """Prune once by ``way``; prints what it took as JSON."""
    import resource

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from sparsify.memory import peak_memory_bytes
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import resolve

    source = resolve(model)
    recipe = Recipe(
        options.pattern, method, calibration=options.calibration, windows=options.windows, length=options.length
    )
    out = Path(options.child[-1])
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    with torch.inference_mode():
        if way == STREAMED:
            prune(source, recipe, out)
        else:
            loop(source, recipe, out, short=way == LOOPS[1])
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "seconds": seconds,
        "user_cpu_seconds": after.ru_utime - before.ru_utime,
        "system_cpu_seconds": after.ru_stime - before.ru_stime,
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found))


def agreement(ours: Path, theirs: Path) -> dict[str, float]:
    """How much of the weights of two folders' linears is pruned alike, and how much is the same to the bit."""
    import torch

    from sparsify.files import read_json
    from sparsify.format.reader import open_checkpoint

    names = [f"{row['name']}.weight" for row in read_json(ours / "sparsify.json")["linears"]]
    others, n, masks, bits = dict(open_checkpoint(theirs).read(names)), 0, 0, 0
    for name, a in open_checkpoint(ours).read(names):
        b = others[name]
        n += a.numel()
        masks += int(((a == 0) == (b == 0)).sum())
        bits += int(torch.eq(a, b).sum())
    return {"weights": n, "equal_masks": masks / n, "equal_weights": bits / n}


def run_round(method: str, ways: list[str], options: argparse.Namespace, *, compare: bool) -> dict[str, Any]:
    """Each way once; what each took, and how the outputs differ where that is asked for."""
    found: dict[str, Any] = {"method": method, "order": ways, "runs": {}, "agreement": {}}
    variables = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            out = Path(folder) / way
            given = [
                "--model", options.model, "--pattern", options.pattern, "--calibration", options.calibration,
                "--windows", str(options.windows), "--length", str(options.length), "--out", str(options.out),
            ]  # fmt: skip
            command = [sys.executable, __file__, *given, "--child", way, method, str(out)]
            began = time.monotonic()
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **variables}
            )
            row = json.loads(done.stdout.splitlines()[-1])
            row["process_seconds"] = time.monotonic() - began
            found["runs"][way] = row
            print(method, way, {key: round(value, 2) for key, value in row.items()}, flush=True)
        if compare:
            found["agreement"] = {way: agreement(Path(folder) / STREAMED, Path(folder) / way) for way in LOOPS}
    return found


def tables(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """By method: seconds, overheads paired within rounds, memory, and the agreement that was measured."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(each["method"] for each in rounds):
        mine = [each for each in rounds if each["method"] == method]
        runs = [each["runs"] for each in mine]
        found[method] = {
            "seconds": {way: spread([run[way]["seconds"] for run in runs]) for way in (STREAMED, *LOOPS)},
            **{
                f"{key}, prune over {way}": spread([run[STREAMED][key] / run[way][key] for run in runs])
                for key in ("seconds", "process_seconds", "user_cpu_seconds", "peak_memory_bytes")
                for way in LOOPS
            },
            "agreement": next((each["agreement"] for each in mine if each["agreement"]), {}),
        }
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", nargs="+", choices=("wanda", "sparsegpt"), default=["wanda", "sparsegpt"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="to add")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.model, options.child[1], options)
        return
    keys = ("model", "pattern", "calibration", "windows", "length", "threads")
    record: dict[str, Any] = {
        "benchmark": "streaming_overhead",
        "commit": commit(),
        "arguments": {key: getattr(options, key) for key in keys},
    }
    rounds: list[dict[str, Any]] = earlier(options.out, record).get("rounds", [])
    for _ in range(options.rounds):
        for method in options.methods:
            n = sum(each["method"] == method for each in rounds)
            ways = [STREAMED, *LOOPS]
            random.Random(f"{method} {n}").shuffle(ways)
            rounds.append(run_round(method, ways, options, compare=n == 0))
            whole = {**record, "environment": environment(options.threads), "tables": tables(rounds), "rounds": rounds}
            options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(tables(rounds), indent=1))


if __name__ == "__main__":
    main()
