// Several tokens at a time in tile registers. Rows of the weight, expanded, are left tiles as they are; the tokens,
// transposed in pairs (bfloat16) or fours (int8), are the right ones, so that a sum's row is an output and its column a
// token. Up to 32 tokens, sixteen rows are expanded a panel at a time and multiplied at once: the weight's stream is
// what takes time. More tokens reuse rows that were expanded into the second-level cache.
#include <algorithm>

#include "scratch.h"
#include "stream.h"
#include "transpose.h"

namespace sparsify {
namespace {

constexpr int64_t kTile = 16, kTileBytes = kTile * kRegister;
// Registers of columns in a panel: sixteen rows of it and of the tokens lie in the first-level cache.
constexpr int64_t kPanel = 16;
// Rows of a panel for many tokens: each tile of tokens that comes from further away is used for all of them.
// Its registers are about kBlockPanel, and fewer than twice that where rows have few.
constexpr int64_t kBlockRows = 256, kBlockPanel = 16;

// GCC's tile intrinsics do not say what memory they read: stores to it stay before them, and later ones behind, by this.
void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

__m512 bias_of_tile(const Product& p, int64_t row, __mmask16 inside) {
    if (!p.bias) return _mm512_setzero_ps();
    if (p.x_type == Type::f32) return _mm512_maskz_loadu_ps(inside, static_cast<const float*>(p.bias) + row);
    const __m256i bits = _mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(p.bias) + row);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// sum * scale * step in double: the product of any two of them need not be a float.
__m512 times(__m512 sum, __m512 scale, double step) {
    const auto half = [&](__m256 a, __m256 b) {
        const __m512d product = _mm512_mul_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b));
        return _mm512_cvtpd_ps(_mm512_mul_pd(product, _mm512_set1_pd(step)));
    };
    const __m256 first = half(_mm512_castps512_ps256(sum), _mm512_castps512_ps256(scale));
    const __m256 second = half(_mm512_extractf32x8_ps(sum, 1), _mm512_extractf32x8_ps(scale, 1));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
}

// The usual case of `finish`, in fewer steps: sixteen rows of bfloat16, made of sums in float32. Pairs of rows are rounded
// before they are transposed.
void finish_bf16(const Product& p, int64_t row, int64_t token, const float* sums) {
    alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    alignas(64) float bias[kTile], scale[kTile];
    _mm512_store_ps(bias, bias_of_tile(p, row, 0xffff));
    if (p.weight.scale) _mm512_store_ps(scale, _mm512_loadu_ps(p.weight.scale + row));
    const auto rounded = [&](int i) {
        __m512 y = _mm512_load_ps(sums + 16 * i);
        if (p.weight.scale) y = _mm512_mul_ps(y, _mm512_set1_ps(scale[i]));
        return _mm512_add_ps(y, _mm512_set1_ps(bias[i]));
    };
    __m512i pairs[8], quads[8], eights[8];
    for (int i = 0; i < 8; ++i) {
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rounded(2 * i + 1), rounded(2 * i)));
        pairs[i] = _mm512_permutexvar_epi16(interleave, both);
    }
    // From here on four bytes are two rows of a token, and 128 bits hold four tokens of a pair of rows.
    for (int i = 0; i < 8; i += 2) {
        quads[i] = _mm512_unpacklo_epi32(pairs[i], pairs[i + 1]);
        quads[i + 1] = _mm512_unpackhi_epi32(pairs[i], pairs[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
            eights[i + 2 * k] = _mm512_unpacklo_epi64(quads[i + k], quads[i + k + 2]);
            eights[i + 2 * k + 1] = _mm512_unpackhi_epi64(quads[i + k], quads[i + k + 2]);
        }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    uint16_t* y = static_cast<uint16_t*>(p.y) + token * p.weight.n_out + row;
    const int64_t n = std::min(kTile, p.tokens - token);
    for (int k = 0; k < 4; ++k)
        for (int half = 0; half < 2; ++half) {
            const __m512i two = _mm512_permutex2var_epi64(eights[k], half ? second : first, eights[k + 4]);
            const int64_t t = 8 * half + k;
            const auto store = [&](int64_t at, __m256i rows) {
                if (at < n) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + at * p.weight.n_out), rows);
            };
            store(t, _mm512_castsi512_si256(two));
            store(t + 4, _mm512_extracti64x4_epi64(two, 1));
        }
}

