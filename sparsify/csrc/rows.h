// Products row by row: each register of a row is expanded once and multiplied with up to eight tokens.
// Included only by files that are compiled for AVX-512 VBMI2. `Op` says how a register is multiplied:
//   V                 type of the values
//   X                 type of the prepared input, kPerRegister of them for each register of values
//   kExact            whether sums do not depend on their order
//   Acc               sums of one token; zero(), add(Acc), step(w, x), total(product, input, row, token)
#pragma once

#include <algorithm>

#include "stream.h"

namespace sparsify {
namespace {

template <class Op, Stride S, int T>
void one_row(const Product& p, const Input& input, int64_t row, int64_t token) {
    using R = Row<typename Op::V, S>;
    // Sums in flight hide the latency of an addition. Sums that round are as many for any number of tokens, so that a
    // token's result does not depend on those beside it.
    constexpr int kUnroll = !Op::kExact ? 2 : T >= 4 ? 1 : T >= 2 ? 2 : 4;
    typename Op::Acc acc[kUnroll][T];
    for (auto& of_step : acc)
        for (auto& sum : of_step) sum = Op::zero();
    const typename Op::X* x[T];
    for (int t = 0; t < T; ++t) x[t] = static_cast<const typename Op::X*>(input.data) + (token + t) * input.stride;

    R values(p.weight, row);
    const int64_t n = p.weight.n_in / R::kLanes, rest = p.weight.n_in % R::kLanes;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        // Half of the columns kept is two lines of values in four steps; denser rows rely on the hardware for the rest.
        values.template prefetch<kAhead>(0);
        values.template prefetch<kAhead>(64);
        if (i % 16 == 0) values.prefetch_mask();
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const __m512i w = values.next();
            for (int t = 0; t < T; ++t) Op::step(acc[k % kUnroll][t], w, x[t] + (i + k) * Op::kPerRegister);
        }
    }
    for (; i < n; ++i) {
        const __m512i w = values.next();
        for (int t = 0; t < T; ++t) Op::step(acc[0][t], w, x[t] + i * Op::kPerRegister);
    }
    if (rest) {
        const __m512i w = values.rest(rest);
        for (int t = 0; t < T; ++t) Op::step(acc[0][t], w, x[t] + i * Op::kPerRegister);
    }
    const float bias = bias_of(p, row);
    for (int t = 0; t < T; ++t) {
        for (int u = 1; u < kUnroll; ++u) Op::add(acc[0][t], acc[u][t]);
        put(p, token + t, row, Op::total(acc[0][t], p, input, row, token + t) + bias);
    }
}

template <class Op, Stride S>
void some_rows(const Product& p, const Input& input, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        // Eight tokens' sums fit into registers; for more, a row is read again while it lies in the cache.
        for (int64_t token = 0; token < p.tokens;) {
            const int64_t left = p.tokens - token;
            if (left >= 8) one_row<Op, S, 8>(p, input, row, token), token += 8;
            else if (left >= 4) one_row<Op, S, 4>(p, input, row, token), token += 4;
            else if (left >= 2) one_row<Op, S, 2>(p, input, row, token), token += 2;
            else one_row<Op, S, 1>(p, input, row, token), token += 1;
        }
    }
}

template <class Op>
void all_rows(const Product& p, const Input& input, int64_t begin, int64_t end) {
    using V = typename Op::V;
    if (halved<V>(p.weight)) {
        some_rows<Op, Stride::half>(p, input, begin, end);
        return;
    }
    const int64_t last = first_last_row<V>(p.weight, begin, end);
    some_rows<Op, Stride::any>(p, input, begin, last);
    some_rows<Op, Stride::last>(p, input, last, end);
}

}  // namespace
}  // namespace sparsify
