// Products with packed weights on a CPU: the interface between the parts of this folder. Nothing here knows Python.
//
// A weight [out, in] is a bitmask and its kept values, as docs/formats.md stores them. Every path computes
//     y[t, i] = cast(scale[i] * sum_j x[t, j] * value[i, j] + bias[i])
// with one cast at the end. Sums are in float32; those of int8 values in bytes (vnni, and amx for few tokens) are exact
// ones of an input rounded to 16 bits a token.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

enum class Type { f32, bf16, i8 };

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// The instructions that a product is made with.
enum class Path { avx512, bf16, vnni, amx };

struct Weight {
    Type type;
    const void* values;     // any alignment
    int64_t n_values;
    const uint8_t* mask;    // [out, ceil(in / 8)], unused bits zero
    const int64_t* starts;  // [out + 1]: where the values of each row begin; null for n:m, where they follow from n, m
    const float* scale;     // [out] for int8, else null
    int64_t n_out, n_in;
    int n, m;               // 0: unstructured

    int64_t mask_stride() const { return (n_in + 7) / 8; }
    int64_t start(int64_t row) const { return starts ? starts[row] : row * (n_in / m * n); }
};

struct Product {
    Weight weight;
    Type x_type;            // f32 or bf16: of x, y and bias
    const void* x;          // [tokens, in]
    const void* bias;       // [out] or null
    void* y;                // [tokens, out]
    int64_t tokens;
};

// x as a path wants it; built once for all rows.
struct Input {
    const void* data;
    int64_t stride;         // elements between tokens
    const double* steps;    // [tokens] of products in bytes, else null; double, as those of tiny inputs are no floats
    bool few;               // tiles: laid out for few tokens
};

struct Features {
    bool avx512, bf16, vnni, amx;
};

// What this processor and operating system allow, and this build contains.
const Features& features();

// Columns that one step of a path takes: a register of values.
constexpr int64_t kRegister = 64;
inline int64_t lanes(Type type) { return kRegister / static_cast<int64_t>(size_of(type)); }
inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Tiles: up to 32 tokens stream the weight once; for more, rows are expanded into the cache, and int8 codes are
// multiplied as bfloat16 with x as it is, instead of in bytes.
inline bool few(const Product& p) { return p.tokens <= 32; }

// The rows [begin, end) of a product. Each lives in a file that is compiled for its instructions alone.
void rows_avx512(const Product&, const Input&, int64_t begin, int64_t end);
void rows_bf16(const Product&, const Input&, int64_t begin, int64_t end);
void rows_vnni(const Product&, const Input&, int64_t begin, int64_t end);
void rows_amx(const Product&, const Input&, int64_t begin, int64_t end);
void dense_bf16(const Product&, const Input&, int64_t begin, int64_t end);  // weight.values is the dense weight

// Rows [begin, end) of the weight, dense, as `type`: that of the values, or for int8 values also f32 and bf16.
void expand_avx512(const Weight&, Type type, void* out, int64_t begin, int64_t end);

// Columns up to which int32 sums of products of bytes cannot overflow.
constexpr int64_t kMostVnni = 1 << 20, kMostTiles = 1 << 16;

// Whether `path` can compute the product on this machine.
bool supports(Path path, const Product& product);

// y of `product` by `path`, on up to `threads` threads of the caller's pool.
void linear(const Product& product, Path path, int threads);
void dense(const Product& product, int threads);
void expand(const Weight& weight, Type type, void* out, int64_t begin, int64_t end, int threads);

}  // namespace sparsify
