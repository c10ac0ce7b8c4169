// One body for every processor: most of its time goes into looking up codes, which no instruction set here does faster.
#include "moments.h"

#include <cmath>
#include <cstring>

namespace ondevice::cpu {
namespace {

void expand(const Coded& from, const Levels& with, int64_t block, float* to) {
    if (!from.codes) return void(std::memset(to, 0, sizeof(float) * kShared));
    const uint8_t* codes = from.codes + block * kShared;
    for (int64_t i = 0; i < kShared; i++) to[i] = with.levels[codes[i]] * from.scales[block];
}

// moments.compress of one block.
void compress(const float* values, const Levels& with, int64_t block, const Coded& to) {
    float most = 0;
    for (int64_t i = 0; i < kShared; i++) most = std::fabs(values[i]) > most ? std::fabs(values[i]) : most;
    const float inverse = most == 0 ? 1.0f : 1.0f / most;
    to.scales[block] = most;
    uint8_t* codes = to.codes + block * kShared;
    for (int64_t i = 0; i < kShared; i++) {
        const float whole = std::fabs(values[i]) * inverse, share = whole < 1.0f ? whole : 1.0f;
        int32_t bits;
        std::memcpy(&bits, &share, sizeof bits);
        int32_t found = with.starts[bits >> 17];
        found += share >= with.edges[found + 1];
        found += share >= with.edges[found + 1];
        codes[i] = static_cast<uint8_t>(found + (with.is_signed && values[i] < 0 ? 128 : 0));
    }
}

// `count` numbers from `begin` on; m and root: their moments, which become the new ones.
void update(const AdamW8& p, int64_t begin, int64_t count, float* m, float* root) {
    const float *param = p.param + begin, *grad = p.grad + begin;
    float* fresh = p.new_param + begin;
    const float left1 = 1 - p.beta1, left2 = 1 - p.beta2, kept = 1 - p.rate * p.decay, fix = std::sqrt(p.fix2);
    for (int64_t i = 0; i < count; i++) {
        m[i] = p.beta1 * m[i] + left1 * grad[i];
        root[i] = std::sqrt(p.beta2 * root[i] * root[i] + left2 * grad[i] * grad[i]);
        fresh[i] = param[i] * kept - p.rate * (m[i] * p.fix1) / (root[i] * fix + p.eps);
    }
}

}  // namespace

void adamw8(const AdamW8& p, Pool& pool) {
    const int64_t blocks = (p.size + kShared - 1) / kShared, tasks = pieces(pool, blocks, 64);
    const int64_t step = (blocks + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t block = task * step; block < blocks && block < (task + 1) * step; block++) {
            float m[kShared], root[kShared];
            expand(p.m, p.of_m, block, m);
            expand(p.root, p.of_root, block, root);
            const int64_t begin = block * kShared, left = p.size - begin;
            update(p, begin, left < kShared ? left : kShared, m, root);
            compress(m, p.of_m, block, p.new_m);
            compress(root, p.of_root, block, p.new_root);
        }
    });
}

}  // namespace ondevice::cpu
