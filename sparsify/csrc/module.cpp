// The Python side of the kernels. Addresses and sizes come from sparsify/kernels/native.py, which has checked them;
// here every size that a kernel derives an address from is checked once more.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using namespace sparsify;

namespace {

Type type_of(const std::string& name) {
    if (name == "f32") return Type::f32;
    if (name == "bf16") return Type::bf16;
    if (name == "i8") return Type::i8;
    throw std::invalid_argument("type " + name + " is none of f32, bf16, i8");
}

Path path_of(const std::string& name) {
    if (name == "avx512") return Path::avx512;
    if (name == "bf16") return Path::bf16;
    if (name == "vnni") return Path::vnni;
    if (name == "amx") return Path::amx;
    throw std::invalid_argument("path " + name + " is none of avx512, bf16, vnni, amx");
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A weight from addresses and sizes. What cannot be checked here in constant time is that the rows' masks have as many
// ones as `starts` says; whoever prepares a weight computes `starts` from the mask.
Weight weight_of(const std::string& type, uintptr_t values, int64_t n_values, uintptr_t mask, uintptr_t starts,
                 uintptr_t scale, int64_t n_out, int64_t n_in, int n, int m) {
    const Weight w{type_of(type), at<const void>(values), n_values, at<const uint8_t>(mask), at<const int64_t>(starts),
                   at<const float>(scale), n_out, n_in, n, m};
    const bool unstructured = n == 0 && m == 0;
    if (n_out < 0 || n_in < 1 || n_values < 0) throw std::invalid_argument("a size is negative");
    if (!unstructured && (n < 1 || m < n || n_in % m)) throw std::invalid_argument("n:m does not divide the rows");
    if (unstructured != (starts != 0)) throw std::invalid_argument("starts belong to unstructured weights");
    if (n_values != (unstructured ? w.starts[n_out] : n_out * (n_in / m * n)))
        throw std::invalid_argument("the number of values does not follow from the shape");
    if ((w.type == Type::i8) != (scale != 0)) throw std::invalid_argument("a scale belongs to int8 values");
    return w;
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Products with packed weights on CPUs with AVX-512.";

    m.def("features", [] {
        std::vector<std::string> names;
        if (features().avx512) names.emplace_back("avx512");
        if (features().bf16) names.emplace_back("bf16");
        if (features().vnni) names.emplace_back("vnni");
        if (features().amx) names.emplace_back("amx");
        return names;
    }, "Names of the paths that this processor and this build have.");

    m.def("pool", [] { return std::string(pool_name()); },
          "File of the OpenMP runtime whose threads are used; empty: only the calling thread is.");

    m.def("wake_ns", [](int threads) { return wake_ns(threads); }, nb::arg("threads"),
          "Nanoseconds that it takes to wake the pool's threads, measured now and then by products that could use them.");

    m.def("assume_wake_ns", [](int64_t ns) { assume_wake_ns(ns); }, nb::arg("ns"),
          "Take it to be that instead, so that small products are divided too; negative: what was measured.");

    m.def("linear", [](const std::string& type, uintptr_t values, int64_t n_values, uintptr_t mask, uintptr_t starts,
                       uintptr_t scale, int64_t n_out, int64_t n_in, int n, int m, const std::string& path,
                       const std::string& x_type, uintptr_t x, int64_t tokens, uintptr_t bias, uintptr_t y,
                       int threads) {
        const Weight weight = weight_of(type, values, n_values, mask, starts, scale, n_out, n_in, n, m);
        const Product product{weight, type_of(x_type), at<const void>(x), at<const void>(bias), at<void>(y), tokens};
        const Path by = path_of(path);
        if (!supports(by, product)) throw std::invalid_argument("this processor, or this build, has no such product");
        nb::gil_scoped_release release;
        linear(product, by, threads);
    }, nb::arg("type"), nb::arg("values"), nb::arg("n_values"), nb::arg("mask"), nb::arg("starts"), nb::arg("scale"),
          nb::arg("n_out"), nb::arg("n_in"), nb::arg("n"), nb::arg("m"), nb::arg("path"), nb::arg("x_type"),
          nb::arg("x"), nb::arg("tokens"), nb::arg("bias"), nb::arg("y"), nb::arg("threads"),
          "y [tokens, out] = x [tokens, in] @ weight.T + bias, all given by address; 0 for what there is none of.");

    m.def("expand", [](const std::string& type, uintptr_t values, int64_t n_values, uintptr_t mask, uintptr_t starts,
                       uintptr_t scale, int64_t n_out, int64_t n_in, int n, int m, const std::string& out_type,
                       uintptr_t out, int64_t begin, int64_t end, int threads) {
        const Weight weight = weight_of(type, values, n_values, mask, starts, scale, n_out, n_in, n, m);
        const Type to = type_of(out_type);
        if (!features().avx512) throw std::invalid_argument("this processor, or this build, has no AVX-512");
        if (to != weight.type && weight.type != Type::i8) throw std::invalid_argument("only int8 changes its type");
        if (begin < 0 || begin > end || end > n_out) throw std::invalid_argument("there are no such rows");
        nb::gil_scoped_release release;
        expand(weight, to, at<void>(out), begin, end, threads);
    }, nb::arg("type"), nb::arg("values"), nb::arg("n_values"), nb::arg("mask"), nb::arg("starts"), nb::arg("scale"),
          nb::arg("n_out"), nb::arg("n_in"), nb::arg("n"), nb::arg("m"), nb::arg("out_type"), nb::arg("out"),
          nb::arg("begin"), nb::arg("end"), nb::arg("threads"),
          "Rows [begin, end) of the dense weight, written to the address `out`.");

    m.def("dense_linear", [](uintptr_t weight, int64_t n_out, int64_t n_in, uintptr_t x, int64_t tokens, uintptr_t y,
                             int threads) {
        if (!features().bf16) throw std::invalid_argument("this processor, or this build, has no bfloat16 products");
        const Weight dense_weight{Type::bf16, at<const void>(weight), n_out * n_in, nullptr, nullptr, nullptr,
                                  n_out, n_in, 1, 1};
        nb::gil_scoped_release release;
        dense({dense_weight, Type::bf16, at<const void>(x), nullptr, at<void>(y), tokens}, threads);
    }, nb::arg("weight"), nb::arg("n_out"), nb::arg("n_in"), nb::arg("x"), nb::arg("tokens"), nb::arg("y"),
          nb::arg("threads"), "The same loop over a dense bfloat16 weight: what packing has to beat in benchmarks.");
}
