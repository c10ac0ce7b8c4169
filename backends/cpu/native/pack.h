// Quantized weights from their files' layouts into tiles, and rows of tiles back into floats.
#pragma once

#include <string>

#include "pool.h"
#include "tiles.h"

namespace ondevice::cpu {

// Codes as one stream of `bits` bits a row, lowest bits first: MLX's uint32 words (and, with 8 bits, plain bytes).
// scales and biases [rows, columns / group] in the tiles' scale type; biases is null if the tiles have none.
struct AffineParts {
    const uint8_t* codes;
    int bits;
    const uint8_t *scales, *biases;
};

// GGUF's blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, told apart by the tiles' bits and biases.
struct LegacyBlocks {
    const uint8_t* data;
};

// One of GGUF's kinds of blocks that become tiles with float32 scales: the K-quants and MXFP4.
struct Kind {
    const char* name;
    int64_t columns, bytes;  // of a block
    Tiles (*tiles)(int64_t experts, int64_t rows, int64_t columns);
    void (*pack)(const uint8_t* blocks, Tiles& to, Pool& pool);
};
const Kind* find_kind(const std::string& name);  // null: there is none

void pack(const AffineParts& from, Tiles& to, Pool& pool);
void pack(const LegacyBlocks& from, Tiles& to, Pool& pool);

// float32 numbers of one row.
void unpack_row(const Tiles& w, int64_t expert, int64_t row, float* out);

}  // namespace ondevice::cpu
