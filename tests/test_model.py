"""Every family: found linears, loaded blocks, calls and statistics, against transformers' own forward pass."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from sparsify.checkpoint import CheckpointReader
from sparsify.errors import ModelError
from sparsify.hidden import HiddenStates, enter, file_crc32
from sparsify.model import FAMILIES, load_skeleton, weight_view
from sparsify.naming import Binding
from sparsify.types import LinearSpec
from sparsify.watch import collect
from tests import conftest

EXPECTED = {
    "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma": 7, "gemma2": 7, "gemma3_text": 7, "phi": 6, "phi3": 4,
    "opt": 6, "gpt_neox": 4, "gpt2": 4, "mixtral": 16, "qwen2_moe": 19, "qwen3_moe": 16, "olmoe": 16, "bloom": 4,
}  # fmt: skip


def reference(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("model_type", EXPECTED)
def test_linears_are_found_and_hold_the_weights_of_the_model(
    model_type: str, random_models: Callable[[str], Path]
) -> None:
    folder = random_models(model_type)
    skeleton = load_skeleton(folder)
    assert [len(block) for block in skeleton.linears] == [EXPECTED[model_type]] * 2
    assert bool(skeleton.notices) == (model_type not in FAMILIES)
    binding = Binding(CheckpointReader(folder), skeleton)
    model = reference(folder)
    block = binding.load_block(1, torch.float32, "cpu")
    for name, value in block.state_dict().items():
        assert torch.equal(value, model.state_dict()[skeleton.prefix(1) + name]), name
    views = [(spec, weight_view(skeleton.model.get_parameter(spec.parameter), spec)) for spec in skeleton.linears[1]]
    for spec, view in views:
        assert view.shape == (spec.out_features, spec.in_features)
    # Views cover their parameters without overlap: marking all of them marks every weight once.
    for _, view in views:
        view.fill_(7)
    assert sum(view.numel() for _, view in views) == sum(
        int((p == 7).sum()) for p in block.parameters() if p.dim() >= 2 and (p == 7).any()
    )
    binding.unload(block)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("model_type", EXPECTED)
def test_a_block_goes_back_to_the_tensors_it_came_from(model_type: str, random_models: Callable[[str], Path]) -> None:
    reader = CheckpointReader(random_models(model_type))
    binding = Binding(reader, load_skeleton(reader.folder))
    binding.load_block(0, torch.float32, "cpu")
    stored = binding.stored_form(0)
    names = binding.stored_in(binding.skeleton.prefix(0))
    assert names
    for name, original in reader.read(names):
        assert stored[name].dtype == original.dtype
        assert torch.equal(stored[name], original), name
    assert not set(names) & set(binding.stored_outside_blocks())
    assert len(reader.tensors) == len(binding.stored_outside_blocks()) + 2 * len(names)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_blocks_run_one_by_one_as_the_model_runs_them(
    model_type: str, random_models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = random_models(model_type)
    ids = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    model = reference(folder)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            module.register_forward_pre_hook(lambda _m, x, name=name: inputs.setdefault(name, []).append(x[0].detach()))
    with torch.inference_mode():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        skeleton = load_skeleton(folder)
        binding = Binding(CheckpointReader(folder), skeleton)
        calls, [first] = enter(binding, ids, [tmp_path / "a"], torch.float32, "cpu")
        files = first, HiddenStates(tmp_path / "b", first.layout)
        torch.testing.assert_close(torch.cat(list(files[0].windows("cpu"))), hidden[0])
        block = binding.load_block(0, torch.float32, "cpu")
        with collect(block, skeleton.prefix(0), skeleton.linears[0]) as collector:
            files[1].write(calls.run(block, 0, x) for x in files[0].windows("cpu"))
        assert len(files[1].shards) == len(ids)
        for shard in files[1].shards:
            assert shard.crc32 == file_crc32(shard.path)
        torch.testing.assert_close(torch.cat(list(files[1].windows("cpu"))), hidden[1], rtol=1e-5, atol=1e-5)
        stats = collector.result(skeleton.linears[0])
    compared = 0
    for spec in skeleton.linears[0]:
        assert stats[spec.name].n_tokens > 0
        if spec.expert is None:
            assert stats[spec.name].n_tokens == 60
            expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[spec.name]]).square().sum(dim=0)
            torch.testing.assert_close(stats[spec.name].sq_norm, expected, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared >= 4


def test_linears_that_share_an_input_share_statistics(random_models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = random_models("llama")
    skeleton = load_skeleton(folder)
    binding = Binding(CheckpointReader(folder), skeleton)
    with torch.inference_mode():
        ids = torch.randint(3, 64, (2, 20))
        calls, [file] = enter(binding, ids, [tmp_path / "a"], torch.float32, "cpu")
        block = binding.load_block(0, torch.float32, "cpu")
        with collect(block, skeleton.prefix(0), skeleton.linears[0]) as collector:
            for hidden in file.windows("cpu"):
                with collector.window():
                    calls.run(block, 0, hidden)
        stats = collector.result(skeleton.linears[0])
    by_part = {name.rpartition(".")[2]: value for name, value in stats.items()}
    assert by_part["q_proj"] is by_part["k_proj"] is by_part["v_proj"]
    assert by_part["gate_proj"] is by_part["up_proj"]
    assert len({id(value) for value in stats.values()}) == 4
    assert not any(module._forward_pre_hooks for module in block.modules())


class Twice(torch.nn.Module):
    """Calls ``second`` again where the first channel is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return self.second(y) if x[0, 0] > 0 else y


