// float32 products, bfloat16 products without bfloat16 instructions, and expansion to dense rows.
#include "rows.h"

#include <vector>

namespace sparsify {
namespace {

struct Float {
    using V = float;
    using X = float;
    using Acc = __m512;
    static constexpr int64_t kPerRegister = 16;
    static constexpr bool kExact = false;
    static Acc zero() { return _mm512_setzero_ps(); }
    static void add(Acc& sum, Acc other) { sum = _mm512_add_ps(sum, other); }
    static void step(Acc& sum, __m512i w, const X* x) {
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_loadu_ps(x), sum);
    }
    static float total(Acc sum, const Product&, const Input&, int64_t, int64_t) { return _mm512_reduce_add_ps(sum); }
};

// x is float32, for each 32 columns first the even ones, then the odd ones: as halves of 32-bit words give them.
struct Widened : Float {
    using V = uint16_t;
    static constexpr int64_t kPerRegister = 32;
    static void step(Acc& sum, __m512i w, const X* x) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
        sum = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sum);
        sum = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sum);
    }
};

template <class V, Stride S>
void expand_row(const Weight& weight, V* out, int64_t row) {
    using R = Row<V, S>;
    R values(weight, row);
    int64_t column = 0;
    for (; column + R::kLanes <= weight.n_in; column += R::kLanes) {
        values.template prefetch<kAhead>(0);
        _mm512_storeu_si512(out + column, values.next());
    }
    if (column < weight.n_in) {
        alignas(64) V rest[R::kLanes];
        _mm512_store_si512(rest, values.rest(weight.n_in - column));
        std::memcpy(out + column, rest, static_cast<size_t>(weight.n_in - column) * sizeof(V));
    }
}

// int8 codes of a row times its scale, in float32 or rounded once to bfloat16.
void scale_row(const int8_t* codes, float scale, Type type, void* out, int64_t n) {
    if (type == Type::f32) {
        for (int64_t j = 0; j < n; ++j) static_cast<float*>(out)[j] = scale * static_cast<float>(codes[j]);
    } else {
        for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(out)[j] = narrow(scale * static_cast<float>(codes[j]));
    }
}

template <class V>
void expand_rows(const Weight& weight, Type type, void* out, int64_t begin, int64_t end) {
    const int64_t last = first_last_row<V>(weight, begin, end), size = static_cast<int64_t>(size_of(type));
    const bool scaled = type != weight.type;
    std::vector<V> codes(scaled ? static_cast<size_t>(weight.n_in) : 0);  // of a row on their way to another type
    for (int64_t row = begin; row < end; ++row) {
        char* target = static_cast<char*>(out) + (row - begin) * weight.n_in * size;
        V* dense = scaled ? codes.data() : reinterpret_cast<V*>(target);
        if (halved<V>(weight)) expand_row<V, Stride::half>(weight, dense, row);
        else if (row < last) expand_row<V, Stride::any>(weight, dense, row);
        else expand_row<V, Stride::last>(weight, dense, row);
        if constexpr (sizeof(V) == 1) {
            if (scaled) scale_row(dense, weight.scale[row], type, target, weight.n_in);
        }
    }
}

}  // namespace

void rows_avx512(const Product& p, const Input& input, int64_t begin, int64_t end) {
    if (p.weight.type == Type::f32) all_rows<Float>(p, input, begin, end);
    else all_rows<Widened>(p, input, begin, end);
}

void expand_avx512(const Weight& weight, Type type, void* out, int64_t begin, int64_t end) {
    switch (weight.type) {
        case Type::f32: expand_rows<float>(weight, type, out, begin, end); break;
        case Type::bf16: expand_rows<uint16_t>(weight, type, out, begin, end); break;
        case Type::i8: expand_rows<int8_t>(weight, type, out, begin, end); break;
    }
}

}  // namespace sparsify
