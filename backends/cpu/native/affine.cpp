// One body for every processor: memory is what it waits for.
#include "affine.h"

namespace ondevice::cpu {
namespace {

constexpr int kEight = 8;  // codes that are unpacked at once

template <int bits>
void row_of(const Affine& p, int64_t row) {
    const PackedCodes& c = p.codes;
    const uint8_t* codes = c.data + row * c.row_bytes();
    float* out = p.out + row * c.groups * c.size;
    for (int64_t group = row * c.groups; group < (row + 1) * c.groups; group++)
        for (int64_t at = 0; at < c.size; at += kEight, codes += bits, out += kEight) {
            float code[kEight];
            unpack_eight<bits>(codes, code);
            for (int i = 0; i < kEight; i++) out[i] = code[i] * p.scales[group] + p.biases[group];
        }
}

template <int bits>
void row_of(const AffineBack& p, int64_t row) {
    const PackedCodes& c = p.codes;
    const uint8_t* codes = c.data + row * c.row_bytes();
    const float* grad = p.grad + row * c.groups * c.size;
    for (int64_t group = row * c.groups; group < (row + 1) * c.groups; group++) {
        float weighted[kEight] = {}, plain[kEight] = {};
        for (int64_t at = 0; at < c.size; at += kEight, codes += bits, grad += kEight) {
            float code[kEight];
            unpack_eight<bits>(codes, code);
            for (int i = 0; i < kEight; i++) weighted[i] += grad[i] * code[i], plain[i] += grad[i];
        }
        float to_scale = 0, to_bias = 0;
        for (int i = 0; i < kEight; i++) to_scale += weighted[i], to_bias += plain[i];
        p.to_scales[group] = to_scale, p.to_biases[group] = to_bias;
    }
}

template <int bits, class Arguments>
void rows_of(const Arguments& p, Pool& pool) {
    const int64_t rows = p.codes.rows, tasks = pieces(pool, rows, 16), step = (rows + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t row = task * step; row < rows && row < (task + 1) * step; row++) row_of<bits>(p, row);
    });
}

template <class Arguments>
void all_of(const Arguments& p, Pool& pool) {
    switch (p.codes.bits) {
        case 2: return rows_of<2>(p, pool);
        case 3: return rows_of<3>(p, pool);
        case 4: return rows_of<4>(p, pool);
        case 5: return rows_of<5>(p, pool);
        case 6: return rows_of<6>(p, pool);
        case 8: return rows_of<8>(p, pool);
    }
}

}  // namespace

void affine(const Affine& p, Pool& pool) { all_of(p, pool); }

void affine_back(const AffineBack& p, Pool& pool) { all_of(p, pool); }

}  // namespace ondevice::cpu
