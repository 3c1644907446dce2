"""Roofs against cases computed by hand, published tables, and what is measured of a machine; nothing here is timed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import ModelError, UsageError
from sparsify.model import Skeleton, load_skeleton
from sparsify.roofline import published
from sparsify.roofline.attention import Attention
from sparsify.roofline.bounds import DENSE, Storage, Work, bound, linear_work, storage_of, total
from sparsify.roofline.ceilings import measure_ceilings
from sparsify.roofline.devices import DEVICES, DTYPE_BYTES, Device, dtype_name, find_device
from sparsify.roofline.work import LinearGroup, ModelWork, step_roof
from sparsify.types import parse_pattern
from tests.conftest import CONFIGS

H200 = DEVICES["h200"]
TOY = Device("toy", "a toy", 100.0, {"bfloat16": 1000.0}, {"bfloat16": 2.0}, 10**6, "made up")
# config.json of Llama-3.1-8B, as far as shapes go.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def config_folder(folder: Path, **changes: Any) -> Path:
    """A model folder with a config and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **changes}))
    return folder


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return load_skeleton(config_folder(tmp_path_factory.mktemp("config") / "8b"), weights=False)


# Arithmetic.


@pytest.mark.parametrize(
    ("dtype", "pattern", "milliseconds"),
    # 32 blocks of 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 weights, bytes of each, 4.8 TB/s.
    [("bfloat16", None, 2.908), ("bfloat16", "2:4", 1.636), ("float8", None, 1.454), ("float8", "2:4", 0.909)],
)
def test_linears_of_llama_8b_on_h200(llama_8b: Skeleton, dtype: str, pattern: str | None, milliseconds: float) -> None:
    work = ModelWork.from_skeleton(llama_8b, dtype, storage_of(parse_pattern(pattern) if pattern else None))
    assert 1e3 * work.linear_bytes / H200.bytes_per_s == pytest.approx(milliseconds, abs=6e-4)
    assert work.n_weights == 8_030_261_248


@pytest.mark.parametrize(
    ("size", "pattern", "ratio"),
    [
        *((2, "2:4", 16 / 9), (2, "0.5", 16 / 9), (2, "0.6", 16 / 7.4), (2, "0.7", 16 / 5.8), (2, "1:4", 16 / 5)),
        *((1, "2:4", 8 / 5), (1, "0.5", 8 / 5), (1, "0.7", 8 / 3.4), (4, "2:4", 32 / 17)),
    ],
)
def test_stored_bytes(size: int, pattern: str, ratio: float) -> None:
    stored = storage_of(parse_pattern(pattern))
    dense = DENSE.n_bytes(640, 1024, size)
    assert dense == 640 * 1024 * size
    assert dense / stored.n_bytes(640, 1024, size) == pytest.approx(ratio)


def test_a_mask_has_whole_bytes_in_each_row() -> None:
    assert Storage(0.5, mask=True).n_bytes(3, 12, 2) == 3 * 6 * 2 + 3 * 2


def test_stored_bytes_are_those_of_the_format() -> None:
    from sparsify.format.packed import encode
    from sparsify.types import NofM

    weight = torch.zeros(6, 24, dtype=torch.bfloat16)
    weight[:, 0::4] = weight[:, 1::4] = 1.0
    for pattern in (NofM(2, 4), None):
        stored = storage_of(pattern or parse_pattern("0.5"))
        assert stored.n_bytes(6, 24, 2) == encode(weight, pattern).n_bytes


def test_what_sets_a_bound() -> None:
    assert bound(Work(200, 1000, "bfloat16"), TOY) == (2.0, "bandwidth")
    assert bound(Work(200, 4000, "bfloat16"), TOY) == (4.0, "compute")
    assert bound(Work(100, 4000, "bfloat16", sparse=True), TOY) == (2.0, "compute")
    works = [Work(200, 1000, "bfloat16"), Work(200, 4000, "bfloat16"), Work(300, 0, "bfloat16")]
    assert total(works, TOY) == (9.0, "bandwidth")


