// Quantized weights whose scales are trained (base.quantized): codes as numbers, and their gradient.
#pragma once

#include <cstdint>
#include <cstring>

#include "pool.h"

namespace ondevice::cpu {

// Eight neighbours of MLX's packed codes, which fill `bits` bytes.
template <int bits, class T>
inline void unpack_eight(const uint8_t* from, T* to) {
    uint64_t word = 0;
    std::memcpy(&word, from, bits);
    for (int i = 0; i < 8; i++) to[i] = static_cast<T>(static_cast<int32_t>(word >> bits * i & ((1 << bits) - 1)));
}

// MLX's packed codes: `rows` rows of `groups` groups of `size` (a multiple of 8) codes of `bits` bits.
struct PackedCodes {
    const uint8_t* data;
    int64_t rows, groups, size;
    int bits;

    int64_t row_bytes() const { return groups * size * bits / 8; }
};

// out[r, g, i] = code[r, g, i] * scales[r, g] + biases[r, g]
struct Affine {
    PackedCodes codes;
    const float *scales, *biases;
    float* out;
};

// to_scales[r, g] = sum over i of grad * code, to_biases[r, g] = sum of grad
struct AffineBack {
    PackedCodes codes;
    const float* grad;
    float *to_scales, *to_biases;
};

void affine(const Affine& p, Pool& pool);
void affine_back(const AffineBack& p, Pool& pool);

}  // namespace ondevice::cpu
