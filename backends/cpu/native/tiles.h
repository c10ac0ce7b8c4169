// How quantized weights lie in memory for the kernels: tiles of 16 rows, read once from front to back.
//
// A tile is a run of units, one for each max(group, 32) columns: the codes, 32 columns at a time, then the unit's
// scales and, if the weight is biased, its biases: 16 (one a row) for each group in the unit. So decoding is a single
// stream through memory, 16 rows share each activation, and no vector has to be summed across.
//
// 32 columns of 16 rows are eight quads (four neighbouring columns of all rows: 64 codes, byte 4 r + j for row r and
// column j). Their bits lie in planes of 64-byte lines: 4 bits (quad q in line q % 4, at bit 4 (q / 4)), 2 bits
// (line q / 4, bit 2 (q % 4)), 1 bit (bit q of the only line). 5 bits are a plane of 4 and one of 1, the lower bits
// first; 8 bits are one line a quad, stored less 128 as signed numbers, as most processors multiply them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float16.h"

namespace ondevice::cpu {

constexpr int kRows = 16;  // of a tile: 16 lanes of AVX-512, twice 8 of AVX2, four times 4 of NEON
constexpr int kBlock = 32;  // columns whose codes lie together
constexpr int kHalf = 16;   // columns whose activations share a scale
constexpr int kLine = 64;

enum class Number : int { f32, f16, bf16, i8 };

static inline int64_t size_of(Number type) { return type == Number::f32 ? 4 : type == Number::i8 ? 1 : 2; }

static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A quantized matrix, or a stack of them: w = scale * (code - zero) + bias.
struct Tiles {
    int bits, group;
    Number scale_type;
    bool biased;  // otherwise all biases are 0 and not stored
    float zero;
    int64_t experts, rows, columns;
    uint8_t* data;  // [experts][tiles of 16 rows][tile_bytes()], aligned to 64; the last tile's missing rows are 0

    int64_t unit() const { return group < kBlock ? kBlock : group; }
    int64_t code_bytes() const { return kLine * bits; }  // of 32 columns
    int64_t scales_bytes() const { return kRows * size_of(scale_type); }
    int64_t unit_bytes() const {
        return unit() / kBlock * code_bytes() + unit() / group * scales_bytes() * (biased ? 2 : 1);
    }
    int64_t tile_bytes() const { return columns / unit() * unit_bytes(); }
    int64_t tiles() const { return (rows + kRows - 1) / kRows; }  // of one expert
    int64_t bytes() const { return experts * tiles() * tile_bytes(); }
    const uint8_t* tile(int64_t expert, int64_t index) const {
        return data + (expert * tiles() + index) * tile_bytes();
    }
};

// Where a code's bits lie: `count` of them from bit `from` of its byte in line `line` become bits `to` ... of the code.
struct Field {
    int line, from, count, to;
};

// The fields of quad q in codes of `bits` bits; returns how many there are (1 or 2).
static constexpr int fields(int bits, int q, Field out[2]) {
    int n = 0, line = 0, to = 0;
    if (bits == 8) {
        out[n++] = Field{q, 0, 8, 0};
        return n;
    }
    if (bits >= 4) {
        out[n++] = Field{line + q % 4, 4 * (q / 4), 4, to};
        line += 4;
        to += 4;
    }
    if (bits & 2) {
        out[n++] = Field{line + q / 4, 2 * (q % 4), 2, to};
        line += 2;
        to += 2;
    }
    if (bits & 1) out[n++] = Field{line, q, 1, to};
    return n;
}

}  // namespace ondevice::cpu