// y of sixteen rows and up to sixteen tokens from their sums [row][token]. `low` is there for products of bytes.
void finish(const Product& p, const double* steps, int64_t row, int64_t token, const void* sums, const void* low) {
    const int64_t n_rows = std::min(kTile, p.weight.n_out - row), n = std::min(kTile, p.tokens - token);
    if (!low && p.x_type == Type::bf16 && n_rows == kTile)
        return finish_bf16(p, row, token, static_cast<const float*>(sums));
    const __mmask16 inside = static_cast<__mmask16>((1u << n_rows) - 1);
    __m512 r[16];
    for (int i = 0; i < 16; ++i) {
        if (low) {
            const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(static_cast<const int32_t*>(sums) + 16 * i));
            const __m512 rest = _mm512_cvtepi32_ps(_mm512_load_si512(static_cast<const int32_t*>(low) + 16 * i));
            r[i] = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), rest);
        } else {
            r[i] = _mm512_load_ps(static_cast<const float*>(sums) + 16 * i);
        }
    }
    transpose(r);
    const __m512 bias = bias_of_tile(p, row, inside);
    const __m512 scale = p.weight.scale ? _mm512_maskz_loadu_ps(inside, p.weight.scale + row) : _mm512_set1_ps(1.0f);
    for (int64_t t = 0; t < n; ++t) {
        __m512 y = r[t];
        if (low) y = times(y, scale, steps[token + t]);
        else if (p.weight.scale) y = _mm512_mul_ps(y, scale);
        y = _mm512_add_ps(y, bias);
        const int64_t at = (token + t) * p.weight.n_out + row;
        if (p.x_type == Type::f32) {
            _mm512_mask_storeu_ps(static_cast<float*>(p.y) + at, inside, y);
        } else {
            const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y));
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.y) + at, inside, bits);
        }
    }
}

// Up to 32 tokens.

// Tiles 0 and 1: sums of two blocks of tokens; for bytes 0 and 2 of the high ones, 1 and 3 of the low ones.
template <class V>
void multiply(const char* panel, const char* x, int64_t n, int64_t block_stride, int blocks) {
    if constexpr (sizeof(V) == 2) {
        for (int64_t i = 0; i < n; ++i) {
            _tile_loadd(4, panel + i * kTileBytes, kRegister);
            _tile_loadd(5, x + i * kTileBytes, kRegister);
            _tile_dpbf16ps(0, 4, 5);
            if (blocks > 1) {
                _tile_loadd(6, x + block_stride + i * kTileBytes, kRegister);
                _tile_dpbf16ps(1, 4, 6);
            }
        }
    } else {
        // Tiles multiply signed with signed and signed with unsigned, so the high bytes are signed here.
        for (int64_t i = 0; i < n; ++i) {
            _tile_loadd(4, panel + i * kTileBytes, kRegister);
            _tile_loadd(5, x + 2 * i * kTileBytes, kRegister);
            _tile_loadd(6, x + (2 * i + 1) * kTileBytes, kRegister);
            _tile_dpbssd(0, 4, 5);
            _tile_dpbsud(1, 4, 6);
            if (blocks > 1) {
                _tile_loadd(5, x + block_stride + 2 * i * kTileBytes, kRegister);
                _tile_loadd(6, x + block_stride + (2 * i + 1) * kTileBytes, kRegister);
                _tile_dpbssd(2, 4, 5);
                _tile_dpbsud(3, 4, 6);
            }
        }
    }
}

template <class V, Stride S>
void few_tokens(const Product& p, const Input& input, int64_t begin, int64_t end) {
    using R = Row<V, S>;
    constexpr bool kBytes = sizeof(V) == 1;
    constexpr int64_t kInputTiles = kBytes ? 2 : 1;
    alignas(64) char panel[kPanel * kTileBytes];
    alignas(64) char sums[4][kTileBytes];
    const int64_t whole = p.weight.n_in / R::kLanes, rest = p.weight.n_in % R::kLanes;
    const int64_t n_registers = whole + (rest ? 1 : 0), block_stride = n_registers * kInputTiles * kTileBytes;
    const int blocks = p.tokens > kTile ? 2 : 1;
    for (int64_t row = begin; row < end; row += kTile) {
        const int64_t n_rows = std::min(kTile, end - row);
        if (n_rows < kTile) std::memset(panel, 0, sizeof panel);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        R rows[kTile];
        for (int64_t r = 0; r < n_rows; ++r) rows[r] = R(p.weight, row + r);
        for (int64_t i = 0; i < n_registers; i += kPanel) {
            const int64_t n = std::min(kPanel, n_registers - i), full = std::min(n, whole - i);
            for (int64_t r = 0; r < n_rows; ++r) {
                R& at = rows[r];
                char* target = panel + r * kRegister;
                at.prefetch_mask();
                for (int64_t k = 0; k < full; ++k) {
                    at.template prefetch<kPanelAhead>(0);
                    _mm512_store_si512(target + k * kTileBytes, at.next());
                }
                if (n > full) _mm512_store_si512(target + full * kTileBytes, at.rest(rest));
            }
            const char* x = static_cast<const char*>(input.data) + i * kInputTiles * kTileBytes;
            fence();
            multiply<V>(panel, x, n, block_stride, blocks);
            fence();
        }
        _tile_stored(0, sums[0], kRegister);
        _tile_stored(1, sums[1], kRegister);
        if constexpr (kBytes) {
            _tile_stored(2, sums[2], kRegister);
            _tile_stored(3, sums[3], kRegister);
        }
        for (int block = 0; block < blocks; ++block)
            finish(p, input.steps, row, block * kTile, sums[kBytes ? 2 * block : block],
                   kBytes ? sums[2 * block + 1] : nullptr);
    }
}

