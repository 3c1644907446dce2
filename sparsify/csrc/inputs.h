// x as the paths want it.
#pragma once

#include "kernels.h"

namespace sparsify {

enum class Form {
    plain,       // [tokens][stride]: x with its rows padded to registers by zeros
    even_odd,    // [tokens][stride] float32: of each 32 columns the even ones, then the odd ones
    planes,      // [tokens][2 * stride] bytes: of each 64 columns the high bytes plus 128, then the low ones
    tiles,       // [blocks of 16 tokens][registers][16][16 tokens][2 bfloat16]
    byte_tiles,  // [blocks of 16 tokens][registers][high signed, low][16][16 tokens][4 bytes]
};

// x quantised to 16 bits a token: x = step * code, code = 256 * high + low. A token with NaN or Inf gets NaN for a step.
inline bool quantised(Form form) { return form == Form::planes || form == Form::byte_tiles; }

// Columns of a register in this form, and bytes of a block of 16 tokens.
int64_t columns(const Product& product, Form form);
int64_t block_bytes(const Product& product, Form form);

// Blocks [begin, end) of 16 tokens, written to where they belong in `data`; `steps` [tokens] where the form is quantised.
void lay_out_avx512(const Product& product, Form form, char* data, double* steps, int64_t begin, int64_t end);

}  // namespace sparsify
