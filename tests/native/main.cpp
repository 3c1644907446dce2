// The kernels without Python: products, dense products and expansions of random weights against double loops, in
// buffers that end where they say. Exits with 1 at a difference; a sanitizer ends the process by itself.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "buffer.h"
#include "cases.h"
#include "fake_pool.h"
#include "kernels.h"
#include "pool.h"

using namespace sparsify;

namespace {

struct Named {
    Path path;
    const char* name;
};
constexpr Named kPaths[] = {{Path::avx512, "avx512"}, {Path::bf16, "bf16"}, {Path::vnni, "vnni"}, {Path::amx, "amx"}};
constexpr Place kPlaces[] = {Place::heap, Place::odd_heap, Place::page_after, Place::page_before};

std::map<std::string, long> counts;

double rounded(double value) {
    const uint16_t bits = to_bf16(value);
    return read(reinterpret_cast<const char*>(&bits), Type::bf16, 0);
}

[[noreturn]] void differs(const Case& c, const std::string& what, int64_t at, double got, double wanted) {
    std::printf("%s, %s: at %lld %.9g, not %.9g\n", c.name().c_str(), what.c_str(), static_cast<long long>(at), got, wanted);
    std::exit(1);
}

// What a kernel is given, each array in a buffer of its exact size. Values and mask may have any address; numbers that
// are read one by one are aligned to their size, as in any tensor.
struct Arrays {
    Buffer values, mask, starts, scale, x, bias;

    Arrays(const Case& c, Place place)
        : values(c.values, place), mask(c.mask, place), starts(c.starts, aligned(place)), scale(c.scale, aligned(place)),
          x(c.x, aligned(place)), bias(c.bias, aligned(place)) {}

    static Place aligned(Place place) { return place == Place::odd_heap ? Place::heap : place; }

