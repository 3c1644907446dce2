"""A checkpoint in plain PyTorch through transformers: the reference every other runtime is compared with."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import UsageError
from sparsify.runtimes.session import check_count, check_ids, check_mask, positions

if TYPE_CHECKING:
    import torch


class TorchSession:
    """A Hugging Face folder as a Session (see ``sparsify.runtimes.session``).

    Attributes:
        model: the transformers model; None once the session is closed.

    Args:
        path: local folder with config and safetensors.
        dtype: parameters and arithmetic: float32, bfloat16 or float16.
        device: a torch device.
        trust_remote_code: run the modelling code that the checkpoint brings.

    Raises:
        UsageError: unknown dtype or device.
        ModelError: the folder cannot be loaded, or lacks weights.
    """

    def __init__(
        self, path: Path, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        import torch

        from sparsify.model import load_model

        if dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"dtype {dtype!r}: choose float32, bfloat16 or float16")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device!r}: {str(error).splitlines()[0]}") from error
        model = load_model(path, getattr(torch, dtype), trust_remote_code=trust_remote_code)
        self.name = f"torch {device} {dtype}"
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.model: Any = model.to(device)
        self._device = device
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_last = "logits_to_keep" in accepted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.model = None

    def _forward(self, ids: NDArray[np.int64], mask: NDArray[np.int64], **options: Any) -> Any:
        import torch

        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            if self._takes_positions:
                inputs["position_ids"] = torch.tensor(positions(mask)[:, -ids.shape[1] :])
            return self.model(**{key: value.to(self._device) for key, value in inputs.items()}, **options)

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See ``Session.logits``; on a CPU in float32 the array is torch's own memory, not a copy."""
        check_ids(ids, self.vocab_size)
        output = self._forward(ids, check_mask(attention_mask, ids), use_cache=False).logits
        values: NDArray[np.float32] = output.float().cpu().numpy()
        return values

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """See ``Session.generate``."""
        check_ids(ids, self.vocab_size)
        check_count(n)
        made = np.empty((ids.shape[0], n), dtype=np.int64)
        last = {"logits_to_keep": 1} if self._takes_last else {}
        step, past = ids, None
        for i in range(n):
            mask = np.ones((ids.shape[0], ids.shape[1] + i), dtype=np.int64)
            output = self._forward(step, mask, use_cache=True, past_key_values=past, **last)
            step = output.logits[:, -1].argmax(dim=-1, keepdim=True).cpu().numpy()
            made[:, i], past = step[:, 0], output.past_key_values
        return made

    def engaged(self) -> dict[str, str]:
        """``dense`` for each parameter with 2 or more axes below a linear or an expert layer.

        Known from the parameters themselves: torch has no kernel that skips the zeros of a plain strided tensor. A
        tensor subclass (semi-structured, for one) or a sparse layout is reported by its own name instead.
        """
        import torch

        report: dict[str, str] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                continue
            if kernel := getattr(module, "kernel_name", None):
                report[name] = kernel
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not leaf.endswith("bias"):  # experts have biases of 2 axes
                    linear = name if leaf == "weight" else f"{name}.{leaf}"
                    report[linear] = _kernel(parameter)
        return report


def _kernel(parameter: "torch.nn.Parameter") -> str:
    import torch

    kind = type(parameter.data)
    if kind is not torch.Tensor:
        return kind.__name__
    return "dense" if parameter.layout is torch.strided else str(parameter.layout).removeprefix("torch.")
