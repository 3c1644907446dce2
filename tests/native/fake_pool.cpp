// An OpenMP runtime of four functions on plain threads, which the thread sanitizer understands; it can be told to give
// fewer threads than it is asked for, as real ones may.
#include "fake_pool.h"

#include <atomic>
#include <thread>
#include <vector>

namespace {

thread_local int index = 0, count = 1;
thread_local bool inside = false;
std::atomic<unsigned> most{~0u};
std::atomic<long> started{0};

}  // namespace

namespace fake_pool {

void at_most(unsigned threads) { most = threads; }
long regions() { return started; }

}  // namespace fake_pool

extern "C" {

__attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* data, unsigned asked, unsigned) {
    ++started;
    const unsigned given = asked < most ? asked : most.load();
    const auto member = [=](int i) {
        index = i, count = static_cast<int>(given), inside = true;
        body(data);
        index = 0, count = 1, inside = false;
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < given; ++i) others.emplace_back(member, static_cast<int>(i));
    member(0);
    for (std::thread& other : others) other.join();
}

__attribute__((visibility("default"))) int omp_get_thread_num() { return index; }
__attribute__((visibility("default"))) int omp_get_num_threads() { return count; }
__attribute__((visibility("default"))) int omp_in_parallel() { return inside; }
}
