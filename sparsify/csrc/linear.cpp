// One product: x is laid out for the path, then the rows of the weight are divided between threads.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "inputs.h"
#include "pool.h"
#include "scratch.h"

namespace sparsify {

int64_t columns(const Product& p, Form form) {
    if (quantised(form)) return 64;
    return form == Form::plain ? lanes(p.x_type) : 32;
}

int64_t block_bytes(const Product& p, Form form) {
    const int64_t cells = 16 * padded(p.weight.n_in, columns(p, form));
    if (form == Form::plain) return cells * static_cast<int64_t>(size_of(p.x_type));
    return cells * (form == Form::even_odd ? 4 : 2);
}

#ifdef SPARSIFY_HAS_AVX512

namespace {

using Rows = void (*)(const Product&, const Input&, int64_t, int64_t);

constexpr int64_t kRows = 16;           // of a tile: what threads are given is a multiple
constexpr int64_t kShare = 32 << 10;    // bytes that a thread should get at least
constexpr int64_t kBytesPerNs = 8;      // that one thread gets through, about
constexpr int64_t kTokens = 512;        // that tiles multiply at once: what they make of them stays near the processor
constexpr int64_t kLaidOut = 16 << 20;  // bytes of tokens that are laid out at once for them, if kTokens take no more

// Threads for work of so many bytes. The others bring time * (1 - 1 / threads) and cost their waking, which takes
// microseconds where they wait actively and as long as a small product where they sleep.
int useful(int threads, int64_t bytes) {
    if (threads <= 1 || bytes < 2 * kShare) return 1;
    if (bytes / kBytesPerNs * (threads - 1) / threads < wake_ns(threads)) return 1;
    return static_cast<int>(std::min<int64_t>(threads, bytes / kShare));
}

// What a product costs, in bytes of the weight: its stream, or arithmetic where that takes longer. Row by row a token
// takes three tenths of the stream, in tiles a 24th (512 x 512 at 50 %).
int64_t work(int64_t weight_bytes, int64_t tokens, bool tiles) {
    return std::max(weight_bytes, tiles ? weight_bytes * tokens / 24 : weight_bytes * tokens * 3 / 10);
}

int64_t bytes_of(const Weight& w) {
    return w.n_values * static_cast<int64_t>(size_of(w.type)) + w.n_out * w.mask_stride();
}

// The tokens from `first` on, `n` at the most.
Product some(const Product& p, int64_t first, int64_t n) {
    const auto row = [&](int64_t width) { return first * width * static_cast<int64_t>(size_of(p.x_type)); };
    Product part = p;
    part.x = static_cast<const char*>(p.x) + row(p.weight.n_in);
    part.y = static_cast<char*>(p.y) + row(p.weight.n_out);
    part.tokens = std::min(n, p.tokens - first);
    return part;
}

// `at_once`: tokens that `rows` is given together: all, or a multiple of 16.
void run(const Product& p, Form form, Rows rows, int threads, int64_t weight_bytes, bool few, int64_t at_once) {
    const int64_t stride = padded(p.weight.n_in, columns(p, form)), blocks = padded(p.tokens, 16) / 16;
    std::vector<double> steps(quantised(form) ? static_cast<size_t>(p.tokens) : 0);
    const bool as_it_is = form == Form::plain && stride == p.weight.n_in;
    const int64_t width = block_bytes(p, form);
    const Scratch memory(Use::inputs, as_it_is ? 0 : blocks * width);
    if (!as_it_is)
        parallel_for(blocks, 1, useful(threads, blocks * width), [&](int64_t begin, int64_t end) {
            lay_out_avx512(p, form, memory.data(), steps.data(), begin, end);
        });
    const bool tiles = form == Form::tiles || form == Form::byte_tiles;
    const int shared = useful(threads, work(weight_bytes, p.tokens, tiles));
    parallel_for(p.weight.n_out, kRows, shared, [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < p.tokens; first += at_once) {
            const Product part = some(p, first, at_once);
            const void* data = as_it_is ? part.x : memory.data() + first / 16 * width;
            rows(part, {data, form == Form::planes ? 2 * stride : stride, steps.empty() ? nullptr : &steps[first], few},
                 begin, end);
        }
    });
}

// All tokens at once.
void run(const Product& p, Form form, Rows rows, int threads, int64_t weight_bytes) {
    run(p, form, rows, threads, weight_bytes, true, p.tokens);
}

}  // namespace

void linear(const Product& p, Path path, int threads) {
    const int64_t bytes = bytes_of(p.weight);
    switch (path) {
        case Path::avx512:
            return run(p, p.weight.type == Type::bf16 ? Form::even_odd : Form::plain, rows_avx512, threads, bytes);
#ifdef SPARSIFY_HAS_BF16
        case Path::bf16: return run(p, Form::plain, rows_bf16, threads, bytes);
#endif
#ifdef SPARSIFY_HAS_VNNI
        case Path::vnni: return run(p, Form::planes, rows_vnni, threads, bytes);
#endif
#ifdef SPARSIFY_HAS_AMX
        case Path::amx: {
            if (few(p)) return run(p, p.weight.type == Type::i8 ? Form::byte_tiles : Form::tiles, rows_amx, threads, bytes);
            // As many are laid out together as memory allows: threads are woken for each part.
            const int64_t bytes_of_token = block_bytes(p, Form::tiles) / 16;
            const int64_t together = std::max<int64_t>(1, kLaidOut / bytes_of_token / kTokens) * kTokens;
            for (int64_t first = 0; first < p.tokens; first += together)
                run(some(p, first, together), Form::tiles, rows_amx, threads, bytes, false, kTokens);
            return;
        }
#endif
        default: std::abort();  // supports() was not asked
    }
}

void dense(const Product& p, int threads) {
#ifdef SPARSIFY_HAS_BF16
    run(p, Form::plain, dense_bf16, threads, p.weight.n_out * p.weight.n_in * 2);
#else
    (void)p, (void)threads;
    std::abort();
#endif
}

void expand(const Weight& weight, Type type, void* out, int64_t begin, int64_t end, int threads) {
    const int64_t width = weight.n_in * static_cast<int64_t>(size_of(type));
    parallel_for(end - begin, 1, useful(threads, (end - begin) * width), [&](int64_t from, int64_t to) {
        expand_avx512(weight, type, static_cast<char*>(out) + from * width, begin + from, begin + to);
    });
}

#else

// Nothing to run: features() has nothing, and the module refuses before it comes here.
void linear(const Product&, Path, int) { std::abort(); }
void dense(const Product&, int) { std::abort(); }
void expand(const Weight&, Type, void*, int64_t, int64_t, int) { std::abort(); }

#endif

}  // namespace sparsify
