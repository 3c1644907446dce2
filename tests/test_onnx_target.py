"""Target ``onnx`` in all its forms, from a pruned checkpoint to an artifact that is verified again from its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.decompress import decompress
from sparsify.errors import ModelError, VerificationError
from sparsify.exporters.onnx_forms import RUNS, choose
from sparsify.exporters.onnx_genai import UnsupportedError, export_genai
from sparsify.exporters.onnx_places import WeightLocation
from sparsify.exporters.onnx_reader import FLOATS, OnnxWeights
from sparsify.exporters.onnx_twin import write_float32_twin
from sparsify.exporters.onnx_weights import find_weights, weight_at
from sparsify.naming import linear_weights
from sparsify.pipeline import export
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.runtimes.genai_session import GenaiSession
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.source import Source
from sparsify.targets import Options
from sparsify.verify import verify
from tests.conftest import CONFIGS, Run, refuse, save_random_model

FORMS = [(layout, precision) for layout, table in RUNS.items() for precision in table]
Make = Callable[[str, str], Path]


# Heads of 16, as layout genai needs them.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def random_model(folder: Path, config: Any, stories: Path) -> Source:
    """A random model with the trained one's tokenizer, without which the builder does not start."""
    save_random_model(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, folder / name)
    return Source(folder.name, folder, "folder")


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama at 2:4, one linear dense and one unstructured."""
    folder = tmp_path_factory.mktemp("pruned")
    recipe = Recipe(
        "2:4",
        "wanda",
        calibration="pydoc",
        windows=4,
        length=64,
        exclude=("*.layers.0.mlp.up_proj",),
        overrides={"*.layers.1.self_attn.k_proj": "0.3"},
    )
    return prune(random_model(folder / "llama", transformers.LlamaConfig(**SIZES), stories), recipe, folder / "out")


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Layout and precision -> the artifact, made once; not to be written to."""
    root = tmp_path_factory.mktemp("artifacts")

    def get(layout: str, precision: str) -> Path:
        out = root / f"{layout}-{precision}"
        if not out.exists():
            export(checkpoint, "onnx", out, options=Options(layout=layout, precision=precision))
        return out

    return get


@pytest.fixture
def copy(made: Make, tmp_path: Path) -> Callable[[str, str], Path]:
    return lambda layout, precision: Path(shutil.copytree(made(layout, precision), tmp_path / "copy"))


def facts(artifact: Path) -> dict[str, Any]:
    return manifest.read(artifact)


@pytest.mark.parametrize(("layout", "precision"), FORMS)
def test_the_graph_is_the_pruned_model(made: Make, checkpoint: Path, layout: str, precision: str) -> None:
    artifact = made(layout, precision)
    body = facts(artifact)
    assert (body["onnx"]["layout"], body["onnx"]["precision"]) == (layout, precision)
    assert body["onnx"]["provider"] == RUNS[layout][precision][0]
    assert body["onnx"]["opset"] == OnnxWeights(artifact / "model.onnx").opset >= 22
    # In float32 arithmetic the graph gives PyTorch's logits to rounding, however few bits its weights have; layout
    # genai holds tables of cosines in 16 bits besides.
    most = {"fp16": 2e-3, "bf16": 2e-2}.get(precision, 1e-4) if layout == "genai" else 1e-4
    assert body["parity"]["max_abs_diff"] < most
    assert (body["parity"]["left_padding"] is None) == (layout == "genai")
    assert body["parity"]["float32_twin"] == (precision != "fp32")
    # Every linear of the model is in it, the dense ones too, and the file alone proves the pattern.
    assert len(body["onnx"]["weights"]) == sum(1 for _ in linear_weights(checkpoint))
    assert verify(artifact)[1] == []


def location(place: dict[str, Any]) -> WeightLocation:
    return WeightLocation(**{**place, "rows": place["rows"] and tuple(place["rows"])})


@pytest.mark.parametrize(("layout", "precision"), FORMS)
def test_removed_weights_are_exact_zeros(made: Make, checkpoint: Path, layout: str, precision: str) -> None:
    artifact = made(layout, precision)
    weights = OnnxWeights(artifact / "model.onnx")
    places = facts(artifact)["onnx"]["weights"]
    compared = 0
    for spec, weight in linear_weights(checkpoint):
        stored = weight_at(weights, [location(place) for place in places[spec.name]]).astype(np.float32)
        assert not stored[weight.numpy() == 0].any()
        error = np.abs(stored - weight.numpy()).max() / np.abs(weight.numpy()).max()
        assert error <= {"fp32": 0, "fp16": 2**-11, "bf16": 2**-8, "int8": 2**-7, "int4": 2**-3}[precision]
        compared += 1
    assert compared == len(places)


