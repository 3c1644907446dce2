// Memory of a thread that outlives a product: mapping a megabyte anew costs as much as filling it.
#pragma once

#include <cstdint>

namespace sparsify {

// What it is for; each has memory of its own.
enum class Use { inputs, panel, sums };

// The calling thread's memory for `use`, at least `bytes`, aligned to a register and not initialised; one at a time for
// each use. Up to 16 MB stay for the next one. Throws std::bad_alloc.
class Scratch {
  public:
    Scratch(Use use, int64_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    char* data() const { return data_; }

  private:
    Use use_;
    char* data_;
};

}  // namespace sparsify
