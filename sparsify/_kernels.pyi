"""Products with packed weights on CPUs with AVX-512."""



def features() -> list[str]:
    """Names of the paths that this processor and this build have."""

def pool() -> str:
    """
    File of the OpenMP runtime whose threads are used; empty: only the calling thread is.
    """

def wake_ns(threads: int) -> int:
    """
    Nanoseconds that it takes to wake the pool's threads, measured now and then by products that could use them.
    """

def assume_wake_ns(ns: int) -> None:
    """
    Take it to be that instead, so that small products are divided too; negative: what was measured.
    """

def linear(type: str, values: int, n_values: int, mask: int, starts: int, scale: int, n_out: int, n_in: int, n: int, m: int, path: str, x_type: str, x: int, tokens: int, bias: int, y: int, threads: int) -> None:
    """
    y [tokens, out] = x [tokens, in] @ weight.T + bias, all given by address; 0 for what there is none of.
    """

def expand(type: str, values: int, n_values: int, mask: int, starts: int, scale: int, n_out: int, n_in: int, n: int, m: int, out_type: str, out: int, begin: int, end: int, threads: int) -> None:
    """Rows [begin, end) of the dense weight, written to the address `out`."""

def dense_linear(weight: int, n_out: int, n_in: int, x: int, tokens: int, y: int, threads: int) -> None:
    """
    The same loop over a dense bfloat16 weight: what packing has to beat in benchmarks.
    """