// More tokens: bfloat16 tiles, also of int8 codes, every one of which is a bfloat16.

__m512i to_bf16(__m256i codes) {
    const auto half = [](__m128i eight) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight)); };
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(codes, 1)), half(_mm256_castsi256_si128(codes))));
}

// `n` registers of 32 columns of a row; `rest` columns in the last one unless 0. Targets lie a tile apart.
template <class V, Stride S>
void expand_some(Row<V, S>& row, char* target, int64_t n, int64_t rest) {
    if constexpr (sizeof(V) == 2) {
        for (int64_t k = 0; k < n - (rest ? 1 : 0); ++k) {
            row.template prefetch<kAhead>(0);
            _mm512_store_si512(target + k * kTileBytes, row.next());
        }
        if (rest) _mm512_store_si512(target + (n - 1) * kTileBytes, row.rest(rest));
    } else {
        // Codes come 64 at a time; blocks begin at even registers.
        for (int64_t k = 0; k < n; k += 2) {
            const int64_t columns = n - k > 2 ? 64 : 32 * (n - k) - (rest ? 32 - rest : 0);
            row.template prefetch<kAhead>(0);
            const __m512i codes = columns == 64 ? row.next() : row.rest(columns);
            _mm512_store_si512(target + k * kTileBytes, to_bf16(_mm512_castsi512_si256(codes)));
            if (k + 1 < n)
                _mm512_store_si512(target + (k + 1) * kTileBytes, to_bf16(_mm512_extracti64x4_epi64(codes, 1)));
        }
    }
}

