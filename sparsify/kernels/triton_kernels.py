"""Device code of the Triton kernels: products with few tokens, read from the bitmask as stored.

Needs the package triton; ``triton_decode`` imports it where a GPU is used. Not yet run on a GPU: the tests run it in
Triton's interpreter and compile it for three architectures.

Two kinds of weight are read. *Pairs* is 2:4 whose rows are whole 16-bit words of the mask: two values are one 32-bit
word of fixed place, a mask word belongs to four of them, and which column a value has follows from its nibble alone.
*Bits* is everything else: a table says where the values of a row's chunk begin, and a prefix sum of the mask's bytes
where a byte's do. Two kinds of product follow. ``pairs_rows`` and ``bits_rows`` multiply in float32, for few tokens: a
program has a few rows, a thread a word or byte of the mask. ``tiles`` expands a tile of the weight and multiplies it on
tensor cores.

Each program goes through a share of the columns and writes a float32 sum per share; ``reduce`` adds them in order.
Nothing is added atomically: a result depends on the configuration only. In ``pairs_rows`` zeros that are not stored
are not multiplied either, so that an infinite input can stay infinite where a dense product gives NaN.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-untyped-call, assignment"

from __future__ import annotations

import triton
import triton.language as tl

# The values of a row's chunk begin where a table says: columns of a chunk.
CHUNK = tl.constexpr(512)
# Its interpreter multiplies the bits of bfloat16 as integers; float32 has the same products, and sums.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _float(bits, HALF: tl.constexpr):
    """16-bit floats, given as int16, in float32: denormal ones too, which the interpreter's own conversion loses."""
    if HALF:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _halves(word, HALF: tl.constexpr):
    """Both 16-bit floats of an int32, low one first, in float32."""
    if HALF:
        return _float(word.to(tl.int16), HALF), _float((word >> 16).to(tl.int16), HALF)
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _quarters(word, HALF: tl.constexpr):
    """Four 16-bit floats of an int64, low one first, in float32."""
    return _halves(word.to(tl.int32), HALF) + _halves((word >> 32).to(tl.int32), HALF)