def test_passes_for_statistics_end_at_the_last_input_and_only_where_that_is_safe() -> None:
    def passes(signs: list[int], stop: bool) -> tuple[dict[str, float], int]:
        torch.manual_seed(0)
        block, finished = Twice(), []
        specs = [LinearSpec(f"b.{part}", f"b.{part}.weight", 4, 4) for part in ("first", "second")]
        block.second.register_forward_hook(lambda *_: finished.append(1))
        with collect(block, "b.", specs) as collector:
            for sign in signs:
                with collector.window() if stop else contextlib.nullcontext():
                    block(torch.full((2, 4), float(sign)))
        return {name: value.sq_norm.sum().item() for name, value in collector.result(specs).items()}, len(finished)

    whole, n_whole = passes([-1, -1, -1], stop=False)
    cut, n_cut = passes([-1, -1, -1], stop=True)
    assert cut == whole
    assert (n_whole, n_cut) == (3, 1)
    # Called twice in the first pass: nothing is ever cut, and the second input counts.
    assert passes([1, -1, 1], stop=True) == passes([1, -1, 1], stop=False)


class Pair(torch.nn.Module):
    """Gate and up, of which the latter sees ten times its input where that is large, if told to."""

    def __init__(self, *, turns: bool) -> None:
        super().__init__()
        self.gate, self.up = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.turns = turns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.gate(x) * self.up(10 * x if self.turns and x[0, 0] > 2 else x))


PAIR = [LinearSpec(f"b.{part}", f"b.{part}.weight", 4, 4) for part in ("gate", "up")]


def test_passes_end_before_linears_whose_input_was_seen_already() -> None:
    block, finished = Pair(turns=False), []
    for part in (block.gate, block.up):
        part.register_forward_hook(lambda *_: finished.append(1))
    with collect(block, "b.", PAIR) as collector:
        for i in range(3):
            with collector.window():
                block(torch.full((2, 4), float(i)))
    stats = collector.result(PAIR)
    assert stats["b.gate"] is stats["b.up"]
    assert stats["b.up"].sq_norm.tolist() == [2 * (0 + 1 + 4)] * 4
    assert len(finished) == 2


def test_inputs_that_are_shared_in_some_passes_only_are_refused() -> None:
    block = Pair(turns=True)
    with collect(block, "b.", PAIR) as collector:
        for _ in range(2):
            with collector.window():
                block(torch.ones(2, 4))
        wanted = r"b\.up\.weight: shares its input with another linear in some calls only"
        with pytest.raises(ModelError, match=wanted), collector.window(whole=True):
            block(torch.full((2, 4), 5.0))


def test_a_pass_ends_early_in_a_block_that_catches_exceptions_too() -> None:
    class Careful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return torch.as_tensor(self.a(x))
            except Exception:
                return torch.as_tensor(self.a(x + 1))

    block = Careful()
    specs = [LinearSpec("b.a", "b.a.weight", 4, 4)]
    with collect(block, "b.", specs) as collector:
        for _ in range(3):
            with collector.window():
                block(torch.ones(2, 4))
    assert collector.result(specs)["b.a"].n_tokens == 6