@pytest.mark.parametrize(
    ("layout", "precision", "most"),
    [("standard", "fp16", 1e-4), ("genai", "fp16", 1e-3), ("genai", "int8", 0.05), ("genai", "int4", 1.0)],
)
def test_what_the_arithmetic_costs_is_measured_where_it_can_run(
    made: Make, layout: str, precision: str, most: float
) -> None:
    rounding = facts(made(layout, precision))["rounding"]
    assert 0 < rounding["mean_kl_nats"] < most
    assert rounding["max_abs_diff"] > 0


@pytest.mark.parametrize("layout", ["genai", "standard"])
def test_what_cannot_run_here_is_said(made: Make, layout: str) -> None:
    assert "no provider here runs this graph for cuda" in facts(made(layout, "bf16"))["rounding"]["not_run"]


def test_fp32_needs_no_second_measurement(made: Make) -> None:
    assert facts(made("genai", "fp32"))["rounding"] is None


def test_the_twin_of_a_float32_graph_is_itself(made: Make, tmp_path: Path) -> None:
    model = made("genai", "fp32") / "model.onnx"
    assert write_float32_twin(model, tmp_path) == model
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
def test_a_twin_widens_everything_and_changes_no_value(made: Make, tmp_path: Path, precision: str) -> None:
    model = made("genai", precision) / "model.onnx"
    twin = write_float32_twin(model, tmp_path)
    before, after = OnnxWeights(model), OnnxWeights(twin)
    assert before.tensors.keys() == after.tensors.keys()
    floats = 0
    for name, tensor in before.tensors.items():
        assert after.tensors[name].data_type not in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            np.testing.assert_array_equal(after.read(name), before.read(name).astype(np.float32))
            floats += 1
    assert floats or precision == "int4"
    assert [node.op_type for node in before.nodes] == [node.op_type for node in after.nodes]


def test_genai_config_is_for_the_graph(made: Make) -> None:
    config = json.loads((made("genai", "fp32") / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    assert config["model"]["vocab_size"] == 512


@pytest.mark.parametrize("layout", ["genai", "standard"])
def test_a_removed_weight_that_comes_back_is_found(copy: Make, checkpoint: Path, layout: str) -> None:
    artifact = copy(layout, "fp16")
    model = onnx.load(artifact / "model.onnx")
    (place,) = facts(artifact)["onnx"]["weights"]["model.layers.2.mlp.down_proj"]
    tensor = next(t for t in model.graph.initializer if t.name == place["initializer"])
    values = onnx.numpy_helper.to_array(tensor).copy()
    removed = np.argwhere(values == 0)[5]
    values[tuple(removed)] = np.float16(1e-3)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (artifact / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, artifact / "model.onnx")
    wanted = ((spec.name, w.numpy()) for spec, w in linear_weights(checkpoint))
    assert find_weights(artifact / "model.onnx", wanted)["model.layers.2.mlp.down_proj"] == ()
    # And by what the artifact says of itself, once its hashes are made to fit.
    body = {key: value for key, value in facts(artifact).items() if key not in ("format", "files")}
    manifest.write(artifact, body)
    assert any("model.layers.2.mlp.down_proj" in problem for problem in verify(artifact)[1])


def test_a_code_that_is_not_zero_is_found(copy: Make, checkpoint: Path) -> None:
    artifact = copy("genai", "int8")
    name = "model.layers.2.mlp.down_proj"
    (place,) = facts(artifact)["onnx"]["weights"][name]
    model = onnx.load(artifact / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == place["initializer"])
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes[tuple(np.argwhere(codes == 128)[0])] = 129
    tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))
    (artifact / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, artifact / "model.onnx")
    wanted = ((spec.name, w.numpy()) for spec, w in linear_weights(checkpoint))
    assert find_weights(artifact / "model.onnx", wanted)[name] == ()


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Qwen3", {}),
        ("Phi3", {"original_max_position_embeddings": 128}),
        ("SmolLM3", {}),
        ("Gemma2", {"sliding_window": 16}),
    ],
)
def test_families_in_layout_genai(
    family: str, more: dict[str, Any], stories: Path, tmp_path: Path, ids_file: str
) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    source = random_model(tmp_path / "model", config, stories)
    pruned = prune(source, Recipe("2:4", "magnitude", calibration=ids_file), tmp_path / "pruned")
    body = export(pruned, "onnx", tmp_path / "out")
    assert body["onnx"]["layout"] == "genai"
    assert body["parity"]["max_abs_diff"] < 1e-3
    assert verify(tmp_path / "out")[1] == []


