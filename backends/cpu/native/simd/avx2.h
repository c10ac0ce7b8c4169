// AVX2 with FMA and F16C: what the kernel bodies are written in. See simd/portable.h for what each name means.
#pragma once

#include <immintrin.h>

#include "../tiles.h"

namespace ondevice::cpu::avx2 {

constexpr const char* kName = "avx2";
constexpr int N = 8;
constexpr int kTokens = 4;        // 16 rows x 4 tokens of 16-bit sums fill half of the 16 registers
constexpr int kFloatTokens = 6;   // 16 rows x 6 tokens of float sums, two for the weights, one for the activation
constexpr int kTileTokens = 6;   // 6 tokens x 16 columns of sums, two for the weights, one for the activation: of 16 registers
constexpr int kTilePanels = 1;
constexpr float kOffset8 = 128;   // what dots of 8-bit codes were less than their codes

struct F {
    __m256 v;
};

static ONDEVICE_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
static ONDEVICE_INLINE F load(const half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static ONDEVICE_INLINE F load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
static ONDEVICE_INLINE F load(const bfloat* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
static ONDEVICE_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
static ONDEVICE_INLINE F set(float a) { return {_mm256_set1_ps(a)}; }
static ONDEVICE_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static ONDEVICE_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
static ONDEVICE_INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static ONDEVICE_INLINE F root(F a) { return {_mm256_sqrt_ps(a.v)}; }
static ONDEVICE_INLINE F nearest(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static ONDEVICE_INLINE F power_of_two(F a) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}

static ONDEVICE_INLINE void transpose(F v[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v);
        a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

static ONDEVICE_INLINE float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static ONDEVICE_INLINE float top(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static ONDEVICE_INLINE void store_bytes(int8_t* p, F a) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

struct Line {
    __m256i v[2];
};

using Quad = __m256i;

static ONDEVICE_INLINE Line load_line(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
}
static ONDEVICE_INLINE void store_line(uint8_t* p, Line a) {
    auto* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, a.v[0]);
    _mm256_storeu_si256(q + 1, a.v[1]);
}
static ONDEVICE_INLINE Line operator|(Line a, Line b) {
    return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
}
static ONDEVICE_INLINE Line field(Line a, int from, int count, int to) {
    if (count == 8) return a;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << count) - 1) << to));
    for (__m256i& v : a.v) {
        v = from >= to ? _mm256_srli_epi16(v, from - to) : _mm256_slli_epi16(v, to - from);
        v = _mm256_and_si256(v, mask);
    }
    return a;
}
static ONDEVICE_INLINE Quad load_quad(const int8_t* p) {
    int four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
static ONDEVICE_INLINE void column(Line a, int j, bool is_signed, F out[2]) {
    for (int i = 0; i < 2; i++) {
        const __m256i top = _mm256_slli_epi32(a.v[i], 24 - 8 * j);
        const __m256i code = is_signed ? _mm256_srai_epi32(top, 24) : _mm256_srli_epi32(top, 24);
        out[i] = {_mm256_cvtepi32_ps(code)};
    }
}

// Compilers like to make all products first and add them up afterwards, which takes four times the registers there are:
// a sum that is settled has been added by then.
static ONDEVICE_INLINE void settle(__m256i& sum) {
#if defined(__GNUC__)
    __asm__("" : "+x"(sum));
#else
    (void)sum;
#endif
}

// Products of neighbours are added in 16 bits: 2 x 127 x (2^bits - 1) each, so kChain of them fit below 2^15. Codes of
// 8 bits are made positive, with their signs on the activations: 2 x 127 x 128 just fits.
template <int bits>
struct Dot {
    static constexpr int kChain = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
    __m256i narrow[2], wide[2];
    const float* steps;

    ONDEVICE_INLINE void start(const float* p) { steps = p; }
    ONDEVICE_INLINE void add(int i, Line codes, Quad x) {
        for (int h = 0; h < 2; h++) {
            const __m256i c = codes.v[h];
            const __m256i pairs = bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(x, c))
                                            : _mm256_maddubs_epi16(c, x);
            narrow[h] = i % kChain == 0 ? pairs : _mm256_add_epi16(narrow[h], pairs);
            settle(narrow[h]);
            if ((i + 1) % kChain == 0) gather(h, i < kChain);
        }
    }
    ONDEVICE_INLINE void total(int count, F out[2]) {
        for (int h = 0; h < 2; h++) {
            if (count % kChain) gather(h, count < kChain);
            out[h] = {_mm256_cvtepi32_ps(wide[h])};
        }
    }

  private:
    ONDEVICE_INLINE void gather(int h, bool first) {
        const __m256i products = _mm256_madd_epi16(narrow[h], load_quad(reinterpret_cast<const int8_t*>(steps)));
        wide[h] = first ? products : _mm256_add_epi32(wide[h], products);
    }
};

// Products are made in 16 bits and added by pairs, times a 16-bit number: a step costs nothing (see Quantized).
#define ONDEVICE_STEPS
constexpr bool kSteps = true;
constexpr float kFinest = 2048;  // units in the larger step: sums of a block's products, times it, fit in 32 bits

// The whole of a block of 32 as codes, unit, steps and sums, as Quantized has them. All vectors of floats hold numbers for
// the columns' pairs in turn: a, a, b, b, a, a, b, b.
static ONDEVICE_INLINE void quantize_steps(const float* x, int64_t stride, int8_t* codes, float* scales, float* sums) {
    F v[4], most = set(0);
    for (int i = 0; i < 4; i++) {
        v[i] = load(x + i * N);
        most = max(abs(v[i]), most);
    }
    most = max(most, {_mm256_permute2f128_ps(most.v, most.v, 1)});
    most = max(most, {_mm256_permute_ps(most.v, 0xb1)});
    const F both = max(max({_mm256_permute_ps(most.v, 0x4e)}, most), set(1e-30f));
    const F rate = set(kFinest) / both;  // 1 / unit / 127
    const F step = min({_mm256_ceil_ps((most * rate).v)}, set(kFinest));
    const F inverse = set(127) * rate / max(step, set(1));
    __m256i c[4];
    for (int i = 0; i < 4; i++) c[i] = _mm256_cvtps_epi32((v[i] * inverse).v);
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    const __m256i all = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), all);
    const __m256i whole = _mm256_cvtps_epi32(step.v), steps = _mm256_packs_epi32(whole, whole);  // a, a, b, b, again
    const __m256i pair = _mm256_shuffle_epi32(_mm256_shufflelo_epi16(steps, 0x08), 0);  // a, b, a, b
    const __m256i quads = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), all), pair);
    const __m256i twos = _mm256_hadd_epi32(quads, quads), ones = _mm256_hadd_epi32(twos, twos);
    const float unit = _mm256_cvtss_f32(both.v) * (1 / (127 * kFinest));
    scales[0] = unit;
    const int both_steps = _mm256_cvtsi256_si32(pair);
    std::memcpy(scales + stride, &both_steps, sizeof(float));
    sums[0] = static_cast<float>(_mm256_cvtsi256_si32(ones)) * unit;
    sums[stride] = static_cast<float>(_mm_cvtsi128_si32(_mm256_extracti128_si256(ones, 1))) * unit;
}

}  // namespace ondevice::cpu::avx2