// Two by two tiles: rows a, a + 16, tokens b, b + 16; the second of each only where Rows, Blocks say so.
template <int Rows, int Blocks>
void multiply_square(const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
        _tile_loadd(4, a + k * kTileBytes, kRegister);
        _tile_loadd(6, b + k * kTileBytes, kRegister);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Blocks > 1) {
            _tile_loadd(7, b + b_stride + k * kTileBytes, kRegister);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Rows > 1) {
            _tile_loadd(5, a + a_stride + k * kTileBytes, kRegister);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Blocks > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

void multiply_square(int rows, int blocks, const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t n) {
    if (rows > 1 && blocks > 1) multiply_square<2, 2>(a, a_stride, b, b_stride, n);
    else if (rows > 1) multiply_square<2, 1>(a, a_stride, b, b_stride, n);
    else if (blocks > 1) multiply_square<1, 2>(a, a_stride, b, b_stride, n);
    else multiply_square<1, 1>(a, a_stride, b, b_stride, n);
}

template <class V, Stride S>
void many_tokens(const Product& p, const Input& input, int64_t begin, int64_t end) {
    using R = Row<V, S>;
    const int64_t n_registers = padded(p.weight.n_in, 32) / 32, rest = p.weight.n_in % 32;
    const int64_t token_stride = n_registers * kTileBytes, token_blocks = padded(p.tokens, kTile) / kTile;
    // No panel for what is left after the others: a small one would load and store all sums for little. Pairs, as int8
    // codes come for two registers.
    const int64_t n_panels = std::max<int64_t>(1, n_registers / kBlockPanel);
    const int64_t width = padded((n_registers + n_panels - 1) / n_panels, 2), row_stride = width * kTileBytes;
    const Scratch panel_memory(Use::panel, kBlockRows / kTile * row_stride);
    // Sums of earlier panels: tiles [rows / 16][tokens / 16]; of a single panel only those of the square at hand.
    const bool single = n_panels == 1;
    const int64_t squares = single ? 4 : kBlockRows / kTile * token_blocks;
    const Scratch sums_memory(Use::sums, squares * kTileBytes);
    char *const panel = panel_memory.data(), *const sums = sums_memory.data();
    for (int64_t top = begin; top < end; top += kBlockRows) {
        const int64_t n_rows = std::min(kBlockRows, end - top), row_tiles = padded(n_rows, kTile) / kTile;
        R rows[kBlockRows];
        for (int64_t r = 0; r < n_rows; ++r) rows[r] = R(p.weight, top + r);
        if (n_rows % kTile) std::memset(panel + (row_tiles - 1) * row_stride, 0, row_stride);
        for (int64_t first = 0; first < n_registers; first += width) {
            const int64_t n = std::min(width, n_registers - first);
            const bool last = first + n == n_registers;
            for (int64_t r = 0; r < n_rows; ++r)
                expand_some(rows[r], panel + r / kTile * row_stride + r % kTile * kRegister, n, last ? rest : 0);
            for (int64_t t = 0; t < token_blocks; t += 2) {
                const int blocks = token_blocks - t > 1 ? 2 : 1;
                const char* x = static_cast<const char*>(input.data) + t * token_stride + first * kTileBytes;
                for (int64_t r = 0; r < row_tiles; r += 2) {
                    const int tiles = row_tiles - r > 1 ? 2 : 1;
                    char* at[4];
                    for (int i = 0; i < 4; ++i) {
                        const int64_t row_tile = r + std::min(i / 2, tiles - 1), block = t + std::min(i % 2, blocks - 1);
                        at[i] = sums + (single ? i : row_tile * token_blocks + block) * kTileBytes;
                    }
                    if (first == 0) {
                        _tile_zero(0);
                        _tile_zero(1);
                        _tile_zero(2);
                        _tile_zero(3);
                    } else {
                        _tile_loadd(0, at[0], kRegister);
                        _tile_loadd(1, at[1], kRegister);
                        _tile_loadd(2, at[2], kRegister);
                        _tile_loadd(3, at[3], kRegister);
                    }
                    // The sums of the next square come from as far as the panel, and nothing else waits for them.
                    if (first != 0 && r + 2 < row_tiles)
                        for (int64_t line = 0; line < 2 * kTile; ++line) {
                            const char* next = at[0] + 2 * token_blocks * kTileBytes + line * kRegister;
                            _mm_prefetch(next, _MM_HINT_T0);
                            _mm_prefetch(next + token_blocks * kTileBytes, _MM_HINT_T0);
                        }
                    fence();
                    multiply_square(tiles, blocks, panel + r * row_stride, row_stride, x, token_stride, n);
                    _tile_stored(0, at[0], kRegister);
                    if (blocks > 1) _tile_stored(1, at[1], kRegister);
                    if (tiles > 1) _tile_stored(2, at[2], kRegister);
                    if (tiles > 1 && blocks > 1) _tile_stored(3, at[3], kRegister);
                    if (!last) continue;
                    for (int i = 0; i < 4; ++i)
                        if (i / 2 < tiles && i % 2 < blocks)
                            finish(p, nullptr, top + (r + i / 2) * kTile, (t + i % 2) * kTile, at[i], nullptr);
                }
            }
        }
    }
}

template <class V, Stride S>
void either(const Product& p, const Input& input, int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (input.few) few_tokens<V, S>(p, input, begin, end);
    else many_tokens<V, S>(p, input, begin, end);
}

// oneDNN configures tiles anew for each of its products, so we leave none behind, whatever is thrown, and expect none.
class Tiles {
  public:
    Tiles() {
        Config config;
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes[tile] = kRegister;
            config.rows[tile] = kTile;
        }
        fence();
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <class V>
void all_tiles(const Product& p, const Input& input, int64_t begin, int64_t end) {
    const Tiles tiles;
    if (halved<V>(p.weight)) {
        either<V, Stride::half>(p, input, begin, end);
    } else {
        const int64_t last = begin + (first_last_row<V>(p.weight, begin, end) - begin) / kTile * kTile;
        either<V, Stride::any>(p, input, begin, last);
        either<V, Stride::last>(p, input, last, end);
    }
}

}  // namespace

void rows_amx(const Product& p, const Input& input, int64_t begin, int64_t end) {
    if (p.weight.type == Type::i8) all_tiles<int8_t>(p, input, begin, end);
    else all_tiles<uint16_t>(p, input, begin, end);
}

}  // namespace sparsify
