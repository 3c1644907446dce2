"""The PyTorch model with the weights that an exported graph really holds: what its arithmetic is compared with.

Comparing a rounded or quantised artifact with the unrounded model mixes two things: what rounding costs, and whether
the graph is right. With the rounded weights on both sides only the second is left.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.errors import VerificationError
from sparsify.exporters.onnx_places import WeightLocation
from sparsify.exporters.onnx_reader import OnnxWeights
from sparsify.exporters.onnx_weights import find_weights, weight_at
from sparsify.model import load_skeleton, weight_view
from sparsify.runtimes.torch_session import TorchSession

_ROUNDED = {"fp16": "float16", "bf16": "bfloat16"}


def open_delivered(
    checkpoint: Path,
    model_path: Path,
    locations: Mapping[str, tuple[WeightLocation, ...]],
    precision: str,
    *,
    trust_remote_code: bool = False,
) -> TorchSession:
    """``checkpoint`` in PyTorch, float32, with every weight replaced by the graph's.

    Args:
        checkpoint: the folder that was exported.
        model_path: the graph.
        locations: where the weight of each linear lies in it (``find_weights``).
        precision: of the graph.
        trust_remote_code: let the model's own code load.

    Raises:
        VerificationError: a quantised weight of the graph belongs to no linear of the checkpoint.
        ModelError: as ``TorchSession`` and ``weight_at``.
    """
    import torch

    session = TorchSession(checkpoint, trust_remote_code=trust_remote_code)
    model, weights = session.model, OnnxWeights(model_path)
    with torch.no_grad():
        if precision in _ROUNDED:
            dtype = getattr(torch, _ROUNDED[precision])
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        if not weights.quantized:
            return session
        unused = set(weights.quantized)
        skeleton = load_skeleton(checkpoint, trust_remote_code=trust_remote_code)
        specs = {spec.name: spec for block in skeleton.linears for spec in block}
        for name, places in locations.items():
            if places[0].initializer in weights.quantized:
                spec = specs[name]
                weight = torch.from_numpy(np.ascontiguousarray(weight_at(weights, places)))
                weight_view(model.get_parameter(spec.parameter), spec).copy_(weight)
                unused -= {place.initializer for place in places}
        unused -= _replace_ends(model, weights)
    if unused:
        raise VerificationError(f"{model_path}: quantised weight {sorted(unused)[0]} is of no linear of {checkpoint}")
    return session


def _replace_ends(model: Any, weights: OnnxWeights) -> set[str]:
    """Replace output layer and embedding where the graph holds them quantised; returns the initializers used."""
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    places = find_weights(weights.path, [("lm_head", head.weight.numpy())])["lm_head"]
    if not places or places[0].initializer not in weights.quantized:
        return set()
    weight = torch.from_numpy(np.ascontiguousarray(weight_at(weights, places)))
    # A tied embedding is quantised with the output layer or left as it is.
    shared = any(node.op_type == "GatherBlockQuantized" for node in weights.nodes)
    tied = embedding.weight is head.weight
    if tied and not shared:
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
    else:
        head.weight.copy_(weight)
    return {place.initializer for place in places}
