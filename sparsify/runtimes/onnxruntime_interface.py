"""A decoder's inputs and outputs, held against the configuration that lies beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import ModelError
from sparsify.files import read_json
from sparsify.runtimes.onnxruntime_cache import ELEMENTS, CacheTensor

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


# Options that change how a graph is run and nothing else.
_SESSION_KEYS = {
    *("log_id", "provider_options", "intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena"),
    *("enable_mem_pattern", "graph_optimization_level", "ep.cuda.fpa_intb_gemm"),
    *("session.intra_op.allow_spinning", "session.inter_op.allow_spinning"),
}
# Each has session options of its own, and an artifact has one graph.
_MORE_GRAPHS = {"pipeline", "encoder", "vision", "speech", "embedding", "drafter", "mtp", "custom_ops_library"}


@dataclass(frozen=True)
class Interface:
    """Of a decoder with a key/value cache.

    Attributes:
        vocab_size: logits of each token.
        n_layers: layers with a cache.
        context: longest sequence in tokens, cache included; None where no configuration says.
        cache: key and value tensors, in the order of the graph's inputs.
        takes_positions: whether there is an input ``position_ids``.
    """

    vocab_size: int
    n_layers: int
    context: int | None
    cache: tuple[CacheTensor, ...]
    takes_positions: bool


def read_interface(path: Path, session: Any) -> Interface:
    """The interface of ``session``, an ``onnxruntime.InferenceSession`` of the file ``path``.

    Sizes that the graph leaves open (the builder of onnxruntime-genai leaves the heads' width) come from config.json
    or genai_config.json.

    Raises:
        ModelError: not a decoder with a cache, or another model's than the configuration beside it.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    past = [name for name in inputs if _PAST.fullmatch(name)]
    wanted = {"logits", *(name.replace("past_key_values", "present") for name in past)}
    absent = {"input_ids", "attention_mask"} - set(inputs) | wanted - set(outputs)
    if absent or not past:
        raise ModelError(f"{path}: not a decoder with a cache: lacks {', '.join(sorted(absent)) or 'the cache'}")
    unknown = set(inputs) - {"input_ids", "attention_mask", "position_ids", *past}
    if unknown:
        raise ModelError(f"{path}: has an input {min(unknown)!r} that a decoder has no value for; export it again")
    config = _config(path.parent)
    tensors = []
    for name in past:
        value = inputs[name]
        if value.type not in ELEMENTS or len(value.shape) != 4 or not isinstance(value.shape[1], int):
            raise ModelError(f"{path}: {name} is {value.type} {value.shape}, no cache of a fixed number of heads")
        dim = value.shape[3] if isinstance(value.shape[3], int) else config.get("head_dim")
        if not isinstance(dim, int):
            raise ModelError(f"{path}: {name} has heads of any width; put the config.json of the model beside it")
        present = name.replace("past_key_values", "present")
        tensors.append(CacheTensor(name, present, value.shape[1], dim, ELEMENTS[value.type]))
    vocab_size, n_layers = outputs["logits"].shape[-1], len(past) // 2
    if not isinstance(vocab_size, int):
        raise ModelError(f"{path}: the vocabulary needs a fixed size, and logits are {outputs['logits'].shape}")
    for what, found in (("vocab_size", vocab_size), ("layers", n_layers)):
        if config.get(what, found) != found:
            raise ModelError(
                f"{path}: {what} {found} in the graph, {config[what]} in {config['file']} beside it: "
                "these are two models; export again"
            )
    return Interface(vocab_size, n_layers, config.get("context"), tuple(tensors), "position_ids" in inputs)


@dataclass(frozen=True)
class GenaiFacts:
    """What genai_config.json says of a decoder.

    Attributes:
        file: name of the ONNX file.
        vocab_size: logits of each token.
        n_layers: layers with a cache.
        context: longest sequence in tokens.
        head_dim: width of a head.
    """

    file: str
    vocab_size: int
    n_layers: int
    context: int
    head_dim: int


def read_genai(folder: Path) -> GenaiFacts:
    """What ``genai_config.json`` in ``folder`` says.

    Raises:
        ModelError: missing, damaged, a key is absent or of another type, or one that no artifact of ours has.
    """
    path = folder / "genai_config.json"
    config = _read(path)
    _check_keys(config, path)
    model = _object(config, "model", path)
    decoder = _object(model, "decoder", path)
    file = decoder.get("filename")
    if not isinstance(file, str) or Path(file).name != file or not file:
        raise ModelError(f"{path}: model.decoder.filename is {file!r}, not a file beside it; export it again")
    numbers = [
        _number(model, "vocab_size", path),
        _number(decoder, "num_hidden_layers", path),
        _number(model, "context_length", path),
        _number(decoder, "head_size", path),
    ]
    return GenaiFacts(file, *numbers)


def _check_keys(config: Any, path: Path) -> None:
    """Refuse what onnxruntime-genai would act on beyond running the model: it loads libraries and writes profiles.

    Raises:
        ModelError: an option of a session that the model builder does not write, or a model of several graphs.
    """
    if isinstance(config, list):
        for item in config:
            _check_keys(item, path)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        unknown = sorted(set(value) - _SESSION_KEYS) if key == "session_options" and isinstance(value, dict) else []
        if key in _MORE_GRAPHS or unknown or (key == "session_options" and not isinstance(value, dict)):
            raise ModelError(
                f"{path}: key {unknown[0] if unknown else key} is not one that an export writes; remove it, or open "
                "the folder with onnxruntime-genai yourself"
            )
        _check_keys(value, path)


def _object(value: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise ModelError(f"{path}: key {key} is missing or no object; export the model again")
    return found


def _number(value: dict[str, Any], key: str, path: Path) -> int:
    found = value.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ModelError(f"{path}: key {key} is {found!r}, not a number from 1; export the model again")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """vocab_size, layers, context and head_dim (each where it is stated), and the file that states them."""
    config = _read(folder / "config.json")
    if not config:
        if not (folder / "genai_config.json").exists():
            return {}
        facts = read_genai(folder)
        return {
            "file": "genai_config.json", "vocab_size": facts.vocab_size, "layers": facts.n_layers,
            "context": facts.context, "head_dim": facts.head_dim,
        }  # fmt: skip
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    layers = next((config[key] for key in _LAYERS if key in config), None)
    shared = config.get("num_kv_shared_layers") or 0
    found: dict[str, Any] = {
        "vocab_size": config.get("vocab_size"),
        "layers": layers - shared if isinstance(layers, int) and isinstance(shared, int) else None,
        "context": next((config[key] for key in _POSITIONS if key in config), None),
        "head_dim": config.get("head_dim") or derived,
    }
    return {"file": "config.json", **{k: v for k, v in found.items() if isinstance(v, int) and v > 0}}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
        ModelError: it is there and is no JSON object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); export the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is no JSON object; export the model again")
    return value
