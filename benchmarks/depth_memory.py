"""Peak memory of pruning against depth, under a hard limit that loading the whole model breaks.

    python benchmarks/depth_memory.py --out benchmarks/results/depth_memory.json

Random-weight Llamas of 4, 16 and 64 blocks of one width (written shard by shard) are pruned in a process whose address
space may grow by `--headroom-mib` after its imports, and not more. The same limit is put on the naive way, which loads
the model in float32, to show that the limit is real.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import commit

WIDTH = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}


def make_model(folder: Path, n_blocks: int, shape: dict[str, int], length: int = 512) -> None:
    """A bfloat16 Llama of random weights, one shard per block, never more than one of them in memory."""
    import torch
    import transformers

    from sparsify.checkpoint import write_index, write_shard

    config = transformers.LlamaConfig(
        **shape, num_hidden_layers=n_blocks, vocab_size=1024, max_position_embeddings=length, dtype="bfloat16"
    )
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    folder.mkdir()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, list[str]] = {}
    for name in state:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        groups.setdefault(f"model-{part}.safetensors", []).append(name)
    shards = {}
    for file, names in groups.items():
        tensors = {n: torch.randn(state[n].shape, generator=generator).mul_(0.02).bfloat16() for n in names}
        write_shard(folder / file, tensors)
        shards[file] = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_index(folder, shards)


def child(action: str, folder: Path, ids: str, headroom: int) -> None:
    """Prune, or load the naive way, under the limit; prints peak memory as JSON."""
    import torch
    import transformers

    from sparsify.memory import peak_memory_bytes
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    torch.set_num_threads(2)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pool's stacks belong to what was there before
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    before = int(status["VmSize"].split()[0]) * 1024
    limit = before + headroom * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    transformers.logging.disable_progress_bar()
    if action == "prune":
        prune(
            Source("random", folder, "folder"),
            Recipe("2:4", "wanda", calibration=ids),
            folder.with_name("out"),
            overwrite=True,
        )
    else:
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Not ru_maxrss: a process inherits that from the one that started it, and the one here has made the model.
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes()}))


def main() -> None:
    """Every depth, both ways; table and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--headroom-mib", type=int, default=1024)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.child[2], options.headroom_mib)
        return
    import torch
    from safetensors.torch import save_file

    records: list[dict[str, Any]] = []
    print(
        "| blocks | float32 MiB | limit above imports, MiB | pruning: peak MiB | loading it whole |\n"
        "|--:|--:|--:|--:|---|"
    )
    for n_blocks in (4, 16, 64):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            make_model(folder, n_blocks, WIDTH)
            size = 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            ids = Path(scratch) / "ids.safetensors"
            save_file({"ids": torch.randint(0, 1024, (8, 128), generator=torch.Generator().manual_seed(0))}, ids)
            record: dict[str, Any] = {"blocks": n_blocks, "float32_bytes": size, "headroom_mib": options.headroom_mib}
            for action in ("prune", "load"):
                command = [sys.executable, __file__, "--headroom-mib", str(options.headroom_mib)]
                result = subprocess.run(
                    [*command, "--child", action, str(folder), f"{ids}:ids"], capture_output=True, text=True
                )
                record[action] = (
                    json.loads(result.stdout.splitlines()[-1])
                    if result.returncode == 0
                    else {"failed": result.returncode, "error": result.stderr.strip().splitlines()[-1][:200]}
                )
            records.append(record)
            peak = record["prune"].get("peak_memory_bytes", 0) / 2**20
            naive = record["load"].get("error") or f"peak {record['load']['peak_memory_bytes'] / 2**20:.0f} MiB"
            print(f"| {n_blocks} | {size / 2**20:.0f} | {options.headroom_mib} | {peak:.0f} | {naive} |", flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"commit": commit(), "width": WIDTH, "records": records}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
