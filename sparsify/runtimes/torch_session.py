"""A checkpoint in PyTorch through transformers: without a kernel the reference every other runtime is compared with."""

import inspect
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import UsageError
from sparsify.runtimes.session import Stream, check_count, check_ids, check_mask, collect, positions


class TorchSession:
    """A Hugging Face folder as a Session (see ``sparsify.runtimes.session``).

    Attributes:
        model: the transformers model; None once the session is closed.

    Args:
        path: local folder with config and safetensors.
        dtype: parameters and arithmetic: float32, bfloat16 or float16.
        device: a torch device.
        kernel: what multiplies by sparse weights: ``dense``, ``auto`` or a kernel that ``sparsify doctor`` lists.
        trust_remote_code: run the modelling code that the checkpoint brings.

    Raises:
        UsageError: unknown dtype, device or kernel, or one that cannot run there.
        ModelError: the folder cannot be loaded, or lacks weights.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        kernel: str = "dense",
        trust_remote_code: bool = False,
    ) -> None:
        import torch

        from sparsify.compress import compress_
        from sparsify.kernels.dispatch import DENSE, check_request
        from sparsify.model import load_model

        if dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"dtype {dtype!r}: choose float32, bfloat16 or float16")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device!r}: {str(error).splitlines()[0]}") from error
        check_request(kernel, torch.device(device))
        model = load_model(path, getattr(torch, dtype), trust_remote_code=trust_remote_code)
        self.name = f"torch {device} {dtype}"
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        model = model.to(device)
        self.model: Any = model if kernel == DENSE else compress_(model, kernel)
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

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``Session.stream``."""
        check_ids(ids, self.vocab_size)
        check_count(n)
        last = {"logits_to_keep": 1} if self._takes_last else {}
        step, past = ids, None
        for i in range(n):
            mask = np.ones((ids.shape[0], ids.shape[1] + i), dtype=np.int64)
            output = self._forward(step, mask, use_cache=True, past_key_values=past, **last)
            step = output.logits[:, -1].argmax(dim=-1, keepdim=True).cpu().numpy()
            past = output.past_key_values
            yield step.tolist()

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """See ``Session.generate``."""
        return collect(self.stream(ids, n), len(ids), n)

    def engaged(self) -> dict[str, str]:
        """See ``sparsify.compress.engaged``."""
        from sparsify.compress import engaged

        return engaged(self.model)
