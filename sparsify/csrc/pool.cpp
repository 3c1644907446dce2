// We link no OpenMP: a second runtime would have threads of its own, and two pools on the same cores wait for each
// other. Instead the entry points are looked up in the runtime that is already loaded, the way torch's own calls
// resolve: what is visible to all (a preloaded runtime) first, then what libtorch depends on.
#include "pool.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <new>

namespace sparsify {
namespace {

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
    const char* name = "";
};

template <class Function>
void look_up(void* library, const char* symbol, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, symbol));
}

bool fill(void* library, Runtime& runtime) {
    look_up(library, "GOMP_parallel", runtime.parallel);
    look_up(library, "omp_get_thread_num", runtime.thread_num);
    look_up(library, "omp_get_num_threads", runtime.num_threads);
    look_up(library, "omp_in_parallel", runtime.in_parallel);
    if (!runtime.parallel || !runtime.thread_num || !runtime.num_threads || !runtime.in_parallel) return false;
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(runtime.parallel), &info) && info.dli_fname) runtime.name = info.dli_fname;
    return true;
}

Runtime find() {
    Runtime runtime;
    if (fill(RTLD_DEFAULT, runtime)) return runtime;
    // RTLD_NOLOAD: only if torch is there already. The handle is kept: it is torch's for the life of the process.
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
        if (fill(torch, runtime)) return runtime;
    }
    return {};
}

const Runtime& runtime() {
    static const Runtime found = find();
    return found;
}

struct Region {
    int64_t n, grain;
    void (*body)(void*, int64_t, int64_t);
    void* context;
    std::atomic<bool> failed{false};
};

void share(void* data) {
    Region& region = *static_cast<Region*>(data);
    // The runtime may give fewer threads than were asked for.
    const int64_t threads = runtime().num_threads(), thread = runtime().thread_num();
    const int64_t blocks = (region.n + region.grain - 1) / region.grain;
    const int64_t begin = blocks * thread / threads * region.grain;
    const int64_t end = std::min(region.n, blocks * (thread + 1) / threads * region.grain);
    // Nothing may be thrown through the runtime; all that a body throws is that it got no memory.
    try {
        if (begin < end) region.body(region.context, begin, end);
    } catch (const std::bad_alloc&) {
        region.failed = true;
    }
}

// Between the products of a model other code runs about as long, and threads that wait actively are still awake then.
constexpr std::chrono::microseconds kIdle{50};
constexpr std::chrono::seconds kValid{5};
constexpr int kTrials = 15;
constexpr int64_t kLongest = 100'000;  // ns; more than that is another program on the same cores, which may go

std::atomic<int64_t> assumed{-1}, measured{-1};
std::atomic<std::chrono::steady_clock::rep> measured_at{0};
std::atomic_flag measuring = ATOMIC_FLAG_INIT;

int64_t measure_wake(int threads) {
    using Clock = std::chrono::steady_clock;
    const auto nothing = [](int64_t, int64_t) {};
    parallel_for(threads, 1, threads, nothing);  // the first region makes the threads
    std::array<int64_t, kTrials> taken;
    for (int64_t& each : taken) {
        const auto idle = Clock::now();
        while (Clock::now() - idle < kIdle) {
        }
        const auto begin = Clock::now();
        parallel_for(threads, 1, threads, nothing);
        each = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
    }
    std::nth_element(taken.begin(), taken.begin() + kTrials / 2, taken.end());
    return std::min(taken[kTrials / 2], kLongest);
}

}  // namespace

const char* pool_name() { return runtime().name; }

int64_t wake_ns(int threads) {
    if (threads <= 1 || !runtime().parallel || runtime().in_parallel()) return 0;
    if (assumed >= 0) return assumed;
    // With more threads it takes longer, but of the same order; with other work on the cores, another time. So it is
    // measured again now and then, by whoever comes first; the others go on with what is known.
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    const bool old = measured < 0 || now - std::chrono::steady_clock::duration(measured_at) > kValid;
    if (old && !measuring.test_and_set()) {
        measured = measure_wake(threads);
        measured_at = std::chrono::steady_clock::now().time_since_epoch().count();
        measuring.clear();
    }
    return std::max<int64_t>(measured, 0);
}

void assume_wake_ns(int64_t ns) { assumed = ns; }

void parallel_for(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
    if (n <= 0) return;
    if (threads <= 1 || n <= grain || !runtime().parallel || runtime().in_parallel()) {
        body(context, 0, n);
        return;
    }
    Region region{n, grain, body, context, {}};
    const int64_t blocks = (n + grain - 1) / grain;
    runtime().parallel(share, &region, static_cast<unsigned>(std::min<int64_t>(threads, blocks)), 0);
    if (region.failed) throw std::bad_alloc();
}

}  // namespace sparsify
