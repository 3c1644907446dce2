"""What the names of kernels say that sessions report."""


def runs_sparse(kernel: str) -> bool:
    """Whether what ``engaged`` names is a kernel that makes use of the zeros, on every rank.

    ``dense`` and ``unknown`` do not, nor does what expands the weight for a dense product (``triton, expanded``), nor
    any operator of ONNX Runtime (``DOMAIN::NAME``).
    """
    if "::" in kernel or kernel.endswith("expanded"):
        return False
    return not any(part.startswith(("dense", "unknown")) for part in kernel.split("+"))