    Weight weight(const Case& c) const {
        const int64_t n_values = static_cast<int64_t>(c.values.size() / size_of(c.type));
        return {c.type, values.data(), n_values, reinterpret_cast<const uint8_t*>(mask.data()),
                c.shape.m ? nullptr : reinterpret_cast<const int64_t*>(starts.data()),
                c.type == Type::i8 ? reinterpret_cast<const float*>(scale.data()) : nullptr,
                c.shape.n_out, c.shape.n_in, c.shape.n, c.shape.m};
    }
    Product product(const Case& c, const Buffer& y) const {
        return {weight(c), c.x_type, x.data(), c.has_bias ? bias.data() : nullptr, y.data(), c.shape.tokens};
    }
};

void compare(const Case& c, const Buffer& y, const std::string& what) {
    for (int64_t t = 0; t < c.shape.tokens; ++t)
        for (int64_t i = 0; i < c.shape.n_out; ++i) {
            const int64_t at = t * c.shape.n_out + i;
            const double got = read(y.data(), c.x_type, at);
            const Expected want = expected(c, t, i);
            const bool right = std::isfinite(want.value) ? std::fabs(got - want.value) <= want.tolerance : !std::isfinite(got);
            if (!right) differs(c, what, at, got, want.value);
        }
    ++counts[what.substr(0, what.find(' '))];
}

// For `numbers` results; every one must be written.
Buffer result(size_t numbers, Type type, Place place) {
    return Buffer(std::vector<char>(numbers * size_of(type), 0x5a), place);
}

void products(const Case& c, const Arrays& arrays, int threads, Place place) {
    const size_t n_y = static_cast<size_t>(c.shape.tokens * c.shape.n_out);
    for (const Named& by : kPaths) {
        const Buffer y = result(n_y, c.x_type, Arrays::aligned(place));
        const Product product = arrays.product(c, y);
        if (!supports(by.path, product)) continue;
        linear(product, by.path, threads);
        compare(c, y, std::string(by.name) + " with " + std::to_string(threads) + " threads");
    }
}

void dense_products(const Case& c, int threads, Place place) {
    if (!features().bf16 || c.type != Type::bf16 || c.x_type != Type::bf16) return;
    const Buffer weight(c.dense_bytes, place), x(c.x, Arrays::aligned(place)), bias(c.bias, Arrays::aligned(place));
    const Buffer y = result(static_cast<size_t>(c.shape.tokens * c.shape.n_out), c.x_type, Arrays::aligned(place));
    const Weight whole{Type::bf16, weight.data(), c.shape.n_out * c.shape.n_in, nullptr, nullptr, nullptr,
                       c.shape.n_out, c.shape.n_in, 1, 1};
    dense({whole, Type::bf16, x.data(), c.has_bias ? bias.data() : nullptr, y.data(), c.shape.tokens}, threads);
    compare(c, y, "dense with " + std::to_string(threads) + " threads");
}

void expansions(const Case& c, const Arrays& arrays, int threads, Place place, std::mt19937& random) {
    if (!features().avx512) return;
    const int64_t begin = static_cast<int64_t>(random() % static_cast<unsigned>(c.shape.n_out + 1));
    const int64_t end = begin + static_cast<int64_t>(random() % static_cast<unsigned>(c.shape.n_out - begin + 1));
    const int64_t n = (end - begin) * c.shape.n_in, first = begin * c.shape.n_in;
    for (const Type type : {Type::f32, Type::bf16, Type::i8}) {
        if (type != c.type && c.type != Type::i8) continue;
        const Buffer out = result(static_cast<size_t>(n), type, Arrays::aligned(place));
        expand(arrays.weight(c), type, out.data(), begin, end, threads);
        if (type == c.type) {
            const size_t size = size_of(type);
            // Bit by bit: -0 is not 0 here.
            if (n && std::memcmp(out.data(), c.dense_bytes.data() + static_cast<size_t>(first) * size, out.bytes()))
                differs(c, "expand", first, 0, 0);
        } else {
            for (int64_t k = 0; k < n; ++k) {
                const double value = c.dense[static_cast<size_t>(first + k)], got = read(out.data(), type, k);
                const double wanted = type == Type::f32 ? static_cast<double>(static_cast<float>(value)) : rounded(value);
                if (got != wanted) differs(c, "expand", first + k, got, wanted);
            }
        }
        ++counts["expand"];
    }
}

void run(const Case& c, std::mt19937& random) {
    const Place place = kPlaces[random() % 4];
    const int threads = std::vector<int>{1, 2, 3, 7}[random() % 4];
    fake_pool::at_most(random() % 3 ? ~0u : 2);
    const Arrays arrays(c, place);
    products(c, arrays, threads, place);
    dense_products(c, threads, place);
    expansions(c, arrays, threads, place, random);
}

int64_t pick(std::mt19937& random, std::initializer_list<int64_t> of) { return of.begin()[random() % of.size()]; }

Shape random_shape(std::mt19937& random) {
    Shape shape{};
    shape.tokens = pick(random, {1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 40});
    shape.n_out = pick(random, {1, 2, 15, 16, 17, 33, static_cast<int64_t>(random() % 60)});
    shape.n_in = pick(random, {1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1024, 1100,
                               static_cast<int64_t>(1 + random() % 300)});
    if (random() % 2) {
        shape.density = std::vector<double>{0.02, 0.3, 0.5, 0.9, 1.0, 0.0}[random() % 6];
        return shape;
    }
    shape.m = static_cast<int>(pick(random, {1, 2, 4, 4, 8, 16, 32, 5}));
    shape.n = random() % 2 ? (shape.m + 1) / 2 : 1 + static_cast<int>(random() % static_cast<unsigned>(shape.m));
    shape.n_in = padded(shape.n_in, shape.m);
    return shape;
}

}  // namespace

int main(int argc, char** argv) {
    const long n_cases = argc > 1 ? std::atol(argv[1]) : 1000;
    std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0);
    assume_wake_ns(0);  // or no product here were large enough for threads
    constexpr Type kTypes[][2] = {{Type::f32, Type::f32}, {Type::bf16, Type::bf16}, {Type::i8, Type::f32}, {Type::i8, Type::bf16}};
    for (long i = 0; i < n_cases; ++i) {
        Shape shape = random_shape(random);
        const auto& types = kTypes[random() % 4];
        const Numbers numbers = random() % 2 ? Numbers::usual : static_cast<Numbers>(random() % 4);
        // Large enough now and then that the work is divided.
        if (i % 25 == 0) shape.n_out = 400, shape.n_in = padded(700, shape.m ? shape.m : 1), shape.tokens = 1 + i % 3;
        // More tokens than tiles take at once, and the last few.
        if (i % 100 == 1) shape.n_out = 20, shape.tokens = 512 + pick(random, {1, 20, 33, 600});
        run(make_case(shape, types[0], types[1], random() % 2, numbers, random), random);
    }
    std::printf("features:");
    for (const Named& by : kPaths) {
        const Features& f = features();
        const bool has = by.path == Path::avx512 ? f.avx512 : by.path == Path::bf16 ? f.bf16 : by.path == Path::vnni ? f.vnni : f.amx;
        if (has) std::printf(" %s", by.name);
    }
    std::printf("\n");
    for (const auto& [name, count] : counts) std::printf("%s: %ld\n", name.c_str(), count);
    std::printf("regions: %ld\n", fake_pool::regions());
    return 0;
}
