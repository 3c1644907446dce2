"""What the names of kernels say that sessions report."""


def runs_sparse(kernel: str) -> bool:
    """Whether what ``engaged`` names is a kernel that makes use of the zeros, on every rank.

    ``dense`` and ``unknown`` do not, nor does any operator of ONNX Runtime (``DOMAIN::NAME``).
    """
    return all(not part.startswith(("dense", "unknown")) and "::" not in part for part in kernel.split("+"))
