#include "inputs.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "transpose.h"

namespace sparsify {
namespace {

constexpr int64_t kTokens = 16;

__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << (n > 0 ? n : 0)) - 1); }

// Sixteen columns from `column` on as float32; zeros beyond the last.
__m512 load(const Product& p, int64_t token, int64_t column) {
    const int64_t at = token * p.weight.n_in + column;
    const __mmask16 inside = first(p.weight.n_in - column);
    if (p.x_type == Type::f32) return _mm512_maskz_loadu_ps(inside, static_cast<const float*>(p.x) + at);
    const __m256i bits = _mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(p.x) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void pad(const Product& p, char* target, int64_t stride, int64_t token) {
    const auto size = static_cast<int64_t>(size_of(p.x_type)), n = p.weight.n_in;
    char* row = target + token * stride * size;
    std::memcpy(row, static_cast<const char*>(p.x) + token * n * size, static_cast<size_t>(n * size));
    std::memset(row + n * size, 0, static_cast<size_t>((stride - n) * size));
}

void split_pairs(const Product& p, float* target, int64_t stride, int64_t token) {
    for (int64_t j = 0; j < stride; j += 32) {
        const __m512 low = load(p, token, j), high = load(p, token, j + 16);
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        _mm512_storeu_ps(target + token * stride + j, _mm512_permutex2var_ps(low, even, high));
        _mm512_storeu_ps(target + token * stride + j + 16, _mm512_permutex2var_ps(low, odd, high));
    }
}

// Codes [stride] of a token, zeros beyond its columns; returns the step.
double quantise(const Product& p, int64_t token, int16_t* codes, int64_t stride) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (int64_t j = 0; j < p.weight.n_in; j += 16) {
        const __m512 x = load(p, token, j);
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
        strange |= _mm512_fpclass_ps_mask(x, 0x99);  // NaN or Inf
    }
    const float largest = _mm512_reduce_max_ps(most);
    if (strange || largest == 0) {
        std::memset(codes, 0, static_cast<size_t>(stride) * sizeof *codes);
        return strange ? std::nan("") : 0.0;
    }
    // Tiny ones go through powers of two, exactly: the inverse of a small step is no float.
    const int shift = largest < 1e-30f ? 96 : 0;
    const __m512 inverse = _mm512_set1_ps(32767 / std::ldexp(largest, shift));
    const __m512 up = _mm512_set1_ps(std::ldexp(1.0f, shift));
    for (int64_t j = 0; j < stride; j += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(load(p, token, j), up), inverse));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j), _mm512_cvtsepi32_epi16(code));
    }
    return static_cast<double>(largest) / 32767;
}

// Codes of 32 columns as their high or low bytes.
__m256i bytes(const int16_t* codes, bool high) {
    const __m512i words = _mm512_loadu_si512(codes);
    return _mm512_cvtepi16_epi8(high ? _mm512_srai_epi16(words, 8) : words);
}

void store(char* at, __m256i value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }

void make_planes(const int16_t* codes, char* row, int64_t stride) {
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(128));
    for (int64_t j = 0; j < stride; j += 64)
        for (int64_t half = 0; half < 64; half += 32) {
            store(row + 2 * j + half, _mm256_add_epi8(bytes(codes + j + half, true), offset));
            store(row + 2 * j + 64 + half, bytes(codes + j + half, false));
        }
}

// Sixteen rows of 64 bytes to sixteen times 4 bytes of each, and into a tile.
void tile(__m512i (&rows)[16], char* target) {
    __m512 words[16];
    std::memcpy(words, rows, sizeof words);
    transpose(words);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(target + i * kRegister, words[i]);
}

void make_tiles(const Product& p, char* target, int64_t token) {
    const int64_t n = p.weight.n_in, tokens = std::min(kTokens, p.tokens - token);
    for (int64_t j = 0; j < n; j += 32, target += 1024) {
        const __mmask32 inside = n - j >= 32 ? ~0u : (1u << (n - j)) - 1;
        __m512i rows[16];
        for (int64_t t = 0; t < kTokens; ++t)
            rows[t] = t < tokens ? _mm512_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(p.x) + (token + t) * n + j)
                                 : _mm512_setzero_si512();
        tile(rows, target);
    }
}

void make_byte_tiles(const int16_t* codes, char* target, int64_t stride) {
    for (int64_t j = 0; j < stride; j += 64)
        for (const bool high : {true, false}) {
            __m512i rows[16];
            for (int64_t t = 0; t < kTokens; ++t) {
                const int16_t* at = codes + t * stride + j;
                rows[t] = _mm512_inserti64x4(_mm512_castsi256_si512(bytes(at, high)), bytes(at + 32, high), 1);
            }
            tile(rows, target);
            target += 1024;
        }
}

}  // namespace

void lay_out_avx512(const Product& p, Form form, char* data, double* steps, int64_t begin, int64_t end) {
    const int64_t stride = padded(p.weight.n_in, columns(p, form)), width = block_bytes(p, form);
    std::vector<int16_t> codes(quantised(form) ? static_cast<size_t>(kTokens * stride) : 0);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first_token = block * kTokens, tokens = std::min(kTokens, p.tokens - first_token);
        char* target = data + block * width;
        if (form == Form::tiles) {
            make_tiles(p, target, first_token);
            continue;
        }
        if (quantised(form) && tokens < kTokens) std::fill(codes.begin(), codes.end(), int16_t{0});
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t token = first_token + t;
            if (form == Form::plain) pad(p, data, stride, token);
            if (form == Form::even_odd) split_pairs(p, reinterpret_cast<float*>(data), stride, token);
            if (quantised(form)) steps[token] = quantise(p, token, codes.data() + t * stride, stride);
            if (form == Form::planes) make_planes(codes.data() + t * stride, target + t * 2 * stride, stride);
        }
        if (form == Form::byte_tiles) make_byte_tiles(codes.data(), target, stride);
    }
}

}  // namespace sparsify
