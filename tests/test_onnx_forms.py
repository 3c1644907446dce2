"""The forms of ONNX that are offered, and those that are refused with what there is instead."""

import pytest

from sparsify.errors import UsageError
from sparsify.exporters.onnx_forms import LAYOUTS, OPSET, PRECISIONS, PROVIDERS, RUNS, Form, choose
from sparsify.targets import Options, check_options


def test_every_combination_is_chosen_or_refused_with_what_runs() -> None:
    chosen = 0
    for layout in ("genai", "standard"):
        for precision in PRECISIONS:
            for provider in PROVIDERS:
                if provider in RUNS[layout].get(precision, ()):
                    assert choose(layout, precision, provider) == [Form(layout, precision, provider)]
                    assert choose("auto", precision, provider)[0].provider == provider
                    chosen += 1
                else:
                    with pytest.raises(UsageError, match="what runs is genai: fp32 on cpu/cuda, ") as caught:
                        choose(layout, precision, provider)
                    assert "\n" not in str(caught.value)
    assert chosen == sum(len(providers) for table in RUNS.values() for providers in table.values())


@pytest.mark.parametrize(
    ("layout", "precision", "provider"),
    [("genai", "fp16", "cpu"), ("genai", "bf16", "cpu"), ("standard", "bf16", "cpu"), ("genai", "fp32", "tensorrt")],
)
def test_what_builders_accept_and_runtimes_choke_on_is_refused(layout: str, precision: str, provider: str) -> None:
    with pytest.raises(UsageError, match=f"{precision} for {provider} in layout {layout} does not run"):
        choose(layout, precision, provider)


def test_auto_prefers_genai_and_keeps_standard_for_other_architectures() -> None:
    assert [form.layout for form in choose()] == ["genai", "standard"]
    assert [(form.layout, form.provider) for form in choose("auto", "bf16")] == [
        ("genai", "cuda"),
        ("standard", "cuda"),
    ]
    assert [form.layout for form in choose("auto", "int4")] == ["genai"]
    assert [form.layout for form in choose("auto", "fp16", "tensorrt")] == ["standard"]
    assert choose("auto", opset=18) == [Form("standard", "fp32", "cpu", 18)]
    assert choose("standard")[0].opset == OPSET


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fancy",), "layout 'fancy' is unknown"),
        (("auto", "fp8"), "precision 'fp8' is unknown"),
        (("auto", "fp32", "tpu"), "provider 'tpu' is unknown"),
        (("standard", "fp32", None, 17), "opset 17: choose 18 to 24"),
        (("standard", "fp32", None, 25), "opset 25: choose 18 to 24"),
        (("genai", "fp32", None, 23), "opset is a choice of layout standard"),
    ],
)
def test_words_that_mean_nothing(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        (Options(layout="genai"), ["hf"], "--layout is about target onnx, not hf"),
        (Options(compress=True), ["vllm", "tensorrt"], "--compress is about target onnx, not vllm, tensorrt"),
        (Options(precision="fp16"), ["vllm"], "--precision fp16 is unknown to target vllm; int8"),
        (Options(require_sparse=True), ["onnx"], "--require-sparse is about target tensorrt"),
        (Options(engine=("batch=1",)), ["onnx"], "--engine is about target tensorrt"),
        (Options(compress=True, precision="int4"), ["onnx"], "--compress is for float weights"),
        (Options(compress=True, provider="tensorrt"), ["onnx"], "--compress is for ONNX Runtime's own providers"),
        (Options(precision="int8"), ["tensorrt"], "int8 for tensorrt in layout standard does not run"),
        (Options(precision="fp16", provider="cpu", layout="genai"), ["onnx"], "does not run"),
        (Options(engine=("nonsense=1",)), ["tensorrt"], "engine option 'nonsense=1'"),
    ],
)
def test_options_are_checked_before_any_work(options: Options, targets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(options, targets)


def test_options_that_one_of_several_targets_has_are_fine() -> None:
    check_options(Options(layout="standard", dense=True, precision="fp16"), ["onnx", "vllm", "tensorrt"])
    assert set(LAYOUTS) == {"auto", *RUNS}
