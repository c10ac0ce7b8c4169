// AVX-512 with VNNI, and, where the file is compiled for it, with BF16: what the kernel bodies are written in. See
// simd/portable.h and kernels/math.inl for what each name means.
#pragma once

#include <immintrin.h>

#include "../tiles.h"

#if defined(__AVX512BF16__) && !defined(ONDEVICE_PAIRS)
#define ONDEVICE_PAIRS
#endif
#if defined(ONDEVICE_PAIRS)
#define ONDEVICE_SET avx512_bf16
#else
#define ONDEVICE_SET avx512
#endif

namespace ondevice::cpu::ONDEVICE_SET {

#if defined(ONDEVICE_PAIRS)
constexpr const char* kName = "avx512_bf16";
constexpr bool kPairs = true;
#else
constexpr const char* kName = "avx512";
#endif
constexpr int N = 16;
constexpr int kTokens = 8;       // sums of 8 tokens, twice (integers of a group, floats), leave 16 of 32 registers
constexpr int kFloatTokens = 8;  // two products a cycle, four cycles each: eight sums keep the units busy
constexpr int kTileTokens = 12;   // 12 tokens x 32 columns of sums, two for the weights, one for the activation: of 32 registers
constexpr int kTilePanels = 2;
constexpr float kOffset8 = 0;    // dots of 8-bit codes are of the codes themselves

struct F {
    __m512 v;
};

static ONDEVICE_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static ONDEVICE_INLINE F load(const half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static ONDEVICE_INLINE F load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static ONDEVICE_INLINE F load(const bfloat* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static ONDEVICE_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static ONDEVICE_INLINE F set(float a) { return {_mm512_set1_ps(a)}; }
static ONDEVICE_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static ONDEVICE_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
static ONDEVICE_INLINE F root(F a) { return {_mm512_sqrt_ps(a.v)}; }
static ONDEVICE_INLINE F nearest(F a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static ONDEVICE_INLINE F power_of_two(F a) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

// Pairs, then fours within each quarter of a vector, then the quarters themselves.
static ONDEVICE_INLINE void transpose(F v[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        const __m512 more = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        const __m512 most = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        v[i].v = _mm512_shuffle_f32x4(even, more, 0x88);
        v[i + 4].v = _mm512_shuffle_f32x4(odd, most, 0x88);
        v[i + 8].v = _mm512_shuffle_f32x4(even, more, 0xdd);
        v[i + 12].v = _mm512_shuffle_f32x4(odd, most, 0xdd);
    }
}

static ONDEVICE_INLINE __m256 upper(F a) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}
static ONDEVICE_INLINE float sum(F a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper(a));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static ONDEVICE_INLINE float top(F a) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper(a));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static ONDEVICE_INLINE void store_bytes(int8_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

#if defined(ONDEVICE_PAIRS)

static ONDEVICE_INLINE __m512bh as_pairs(F a) { return (__m512bh)a.v; }
static ONDEVICE_INLINE __m512i narrowed(F a) {  // in the lower half of each word
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v));
}
static ONDEVICE_INLINE F pairs_of(F even, F odd) {
    return {_mm512_castsi512_ps(_mm512_or_si512(narrowed(even), _mm512_slli_epi32(narrowed(odd), 16)))};
}
static ONDEVICE_INLINE void store_pairs(float* to, F first, F second) {
    store(to, {(__m512)_mm512_cvtne2ps_pbh(second.v, first.v)});
}
static ONDEVICE_INLINE F dot_pairs(F a, F b, F sum) { return {_mm512_dpbf16_ps(sum.v, as_pairs(a), as_pairs(b))}; }

#endif

struct Line {
    __m512i v;
};

using Quad = __m512i;

static ONDEVICE_INLINE void store_line(uint8_t* p, Line a) { _mm512_storeu_si512(p, a.v); }
static ONDEVICE_INLINE Line load_line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static ONDEVICE_INLINE Line operator|(Line a, Line b) { return {_mm512_or_si512(a.v, b.v)}; }
static ONDEVICE_INLINE Line field(Line a, int from, int count, int to) {
    if (count == 8) return a;
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << count) - 1) << to));
    const auto shift = static_cast<unsigned>(from >= to ? from - to : to - from);
    const __m512i moved = from >= to ? _mm512_srli_epi16(a.v, shift) : _mm512_slli_epi16(a.v, shift);
    return {_mm512_and_si512(moved, mask)};
}
static ONDEVICE_INLINE Quad load_quad(const int8_t* p) {
    int four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
static ONDEVICE_INLINE void column(Line a, int j, bool is_signed, F out[1]) {
    const __m512i top = _mm512_slli_epi32(a.v, static_cast<unsigned>(24 - 8 * j));
    out[0] = {_mm512_cvtepi32_ps(is_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24))};
}

template <int bits>
struct Dot {
    __m512i sums;

    ONDEVICE_INLINE void start(const float*) { sums = _mm512_setzero_si512(); }
    ONDEVICE_INLINE void add(int, Line codes, Quad x) {
        // Codes are the unsigned side; those of 8 bits lie there less 128, which turning the top bit undoes.
        const __m512i c = bits == 8 ? _mm512_xor_si512(codes.v, _mm512_set1_epi8(-128)) : codes.v;
        sums = _mm512_dpbusd_epi32(sums, c, x);
    }
    ONDEVICE_INLINE void total(int, F out[1]) const { out[0] = {_mm512_cvtepi32_ps(sums)}; }
};

}  // namespace ondevice::cpu::ONDEVICE_SET
