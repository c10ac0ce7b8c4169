// The two 16-bit floating-point formats that files and caches hold, as types of their own, and their conversions.
#pragma once

#include <cstdint>
#include <cstring>

// What an inner loop is made of: compilers give up on inlining just where it matters.
#if defined(ONDEVICE_INLINE)
#elif defined(_MSC_VER)
#define ONDEVICE_INLINE __forceinline
#else
#define ONDEVICE_INLINE inline __attribute__((always_inline))
#endif

namespace ondevice::cpu {

struct half {
    uint16_t bits;
};

struct bfloat {
    uint16_t bits;
};

// `static`, here and in all headers that kernels include: each file is compiled for another instruction set, and a
// shared inline function could be linked from the wrong one.
static inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float widen(float value) { return value; }

static inline float widen(bfloat value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

static inline float widen(half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinite, or not a number
    // 2^112 moves the exponent from half's bias (15) to float's (127); subnormal halves come out right as well.
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

static inline void narrow(float value, float* out) { *out = value; }

static inline void narrow(float value, bfloat* out) {  // to nearest, ties to even; not-a-number stays that
    const uint32_t bits = to_bits(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void narrow(float value, half* out) {  // to nearest, ties to even; too large becomes infinite
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) {
        out->bits = sign | 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520: half of the way from the largest half to the next power
        out->bits = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: subnormal; adding 1/2 aligns the last bit with 2^-24
        out->bits = sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
    } else {
        out->bits = sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
    }
}

}  // namespace ondevice::cpu
