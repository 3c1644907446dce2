// bfloat16 products with the processor's pairwise dot product, which accumulates in float32 and takes denormal
// inputs and sums for zero; and the same loop over a dense weight, as an honest rival in benchmarks.
#include "rows.h"

namespace sparsify {
namespace {

__m512bh halves(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

struct Pairs {
    using V = uint16_t;
    using X = uint16_t;
    using Acc = __m512;
    static constexpr int64_t kPerRegister = 32;
    static constexpr bool kExact = false;
    static Acc zero() { return _mm512_setzero_ps(); }
    static void add(Acc& sum, Acc other) { sum = _mm512_add_ps(sum, other); }
    static void step(Acc& sum, __m512i w, const X* x) {
        sum = _mm512_dpbf16_ps(sum, halves(w), halves(_mm512_loadu_si512(x)));
    }
    static float total(Acc sum, const Product&, const Input&, int64_t, int64_t) { return _mm512_reduce_add_ps(sum); }
};

}  // namespace

void rows_bf16(const Product& p, const Input& input, int64_t begin, int64_t end) {
    all_rows<Pairs>(p, input, begin, end);
}

void dense_bf16(const Product& p, const Input& input, int64_t begin, int64_t end) {
    const int64_t n = p.weight.n_in;
    for (int64_t row = begin; row < end; ++row) {
        const uint16_t* w = static_cast<const uint16_t*>(p.weight.values) + row * n;
        for (int64_t token = 0; token < p.tokens; ++token) {
            const uint16_t* x = static_cast<const uint16_t*>(input.data) + token * input.stride;
            __m512 acc[4] = {};
            int64_t j = 0;
            for (; j + 128 <= n; j += 128)
                for (int k = 0; k < 4; ++k) {
                    _mm_prefetch(reinterpret_cast<const char*>(w + j + 32 * k) + kAhead, _MM_HINT_T0);
                    Pairs::step(acc[k], _mm512_loadu_si512(w + j + 32 * k), x + j + 32 * k);
                }
            for (; j < n; j += 32) {
                const __mmask32 inside = n - j >= 32 ? ~0u : (1u << (n - j)) - 1;
                Pairs::step(acc[0], _mm512_maskz_loadu_epi16(inside, w + j), x + j);
            }
            const __m512 sum = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
            put(p, token, row, _mm512_reduce_add_ps(sum) + bias_of(p, row));
        }
    }
}

}  // namespace sparsify
