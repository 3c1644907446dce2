"""What vLLM calls when it starts (entry point ``vllm.general_plugins``): registers the method ``sparsify``.

vLLM calls it in every process, for every model, and does not catch what it raises. So nothing here may raise, and
nothing is imported before it has to be.
"""

from __future__ import annotations

import os

from sparsify.plugins.engaged import log

# First and last minor version whose interfaces the plugin knows; docs/vllm.md says which ones it was run on.
OLDEST, NEWEST = (0, 24), (0, 33)
ANY_VERSION = "SPARSIFY_ANY_VLLM"


def register() -> None:
    """Make vLLM serve compressed checkpoints; where that fails it says why in one line and leaves vLLM as it is."""
    try:
        import vllm

        if not supported(vllm.__version__):
            if not os.environ.get(ANY_VERSION):
                log.warning(
                    "sparsify: vLLM %s is outside %d.%d to %d.%d, which the plugin knows, so it stays off; "
                    "set %s=1 to try",
                    vllm.__version__, *OLDEST, *NEWEST, ANY_VERSION,
                )  # fmt: skip
                return
            log.warning("sparsify: vLLM %s is not known to the plugin, which was told to try", vllm.__version__)
        from sparsify.plugins.vllm_config import register_config

        register_config()
    except Exception as error:  # whatever it is, vLLM has other models to serve
        text = (str(error).strip().splitlines() or [""])[0]
        log.error("sparsify: the plugin is off: %s: %s", type(error).__name__, text)


def supported(version: str) -> bool:
    """Whether the plugin knows this version of vLLM; false for one that cannot be read."""
    numbers = version.split("+")[0].split(".")[:2]
    if len(numbers) < 2 or not all(part.isdigit() for part in numbers):
        return False
    return OLDEST <= (int(numbers[0]), int(numbers[1])) <= NEWEST
