"""How long each way takes to multiply by one weight, dense and packed.

Every way has copies of the weight that together exceed the last-level cache, and the ways take turns: so weights come
from memory as in a model, and what else the machine does hits all of them. On a GPU calls are timed in CUDA graphs,
which is *not yet run on a GPU*.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from sparsify.bench.engaged import expands
from sparsify.errors import UsageError
from sparsify.format.packed import Packed, decode
from sparsify.kernels import native, tuning_cpu, tuning_gpu
from sparsify.kernels.dispatch import AUTO, KERNELS, choose
from sparsify.kernels.gpu_timing import captured, replayed_us
from sparsify.kernels.kernel import Kernel, State
from sparsify.kernels.operators import define
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.semi_structured import CUSPARSELT, CUSPARSELT_FP8, CUTLASS
from sparsify.kernels.table import last_level_cache_bytes
from sparsify.roofline import bounds
from sparsify.roofline.devices import Device

DENSE, LOOP, CUBLASLT = "dense torch", "dense own loop", "dense cublaslt"
_DENSE_WAYS = (DENSE, LOOP, CUBLASLT)
# Of a kernel that for so many tokens writes the dense weight and has torch multiply by it.
_EXPANDED = ", expanded"
# The slow reference, which is measured where nothing else takes a weight, and a kernel that rounds to 8 bits, whose
# rival would be a dense product in 8 bits.
_LEFT_OUT = (PACKED.name, CUSPARSELT_FP8.name)
# The copies of the smallest form of a weight take this many times the cache.
_BEYOND_CACHE = {"cpu": 1.25, "cuda": 3.0}
# Of a CPU that does not say.
_CACHE_BYTES = 1 << 28
# In a graph: one call is too short for a GPU's clock.
_LEAST_CALLS = 4
# A product that differs by more, relatively, from the dense one is wrong.
_TOLERANCE = 0.02


def _loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Our own loop over a dense weight: bfloat16 [tokens, in] by [out, in]."""
    from sparsify import _kernels

    (tokens, n_in), n_out = x.shape, len(weight)
    y = torch.empty((tokens, n_out), dtype=x.dtype)
    threads = torch.get_num_threads()
    _kernels.dense_linear(weight.data_ptr(), n_out, n_in, x.data_ptr(), tokens, y.data_ptr(), threads)
    return y


# Reached the way sparse products are: what that takes is not what is compared.
_LOOP_OP = define(
    "dense_loop(Tensor x, Tensor weight) -> Tensor", _loop, lambda x, weight: x.new_empty(len(x), len(weight)), "CPU"
)


