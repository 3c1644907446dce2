"""The driver, against the textbook way: a whole model in memory, hooks on every linear."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparsify import manifest
from sparsify.checkpoint import CheckpointReader
from sparsify.errors import NumericsError, OutputError, UsageError
from sparsify.masks import keep_mask
from sparsify.methods import METHODS
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.scores import SCORES
from sparsify.source import Source
from sparsify.stats import InputStats
from sparsify.types import parse_pattern
from tests import conftest
from tests.fakes import Notices


def source(folder: Path) -> Source:
    return Source(folder.name, folder, "folder")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in manifest.ABOUT_RUN
    }


def textbook(folder: Path, ids: torch.Tensor, method: str, pattern: str) -> dict[str, torch.Tensor]:
    """Weights after sequential pruning of a llama with the whole model in memory."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    groups = {"magnitude": "layer", "wanda": "row", "ria": "layer"}
    with torch.inference_mode():
        for block in model.model.layers:
            sums: dict[torch.nn.Module, torch.Tensor] = {}
            linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]

            def hook(module: torch.nn.Module, x: Any, sums: dict[torch.nn.Module, torch.Tensor] = sums) -> None:
                sums[module] = sums.get(module, torch.zeros(1)) + x[0].double().square().sum(dim=(0, 1))

            handles = [linear.register_forward_pre_hook(hook) for linear in linears]
            model(ids)
            for handle in handles:
                handle.remove()
            for linear in linears:
                stats = InputStats(sums[linear].float(), ids.numel())
                score = SCORES[method](linear.weight, stats, METHODS[method], 0)
                linear.weight *= keep_mask(score, parse_pattern(pattern), default_group=groups[method])
    return dict(model.state_dict())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("pattern", ["2:4", "0.6", "1:4"])
def test_streaming_gives_the_weights_of_the_textbook(
    method: str, pattern: str, stories: Path, tmp_path: Path, stories_ids: str
) -> None:
    from safetensors.torch import load_file

    file, key = stories_ids.rsplit(":", 1)
    expected = textbook(stories, load_file(file)[key].long(), method, pattern)
    out = prune(source(stories), Recipe(pattern, method, calibration=stories_ids), tmp_path / "out")
    reader = CheckpointReader(out)
    differing = total = 0
    for name, tensor in reader.read(reader.tensors):
        differing += int((tensor != expected[name]).sum())
        total += tensor.numel()
    # Rounding of batched against single windows may flip a near-tie; a wrong rule would move thousands.
    assert differing <= 1e-4 * total
    body = manifest.read(out)
    assert len(body["linears"]) == 35
    assert (body["calibration"] or {}).get("windows") == (None if method == "magnitude" else 8)


@pytest.fixture(scope="module")
def stories_ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"ids": torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(2))}, path)
    return f"{path}:ids"


