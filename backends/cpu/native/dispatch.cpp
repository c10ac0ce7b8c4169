// Which kernels this processor can run.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace ondevice::cpu {

extern const Kernels kAvx512Bf16, kAvx512, kAvx2, kNeon, kPortable;

namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Registers {
    unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned part = 0) {
    Registers r{};
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(part));
    r = {unsigned(values[0]), unsigned(values[1]), unsigned(values[2]), unsigned(values[3])};
#else
    __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);  // leaves r alone if the processor has no such leaf
#endif
    return r;
}

// The vector registers that the operating system saves: having instructions is not enough.
unsigned saved_registers() {
#if defined(_MSC_VER)
    return static_cast<unsigned>(_xgetbv(0));
#else
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

constexpr bool bit(unsigned word, int n) { return word >> n & 1; }

[[maybe_unused]] bool has_avx2() {
    const Registers one = cpuid(1), seven = cpuid(7);
    const bool fma = bit(one.c, 12), osxsave = bit(one.c, 27), avx = bit(one.c, 28), f16c = bit(one.c, 29);
    return fma && osxsave && avx && f16c && bit(seven.b, 5) && (saved_registers() & 0x6) == 0x6;
}

[[maybe_unused]] bool has_avx512() {  // foundation, DQ, BW, VL and VNNI
    const Registers seven = cpuid(7);
    const bool all = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
    return all && has_avx2() && (saved_registers() & 0xe6) == 0xe6;
}

[[maybe_unused]] bool has_avx512_bf16() {  // part 0 says how many parts there are
    return has_avx512() && cpuid(7).a >= 1 && bit(cpuid(7, 1).a, 5);
}

#elif defined(__aarch64__)

[[maybe_unused]] bool has_dot_product() {
#if defined(__APPLE__)
    return true;  // every Apple processor since the A11
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}

#endif

}  // namespace

Variants variants() {
    Variants found{};
#if defined(ONDEVICE_AVX512_BF16)
    if (has_avx512_bf16()) found.all[found.count++] = &kAvx512Bf16;
#endif
#if defined(ONDEVICE_AVX512)
    if (has_avx512()) found.all[found.count++] = &kAvx512;
#endif
#if defined(ONDEVICE_AVX2)
    if (has_avx2()) found.all[found.count++] = &kAvx2;
#endif
#if defined(ONDEVICE_NEON)
    if (has_dot_product()) found.all[found.count++] = &kNeon;
#endif
    found.all[found.count++] = &kPortable;
    return found;
}

}  // namespace ondevice::cpu
