// AdamW whose moments are kept in eight bits (backends/moments.py).
#pragma once

#include <cstdint>

#include "pool.h"

namespace ondevice::cpu {

// A table of backends/moments.py: 256 levels, signed or not; the edges between those of one sign; where to begin.
struct Levels {
    const float *levels, *edges;
    const int32_t* starts;
    bool is_signed;
};

// Numbers in eight bits, kShared to a scale; codes end at a whole block.
struct Coded {
    uint8_t* codes;
    float* scales;
};

constexpr int64_t kShared = 256;

// base.adamw for one parameter, with the first moment and the second's root in eight bits. m and root have no codes at
// first. fix: 1 / (1 - beta^step)
struct AdamW8 {
    const float *param, *grad;
    float* new_param;
    Coded m, root, new_m, new_root;
    Levels of_m, of_root;
    int64_t size;
    float rate, beta1, beta2, eps, decay, fix1, fix2;
};

void adamw8(const AdamW8& p, Pool& pool);

}  // namespace ondevice::cpu
