// int8 weights. x is quantised to 16 bits a token, x = step * (256 * high + low - 32768), and its two bytes are
// multiplied with the codes apart: sums are exact, and the error is that of 16 bits, at most step / 2 for each input.
#include "rows.h"

namespace sparsify {
namespace {

struct Sums {
    __m512i high, low, ones;
};

struct Bytes {
    using V = int8_t;
    using X = uint8_t;
    using Acc = Sums;
    static constexpr int64_t kPerRegister = 128;  // 64 high bytes, then 64 low ones
    static constexpr bool kExact = true;
    static Acc zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static void add(Acc& sum, const Acc& other) {
        sum.high = _mm512_add_epi32(sum.high, other.high);
        sum.low = _mm512_add_epi32(sum.low, other.low);
        sum.ones = _mm512_add_epi32(sum.ones, other.ones);
    }
    static void step(Acc& sum, __m512i w, const X* x) {
        sum.high = _mm512_dpbusd_epi32(sum.high, _mm512_loadu_si512(x), w);
        sum.low = _mm512_dpbusd_epi32(sum.low, _mm512_loadu_si512(x + 64), w);
        sum.ones = _mm512_dpbusd_epi32(sum.ones, _mm512_set1_epi8(1), w);
    }
    static int64_t reduce(__m512i sum) {
        const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
        const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1));
        return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
    }
    static float total(const Acc& sum, const Product& p, const Input& input, int64_t row, int64_t token) {
        const int64_t whole = 256 * reduce(sum.high) + reduce(sum.low) - 32768 * reduce(sum.ones);
        return static_cast<float>(static_cast<double>(whole) * input.steps[token] * p.weight.scale[row]);
    }
};

}  // namespace

void rows_vnni(const Product& p, const Input& input, int64_t begin, int64_t end) {
    all_rows<Bytes>(p, input, begin, end);
}

}  // namespace sparsify