@pytest.mark.parametrize("model_type", conftest.CONFIGS)
@pytest.mark.parametrize("method", ["ria", "magnitude"])
def test_every_family_is_pruned_and_opens_in_transformers(
    model_type: str, method: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    folder = random_models(model_type)
    out = prune(source(folder), Recipe("2:4", method, calibration=ids_file), tmp_path / "out")
    body = manifest.read(out)
    covered = body["coverage"]
    assert covered["zeros"] * 2 == covered["selected"] == covered["prunable"] < covered["total"]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state, before = model.state_dict(), dense.state_dict()
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    parameters = {name for name in state if "layers" in name or ".h." in name}
    assert changed
    assert changed <= parameters
    for name in changed:
        kept = state[name] != 0
        assert torch.equal(state[name][kept], before[name][kept])
    assert sum(int((value == 0).sum()) for value in state.values()) >= covered["zeros"]


def test_bfloat16_and_shards_and_dtype_survive(tmp_path: Path, ids_file: str) -> None:
    folder = conftest.save_random_model(
        tmp_path / "m", conftest.CONFIGS["llama"](), dtype=torch.bfloat16, max_shard_size="8KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 3
    out = prune(source(folder), Recipe("0.5", "wanda", calibration=ids_file), tmp_path / "out")
    reader, before = CheckpointReader(out), CheckpointReader(folder)
    assert reader.tensors.keys() == before.tensors.keys()
    assert {info.dtype for info in reader.tensors.values()} == {"BF16"}
    single = conftest.save_random_model(tmp_path / "s", conftest.CONFIGS["llama"](), dtype=torch.bfloat16)
    again = prune(source(single), Recipe("0.5", "wanda", calibration=ids_file), tmp_path / "again")
    for name, tensor in CheckpointReader(again).read(reader.tensors):
        assert torch.equal(tensor, dict(reader.read([name]))[name])


def test_negative_zero_and_untouched_bits_survive(llama: Path, tmp_path: Path, ids_file: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -0.0
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    out = prune(source(llama), Recipe("0", "wanda", calibration=ids_file), tmp_path / "out")
    for name, tensor in CheckpointReader(out).read(tensors):
        assert tensor.numpy().tobytes() == tensors[name].numpy().tobytes()


def test_include_exclude_and_overrides(llama: Path, tmp_path: Path, ids_file: str) -> None:
    recipe = Recipe(
        "0.5",
        "wanda",
        include=("*.mlp.*",),
        exclude=("*.1.*up_proj",),
        overrides={"*.down_proj": "1:4", "*.0.mlp.down_proj": "0.25"},
        calibration=ids_file,
    )
    body = manifest.read(prune(source(llama), recipe, tmp_path / "out"))
    zeros = {row["name"]: row["zeros"] / math.prod(row["shape"]) for row in body["linears"]}
    assert zeros == {
        "model.layers.0.mlp.gate_proj": 0.5,
        "model.layers.0.mlp.up_proj": 0.5,
        "model.layers.0.mlp.down_proj": 0.25,
        "model.layers.1.mlp.gate_proj": 0.5,
        "model.layers.1.mlp.down_proj": 0.75,
    }
    assert body["coverage"]["selected"] < body["coverage"]["prunable"]


@pytest.mark.parametrize(("include", "calls"), [("*.layers.0.*", 4), ("*.layers.2.*", 12), ("*.layers.4.*", 20)])
def test_blocks_are_run_no_more_often_than_needed(
    include: str, calls: int, stories: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify import hidden

    original = hidden.Calls.run
    seen: list[int] = []

    def run(self: hidden.Calls, block: torch.nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
        seen.append(index)
        return original(self, block, index, x)

    monkeypatch.setattr(hidden.Calls, "run", run)
    prune(source(stories), Recipe("2:4", "ria", include=(include,), calibration=ids_file), tmp_path / "out")
    # Four windows: once through each block before the chosen one, once for its statistics, and no further.
    assert len(seen) == calls


@pytest.mark.parametrize("glob", ["nothing.*", "q_proj"])
def test_globs_that_match_nothing_are_refused(glob: str, llama: Path, tmp_path: Path) -> None:
    for recipe in (Recipe(include=(glob,)), Recipe(exclude=(glob,)), Recipe(overrides={glob: "0.1"})):
        with pytest.raises(UsageError, match="matches no prunable linear"):
            prune(source(llama), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="leave no linear"):
        prune(source(llama), Recipe(exclude=("*",)), tmp_path / "out")


def test_width_that_m_does_not_divide(llama: Path, tmp_path: Path, ids_file: str) -> None:
    with pytest.raises(UsageError, match=r"32 inputs.*not a multiple of 5"):
        prune(source(llama), Recipe("2:5", calibration=ids_file), tmp_path / "out")


def test_unrouted_experts_are_reported(random_models: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    progress = Notices()
    save_file({"ids": torch.tensor([[5, 6]])}, tmp_path / "few.safetensors")
    recipe = Recipe("2:4", "wanda", calibration=f"{tmp_path}/few.safetensors:ids")
    body = manifest.read(prune(source(random_models("olmoe")), recipe, tmp_path / "out", progress=progress))
    unseen = [row for row in body["linears"] if row["n_tokens"] == 0]
    assert unseen
    assert all(row["zeros"] * 2 == math.prod(row["shape"]) for row in unseen)
    assert any("saw no calibration token" in text for text in progress.texts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_inf_in_weights_names_module_and_channel(
    value: float, llama: Path, tmp_path: Path, ids_file: str
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 17] = value
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.down_proj.*channel 17"):
        prune(source(llama), Recipe("2:4", calibration=ids_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_activations_names_module_and_channel(llama: Path, tmp_path: Path, ids_file: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    # Finite weights whose product is not.
    tensors["model.layers.1.input_layernorm.weight"][9] = 3e38
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.\w+.*channel 9"):
        prune(source(llama), Recipe("2:4", calibration=ids_file), tmp_path / "out")


def test_the_recipe_in_the_manifest_reproduces_the_run(llama: Path, tmp_path: Path, ids_file: str) -> None:
    from sparsify.recipe import from_mapping

    recipe = Recipe(
        "0.55", "ria", settings={"ria.exponent": 0.7}, group="row", exclude=("*.o_proj",), calibration=ids_file
    )
    first = prune(source(llama), recipe, tmp_path / "first")
    again = prune(source(llama), from_mapping(manifest.read(first)["recipe"], "manifest"), tmp_path / "again")
    assert tree(first) == tree(again)


def test_an_existing_output_is_kept_unless_overwritten(llama: Path, tmp_path: Path, ids_file: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    recipe = Recipe("2:4", calibration=ids_file)
    with pytest.raises(OutputError, match="--overwrite"):
        prune(source(llama), recipe, out)
    with pytest.raises(OutputError, match=r"precious\.txt is not part of an output"):
        prune(source(llama), recipe, out, overwrite=True)
    assert tree(out) == {"precious.txt": b"mine"}
    (out / "precious.txt").unlink()
    prune(source(llama), recipe, out)
    before = tree(out)
    with pytest.raises(UsageError):
        prune(source(llama), Recipe("2:5", calibration=ids_file), out, overwrite=True)
    assert tree(out) == before
    prune(source(llama), Recipe("0.5", calibration=ids_file), out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]
    assert manifest.read(out)["recipe"]["pattern"] == "0.5"


def test_no_output_replaces_the_model_or_a_folder_of_somebody_else(llama: Path, tmp_path: Path, ids_file: str) -> None:
    recipe = Recipe("2:4", calibration=ids_file)
    (llama / "sparsify.json").write_text("{}")
    before = tree(tmp_path)
    for out in (llama, tmp_path):
        with pytest.raises(OutputError, match="holds the input"):
            prune(source(llama), recipe, out, overwrite=True)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").write_text("mine")
    with pytest.raises(OutputError, match="not a folder of sparsify's"):
        prune(source(llama), recipe, tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before | {"out.partial/mine": b"mine"}


def test_what_was_never_committed_to_is_not_delivered(llama: Path, tmp_path: Path, ids_file: str) -> None:
    partial = tmp_path / "out.partial"
    (partial / "hf").mkdir(parents=True)
    (partial / ".lock").touch()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"stale")
    out = prune(source(llama), Recipe("2:4", calibration=ids_file), tmp_path / "out")
    assert not {"hf", "model-00001-of-00009.safetensors"} & {path.name for path in out.iterdir()}
    assert set(manifest.artifact_files(out)) == set(manifest.read(out)["files"])


def test_overwrite_resumes_what_can_be_resumed(
    llama: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("2:4", calibration=ids_file)
    conftest.interrupt(monkeypatch, "sparsify.prune._Run.finish")
    with pytest.raises(KeyboardInterrupt):
        prune(source(llama), recipe, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    out = prune(source(llama), recipe, tmp_path / "out", overwrite=True)
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] == 2


def test_a_compute_dtype_that_would_round_the_weights_is_refused(llama: Path, tmp_path: Path, ids_file: str) -> None:
    with pytest.raises(UsageError, match="stored as F32"):
        prune(source(llama), Recipe("2:4", "ria", compute_dtype="bfloat16", calibration=ids_file), tmp_path / "out")
    folder = conftest.save_random_model(tmp_path / "m", conftest.CONFIGS["llama"](), dtype=torch.bfloat16)
    out = prune(source(folder), Recipe("2:4", "ria", compute_dtype="bfloat16", calibration=ids_file), tmp_path / "out")
    before = CheckpointReader(folder)
    for name, tensor in CheckpointReader(out).read(before.tensors):
        original = dict(before.read([name]))[name]
        assert torch.equal(tensor[tensor != 0], original[tensor != 0])


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_nan_outside_the_blocks_is_found(name: str, llama: Path, tmp_path: Path, ids_file: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=rf"{name.removesuffix('.weight')}: channel 31"):
        prune(source(llama), Recipe("2:4", "magnitude"), tmp_path / "out")


def test_a_failed_run_resumes_and_another_recipe_is_refused(
    llama: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("2:4", calibration=ids_file)
    whole = prune(source(llama), recipe, tmp_path / "whole")
    conftest.interrupt(
        monkeypatch,
        "sparsify.block.BlockPruner._prune_linear",
        when=lambda _, spec, *rest: ".1.mlp.up_proj" in spec.name,
    )
    with pytest.raises(KeyboardInterrupt):
        prune(source(llama), recipe, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert len(json.loads((tmp_path / "out.partial/.state.json").read_text())["state"]["blocks"]) == 1
    with pytest.raises(OutputError, match="another recipe"):
        prune(source(llama), Recipe("0.5", calibration=ids_file), tmp_path / "out")
    out = prune(source(llama), recipe, tmp_path / "out")
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] == 1
    assert tree(out) == tree(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "damage", ["json", "deep", "list", "hidden", "inputs", "shard", "threads", "blocks", "numbers", "rows"]
)
def test_damaged_interrupted_work_is_noticed(
    damage: str, llama: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conftest.interrupt(monkeypatch, "sparsify.prune._Run.finish")
    recipe = Recipe("2:4", calibration=ids_file)
    with pytest.raises(KeyboardInterrupt):
        prune(source(llama), recipe, tmp_path / "out")
    monkeypatch.undo()
    partial = tmp_path / "out.partial"
    stored = json.loads((partial / ".state.json").read_text())
    state = stored["state"]
    if damage == "shard":
        (partial / state["blocks"]["0"]["file"]).write_bytes(b"short")
    elif damage == "hidden":
        (partial / "hidden.1").write_bytes(b"other")
        state["hidden"] = {"hidden.1": 1}
    elif damage == "inputs":
        del state["blocks"]["1"]
    elif damage == "threads":
        state["threads"] = "many"
    elif damage == "blocks":
        state["blocks"] = {"0": {}}
    elif damage == "numbers":
        state["blocks"]["7"] = state["blocks"].pop("1")
    elif damage == "rows":
        state["blocks"]["0"]["linears"][0].pop("zeros")
    text = {"json": '{"state": [', "deep": "[" * 10**5, "list": "[1]"}.get(damage) or json.dumps(stored)
    (partial / ".state.json").write_text(text)
    with pytest.raises(OutputError, match="--overwrite"):
        prune(source(llama), recipe, tmp_path / "out")
    prune(source(llama), recipe, tmp_path / "out", overwrite=True)


def test_two_runs_into_one_folder_are_refused(llama: Path, tmp_path: Path, ids_file: str) -> None:
    from sparsify.files import staging_folder

    with (
        staging_folder(tmp_path / "out", {}),
        pytest.raises(OutputError, match="another sparsify process"),
    ):
        prune(source(llama), Recipe("2:4", calibration=ids_file), tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "olmoe"])
@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_gpu_gives_the_masks_of_the_cpu(
    model_type: str, pattern: str, random_models: Callable[[str], Path], ids_file: str, tmp_path: Path
) -> None:
    recipe = Recipe(pattern, "ria", calibration=ids_file)
    folders = [
        prune(source(random_models(model_type)), recipe, tmp_path / device, device=device) for device in ("cpu", "cuda")
    ]
    first, second = map(CheckpointReader, folders)
    differing = total = 0
    for name, tensor in first.read(first.tensors):
        differing += int((tensor != dict(second.read([name]))[name]).sum())
        total += tensor.numel()
    assert differing <= 1e-3 * total


def test_of_passes_for_statistics_the_first_and_the_last_of_the_text_are_complete(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    n_windows, n_blocks, complete = 20, 2, 0
    forward = torch.nn.Linear.forward

    def counting(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        nonlocal complete
        # The last linear of a block, the only one of these sizes.
        complete += (self.in_features, self.out_features) == (48, 32)
        return forward(self, x)

    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    assert (config["intermediate_size"], config["hidden_size"], config["num_hidden_layers"]) == (48, 32, n_blocks)
    ids = torch.randint(3, 64, (n_windows, 24), generator=torch.Generator().manual_seed(1))
    save_file({"calibration": ids.to(torch.int32)}, tmp_path / "ids.safetensors")
    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    recipe = Recipe("2:4", "wanda", calibration=f"{tmp_path / 'ids.safetensors'}:calibration", windows=n_windows)
    prune(source(llama), recipe, tmp_path / "out")
    # Nothing wants what leaves the last block.
    assert complete == 2 * n_blocks + n_windows * (n_blocks - 1)
