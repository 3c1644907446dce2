// The thread pool of whoever calls us.
#pragma once

#include <cstdint>

namespace sparsify {

// body(context, begin, end) for disjoint ranges that cover [0, n), each a multiple of `grain` but the last, on up to
// `threads` threads of the OpenMP runtime that torch uses; here if there is none, or inside one of its regions.
void parallel_for(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, Body body) {
    parallel_for(n, grain, threads, [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Body*>(context))(begin, end);
    }, &body);
}

// The file of that runtime, or "" where products run on the calling thread.
const char* pool_name();

// Nanoseconds that an empty region of that runtime takes after a short idle time (a median), measured by the first call
// that asks for more than one thread and again every few seconds; 0 for one thread and where there is no runtime.
int64_t wake_ns(int threads);

// Take it to be that instead; negative: what was measured. For tests, whose products are small.
void assume_wake_ns(int64_t ns);

}  // namespace sparsify