def test_an_unknown_architecture_goes_standard_with_a_notice(
    stories: Path, tmp_path: Path, ids_file: str, cli: Run
) -> None:
    config = transformers.OlmoeConfig(**CONFIGS["olmoe"]().to_diff_dict() | {"hidden_size": 64})
    pruned = prune(
        random_model(tmp_path / "olmoe", config, stories),
        Recipe("2:4", "magnitude", calibration=ids_file),
        tmp_path / "pruned",
    )
    done = cli("export", pruned, "--target", "onnx", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "layout genai does not know olmoe" in done.stderr
    assert "exporting in layout standard" in done.stderr
    assert facts(tmp_path / "out")["onnx"]["layout"] == "standard"
    refuse(cli("export", pruned, "-t", "onnx", "--layout", "genai", "-o", tmp_path / "no"), 3, "olmoe", "standard")
    assert not (tmp_path / "no").exists()


def test_heads_that_the_attention_does_not_take_are_told_before_the_build(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="heads have 8 values, and layout genai takes multiples of 16"):
        export_genai(stories, tmp_path, choose("genai")[0])


def test_packed_checkpoints_export_too(checkpoint: Path, made: Make, tmp_path: Path) -> None:
    export(checkpoint, "vllm", tmp_path / "packed")
    export(tmp_path / "packed", "onnx", tmp_path / "out", options=Options(layout="genai"))
    assert (tmp_path / "out/model.onnx.data").read_bytes() == (made("genai", "fp32") / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_emptied_weights_with_a_wide_scale_are_found(copy: Make, checkpoint: Path, precision: str) -> None:
    """A scale from the file must not decide how far from the checkpoint its weights may be."""
    artifact = copy("genai", precision)
    name = "model.layers.2.mlp.down_proj"
    (place,) = facts(artifact)["onnx"]["weights"][name]
    model = onnx.load(artifact / "model.onnx")
    inside = OnnxWeights(artifact / "model.onnx").quantized[place["initializer"]]
    for tensor in model.graph.initializer:
        if tensor.name in (inside.codes, inside.scales):
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:] = 100 if tensor.name == inside.scales else 0x88 if precision == "int4" else 0x80
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (artifact / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, artifact / "model.onnx")
    wanted = ((spec.name, w.numpy()) for spec, w in linear_weights(checkpoint))
    found = find_weights(artifact / "model.onnx", wanted)
    assert [linear for linear, places in found.items() if not places] == [name]
    body = {key: value for key, value in facts(artifact).items() if key not in ("format", "files")}
    manifest.write(artifact, body)
    assert any(name in problem for problem in verify(artifact)[1])


def test_rows_of_zeros_do_not_hide_a_quantised_weight(checkpoint: Path, stories: Path, tmp_path: Path) -> None:
    source = random_model(tmp_path / "llama", transformers.LlamaConfig(**SIZES), stories)
    weights = load_file(source.folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:40] = 0
    weights["model.layers.2.mlp.up_proj.weight"][:] = 0
    weights["model.layers.0.self_attn.k_proj.weight"][-10:] = 0
    weights["model.layers.0.self_attn.v_proj.weight"][:10] = 0
    save_file(weights, source.folder / "model.safetensors", {"format": "pt"})
    pruned = prune(source, Recipe("2:4", "magnitude"), tmp_path / "pruned")
    body = export(pruned, "onnx", tmp_path / "out", options=Options(precision="int8"))
    assert all(body["onnx"]["weights"].values())
    assert verify(tmp_path / "out")[1] == []


@pytest.mark.parametrize(
    "options",
    [
        {"custom_ops_library": "evil.so"},
        {"enable_profiling": "profile"},
        {"session_options": "text"},
        {"config_entries": {"a": "b"}},
    ],
)
def test_genai_config_that_would_do_more_than_run_the_model(
    copy: Make, options: dict[str, Any], tmp_path: Path
) -> None:
    """onnxruntime-genai loads libraries and writes files that this configuration names."""
    artifact = copy("genai", "fp32")
    path = artifact / "genai_config.json"
    config = json.loads(path.read_text())
    if "session_options" in options:
        config["model"]["decoder"].update(options)
    else:
        config["model"]["decoder"]["session_options"].update(options)
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"genai_config\.json: key .* is not one that an export writes"):
        GenaiSession(artifact)
    assert not list(artifact.glob("profile*"))