def _cublaslt(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The dense product by the other of NVIDIA's libraries, which may choose another kernel."""
    library = torch.backends.cuda.preferred_blas_library
    before = library()
    library("cublaslt")
    try:
        return linear(x, weight)
    finally:
        library(before)


@dataclass(frozen=True)
class _Form:
    """A weight as one way wants it: bytes of one copy, the tensors of all, and the sizes of a ``State``."""

    n_bytes: int
    copies: list[dict[str, torch.Tensor]]
    sizes: Mapping[str, int]


def measure(
    packed: Packed,
    tokens: Sequence[int],
    rounds: int,
    ceilings: Device | None = None,
    told: Callable[[str], None] = lambda why: None,
    *,
    n_bytes: int = 0,
) -> Iterator[dict[str, Any]]:
    """Time products with one weight by every way that its device has.

    A kernel of a GPU first searches for its fastest launch.

    Args:
        packed: on the device, in the type of the inputs or in 8 bits that are scaled to it.
        tokens: numbers of rows of the input.
        rounds: samples of each way.
        ceilings: of the device, for the roof beside each time; None leaves it out.
        told: of ways that failed or gave a wrong product, which then have no times.
        n_bytes: of the copies of the smallest form of the weight; 0: more than the cache holds.

    Yields:
        For each number of tokens the fields of a ``kernel`` record that do not say which linear it is; nothing where
        no dense product can be timed.
    """
    products = Products(packed, n_bytes, told)
    device = packed.values.device
    for count in tokens:
        x = torch.randn(count, packed.shape[1], device=device).to(packed.dtype)
        here, on_gpu = products.runs(count), device.type == "cuda"
        with torch.inference_mode():
            if on_gpu:
                products.search(x, told)
            samples = _samples(products.calls(x), x, products.n_copies, rounds, told, on_gpu=on_gpu)
        dense = [way for way in _DENSE_WAYS if way in samples]
        if not dense:
            continue
        times = {
            name: {
                "samples_us": found,
                "median_us": statistics.median(found),
                **products.roof(name, count, ceilings),
            }
            for name, found in samples.items()
        }
        yield {
            "device": device.type,
            "density": packed.values.numel() / math.prod(packed.shape),
            "dtype": _name(packed.dtype),
            "tokens": count,
            "threads": None if on_gpu else torch.get_num_threads(),
            "kernels": times,
            "best_dense": min(dense, key=lambda name: times[name]["median_us"]),
            "auto": here if here in times else None,
            "cold": products.cold,
            "graphs": on_gpu,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kernels(packed: Packed) -> dict[str, Kernel]:
    """The sparse kernels that take ``packed``; the native one with its plan."""
    device = packed.values.device
    names = [name for name, kernel in KERNELS.items() if name not in _LEFT_OUT and not kernel.absent(device)]
    found = {name: made.kernel for name in names if (made := choose(packed, name, packed.dtype)).kernel}
    return found or {PACKED.name: PACKED}


class Products:
    """One weight in every form that its device multiplies by, several times.

    Args:
        packed: see ``measure``, as ``n_bytes`` and ``told``.
        n_bytes: see there.
        told: see there.

    Attributes:
        n_copies: of each form.
        cold: whether those of the smallest form exceed the last-level cache.
    """

    def __init__(self, packed: Packed, n_bytes: int = 0, told: Callable[[str], None] = lambda why: None) -> None:
        self._packed = packed
        self._auto = choose(packed, AUTO, packed.dtype)
        self._kernels: dict[str, Kernel] = {}
        states: dict[str, State] = {}
        for name, kernel in _kernels(packed).items():
            try:
                states[name] = kernel.prepare(packed)
            except Exception as error:  # of libraries that have no common class
                told(f"{name}, its form of the weight: {_told(error)}")
                continue
            self._kernels[name] = kernel
        states[DENSE] = State({"dense": decode(packed)}, {})
        # A plan may want the dense weight beside the packed one, and does not read it in the steps that are timed.
        tensors = {
            name: {key: tensor for key, tensor in state.tensors.items() if name == DENSE or key != "dense"}
            for name, state in states.items()
        }
        sizes = {name: sum(tensor.nbytes for tensor in each.values()) for name, each in tensors.items()}
        self.n_copies, self.cold = _n_copies(sizes.values(), packed.values.device, n_bytes)
        self._forms = {
            name: _Form(sizes[name], _several(each, self.n_copies), states[name].sizes)
            for name, each in tensors.items()
        }

    def runs(self, tokens: int) -> str:
        """What ``auto`` runs for so many tokens, one of ``calls``; with a dense step that is torch's product."""
        plan, kernel = self._auto.plan, self._auto.kernel
        if kernel is None or (plan and native.way_for(plan, tokens) == native.DENSE):
            return DENSE
        return _key(kernel, tokens)

    def calls(self, x: torch.Tensor) -> dict[str, Callable[[int], torch.Tensor]]:
        """Each way to multiply ``x`` [tokens, in], as a function of the place of a copy."""
        dense = self._forms[DENSE].copies
        found: dict[str, Callable[[int], torch.Tensor]] = {DENSE: lambda i: linear(x, dense[i]["dense"])}
        few = len(x) < tuning_cpu.MANY_TOKENS
        if few and x.device.type == "cpu" and x.dtype == torch.bfloat16 and "bf16" in native.features():
            found[LOOP] = lambda i: _LOOP_OP(x, dense[i]["dense"])
        if x.device.type == "cuda" and hasattr(torch.backends.cuda, "preferred_blas_library"):
            found[CUBLASLT] = lambda i: _cublaslt(x, dense[i]["dense"])
        here = self.runs(len(x))
        for name, kernel in self._kernels.items():
            # Of the native one, the plan that is followed.
            auto = self._auto.kernel
            chosen = auto if auto and auto.name == name and here != DENSE else kernel
            found[_key(chosen, len(x))] = partial(self._multiply, chosen, name, x)
        return found

    def search(self, x: torch.Tensor, told: Callable[[str], None]) -> None:
        """Have the kernels of a GPU find their fastest launch for ``x``; those that find none keep their default."""
        for name, kernel in self._kernels.items():
            form = self._forms[name]
            try:
                tuning_gpu.search_launch(kernel, State(form.copies[0], form.sizes), x)
            except Exception as error:  # Triton's own have no common class
                told(_failure(_key(kernel, len(x)), x, error))

    def _multiply(self, kernel: Kernel, name: str, x: torch.Tensor, i: int) -> torch.Tensor:
        form = self._forms[name]
        return kernel.linear(x, form.copies[i], form.sizes, None)

    def roof(self, name: str, tokens: int, ceilings: Device | None) -> dict[str, Any]:
        """The least time of one of ``calls``, as a record holds it."""
        nothing = {"roof_us": None, "limited_by": None}
        if ceilings is None:
            return nothing
        dense = name in _DENSE_WAYS
        storage = bounds.Storage(sparse_cores=name in (CUSPARSELT.name, CUTLASS.name))
        n_bytes = self._forms[DENSE if dense else name.removesuffix(_EXPANDED)].n_bytes
        needed = bounds.linear_work(*self._packed.shape, tokens, _name(self._packed.dtype), storage, n_bytes)
        if self._packed.values.dtype == torch.int8 and not dense and "int8" in ceilings.flops:
            # Some ways multiply bytes.
            needed = needed._replace(dtype="int8")
        try:
            least = bounds.bound(needed, ceilings)
        except UsageError:  # no peak is known for the type
            return nothing
        return {"roof_us": 1e6 * least.seconds, "limited_by": least.limited_by}


def _key(kernel: Kernel, tokens: int) -> str:
    """What a kernel's times go by."""
    if kernel.name == PACKED.name:  # which does nothing else
        return kernel.name
    return kernel.name + (_EXPANDED if expands(kernel.reported, tokens) else "")


def _n_copies(sizes: Collection[int], device: torch.device, n_bytes: int) -> tuple[int, bool]:
    """How many copies of forms of such sizes, and whether those of the smallest exceed the cache."""
    if device.type == "cpu":
        cache, free = last_level_cache_bytes() or _CACHE_BYTES, tuning_cpu.available_bytes()
    else:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        free = torch.cuda.mem_get_info(device)[0]
    smallest = min(sizes)
    wanted = math.ceil((n_bytes or _BEYOND_CACHE[device.type] * cache) / max(1, smallest))
    most = int(tuning_cpu.SHARE_OF_MEMORY * free / max(1, sum(sizes)))
    n = max(1, min(wanted, most, tuning_cpu.MOST_COPIES))
    return n, n * smallest > cache


def _several(tensors: Mapping[str, torch.Tensor], n: int) -> list[dict[str, torch.Tensor]]:
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors.values())
    each = [tuning_cpu.copies_of(t, n) if on_cpu else [t.clone() for _ in range(n)] for t in tensors.values()]
    return [dict(zip(tensors, row, strict=True)) for row in zip(*each, strict=True)]


def _failure(name: str, x: torch.Tensor, error: Exception) -> str:
    return f"{name}, {len(x)} tokens: {_told(error)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _samples(
    run: Mapping[str, Callable[[int], torch.Tensor]], x: torch.Tensor, n: int, rounds: int, told: Callable[[str], None],
    *, on_gpu: bool,
) -> dict[str, list[float]]:  # fmt: skip
    """Microseconds of a product with ``x`` by each of ``run`` that is right; of none where torch's dense one fails."""
    try:
        wanted = run[DENSE](0).float()
    except Exception as error_:
        told(_failure(DENSE, x, error_))
        return {}
    right: dict[tuple[int, str], Callable[[int], torch.Tensor]] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    calls = max(n, _LEAST_CALLS)
    for name, call in run.items():
        try:
            found = call(0)
            error = float((found.float() - wanted).norm() / wanted.norm())
            # Of a weight of zeros, which any difference from is wrong, it is NaN.
            if not (error <= _TOLERANCE or torch.equal(found, wanted.to(found.dtype))):
                told(f"{name}, {len(x)} tokens: differs from the dense product by {error:.3f}")
                continue
            if on_gpu:
                graphs[name] = captured(partial(_in_turn, call, calls, n))[0]
        except Exception as error_:  # Triton's own have no common class
            told(_failure(name, x, error_))
            continue
        right[0, name] = call
    if (0, DENSE) not in right:
        return {}
    if on_gpu:
        return {name: [us / calls for us in found] for name, found in replayed_us(graphs, rounds).items()}
    return {name: found for (_, name), found in tuning_cpu.interleaved(right, (0, DENSE), n, rounds).items()}


def _in_turn(call: Callable[[int], torch.Tensor], calls: int, n: int) -> torch.Tensor:
    """The last of ``calls`` products, each with the next of ``n`` copies."""
    for i in range(calls):
        result = call(i % n)
    return result