def test_expert_statistics_are_those_of_the_routed_tokens(random_models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = random_models("mixtral")
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    model = reference(folder)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _m, args: seen.append((args[0].detach(), args[1].detach())))
    with torch.inference_mode():
        model(ids)
        (tokens, routed) = seen[0]
        skeleton = load_skeleton(folder)
        binding = Binding(CheckpointReader(folder), skeleton)
        calls, [file] = enter(binding, ids, [tmp_path / "a"], torch.float32, "cpu")
        block = binding.load_block(0, torch.float32, "cpu")
        with collect(block, skeleton.prefix(0), skeleton.linears[0]) as collector:
            for hidden in file.windows("cpu"):
                calls.run(block, 0, hidden)
        stats = collector.result(skeleton.linears[0])
        for expert in range(4):
            mine = tokens[(routed == expert).any(dim=1)]
            name = f"model.layers.0.mlp.experts.{expert}"
            assert stats[f"{name}.gate_proj"] is stats[f"{name}.up_proj"]
            assert stats[f"{name}.up_proj"].n_tokens == len(mine)
            torch.testing.assert_close(stats[f"{name}.up_proj"].sq_norm, mine.square().sum(dim=0), rtol=1e-4, atol=1e-5)
            gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(
                stats[f"{name}.down_proj"].sq_norm, inner.square().sum(dim=0), rtol=1e-4, atol=1e-5
            )


def test_tied_weights_may_be_stored_under_the_name_of_the_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = conftest.save_random_model(
        tmp_path / "m", transformers.LlamaConfig(**conftest._SIZE, tie_word_embeddings=True)
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    skeleton = load_skeleton(folder)
    binding = Binding(CheckpointReader(folder), skeleton)
    binding.load_surroundings(torch.float32, "cpu")
    assert torch.equal(skeleton.model.model.embed_tokens.weight, tensors["lm_head.weight"])


def test_a_module_that_is_never_called_is_refused_by_name(tmp_path: Path, ids_file: str) -> None:
    from sparsify.errors import ModelError
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    folder = conftest.save_random_model(
        tmp_path / "mamba", transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    )
    with pytest.raises(ModelError, match=r"dt_proj.*never called.*--exclude"):
        prune(Source("m", folder, "folder"), Recipe("0.5", "wanda", calibration=ids_file), tmp_path / "out")


@pytest.mark.parametrize("name", ["vision_tower.encoder.layers.5.fc1.weight", "model.layers.2.eh_proj.weight"])
def test_tensors_that_the_model_does_not_use_are_copied_and_noticed(
    name: str, llama: Path, tmp_path: Path, ids_file: str
) -> None:
    from safetensors.torch import load_file, save_file

    from sparsify import manifest
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    tensors = load_file(llama / "model.safetensors")
    tensors[name] = torch.randn(3, 4)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    out = prune(Source("m", llama, "folder"), Recipe("2:4", calibration=ids_file), tmp_path / "out")
    assert any(name in text for text in manifest.read(out)["notices"])
    assert torch.equal(dict(CheckpointReader(out).read([name]))[name], tensors[name])


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_lack_of_memory_is_not_taken_for_an_unknown_architecture(
    error: type[Exception], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = load_skeleton(llama)
    binding = Binding(CheckpointReader(llama), skeleton)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(skeleton.model.base_model), "forward", fail)
    with pytest.raises(error):
        enter(binding, torch.ones(1, 4).long(), [tmp_path / "a"], torch.float32, "cpu")


def test_an_architecture_whose_blocks_cannot_be_run_alone_is_refused_by_name(tmp_path: Path, ids_file: str) -> None:
    from sparsify.errors import ModelError
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    config = transformers.RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, vocab_size=64, context_length=64
    )
    folder = conftest.save_random_model(tmp_path / "rwkv", config)
    with pytest.raises(ModelError, match=r"rwkv.*not supported yet"):
        prune(Source("m", folder, "folder"), Recipe("0.5", "wanda", calibration=ids_file), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rwkv"]


def test_embeddings_narrower_than_the_blocks(tmp_path: Path, ids_file: str) -> None:
    from sparsify import manifest
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    config = conftest.CONFIGS["opt"]()
    config.word_embed_proj_dim = 16
    folder = conftest.save_random_model(tmp_path / "opt", config)
    out = prune(Source("m", folder, "folder"), Recipe("2:4", "ria", calibration=ids_file), tmp_path / "out")
    covered = manifest.read(out)["coverage"]
    assert covered["zeros"] * 2 == covered["selected"]


def test_coverage_counts_each_parameter_once_and_no_buffers(
    random_models: Callable[[str], Path], ids_file: str
) -> None:
    from sparsify import manifest
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    for model_type in ("gpt2", "gemma", "mixtral"):
        folder = random_models(model_type)
        out = folder.with_name(f"{model_type}-covered")
        prune(Source("m", folder, "folder"), Recipe("2:4", "ria", calibration=ids_file), out)
        expected = sum(parameter.numel() for parameter in reference(folder).parameters())
        assert manifest.read(out)["coverage"]["total"] == expected
