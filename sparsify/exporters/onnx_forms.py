"""The forms in which a model can leave as ONNX: layout, precision and the provider that is to run it.

Only combinations that really run are offered. The model builder of onnxruntime-genai, for one, accepts fp16 and bf16
for the CPU and writes graphs that ONNX Runtime then cannot load or cannot decode with.
"""

from dataclasses import dataclass

from sparsify.errors import UsageError

LAYOUTS = ("auto", "genai", "standard")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
PROVIDERS = ("cpu", "cuda", "tensorrt")

# precision -> providers, the one that is taken for granted first
RUNS = {
    "genai": {
        "fp32": ("cpu", "cuda"),
        "fp16": ("cuda",),
        "bf16": ("cuda",),
        "int8": ("cpu", "cuda"),
        "int4": ("cpu", "cuda"),
    },
    # The CPU provider computes fp16 in float32: half the file, the memory and speed of fp32. It has no bfloat16.
    "standard": {
        "fp32": ("cpu", "cuda", "tensorrt"),
        "fp16": ("cuda", "tensorrt", "cpu"),
        "bf16": ("cuda", "tensorrt"),
    },
}
# Below 18 the exporter cannot go. 23 brings Attention, RMSNormalization and RotaryEmbedding: half the nodes of 18.
MIN_OPSET, OPSET, MAX_OPSET = 18, 23, 24


@dataclass(frozen=True)
class Form:
    """One way to export.

    Attributes:
        layout: ``genai`` (operators of ONNX Runtime) or ``standard`` (operators of the ONNX standard).
        precision: of the weights: fp32, fp16, bf16, or int8 and int4 codes in blocks of 32.
        provider: ONNX Runtime's execution provider that the graph is for.
        opset: of layout ``standard``.
    """

    layout: str
    precision: str
    provider: str
    opset: int = OPSET


def choose(
    layout: str = "auto", precision: str = "fp32", provider: str | None = None, opset: int | None = None
) -> list[Form]:
    """The forms that fit what was asked for, the preferred one first; ``auto`` prefers ``genai``.

    ``genai`` exports ten times as fast, runs fastest on CPUs and has int8 and int4; ``standard`` has every
    architecture, a choice of opset, and is what TensorRT reads. With ``auto`` both may fit: the second is for an
    architecture that the first does not know.

    Raises:
        UsageError: unknown words, an opset out of range, or nothing fits; with what does.
    """
    for what, value, known in (
        ("layout", layout, LAYOUTS),
        ("precision", precision, PRECISIONS),
        ("provider", provider, (None, *PROVIDERS)),
    ):
        if value not in known:
            raise UsageError(f"{what} {value!r} is unknown; choose one of {', '.join(filter(None, known))}")
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset}: choose {MIN_OPSET} to {MAX_OPSET}")
    if opset is not None and layout == "genai":
        raise UsageError("opset is a choice of layout standard; leave it out, or take --layout standard")
    layouts = [layout] if layout != "auto" else ["standard"] if opset is not None else ["genai", "standard"]
    forms = []
    for name in layouts:
        providers = RUNS[name].get(precision, ())
        if provider in providers or (provider is None and providers):
            forms.append(Form(name, precision, provider or providers[0], opset or OPSET))
    if not forms:
        raise UsageError(
            f"{precision} for {provider or 'any provider'} in layout {layout} does not run; what runs is "
            + "; ".join(f"{name}: {_pairs(name)}" for name in RUNS)
        )
    return forms


def _pairs(layout: str) -> str:
    return ", ".join(f"{precision} on {'/'.join(providers)}" for precision, providers in RUNS[layout].items())