def test_the_builder_fails_in_one_line(checkpoint: Path, tmp_path: Path, cli: Run) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the model builder of onnxruntime-genai failed on llama: ") as caught:
        export_genai(damaged, tmp_path, choose("genai")[0])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_a_graph_that_computes_something_else_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that forgot the mask would pass every check of weights."""
    import sparsify.exporters.onnx_genai as module

    real = module._build

    def forgetful(source: Path, built: Path, *rest: Any) -> None:
        real(source, built, *rest)
        model = onnx.load(built / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                attribute = next((a for a in node.attribute if a.name == "scale"), None)
                node.attribute.remove(attribute) if attribute else None
                node.attribute.append(onnx.helper.make_attribute("scale", 0.01))
        onnx.save(model, built / "model.onnx")

    monkeypatch.setattr(module, "_build", forgetful)
    with pytest.raises(VerificationError, match=r"prefill: logits differ from the model's by"):
        export(checkpoint, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sessions_of_both_layouts_agree(made: Make) -> None:
    ids = np.arange(1, 13, dtype=np.int64).reshape(2, 6)
    with OnnxRuntimeSession(made("genai", "fp32")) as genai, OnnxRuntimeSession(made("standard", "fp32")) as standard:
        np.testing.assert_allclose(genai.logits(ids), standard.logits(ids), atol=1e-3)
        np.testing.assert_array_equal(genai.generate(ids, 8), standard.generate(ids, 8))


@pytest.mark.parametrize(("layout", "precision"), [("genai", "fp32"), ("standard", "fp16"), ("genai", "bf16")])
def test_packed_weights_come_back_bit_for_bit(
    made: Make, checkpoint: Path, tmp_path: Path, layout: str, precision: str
) -> None:
    plain, packed = made(layout, precision), tmp_path / "packed"
    body = export(checkpoint, "onnx", packed, options=Options(layout=layout, precision=precision, compress=True))
    storage = body["onnx"]["storage"]
    assert storage["packed"] > 10
    assert storage["folded"] == "equal" if precision != "bf16" else storage["folded"].startswith("not run: ")
    # A weight of 16 bits at 2:4 costs 9, one of 32 bits 17; some are at 30 %.
    assert storage["packed_bytes"] < 0.7 * storage["dense_bytes"]
    assert verify(packed)[1] == []
    decompress(packed, tmp_path / "dense")
    assert "storage" not in facts(tmp_path / "dense")["onnx"]
    assert verify(tmp_path / "dense")[1] == []
    before, after = OnnxWeights(plain / "model.onnx"), OnnxWeights(tmp_path / "dense/model.onnx")
    inside = OnnxWeights(packed / "model.onnx")
    for name, tensor in before.tensors.items():
        if tensor.data_type in FLOATS.values():
            stored = before.read(name)
            for other in (after, inside):
                assert other.read(name).tobytes() == stored.tobytes(), name
    if precision != "bf16":
        ids = np.arange(1, 25, dtype=np.int64).reshape(2, 12)
        with OnnxRuntimeSession(plain) as one, OnnxRuntimeSession(packed) as other_session:
            np.testing.assert_array_equal(one.logits(ids), other_session.logits(ids))


def test_decompress_refuses_what_is_not_packed(made: Make, checkpoint: Path, tmp_path: Path, cli: Run) -> None:
    out = tmp_path / "out"
    refuse(cli("decompress", made("genai", "fp32"), "--out", out), 2, "has dense weights already")
    refuse(cli("decompress", checkpoint, "--out", out), 2, "kind checkpoint")
    refuse(cli("decompress", tmp_path, "--out", out), 8, "sparsify.json")
    export(checkpoint, "onnx", tmp_path / "packed", options=Options(layout="genai", compress=True))
    done = cli("decompress", tmp_path / "packed", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] > json.loads(done.stdout)["packed_bytes"]
    data = tmp_path / "packed/model.onnx.packed.data"
    data.write_bytes(data.read_bytes()[:-5000])
    refuse(cli("decompress", tmp_path / "packed", "--out", tmp_path / "no"), 8, "model.onnx.packed.data")
    assert not (tmp_path / "no").exists()


def test_a_graph_that_nothing_here_runs_is_delivered_and_said_to_be_unmeasured(
    stories: Path, tmp_path: Path, cli: Run
) -> None:
    source = random_model(tmp_path / "llama", transformers.LlamaConfig(**SIZES), stories)
    done = cli(
        *("prune-and-export", source.folder, "--method", "magnitude", "--target", "onnx", "--precision", "bf16"),
        *("--eval-windows", 1, "--eval-length", 16, "--out", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    (artifact,) = json.loads(done.stdout)["artifacts"]
    assert artifact["perplexity"] is None
    assert artifact["runtime"] == "not run here: the graph is for provider cuda"
    assert "not run here" in (tmp_path / "out/report.md").read_text()
