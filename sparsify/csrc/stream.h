// A packed row as a sequence of dense registers. Included only by files that are compiled for AVX-512 VBMI2.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace sparsify {
// Every file has its own copy, made with its own instructions: nothing here may be merged between them by the linker.
namespace {

// How far ahead values are asked for. Hardware follows two streams well on some processors and not on others; a naive
// loop waited for memory until it asked itself.
constexpr int kAhead = 2048, kMaskAhead = 512;
// The same for tiles, which take half a kilobyte of a row before they turn to the next.
constexpr int kPanelAhead = 512;

template <class V> struct Lane;
template <> struct Lane<float> {
    using Mask = __mmask16;
    static __m512i expand(Mask mask, __m512i v) { return _mm512_maskz_expand_epi32(mask, v); }
    static __m512i load(Mask mask, const float* at) { return _mm512_maskz_loadu_epi32(mask, at); }
};
template <> struct Lane<uint16_t> {
    using Mask = __mmask32;
    static __m512i expand(Mask mask, __m512i v) { return _mm512_maskz_expand_epi16(mask, v); }
    static __m512i load(Mask mask, const uint16_t* at) { return _mm512_maskz_loadu_epi16(mask, at); }
};
template <> struct Lane<int8_t> {
    using Mask = __mmask64;
    static __m512i expand(Mask mask, __m512i v) { return _mm512_maskz_expand_epi8(mask, v); }
    static __m512i load(Mask mask, const int8_t* at) { return _mm512_maskz_loadu_epi8(mask, at); }
};

// How many values a register of columns has.
enum class Stride {
    half,  // always half of them: 2:4, 4:8, 1:2, 8:16; half a register is loaded, never a byte too much
    any,   // as many as its mask has ones; a whole register is loaded, which must not pass the end
    last,  // the same near the end of all values, where loads are masked
};

template <class V, Stride S>
class Row {
  public:
    static constexpr int64_t kLanes = kRegister / static_cast<int64_t>(sizeof(V));
    using Mask = typename Lane<V>::Mask;

    Row() = default;
    Row(const Weight& weight, int64_t row)
        : at_(static_cast<const V*>(weight.values) + weight.start(row)), mask_(weight.mask + row * weight.mask_stride()) {}

    // The next kLanes columns, zeros in place.
    __m512i next() {
        Mask mask;
        std::memcpy(&mask, mask_, sizeof mask);
        mask_ += sizeof mask;
        if constexpr (S == Stride::half) {
            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at_));
            at_ += kLanes / 2;
            return Lane<V>::expand(mask, _mm512_castsi256_si512(half));
        } else if constexpr (S == Stride::any) {
            const __m512i whole = _mm512_loadu_si512(at_);
            at_ += _mm_popcnt_u64(mask);
            return Lane<V>::expand(mask, whole);
        } else {
            return masked(mask);
        }
    }

    // The last columns of a row, fewer than kLanes.
    __m512i rest(int64_t columns) {
        Mask mask = 0;
        std::memcpy(&mask, mask_, static_cast<size_t>((columns + 7) / 8));
        return masked(mask);
    }

    template <int Ahead>
    void prefetch(int64_t offset) const {
        _mm_prefetch(reinterpret_cast<const char*>(at_) + Ahead + offset, _MM_HINT_T0);
    }
    void prefetch_mask() const { _mm_prefetch(reinterpret_cast<const char*>(mask_) + kMaskAhead, _MM_HINT_T0); }

  private:
    __m512i masked(Mask mask) {
        const int64_t count = _mm_popcnt_u64(mask);
        const Mask low = static_cast<Mask>(_bzhi_u64(~0ull, static_cast<unsigned>(count)));
        const __m512i values = Lane<V>::load(low, at_);
        at_ += count;
        return Lane<V>::expand(mask, values);
    }

    const V* at_ = nullptr;
    const uint8_t* mask_ = nullptr;
};

// Whether every register of the weight's columns has half its places kept.
template <class V>
bool halved(const Weight& weight) {
    return weight.m > 0 && 2 * weight.n == weight.m && Row<V, Stride::half>::kLanes % weight.m == 0;
}

// Rows from here on are read with Stride::last: a whole register at the end of an earlier one still is inside.
template <class V>
int64_t first_last_row(const Weight& weight, int64_t begin, int64_t end) {
    int64_t row = end;
    while (row > begin && weight.start(row) + Row<V, Stride::any>::kLanes > weight.n_values) --row;
    return row;
}

inline float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN stays one.
inline uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float bias_of(const Product& p, int64_t row) {
    if (!p.bias) return 0.0f;
    return p.x_type == Type::f32 ? static_cast<const float*>(p.bias)[row]
                                 : widen(static_cast<const uint16_t*>(p.bias)[row]);
}

inline void put(const Product& p, int64_t token, int64_t row, float value) {
    const int64_t at = token * p.weight.n_out + row;
    if (p.x_type == Type::f32) static_cast<float*>(p.y)[at] = value;
    else static_cast<uint16_t*>(p.y)[at] = narrow(value);
}

}  // namespace
}  // namespace sparsify
