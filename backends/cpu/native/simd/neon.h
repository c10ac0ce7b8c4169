// NEON with the dot product of ARMv8.2: what the kernel bodies are written in. See simd/portable.h for what each name
// means.
#pragma once

#include <arm_neon.h>

#include "../tiles.h"

namespace ondevice::cpu::neon {

constexpr const char* kName = "neon";
constexpr int N = 4;
constexpr int kTokens = 4;       // 16 rows x 4 tokens of sums fill half of the 32 registers
constexpr int kFloatTokens = 4;  // the same
constexpr int kTileTokens = 6;   // 6 tokens x 16 columns of sums, four for the weights, one for the activation: of 32 registers
constexpr int kTilePanels = 1;
constexpr float kOffset8 = 128;  // what dots of 8-bit codes were less than their codes

struct F {
    float32x4_t v;
};

static ONDEVICE_INLINE F load(const float* p) { return {vld1q_f32(p)}; }
static ONDEVICE_INLINE uint16x4_t four_shorts(const void* p) {
    uint64_t four;
    std::memcpy(&four, p, 8);
    return vcreate_u16(four);
}
static ONDEVICE_INLINE F load(const half* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(four_shorts(p)))}; }
static ONDEVICE_INLINE F load(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
}
static ONDEVICE_INLINE F load(const bfloat* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(four_shorts(p), 16))};
}
static ONDEVICE_INLINE void store(float* p, F a) { vst1q_f32(p, a.v); }
static ONDEVICE_INLINE F set(float a) { return {vdupq_n_f32(a)}; }
static ONDEVICE_INLINE F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
static ONDEVICE_INLINE F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
static ONDEVICE_INLINE F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
static ONDEVICE_INLINE F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
static ONDEVICE_INLINE F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
static ONDEVICE_INLINE F min(F a, F b) { return {vminq_f32(a.v, b.v)}; }  // not a number when one is
static ONDEVICE_INLINE F max(F a, F b) { return {vmaxq_f32(a.v, b.v)}; }
static ONDEVICE_INLINE F abs(F a) { return {vabsq_f32(a.v)}; }
static ONDEVICE_INLINE F root(F a) { return {vsqrtq_f32(a.v)}; }
static ONDEVICE_INLINE F nearest(F a) { return {vrndnq_f32(a.v)}; }
static ONDEVICE_INLINE F power_of_two(F a) {
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(a.v), vdupq_n_s32(127)), 23))};
}
static ONDEVICE_INLINE void transpose(F v[4]) {
    const float32x4x2_t a = vtrnq_f32(v[0].v, v[1].v), b = vtrnq_f32(v[2].v, v[3].v);
    for (int i = 0; i < 2; i++) {
        v[i].v = vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i]));
        v[i + 2].v = vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i]));
    }
}
static ONDEVICE_INLINE float sum(F a) { return vaddvq_f32(a.v); }
static ONDEVICE_INLINE float top(F a) { return vmaxvq_f32(a.v); }
static ONDEVICE_INLINE void store_bytes(int8_t* p, F a) {
    const int16x4_t words = vqmovn_s32(vcvtq_s32_f32(a.v));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    std::memcpy(p, &four, 4);
}

struct Line {
    uint8x16_t v[4];
};

using Quad = int8x16_t;

static ONDEVICE_INLINE void store_line(uint8_t* p, Line a) {
    for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, a.v[i]);
}
static ONDEVICE_INLINE Line load_line(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
static ONDEVICE_INLINE Line operator|(Line a, Line b) {
    for (int i = 0; i < 4; i++) a.v[i] = vorrq_u8(a.v[i], b.v[i]);
    return a;
}
static ONDEVICE_INLINE Line field(Line a, int from, int count, int to) {
    if (count == 8) return a;
    const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(to - from));  // to the right when negative
    const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>(((1 << count) - 1) << to));
    for (uint8x16_t& v : a.v) v = vandq_u8(vshlq_u8(v, shift), mask);
    return a;
}
static ONDEVICE_INLINE Quad load_quad(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
static ONDEVICE_INLINE void column(Line a, int j, bool is_signed, F out[4]) {
    const int32x4_t up = vdupq_n_s32(24 - 8 * j), down = vdupq_n_s32(-24);
    for (int i = 0; i < 4; i++) {
        const uint32x4_t top = vshlq_u32(vreinterpretq_u32_u8(a.v[i]), up);
        out[i] = {is_signed ? vcvtq_f32_s32(vshlq_s32(vreinterpretq_s32_u32(top), down))
                            : vcvtq_f32_u32(vshlq_u32(top, down))};
    }
}

template <int bits>
struct Dot {  // codes below 8 bits are positive as signed numbers too
    int32x4_t sums[4];

    ONDEVICE_INLINE void start(const float*) {
        for (int32x4_t& s : sums) s = vdupq_n_s32(0);
    }
    ONDEVICE_INLINE void add(int, Line codes, Quad x) {
        for (int i = 0; i < 4; i++) sums[i] = vdotq_s32(sums[i], vreinterpretq_s8_u8(codes.v[i]), x);
    }
    ONDEVICE_INLINE void total(int, F out[4]) const {
        for (int i = 0; i < 4; i++) out[i] = {vcvtq_f32_s32(sums[i])};
    }
};

}  // namespace ondevice::cpu::neon
