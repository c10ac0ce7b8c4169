// AVX-512 on a processor without it: SIMDe's portable intrinsics, under Intel's names, before anything else is read.
// What Debian's SIMDe 0.7.4 lacks is made of two halves in AVX2.
#pragma once

#include <immintrin.h>

#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define __m512 simde__m512
#define __m512i simde__m512i

namespace emulated {

template <class Half, class Whole>
static inline Half half_of(const Whole& whole, int i) {
    Half out;
    std::memcpy(&out, reinterpret_cast<const char*>(&whole) + i * sizeof(Half), sizeof(Half));
    return out;
}

// f gives the lower (0) and the upper (1) half.
template <class Whole, class Function>
static inline Whole both(const Function& f) {
    const decltype(f(0)) halves[] = {f(0), f(1)};
    Whole out;
    std::memcpy(&out, halves, sizeof(out));
    return out;
}

static inline simde__m512i cvtps_epi32(simde__m512 a) {
    return both<simde__m512i>([&](int i) { return _mm256_cvtps_epi32(half_of<__m256>(a, i)); });
}
static inline simde__m512i srai_epi32(simde__m512i a, unsigned n) {
    return both<simde__m512i>([&](int i) { return _mm256_srai_epi32(half_of<__m256i>(a, i), static_cast<int>(n)); });
}
static inline simde__m512i cvtepu16_epi32(__m256i a) {
    return both<simde__m512i>([&](int i) { return _mm256_cvtepu16_epi32(half_of<__m128i>(a, i)); });
}
static inline simde__m512i cvtepi8_epi32(__m128i a) {
    return both<simde__m512i>([&](int i) { return _mm256_cvtepi8_epi32(i ? _mm_srli_si128(a, 8) : a); });
}
static inline simde__m512 cvtepi32_ps(simde__m512i a) {
    return both<simde__m512>([&](int i) { return _mm256_cvtepi32_ps(half_of<__m256i>(a, i)); });
}
static inline simde__m512 cvtph_ps(__m256i a) {
    return both<simde__m512>([&](int i) { return _mm256_cvtph_ps(half_of<__m128i>(a, i)); });
}

// Quarters: two of a, then two of b, by two bits of `which` each.
static inline simde__m512 shuffle_f32x4(simde__m512 a, simde__m512 b, int which) {
    float from[2][16], out[16];
    std::memcpy(from[0], &a, sizeof(a));
    std::memcpy(from[1], &b, sizeof(b));
    for (int i = 0; i < 4; i++) std::memcpy(out + 4 * i, from[i / 2] + 4 * (which >> 2 * i & 3), 16);
    simde__m512 whole;
    std::memcpy(&whole, out, sizeof(whole));
    return whole;
}

// Called, not inlined: tiles of products hold two dozen of them, which compilers take minutes for.
static inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}
static inline uint16_t to_bf16(float a) {  // to nearest, ties to even; subnormal numbers count as 0
    const uint32_t bits = bits_of(a), size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    if (size < 0x00800000) return static_cast<uint16_t>(bits >> 16 & 0x8000);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static __attribute__((noinline)) __m256i cvtneps_pbh(simde__m512 a) {
    float from[16];
    uint16_t to[16];
    std::memcpy(from, &a, sizeof(from));
    for (int i = 0; i < 16; i++) to[i] = to_bf16(from[i]);
    return half_of<__m256i>(to, 0);
}
static __attribute__((noinline)) simde__m512i cvtne2ps_pbh(simde__m512 upper, simde__m512 lower) {
    return both<simde__m512i>([&](int i) { return cvtneps_pbh(i ? upper : lower); });
}
// Intel's manual: the odd numbers' product is added first, then the even ones', each rounded.
static __attribute__((noinline)) simde__m512 dpbf16_ps(simde__m512 sum, simde__m512i a, simde__m512i b) {
    uint16_t x[32], y[32];
    float out[16];
    std::memcpy(x, &a, sizeof(x)), std::memcpy(y, &b, sizeof(y)), std::memcpy(out, &sum, sizeof(out));
    const auto wide = [](uint16_t bits) {
        const uint32_t all = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &all, 4);
        return value;
    };
    for (int i = 0; i < 16; i++) {
        out[i] = __builtin_fmaf(wide(x[2 * i + 1]), wide(y[2 * i + 1]), out[i]);
        out[i] = __builtin_fmaf(wide(x[2 * i]), wide(y[2 * i]), out[i]);
    }
    std::memcpy(&sum, out, sizeof(out));
    return sum;
}

}  // namespace emulated

#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_dpbf16_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#undef __m512bh
#define __m512bh simde__m512i
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