def test_a_product_moves_weight_inputs_and_results() -> None:
    assert linear_work(6, 8, 3, "bfloat16") == (6 * 8 * 2 + 3 * 8 * 2 + 3 * 6 * 2, 2 * 3 * 6 * 8, "bfloat16", False)
    # Inputs in 8 bits, results in 16.
    assert linear_work(6, 8, 3, "float8").n_bytes == 6 * 8 + 3 * 8 + 3 * 6 * 2
    assert linear_work(6, 8, 3, "bfloat16", stored_bytes=7).n_bytes == 7 + 3 * 8 * 2 + 3 * 6 * 2


def test_the_ridge_of_h200_is_at_206_tokens() -> None:
    group = LinearGroup("mlp", 4096, 4096, 1, DENSE, 4096 * 4096 * 2)
    assert bound(group.work(206, "bfloat16"), H200).limited_by == "bandwidth"
    assert bound(group.work(207, "bfloat16"), H200).limited_by == "compute"


def test_attention_sees_what_a_loop_counts() -> None:
    each = Attention(4, 2, 8, full=2, windows=(3, 100))
    prompt = 9
    seen = 0
    for token in range(prompt):
        seen += 2 * (token + 1) + min(token + 1, 3) + min(token + 1, 100)
    assert each.seen_by_all(prompt) == seen
    assert each.seen(prompt) == 2 * 9 + 3 + 9
    assert each.cached(prompt, 2) == 2 * 2 * 8 * 2 * each.seen(prompt)


def test_cache_of_llama_8b(llama_8b: Skeleton) -> None:
    work = ModelWork.from_skeleton(llama_8b)
    assert work.cache_bytes(1, 1) == 2 * 8 * 128 * 2 * 32
    assert work.cache_bytes(4, 1000) == 4000 * work.cache_bytes(1, 1)
    # In 8-bit models the cache stays in 16.
    assert ModelWork.from_skeleton(llama_8b, "float8").cache_bytes(1, 1) == work.cache_bytes(1, 1)


