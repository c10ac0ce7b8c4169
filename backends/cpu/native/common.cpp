// Kernels that need no vectors: positions, and moving rows about.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "pack.h"

namespace ondevice::cpu {

void rope_table(const RopeTable& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.B * p.T, 1 + 512 / (p.pairs + 1)), step = (p.B * p.T + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t token = task * step; token < p.B * p.T && token < (task + 1) * step; token++) {
            const float position = static_cast<float>(p.starts[token / p.T] + token % p.T);
            float *cosines = p.table + token * 2 * p.pairs, *sines = cosines + p.pairs;
            for (int64_t i = 0; i < p.pairs; i++) {
                const float angle = position * p.freqs[i];
                cosines[i] = std::cos(angle) * p.scale;
                sines[i] = std::sin(angle) * p.scale;
            }
        }
    });
}

void take(const Take& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.count, 1 + 65536 / (p.bytes + 1)), step = (p.count + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t i = task * step; i < p.count && i < (task + 1) * step; i++)
            std::memcpy(p.out + i * p.bytes, p.x + p.ids[i] * p.bytes, static_cast<size_t>(p.bytes));
    });
}

void piece(const Piece& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.rows, 1 + 16384 / (p.width + 1)), step = (p.rows + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t row = task * step; row < p.rows && row < (task + 1) * step; row++)
            std::memcpy(p.out + row * p.width, p.x + row * p.stride + p.from, sizeof(float) * p.width);
    });
}

void join(const Join& p, Pool& pool) {
    const int64_t width = p.width_a + p.width_b, tasks = pieces(pool, p.rows, 1 + 16384 / (width + 1));
    const int64_t step = (p.rows + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t row = task * step; row < p.rows && row < (task + 1) * step; row++) {
            std::memcpy(p.out + row * width, p.a + row * p.width_a, sizeof(float) * p.width_a);
            std::memcpy(p.out + row * width + p.width_a, p.b + row * p.width_b, sizeof(float) * p.width_b);
        }
    });
}

namespace {

template <class E>
void widen_row(const void* data, int64_t row, int64_t columns, float* out) {
    const E* from = static_cast<const E*>(data) + row * columns;
    for (int64_t i = 0; i < columns; i++) {
        E value;
        std::memcpy(&value, from + i, sizeof(E));  // at any address
        out[i] = widen(value);
    }
}

void matrix_row(const Matrix& w, int64_t row, float* out) {
    if (w.tiles) return unpack_row(*w.tiles, w.expert, row, out);
    if (w.type == Number::f32) widen_row<float>(w.dense, row, w.columns, out);
    if (w.type == Number::f16) widen_row<half>(w.dense, row, w.columns, out);
    if (w.type == Number::bf16) widen_row<bfloat>(w.dense, row, w.columns, out);
}

}  // namespace

void embed(const Embed& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.count, 1 + 2048 / (p.weight.columns + 1)), step = (p.count + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t i = task * step; i < p.count && i < (task + 1) * step; i++)
            matrix_row(p.weight, p.ids[i], p.out + i * p.weight.columns);
    });
}

}  // namespace ondevice::cpu
