// The vocabulary of the kernel bodies, in plain C++: the definition of what simd/avx2.h, avx512.h and neon.h say in
// intrinsics. A compiler may turn it into whatever vectors the baseline has.
#pragma once

#include <cmath>

#include "../tiles.h"

namespace ondevice::cpu::portable {

constexpr const char* kName = "portable";
constexpr int N = 4;             // floats in an F; divides 16
constexpr int kTokens = 1;       // most tokens that a tile is multiplied with at a time: 1, 2, 4, ... up to this
constexpr int kFloatTokens = 4;  // the same for float activations: 1, 2, 3, ...
constexpr int kTileTokens = 4;   // of many products: tokens in a tile, and panels of 16 columns in it
constexpr int kTilePanels = 1;
constexpr float kOffset8 = 128;  // what Dot<8> took from each code

struct F {
    float v[N];
};

template <class Function>
static inline F each(Function f) {
    F out;
    for (int i = 0; i < N; i++) out.v[i] = f(i);
    return out;
}

static inline F load(const float* p) {
    F out;
    std::memcpy(out.v, p, sizeof(out.v));  // p may be any address: weights stay where the file has them
    return out;
}
static inline F load(const half* p) {
    half h[N];
    std::memcpy(h, p, sizeof(h));
    return each([&](int i) { return widen(h[i]); });
}
static inline F load(const int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
}
static inline F load(const bfloat* p) {
    bfloat b[N];
    std::memcpy(b, p, sizeof(b));
    return each([&](int i) { return widen(b[i]); });
}
static inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
static inline F set(float a) {
    return each([&](int) { return a; });
}
static inline F operator+(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
static inline F operator-(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
static inline F operator*(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
static inline F operator/(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
static inline F fma(F a, F b, F c) {  // a b + c, rounded once or twice
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline F min(F a, F b) {  // b when one is not a number
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F abs(F a) {
    return each([&](int i) { return from_bits(to_bits(a.v[i]) & 0x7fffffff); });
}
static inline F root(F a) {
    return each([&](int i) { return std::sqrt(a.v[i]); });
}
static inline F nearest(F a) {  // whole number, ties to even; |a| < 2^22: 1.5 * 2^23 leaves no bit behind the point
    return each([&](int i) { return (a.v[i] + 0x1.8p23f) - 0x1.8p23f; });
}
static inline F power_of_two(F a) {  // whole a in -127 ... 128; 2^-127 gives 0, 2^128 infinity
    return each([&](int i) {
        const int whole = a.v[i] >= -127 && a.v[i] <= 128 ? static_cast<int>(a.v[i]) : 128;
        return from_bits(static_cast<uint32_t>(whole + 127) << 23);
    });
}
static inline void transpose(F v[N]) {  // N rows of N numbers
    for (int i = 0; i < N; i++)
        for (int j = 0; j < i; j++) {
            const float other = v[i].v[j];
            v[i].v[j] = v[j].v[i];
            v[j].v[i] = other;
        }
}
static inline float sum(F a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
static inline float top(F a) {
    float best = a.v[0];
    for (float v : a.v) best = v > best ? v : best;
    return best;
}
static inline void store_bytes(int8_t* p, F a) {  // of whole numbers; anything else gives any bytes
    for (int i = 0; i < N; i++) p[i] = a.v[i] >= -128 && a.v[i] <= 127 ? static_cast<int8_t>(a.v[i]) : int8_t{0};
}

struct Line {  // 16 rows x 4 columns of codes (or of bits of codes)
    uint8_t v[kLine];
};

struct Quad {  // one token's activations at 4 columns
    int8_t v[4];
};

static inline void store_line(uint8_t* p, Line a) { std::memcpy(p, a.v, kLine); }
static inline Line load_line(const uint8_t* p) {
    Line out;
    std::memcpy(out.v, p, kLine);
    return out;
}
static inline Line operator|(Line a, Line b) {
    for (int i = 0; i < kLine; i++) a.v[i] |= b.v[i];
    return a;
}
static inline Line field(Line a, int from, int count, int to) {  // `count` bits from bit `from`, at bit `to`
    for (uint8_t& v : a.v) v = static_cast<uint8_t>((v >> from & ((1 << count) - 1)) << to);
    return a;
}
static inline Quad load_quad(const int8_t* p) {
    Quad out;
    std::memcpy(out.v, p, 4);
    return out;
}
static inline void column(Line a, int j, bool is_signed, F out[kRows / N]) {  // column j of the four, as floats
    for (int r = 0; r < kRows; r++) {
        const uint8_t code = a.v[4 * r + j];
        out[r / N].v[r % N] = is_signed ? static_cast<float>(static_cast<int8_t>(code)) : static_cast<float>(code);
    }
}

template <int bits>
struct Dot {  // 16 rows' sums of codes times activations, exact
    int32_t sums[kRows];

    void start(const float*) { std::memset(sums, 0, sizeof(sums)); }  // a token's steps
    void add(int, Line codes, Quad x) {  // the i-th quad since start()
        for (int r = 0; r < kRows; r++)
            for (int j = 0; j < 4; j++) {
                const uint8_t code = codes.v[4 * r + j];
                sums[r] += (bits == 8 ? static_cast<int8_t>(code) : code) * x.v[j];
            }
    }
    void total(int, F out[kRows / N]) const {  // of so many quads
        for (int r = 0; r < kRows; r++) out[r / N].v[r % N] = static_cast<float>(sums[r]);
    }
};

}  // namespace ondevice::cpu::portable
