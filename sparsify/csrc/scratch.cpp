#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace sparsify {
namespace {

constexpr int64_t kMostKept = 16 << 20;

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};

struct Memory {
    std::unique_ptr<char, Free> data;
    int64_t capacity = 0;
};

Memory& memory_of(Use use) {
    static thread_local Memory memories[3];
    return memories[static_cast<int>(use)];
}

}  // namespace

Scratch::Scratch(Use use, int64_t bytes) : use_(use) {
    Memory& memory = memory_of(use);
    if (memory.capacity < bytes || !memory.data) {
        memory.data.reset();
        memory.capacity = 0;
        const int64_t size = padded(bytes > 0 ? bytes : 1, kRegister);
        memory.data.reset(static_cast<char*>(std::aligned_alloc(kRegister, static_cast<size_t>(size))));
        if (!memory.data) throw std::bad_alloc();
        memory.capacity = size;
    }
    data_ = memory.data.get();
}

Scratch::~Scratch() {
    Memory& memory = memory_of(use_);
    if (memory.capacity > kMostKept) memory = {};
}

}  // namespace sparsify
