"""The optional packages behind each extra of pyproject.toml, and the one error for those that are absent."""

from __future__ import annotations

import importlib.util

from sparsify.errors import MissingExtraError

# gguf: transformers asks for accelerate too, without using it for a load on one device.
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime", "onnxruntime_genai"),
    "gguf": ("gguf", "accelerate"),
    "datasets": ("datasets",),
    "bench": ("matplotlib", "jinja2", "jsonschema"),
    "eval": ("lm_eval",),
    "ray": ("ray",),
}


def absent(extra: str) -> str:
    """What of ``extra`` is not installed and how to install it, in one line; empty where nothing is missing."""
    names = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    return f'{" and ".join(names)}; run: pip install "sparsify-toolkit[{extra}]"' if names else ""


def require(extra: str, what: str) -> None:
    """Refuse ``what`` where a package of ``extra`` is not installed.

    Raises:
        MissingExtraError: names the packages and the command that installs them.
    """
    missing = absent(extra)
    if missing:
        raise MissingExtraError(f"{what} needs {missing}")