def test_steps_of_llama_8b_by_hand(llama_8b: Skeleton) -> None:
    """Everything again, in plain numbers."""
    batch, prompt, new = 2, 1000, 101
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    bytes_per_s, flops = 4.8e12, 989.5e12
    first = second = 0.0
    for n_out, n_in in shapes:
        first += 32 * max(2 * n_out * n_in / bytes_per_s, 2 * batch * prompt * n_out * n_in / flops)
        second += 32 * max(2 * n_out * n_in / bytes_per_s, 2 * batch * n_out * n_in / flops)
    head = max(2 * 128256 * 4096 / bytes_per_s, 2 * batch * 128256 * 4096 / flops)
    pairs = prompt * (prompt + 1) / 2
    cache = 2 * 8 * 128 * 2 * 32
    first += max(batch * prompt * cache / bytes_per_s, batch * 4 * 4096 * pairs * 32 / flops) + head
    context = prompt + 51
    second += max(batch * context * cache / bytes_per_s, batch * 4 * 4096 * context * 32 / flops) + head
    roof = step_roof(ModelWork.from_skeleton(llama_8b), H200, prompt, batch, new)
    assert roof.ttft_s == pytest.approx(first)
    assert roof.tpot_s == pytest.approx(second)
    assert (roof.ttft_limit, roof.tpot_limit) == ("compute", "bandwidth")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_weight_is_counted_once(random_models: Callable[[str], Path], model_type: str) -> None:
    skeleton = load_skeleton(random_models(model_type))
    n_weights = sum(parameter.numel() for parameter in skeleton.model.parameters())
    work = ModelWork.from_skeleton(skeleton, "float32")
    assert work.weight_bytes == 4 * n_weights
    assert sum(group.count for group in work.linears) == sum(map(len, skeleton.linears))
    step = step_roof(work, replace(H200, flops={"float32": 1e12}), 8, 2, 4)
    assert 0 < step.tpot_s < step.ttft_s


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_are_read_where_tokens_go(random_models: Callable[[str], Path], model_type: str) -> None:
    work = ModelWork.from_skeleton(load_skeleton(random_models(model_type)))
    experts = [group for group in work.linears if group.share < 1]
    assert experts
    for group in experts:
        assert group.share == 0.5
        one, many = group.work(1, "bfloat16"), group.work(64, "bfloat16")
        assert one.n_bytes == 0.5 * group.count * group.stored_bytes
        assert many.n_bytes == pytest.approx(group.count * group.stored_bytes)
        # Two of four experts for each token.
        assert many.flops == 2 * 64 * 0.5 * group.count * group.n_out * group.n_in


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt_oss", {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}),
        ("llama4_text", {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}),
    ],
)
def test_experts_of_a_layout_that_is_not_understood_are_read_too(
    tmp_path: Path, model_type: str, sizes: dict[str, int]
) -> None:
    folder = config_folder(
        tmp_path / model_type, model_type=model_type, hidden_size=64, head_dim=16, num_hidden_layers=2, vocab_size=96,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    skeleton = load_skeleton(folder, weights=False)
    work = ModelWork.from_skeleton(skeleton)
    experts = [group for group in work.dense if "experts" in group.kind and group.count == 8]
    assert {group.share for group in experts} == {0.25}
    # Two blocks of eight experts, whose three matrices are 64 x 48.
    assert sum(group.count * group.n_out * group.n_in for group in experts) == 2 * 8 * 3 * 64 * 48
    assert work.weight_bytes == 2 * work.n_weights
    assert work.other_bytes < 0.1 * work.weight_bytes
    for step in (work.decode(1, 8), work.decode(64, 8), work.prefill(1, 64)):
        read = sum(each.n_bytes for each in step)
        assert read > 0.25 * 2 * 2 * 8 * 3 * 64 * 48
    # With many tokens all experts are read, and each token goes through two.
    many = list(work.rest_of_decode(1000, 8))
    assert sum(each.n_bytes for each in many) > 2 * 2 * 8 * 3 * 64 * 48
    assert sum(each.flops for each in many) > 2 * 1000 * 2 * 2 * 3 * 64 * 48


def test_a_window_bounds_what_is_read(random_models: Callable[[str], Path]) -> None:
    skeleton = load_skeleton(random_models("gemma2"))
    window = skeleton.text_config.sliding_window
    each = ModelWork.from_skeleton(skeleton).attention
    assert (each.full, each.windows) == (1, (window,))


def test_storage_of_each_linear_and_bytes_that_are_known(llama_8b: Skeleton) -> None:
    name = "model.layers.3.mlp.down_proj"
    half = storage_of(parse_pattern("2:4"))
    dense = ModelWork.from_skeleton(llama_8b)
    one = ModelWork.from_skeleton(llama_8b, storage=lambda spec: half if spec.name == name else DENSE)
    weight = 4096 * 14336 * 2
    assert dense.linear_bytes - one.linear_bytes == pytest.approx(weight * 7 / 16)
    told = ModelWork.from_skeleton(llama_8b, stored_bytes={name: 5})
    assert dense.linear_bytes - told.linear_bytes == weight - 5
    assert {group.count for group in told.linears if group.kind == "mlp.down_proj"} == {1, 31}


# Devices.


def test_devices_are_known_by_name() -> None:
    assert find_device("H200") is H200
    with pytest.raises(UsageError, match=r"--device 'h900'.*here, a100-40gb.*h200"):
        find_device("h900")
    assert dtype_name("bf16") == dtype_name("bfloat16") == "bfloat16"
    with pytest.raises(UsageError, match=r"--dtype 'int5'.*float8"):
        dtype_name("int5")
    with pytest.raises(UsageError, match="no peak of a100-80gb is known"):
        DEVICES["a100-80gb"].peak("float8")


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: str(device.name))
def test_every_device_is_cited_and_makes_sense(device: Device) -> None:
    assert "NVIDIA" in device.source
    assert device.known_as
    assert set(device.flops) <= set(DTYPE_BYTES)
    assert 1e11 < device.bytes_per_s < 1e13
    assert device.flops["float32"] < device.flops["bfloat16"] < device.flops["int8"]
    assert device.peak("bfloat16", sparse=True) == 2 * device.peak("bfloat16")
    assert device.peak("float32", sparse=True) == device.peak("float32")
    assert device.to_record()["how"] == "published"


# Published ratios.


