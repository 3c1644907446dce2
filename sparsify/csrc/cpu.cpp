// What the processor offers and the operating system lets us use. Compiled without any -m flag.
#include "kernels.h"

#ifdef SPARSIFY_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsify {
namespace {

#ifdef SPARSIFY_X86

struct Cpuid {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool bit(unsigned word, int index) { return (word >> index) & 1; }

uint64_t saved_state() {
    // XCR0: which registers the operating system saves.
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool may_use_tiles() {
    // Linux hands out the tile registers on request, once for the whole process.
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

Features detect() {
    Features found{};
    const Cpuid one(1, 0), seven(7, 0), seven_one(7, 1);
    if (!bit(one.c, 27)) return found;  // OSXSAVE: xgetbv exists
    const uint64_t state = saved_state();
    constexpr uint64_t kZmm = 0xe6, kTiles = 0x60000;
    if ((state & kZmm) != kZmm) return found;
    const bool avx512 = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);  // F DQ BW VL
    const bool expand = bit(seven.c, 1) && bit(seven.c, 6);                                            // VBMI VBMI2
    // What every file but this one is compiled with besides: FMA, BMI2, POPCNT.
    const bool scalar = bit(one.c, 12) && bit(seven.b, 8) && bit(one.c, 23);
    found.avx512 = avx512 && expand && scalar;
    found.bf16 = found.avx512 && bit(seven_one.a, 5);
    found.vnni = found.avx512 && bit(seven.c, 11);
    found.amx = found.bf16 && found.vnni && (state & kTiles) == kTiles && bit(seven.d, 24) && bit(seven.d, 22) &&
                bit(seven.d, 25) && may_use_tiles();
#ifndef SPARSIFY_HAS_AVX512
    found.avx512 = false;
#endif
#ifndef SPARSIFY_HAS_BF16
    found.bf16 = false;
#endif
#ifndef SPARSIFY_HAS_VNNI
    found.vnni = false;
#endif
#ifndef SPARSIFY_HAS_AMX
    found.amx = false;
#endif
    return found;
}

#else

Features detect() { return {}; }

#endif

}  // namespace

const Features& features() {
    static const Features found = detect();
    return found;
}

bool supports(Path path, const Product& p) {
    const Features& have = features();
    const Type values = p.weight.type;
    const bool narrow = p.x_type == Type::bf16 && values == Type::bf16;
    switch (path) {
        case Path::avx512: return have.avx512 && values != Type::i8 && values == p.x_type;
        case Path::bf16: return have.bf16 && narrow;
        case Path::vnni: return have.vnni && values == Type::i8 && p.weight.n_in <= kMostVnni;
        case Path::amx:
            if (values != Type::i8) return have.amx && narrow;
            return have.amx && (few(p) ? p.weight.n_in <= kMostTiles : p.x_type == Type::bf16);
    }
    return false;
}

}  // namespace sparsify
