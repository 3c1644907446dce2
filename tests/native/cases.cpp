#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

using sparsify::Type;

namespace {

double uniform(std::mt19937& random, double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random);
}

bool chance(std::mt19937& random, double p) { return uniform(random, 0, 1) < p; }

template <class T>
void append(std::vector<char>& bytes, T value) {
    const size_t at = bytes.size();
    bytes.resize(at + sizeof value);
    std::memcpy(bytes.data() + at, &value, sizeof value);
}

void append(std::vector<char>& bytes, Type type, double value) {
    if (type == Type::f32) append(bytes, static_cast<float>(value));
    else if (type == Type::bf16) append(bytes, to_bf16(value));
    else append(bytes, static_cast<int8_t>(value));
}

double weight_number(Type type, Numbers numbers, std::mt19937& random) {
    if (type == Type::i8) return std::uniform_int_distribution<int>(-128, 127)(random);
    if (chance(random, 0.02)) return 0.0;  // kept all the same
    if (chance(random, 0.02)) return -0.0;
    return uniform(random, -1, 1) * (numbers == Numbers::small ? 1e-20 : numbers == Numbers::large ? 1e15 : 1.0);
}

double input_number(Type weight, Numbers numbers, std::mt19937& random) {
    const double number = uniform(random, -1, 1);
    // Products are denormal; with int8 weights, the inverse of x's step is no float.
    if (numbers == Numbers::small) return number * (weight == Type::i8 ? 1e-36 : 1e-20);
    if (numbers == Numbers::large) return number * 1e20;
    if (numbers == Numbers::special) {
        constexpr double kInf = std::numeric_limits<double>::infinity();
        const double one_of[] = {kInf, -kInf, std::nan(""), 1e-40, -1e-40, -0.0, 0.0, number};
        if (chance(random, 0.05)) return one_of[random() % std::size(one_of)];
    }
    return number;
}

// Which columns of a row are kept. Some rows of an unstructured weight are empty, some full.
std::vector<char> kept(const Shape& shape, std::mt19937& random) {
    std::vector<char> keep(static_cast<size_t>(shape.n_in));
    if (shape.m) {
        for (auto group = keep.begin(); group != keep.end(); group += shape.m) {
            std::fill(group, group + shape.n, 1);
            std::shuffle(group, group + shape.m, random);
        }
        return keep;
    }
    const double kind = uniform(random, 0, 1), density = kind < 0.1 ? 0 : kind < 0.2 ? 1 : shape.density;
    for (char& k : keep) k = chance(random, density);
    return keep;
}

}  // namespace

uint16_t to_bf16(double value) {
    if (std::isnan(value)) return 0x7fc0;
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double read(const char* bytes, Type type, int64_t index) {
    const char* at = bytes + static_cast<size_t>(index) * sparsify::size_of(type);
    if (type == Type::i8) return *reinterpret_cast<const int8_t*>(at);
    uint32_t bits = 0;
    if (type == Type::f32) std::memcpy(&bits, at, 4);
    else std::memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

Case make_case(const Shape& shape, Type type, Type x_type, bool has_bias, Numbers numbers, std::mt19937& random) {
    Case c{};
    c.shape = shape, c.type = type, c.x_type = x_type, c.has_bias = has_bias, c.numbers = numbers;
    const int64_t stride = (shape.n_in + 7) / 8;
    c.mask.assign(static_cast<size_t>(shape.n_out * stride), 0);
    if (!shape.m) c.starts.push_back(0);
    int64_t n_values = 0;
    for (int64_t i = 0; i < shape.n_out; ++i) {
        const std::vector<char> keep = kept(shape, random);
        // All of a row of zeros now and then.
        const bool zeros = chance(random, 0.05);
        if (type == Type::i8) c.scale.push_back(static_cast<float>(uniform(random, 0.001, 0.1)));
        for (int64_t j = 0; j < shape.n_in; ++j) {
            if (!keep[static_cast<size_t>(j)]) {
                append(c.dense_bytes, type, 0.0);
                c.dense.push_back(0.0);
                continue;
            }
            append(c.values, type, zeros ? 0.0 : weight_number(type, numbers, random));
            append(c.dense_bytes, type, 0.0);
            const size_t size = sparsify::size_of(type);
            std::memcpy(&*c.dense_bytes.end() - size, &*c.values.end() - size, size);
            c.dense.push_back(read(c.values.data(), type, n_values) * (type == Type::i8 ? c.scale.back() : 1.0));
            c.mask[static_cast<size_t>(i * stride + j / 8)] |= static_cast<uint8_t>(1 << j % 8);
            ++n_values;
        }
        if (!shape.m) c.starts.push_back(n_values);
    }
    for (int64_t k = 0; k < shape.tokens * shape.n_in; ++k) {
        append(c.x, x_type, input_number(type, numbers, random));
        c.wide_x.push_back(read(c.x.data(), x_type, k));
    }
    for (int64_t i = 0; i < shape.n_out; ++i) {
        c.wide_bias.push_back(0.0);
        if (!has_bias) continue;
        append(c.bias, x_type, uniform(random, -1, 1));
        c.wide_bias.back() = read(c.bias.data(), x_type, i);
    }
    return c;
}

Expected expected(const Case& c, int64_t token, int64_t row) {
    constexpr double kSmallest = std::numeric_limits<float>::min(), kStep = std::numeric_limits<float>::epsilon();
    const double* x = c.wide_x.data() + token * c.shape.n_in;
    const double* w = c.dense.data() + row * c.shape.n_in;
    const double bias = c.wide_bias[static_cast<size_t>(row)];
    double sum = 0, size = 0, lost = 0, largest_x = 0, weights = 0;
    for (int64_t j = 0; j < c.shape.n_in; ++j) {
        sum += x[j] * w[j];
        size += std::fabs(x[j] * w[j]);
        if (std::fabs(x[j]) < kSmallest || std::fabs(w[j]) < kSmallest) lost += std::fabs(x[j] * w[j]);
        largest_x = std::max(largest_x, std::fabs(x[j]));
        weights += std::fabs(w[j]);
    }
    const double value = sum + bias, terms = static_cast<double>(c.shape.n_in) + 8;
    // Sums in float32; denormal inputs and sums may be lost; int8 products see x in steps of a 32767th.
    double tolerance = terms * kStep * (size + std::fabs(bias)) + terms * kSmallest + lost;
    if (c.type == Type::i8) tolerance += weights * largest_x / 32767 / 2 * (1 + 1e-6);
    tolerance += std::fabs(value) * (c.x_type == Type::bf16 ? 1.0 / 256 : kStep);
    return {value, tolerance};
}

std::string Case::name() const {
    const auto text = [](Type t) { return std::string(t == Type::f32 ? "f32" : t == Type::bf16 ? "bf16" : "i8"); };
    const std::string pattern = shape.m ? std::to_string(shape.n) + ":" + std::to_string(shape.m)
                                        : std::to_string(shape.density).substr(0, 4);
    return "[" + std::to_string(shape.n_out) + ", " + std::to_string(shape.n_in) + "] " + pattern + " " + text(type) +
           ", " + std::to_string(shape.tokens) + " tokens " + text(x_type) + (has_bias ? " + bias" : "") + ", numbers " +
           std::to_string(static_cast<int>(numbers));
}