def test_published_ratios_are_found_by_tokens_and_device() -> None:
    def found(device: str, tokens: int, dtype: str = "bfloat16", **options: Any) -> published.Found | None:
        asked: dict[str, Any] = {"structured": True, **options}
        return published.kernel_ratio(device, dtype, asked.pop("density", 0.5), tokens=tokens, **asked)

    at = found("b200", 16384)
    assert at is not None
    assert (at.low, at.high) == (1.64, 1.88)
    assert "SlideSparse" in at.source
    between, above = found("h100-pcie", 3000), found("h100-pcie", 100_000)
    ends = [found("h100-pcie", tokens) for tokens in (2048, 4096)]
    assert between is not None
    assert between.low == min(each.low for each in ends if each)
    assert between.high == max(each.high for each in ends if each)
    assert above == found("h100-pcie", 16384)
    # A card stands for the modules with the same chip where weights come from memory, and there only.
    few, many = found("h200", 64), found("h200", 8192)
    assert few is not None
    assert few.device == "h100-pcie"
    assert many is not None
    assert (many.device, many.low, many.high) == ("h100-sxm", 1.0, 1.22)
    assert found("h200", 1500) is None
    assert found("h200", 1) is None
    assert found("l4", 64) is None
    assert found("b200", 64, structured=False) is None
    assert found("rtx4090", 1, "float16", structured=False) is not None
    assert found("rtx4090", 1, "float16", structured=False, density=0.4) is None


def test_single_shapes_that_are_published_widen_the_range_and_nothing_else_does() -> None:
    def at(tokens: int) -> tuple[float, float]:
        found = published.kernel_ratio("h100-pcie", "float8", 0.5, structured=True, tokens=tokens)
        assert found is not None
        return found.low, found.high

    assert at(64) == (0.87, 2.07)
    assert at(256) == (0.95, 1.14)
    assert at(1024) == (1.43, 1.43)
    assert at(16384) == (1.37, 1.85)


def test_published_steps_are_found_by_size() -> None:
    found = published.end_to_end_ratio("h100-pcie", "float8", "prefill", 8e9, 2048)
    assert found is not None
    assert (found.low, found.high) == (1.21, 1.24)
    small = published.end_to_end_ratio("h100-pcie", "float8", "prefill", 1.2e9, 2048)
    assert small is not None
    assert small.high < 1
    decode = published.end_to_end_ratio("h100-pcie", "float8", "decode", 3.21e9, 64)
    assert decode is not None
    assert (decode.low, decode.high) == (0.96, 1.03)
    assert published.SMALL_MODEL > 3.21e9
    # Its dense side had two GPUs.
    assert published.end_to_end_ratio("h200", "float8", "decode", 70e9, 64) is None
    assert published.end_to_end_ratio("h100-pcie", "bfloat16", "prefill", 8e9, 2048) is None
    assert published.end_to_end_ratio("h100-pcie", "float8", "prefill", 400e9, 2048) is None


def test_published_rows_name_devices_and_sources() -> None:
    rows: list[published.Kernels | published.EndToEnd] = [*published.KERNELS, *published.END_TO_END]
    for row in rows:
        assert {row.device, *getattr(row, "stands_for", ())} <= DEVICES.keys()
        assert row.source
        assert row.dtype in DEVICES[row.device].flops


# What is measured.


def test_ceilings_of_this_machine() -> None:
    found = measure_ceilings("cpu", quick=True, n_bytes=1 << 20, size=64, dtypes=("float32", "bfloat16"))
    for rate in (found.bandwidth, *found.flops.values()):
        assert 0 < rate.low <= rate.median <= rate.best
        assert rate.n >= 5
        assert rate.how
    device = found.device
    assert (device.name, device.kind, device.how) == ("here", "cpu", "measured")
    assert device.threads == torch.get_num_threads()
    assert device.bytes_per_s == found.bandwidth.best
    assert device.flops == {dtype: rate.best for dtype, rate in found.flops.items()}
    assert device.to_record()["how"] == "measured"
    assert f"{device.threads} threads" in device.source


# A config without weights.


def test_a_config_alone_is_enough_and_is_checked(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "many", num_hidden_layers=100_000)
    with pytest.raises(ModelError, match="num_hidden_layers is 100000"):
        load_skeleton(folder, weights=False)
    few = config_folder(tmp_path / "few", num_hidden_layers=2)
    assert load_skeleton(few, weights=False).n_blocks == 2
    with pytest.raises(ModelError, match=r"no .*safetensors|holds no"):
        load_skeleton(few)
