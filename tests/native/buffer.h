// Memory that ends where it says.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

// Where the bytes of a buffer lie. The address sanitizer guards the heap, but sees neither masked loads nor tiles; a page
// without access after or before the bytes stops those as well.
enum class Place { heap, odd_heap, page_after, page_before };

class Buffer {
  public:
    Buffer(size_t bytes, Place place) : bytes_(bytes) {
        if (place == Place::heap || place == Place::odd_heap) {
            const size_t shift = place == Place::odd_heap ? 1 : 0;
            memory_ = static_cast<char*>(std::malloc(bytes + shift));
            if (!memory_) throw std::bad_alloc();
            data_ = memory_ + shift;
            return;
        }
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
        mapped_ = inside + page;
        void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<char*>(map);
        const bool after = place == Place::page_after;
        if (mprotect(after ? memory_ + inside : memory_, page, PROT_NONE)) std::abort();
        data_ = after ? memory_ + inside - bytes : memory_ + page;
    }
    template <class T>
    Buffer(const std::vector<T>& from, Place place) : Buffer(from.size() * sizeof(T), place) {
        if (bytes_) std::memcpy(data_, from.data(), bytes_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (mapped_) munmap(memory_, mapped_);
        else std::free(memory_);
    }

    char* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    size_t bytes_, mapped_ = 0;
    char* memory_ = nullptr;
    char* data_ = nullptr;
};