@triton.jit
def _ones(byte):
    """Bits set in each byte."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def _write(result, bias, row, token, sums, n_out, n_tokens, part, inside, BIAS: tl.constexpr, FINAL: tl.constexpr):
    """``sums`` for each (token, row) of a share, or the result itself where there is one share."""
    if FINAL:
        if BIAS:
            sums += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + token * n_out + row, sums.to(result.dtype.element_ty), mask=inside)
    else:
        tl.store(result + (part.to(tl.int64) * n_tokens + token) * n_out + row, sums, mask=inside)


@triton.jit
def pairs_rows(
    x, values, mask, bias, result, n_out, n_in, n_tokens,
    T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """2:4 times T tokens: x int64 [T, in / 4], values int32 [out, in / 4], mask int16 [out, in / 16].

    A program has R rows, and C words of each at a time. An element of a tile [C, 4] is one group of four columns.
    """
    first, part = tl.program_id(0) * R, tl.program_id(1)
    words = n_in // 16
    group = tl.arange(0, 4)[None, :]
    sums = ()
    for _ in tl.static_range(R * T):
        sums = sums + (tl.zeros((C, 4), tl.float32),)  # noqa: RUF005 (no unpacking in Triton)
    for start in range(part * C, words, tl.num_programs(1) * C):
        word = start + tl.arange(0, C)
        inside = word < words
        inputs = ()
        for t in tl.static_range(T):
            four = tl.load(x + (t * words + word)[:, None] * 4 + group, mask=inside[:, None], other=0)
            inputs = inputs + _quarters(four, HALF)
        added = ()
        for r in tl.static_range(R):
            place = tl.minimum(first + r, n_out - 1).to(tl.int64) * words + word
            nibble = tl.load(mask + place, mask=inside, other=0).to(tl.int32)[:, None] >> (4 * group)
            pair = tl.load(values + place[:, None] * 4 + group, mask=inside[:, None], other=0)
            low, high = _halves(pair, HALF)
            for t in tl.static_range(T):
                late = tl.where(nibble & 2 != 0, inputs[4 * t + 1], inputs[4 * t + 2])
                early = tl.where(nibble & 4 != 0, inputs[4 * t + 2], inputs[4 * t + 1])
                x_low = tl.where(nibble & 1 != 0, inputs[4 * t], late)
                x_high = tl.where(nibble & 8 != 0, inputs[4 * t + 3], early)
                added = added + (sums[r * T + t] + low * x_low + high * x_high,)  # noqa: RUF005
        sums = added
    for r in tl.static_range(R):
        for t in tl.static_range(T):
            total = tl.sum(tl.sum(sums[r * T + t], 1), 0)
            _write(result, bias, first + r, t, total, n_out, n_tokens, part, first + r < n_out, BIAS, FINAL)


@triton.jit
def bits_rows(
    x, values, mask, starts, bias, result, n_out, n_in, n_tokens,
    T: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Any bitmask times T tokens: x int64 [T, 2 ceil(in / 8)], values int16 [nnz], mask uint8 [out, ceil(in / 8)].

    ``starts`` [out, chunks] says where the values of each chunk of a row begin.

    A program has R rows, and a chunk of each at a time; an element of a tile is a byte of the mask, and a thread takes
    the values of its byte one after the other.
    """
    first, part = tl.program_id(0) * R, tl.program_id(1)
    n_bytes, chunks = tl.cdiv(n_in, 8), tl.cdiv(n_in, CHUNK)
    lane = tl.arange(0, CHUNK // 8)
    sums = ()
    for _ in tl.static_range(R * T):
        sums = sums + (tl.zeros((CHUNK // 8,), tl.float32),)  # noqa: RUF005
    for chunk in range(part, chunks, tl.num_programs(1)):
        place = chunk * (CHUNK // 8) + lane
        inputs = ()
        for t in tl.static_range(T):
            for half in tl.static_range(2):
                four = tl.load(x + 2 * (t * n_bytes + place) + half, mask=place < n_bytes, other=0)
                inputs = inputs + _quarters(four, HALF)
        added = ()
        for r in tl.static_range(R):
            row = tl.minimum(first + r, n_out - 1).to(tl.int64)
            byte = tl.load(mask + row * n_bytes + place, mask=place < n_bytes, other=0).to(tl.int32)
            ones = _ones(byte)
            of_chunk, at = values + tl.load(starts + row * chunks + chunk), tl.cumsum(ones, 0) - ones
            of_row = ()
            for t in tl.static_range(T):
                of_row = of_row + (sums[r * T + t],)  # noqa: RUF005
            for j in tl.static_range(8):
                value = _float(tl.load(of_chunk + at, mask=byte & (1 << j) != 0, other=0), HALF)
                at += (byte >> j) & 1
                more = ()
                for t in tl.static_range(T):
                    more = more + (of_row[t] + value * inputs[8 * t + j],)  # noqa: RUF005
                of_row = more
            added = added + of_row
        sums = added
    for r in tl.static_range(R):
        for t in tl.static_range(T):
            total = tl.sum(sums[r * T + t], 0)
            _write(result, bias, first + r, t, total, n_out, n_tokens, part, first + r < n_out, BIAS, FINAL)


@triton.jit
def _pairs_tile(values, mask, row, start, n_in, DTYPE: tl.constexpr, K: tl.constexpr):
    """Columns ``start`` to ``start + K`` of 2:4 rows ``row`` int64 [B], expanded: [B, K]."""
    words = n_in // 16
    word = start // 16 + tl.arange(0, K // 16)
    inside = (word < words)[None, :]
    place = row[:, None] * words + word[None, :]
    group = tl.arange(0, 4)[None, None, :]
    nibble = tl.load(mask + place, mask=inside, other=0).to(tl.int32)[:, :, None] >> (4 * group)
    pair = tl.load(values + place[:, :, None] * 4 + group, mask=inside[:, :, None], other=0)
    low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    none = tl.zeros_like(low)
    a = tl.where(nibble & 1 != 0, low, none)
    b = tl.where(nibble & 2 != 0, tl.where(nibble & 1 != 0, high, low), none)
    c = tl.where(nibble & 4 != 0, tl.where(nibble & 8 != 0, low, high), none)
    d = tl.where(nibble & 8 != 0, high, none)
    # A join adds the fastest dimension: the order within a group is a, b, c, d.
    four = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(four, (row.shape[0], K)).to(DTYPE, bitcast=True)


@triton.jit
def _bits_tile(values, mask, at, row, start, n_in, K: tl.constexpr):
    """Columns ``start`` to ``start + K`` of rows of a bitmask, expanded: [B, K], and how many values each row has.

    ``at`` int64 [B] says where they begin.
    """
    n_bytes = tl.cdiv(n_in, 8)
    place = start // 8 + tl.arange(0, K // 8)[None, :]
    byte = tl.load(mask + row[:, None] * n_bytes + place, mask=place < n_bytes, other=0).to(tl.int32)
    ones = _ones(byte)
    pointer = values + (at[:, None] + (tl.cumsum(ones, 1) - ones))
    found = ()
    for j in tl.static_range(8):
        found = found + (tl.load(pointer, mask=byte & (1 << j) != 0, other=0.0),)  # noqa: RUF005
        pointer += (byte >> j) & 1
    even = tl.join(tl.join(found[0], found[4]), tl.join(found[2], found[6]))
    odd = tl.join(tl.join(found[1], found[5]), tl.join(found[3], found[7]))
    return tl.reshape(tl.join(even, odd), (row.shape[0], K)), tl.sum(ones, 1)


@triton.jit
def tiles(
    x, values, mask, starts, bias, result, n_out, n_in, n_tokens, share,
    PAIRS: tl.constexpr, T: tl.constexpr, B: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """Up to T tokens, x [tokens, in], times B rows a program on tensor cores, K columns at a time.

    A program goes through ``share`` columns, whole chunks, one after the other. WIDE multiplies in float32.
    """
    row, part, token = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1), tl.arange(0, T)
    readable = tl.minimum(row, n_out - 1).to(tl.int64)
    sums = tl.zeros((B, T), tl.float32)
    first = part * share
    if not PAIRS:
        at = tl.load(starts + readable * tl.cdiv(n_in, CHUNK) + first // CHUNK).to(tl.int64)
    for start in range(first, tl.minimum(first + share, n_in), K):
        if PAIRS:
            weight = _pairs_tile(values, mask, readable, start, n_in, x.dtype.element_ty, K)
        else:
            weight, ones = _bits_tile(values, mask, at, readable, start, n_in, K)
            at += ones
        column = start + tl.arange(0, K)
        inside = (token < n_tokens)[:, None] & (column < n_in)[None, :]
        inputs = tl.load(x + token[:, None] * n_in + column[None, :], mask=inside, other=0.0)
        if WIDE:
            half: tl.constexpr = x.dtype.element_ty == tl.float16
            weight = _float(weight.to(tl.int16, bitcast=True), half)
            inputs = _float(inputs.to(tl.int16, bitcast=True), half)
        sums = tl.dot(weight, tl.trans(inputs), sums)
    inside = (row < n_out)[:, None] & (token < n_tokens)[None, :]
    _write(result, bias, row[:, None], token[None, :], sums, n_out, n_tokens, part, inside, BIAS, FINAL)


@triton.jit
def expand(values, mask, starts, result, n_out, n_in, PAIRS: tl.constexpr, B: tl.constexpr, K: tl.constexpr):
    """The dense weight, result [out, in]: B rows and a chunk of columns a program, K at a time."""
    row, first = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * CHUNK
    readable = tl.minimum(row, n_out - 1).to(tl.int64)
    if not PAIRS:
        at = tl.load(starts + readable * tl.cdiv(n_in, CHUNK) + first // CHUNK).to(tl.int64)
    for start in range(first, tl.minimum(first + CHUNK, n_in), K):
        if PAIRS:
            weight = _pairs_tile(values, mask, readable, start, n_in, result.dtype.element_ty, K)
        else:
            weight, ones = _bits_tile(values, mask, at, readable, start, n_in, K)
            at += ones
        column = start + tl.arange(0, K)[None, :]
        tl.store(result + readable[:, None] * n_in + column, weight, mask=(row < n_out)[:, None] & (column < n_in))


@triton.jit
def reduce(partial, bias, result, n_out, total, SPLIT: tl.constexpr, BIAS: tl.constexpr, B: tl.constexpr):
    """The shares of ``partial`` float32 [SPLIT, tokens, out] added in order, the bias, one rounding."""
    place = tl.program_id(0) * B + tl.arange(0, B)
    inside = place < total
    sums = tl.zeros((B,), tl.float32)
    for part in tl.static_range(SPLIT):
        sums += tl.load(partial + part * tl.cast(total, tl.int64) + place, mask=inside, other=0.0)
    if BIAS:
        sums += tl.load(bias + place % n_out, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, sums.to(result.dtype.element_ty), mask=inside)
