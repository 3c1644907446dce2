// Random weights and inputs, packed as docs/formats.md says, and what their product is in double.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

struct Shape {
    int64_t n_out, n_in, tokens;
    int n, m;        // 0: unstructured
    double density;  // of an unstructured weight
};

enum class Numbers { usual, small, large, special };  // special: NaN, infinities, denormals, -0 in x

struct Case {
    Shape shape;
    sparsify::Type type, x_type;
    bool has_bias;
    Numbers numbers;

    // As the kernels take them.
    std::vector<char> values, x, bias;
    std::vector<uint8_t> mask;
    std::vector<int64_t> starts;
    std::vector<float> scale;

    std::vector<double> dense;             // [out, in], scaled
    std::vector<char> dense_bytes;         // [out, in] in the type of the values
    std::vector<double> wide_x, wide_bias;

    std::string name() const;
};

Case make_case(const Shape& shape, sparsify::Type type, sparsify::Type x_type, bool has_bias, Numbers numbers,
               std::mt19937& random);

// x @ dense.T + bias in double, and how far from it a kernel may be.
struct Expected {
    double value, tolerance;
};
Expected expected(const Case& c, int64_t token, int64_t row);

double read(const char* bytes, sparsify::Type type, int64_t index);
uint16_t to_bf16(double value);
