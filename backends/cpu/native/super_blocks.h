// GGUF's K-quants and MXFP4 as files hold them: of each block the codes of 32 neighbours and the numbers of a group. In
// K-quants, blocks of 256 whose groups' scales are small whole numbers of the block's own, two levels that are multiplied
// out here (ggml's names for the fields; I. Kawrakow, llama.cpp, 2023).
#pragma once

#include <cmath>
#include <cstring>

#include "tiles.h"

namespace ondevice::cpu {

using Codes = uint8_t[kBlock];  // 32 neighbours of one row

inline float wide(const uint8_t (&d)[2]) {
    half bits;
    std::memcpy(&bits, d, 2);
    return widen(bits);
}

inline uint64_t load8(const uint8_t* p) {
    uint64_t eight;
    std::memcpy(&eight, p, 8);
    return eight;
}

// Bits [from, from + count) of 32 bytes.
inline void fields_of(const uint8_t* octets, int from, int count, Codes& out) {
    const uint64_t mask = 0x0101010101010101ull * ((1u << count) - 1);
    for (int i = 0; i < kBlock; i += 8) {
        const uint64_t eight = load8(octets + i) >> from & mask;
        std::memcpy(out + i, &eight, 8);
    }
}

// More bits of the same codes, which become bits `to` and up.
inline void add_fields(const uint8_t* octets, int from, int count, int to, Codes& out) {
    const uint64_t mask = 0x0101010101010101ull * ((1u << count) - 1);
    for (int i = 0; i < kBlock; i += 8) {
        const uint64_t eight = load8(out + i) | (load8(octets + i) >> from & mask) << to;
        std::memcpy(out + i, &eight, 8);
    }
}

struct Q2K {
    static constexpr int kBits = 2, kColumns = 256, kGroup = 16, kZero = 0;
    static constexpr bool kBiased = true, kNibbles = false;
    uint8_t scales[16], qs[64], d[2], dmin[2];

    void codes(int b, Codes& out) const { fields_of(qs + 32 * (b / 4), 2 * (b % 4), 2, out); }
    float number(int group, int which) const {
        return which ? -(wide(dmin) * static_cast<float>(scales[group] >> 4)) : wide(d) * static_cast<float>(scales[group] & 15);
    }
};

struct Q3K {
    static constexpr int kBits = 3, kColumns = 256, kGroup = 16, kZero = 4;
    static constexpr bool kBiased = false, kNibbles = false;
    uint8_t hmask[32], qs[64], scales[12], d[2];

    void codes(int b, Codes& out) const {
        fields_of(qs + 32 * (b / 4), 2 * (b % 4), 2, out);
        add_fields(hmask, b, 1, 2, out);
    }
    float number(int group, int) const {  // four bits of each in the first eight bytes, two in the last four
        const int low = scales[group % 8] >> 4 * (group / 8) & 15, high = scales[8 + group % 4] >> 2 * (group / 4) & 3;
        return wide(d) * static_cast<float>((low | high << 4) - 32);
    }
};

// Scales and minimums of six bits, eight of each in twelve bytes.
inline int six_bits(const uint8_t (&packed)[12], int group, int which) {
    const uint8_t *own = packed + 4 * which, *rest = packed + 8;
    if (group < 4) return own[group] & 63;
    return (rest[group - 4] >> 4 * which & 15) | own[group - 4] >> 6 << 4;
}

struct Q4K {
    static constexpr int kBits = 4, kColumns = 256, kGroup = 32, kZero = 0;
    static constexpr bool kBiased = true, kNibbles = true;
    uint8_t d[2], dmin[2], scales[12], qs[128];

    void codes(int b, Codes& out) const { fields_of(qs + 32 * (b / 2), 4 * (b % 2), 4, out); }
    float number(int group, int which) const {
        const auto factor = static_cast<float>(six_bits(scales, group, which));
        return which ? -(wide(dmin) * factor) : wide(d) * factor;
    }
};

struct Q5K {
    static constexpr int kBits = 5, kColumns = 256, kGroup = 32, kZero = 0;
    static constexpr bool kBiased = true, kNibbles = false;
    uint8_t d[2], dmin[2], scales[12], qh[32], qs[128];

    void codes(int b, Codes& out) const {
        fields_of(qs + 32 * (b / 2), 4 * (b % 2), 4, out);
        add_fields(qh, b, 1, 4, out);
    }
    float number(int group, int which) const {
        const auto factor = static_cast<float>(six_bits(scales, group, which));
        return which ? -(wide(dmin) * factor) : wide(d) * factor;
    }
};

struct Q6K {
    static constexpr int kBits = 6, kColumns = 256, kGroup = 16, kZero = 32;
    static constexpr bool kBiased = false, kNibbles = false;
    uint8_t ql[128], qh[64];
    int8_t scales[16];
    uint8_t d[2];

    void codes(int b, Codes& out) const {
        const int part = b / 4, of = b % 4;
        fields_of(ql + 64 * part + 32 * (of % 2), 4 * (of / 2), 4, out);
        add_fields(qh + 32 * part, 2 * of, 2, 4, out);
    }
    float number(int group, int) const { return wide(d) * static_cast<float>(scales[group]); }
};

// OCP's microscaling format: 4-bit floats, 32 to a power of two. Codes: twice their values, plus 12.
struct MXFP4 {
    static constexpr int kBits = 5, kColumns = 32, kGroup = 32, kZero = 12;
    static constexpr bool kBiased = false, kNibbles = false;
    uint8_t e, qs[16];

    void codes(int, Codes& out) const {
        static constexpr uint8_t values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        for (int i = 0; i < 16; i++) {
            out[i] = values[qs[i] & 15];
            out[16 + i] = values[qs[i] >> 4];
        }
    }
    float number(int, int) const { return std::ldexp(1.0f, e - 128); }
};

}  // namespace ondevice::cpu
