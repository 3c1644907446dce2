"""Export by the model builder of onnxruntime-genai: graphs of ONNX Runtime's own operators, and its configuration.

The builder runs as a process of its own: importing it puts modules of common names on the import path, and it prints
as it goes. It is given a dense checkpoint and told to run none of its code unless the user allows it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparsify.checkpoint import copy_side_files, portable_config, read_config
from sparsify.errors import ModelError, OutputError
from sparsify.exporters.hf import export_hf
from sparsify.exporters.onnx_forms import Form
from sparsify.exporters.onnx_graph import check_contributed
from sparsify.extras import require
from sparsify.files import write_json
from sparsify.format.storage import KEY

# The builder holds a whole model: whatever ends this process ends it too (prctl's PR_SET_PDEATHSIG with SIGKILL).
_LAUNCH = """
import ctypes, runpy
ctypes.CDLL(None).prctl(1, 9)
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
"""
_UNSUPPORTED = "NotImplementedError"
# What GroupQueryAttention asks of the size of a head.
_HEAD_MULTIPLE = 16


class UnsupportedError(ModelError):
    """The builder does not know this architecture, or its operators not these sizes; layout ``standard`` may."""


def export_genai(checkpoint: Path, out: Path, form: Form, *, trust_remote_code: bool = False) -> None:
    """Write ``model.onnx``, ``model.onnx.data`` and ``genai_config.json`` into the existing folder ``out``.

    Config, tokenizer files and chat template are copied beside them as the checkpoint has them. Weights are stored
    [in, out], query, key and value as one; int8 and int4 round to nearest in symmetric blocks of 32, so that a zero
    stays a zero. Peak memory is the whole model in the builder's process.

    Raises:
        MissingExtraError: onnxruntime-genai is absent.
        UnsupportedError: the builder does not know the architecture, or the size of its heads is not one that ONNX
            Runtime's attention takes.
        ModelError: the builder failed; the message is its last line.
        OutputError: ``out`` is not a folder or cannot be written.
        VerificationError: the graph is refused by ONNX's checker.
    """
    require("onnx", "layout genai")
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder")
    config = read_config(checkpoint)
    _check_heads(config, checkpoint)
    with tempfile.TemporaryDirectory(dir=out, prefix=".genai-") as scratch:
        folder, source = Path(scratch), checkpoint
        if KEY in config:  # packed weights: the builder reads plain ones only
            source = folder / "dense"
            source.mkdir()
            export_hf(checkpoint, source)
        built = folder / "built"
        _build(source, built, form, folder, trust_remote_code)
        for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
            if not (built / name).is_file():
                raise ModelError(f"{checkpoint}: the model builder wrote no {name}; take --layout standard")
            (built / name).replace(out / name)
    check_contributed(out / "model.onnx")
    write_json(out / "config.json", portable_config(config))
    copy_side_files(checkpoint, out)


def _check_heads(config: dict[str, Any], checkpoint: Path) -> None:
    heads, hidden, size = (config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    if size is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        size = hidden // heads
    if isinstance(size, int) and size % _HEAD_MULTIPLE:
        raise UnsupportedError(
            f"{checkpoint}: its heads have {size} values, and layout genai takes multiples of {_HEAD_MULTIPLE}; "
            "take standard"
        )


def _build(source: Path, built: Path, form: Form, folder: Path, trust_remote_code: bool) -> None:
    command = [sys.executable, "-c", _LAUNCH, "-i", str(source.resolve()), "-o", str(built.resolve())]
    command += ["-p", form.precision, "-e", form.provider, "-c", str((folder / "cache").resolve())]
    command += ["--extra_options", f"hf_remote={str(trust_remote_code).lower()}", "hf_token=false"]
    # Sliding layers with a cache of the window's length need a buffer that only onnxruntime-genai itself prepares.
    command += ["windowed_kv_cache=false"]
    offline = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (folder / "log").open("w+") as log:
        done = subprocess.run(
            command,
            cwd=folder,  # a folder with nothing to import in it
            env=os.environ | offline,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if done.returncode == 0:
        return
    shutil.rmtree(built, ignore_errors=True)
    kind = read_config(source).get("model_type", "this model")
    reason = (lines or [f"exit code {done.returncode}"])[-1][:300]
    if _UNSUPPORTED in reason:
        raise UnsupportedError(f"{source}: layout genai does not know {kind} ({reason}); take --layout standard")
    raise ModelError(
        f"{source}: the model builder of onnxruntime-genai failed on {kind}: {reason}; mend that, or take "
        "--layout standard"
    )
