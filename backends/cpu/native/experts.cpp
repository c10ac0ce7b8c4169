// Routing: which experts, how much each counts, and their sum. Small work: one body for all instruction sets.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace ondevice::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void scores_of(const float* logits, int64_t experts, Scoring scoring, float* scores) {
    if (scoring == Scoring::kSparsemixer) {
        std::copy(logits, logits + experts, scores);
        return;
    }
    if (scoring == Scoring::kSigmoid) {
        for (int64_t e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
        return;
    }
    float largest = kNever, sum = 0;
    for (int64_t e = 0; e < experts; e++) largest = logits[e] > largest ? logits[e] : largest;
    for (int64_t e = 0; e < experts; e++) sum += scores[e] = std::exp(logits[e] - largest);
    for (int64_t e = 0; e < experts; e++) scores[e] /= sum;
}

// The place of the largest of `count` scores, the first among equals; it is then struck out.
int64_t take_best(float* scores, int64_t count) {
    int64_t best = 0;
    for (int64_t e = 1; e < count; e++)
        if (scores[e] > scores[best]) best = e;
    scores[best] = kNever;
    return best;
}

// Groups are as strong as their two best experts; those of the others stand back.
void keep_groups(const Elect& p, float* scores) {
    const int64_t size = p.experts / p.groups;
    std::vector<float> strength(static_cast<size_t>(p.groups)), copy(static_cast<size_t>(size));
    for (int64_t g = 0; g < p.groups; g++) {
        copy.assign(scores + g * size, scores + (g + 1) * size);
        const float first = scores[g * size + take_best(copy.data(), size)];
        strength[g] = size > 1 ? first + scores[g * size + take_best(copy.data(), size)] : first;
    }
    std::vector<bool> kept(static_cast<size_t>(p.groups));
    for (int64_t i = 0; i < p.top_groups; i++) kept[take_best(strength.data(), p.groups)] = true;
    for (int64_t e = 0; e < p.experts; e++)
        if (!kept[e / size]) scores[e] = kNever;
}

// An expert's share among the rivals that are left; it then leaves them. left: the logits, but for those who left.
float share(float* left, int64_t experts, int64_t elected, float jitter) {
    const float best = left[elected];
    float sum = 0;
    for (int64_t e = 0; e < experts; e++)
        if (best - left[e] <= 2 * jitter * std::max(std::fabs(left[e]), best) && left[e] > kNever)
            sum += std::exp(left[e] - best);
    left[elected] = kNever;
    return 1 / sum;
}

}  // namespace

void elect(const Elect& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.tokens, 1 + 4096 / p.experts), step = (p.tokens + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        std::vector<float> scores(static_cast<size_t>(p.experts));
        for (int64_t t = task * step; t < p.tokens && t < (task + 1) * step; t++) {
            scores_of(p.logits + t * p.experts, p.experts, p.scoring, scores.data());
            for (int64_t e = 0; p.bias && e < p.experts; e++) scores[e] += p.bias[e];
            if (p.groups > 1) keep_groups(p, scores.data());
            for (int64_t i = 0; i < p.k; i++)
                p.ids[t * p.k + i] = static_cast<int32_t>(take_best(scores.data(), p.experts));
        }
    });
}

void gates(const Gates& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.tokens, 1 + 4096 / p.experts), step = (p.tokens + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        std::vector<float> scores(static_cast<size_t>(p.experts));
        for (int64_t t = task * step; t < p.tokens && t < (task + 1) * step; t++) {
            scores_of(p.logits + t * p.experts, p.experts, p.scoring, scores.data());
            float *out = p.gates + t * p.k, sum = 0;
            for (int64_t i = 0; i < p.k; i++) {
                const int64_t e = p.ids[t * p.k + i];
                const bool rivals = p.scoring == Scoring::kSparsemixer;
                sum += out[i] = rivals ? share(scores.data(), p.experts, e, p.jitter) : scores[e];
            }
            for (int64_t i = 0; i < p.k; i++) out[i] *= p.renormalise ? p.scale / sum : p.scale;
        }
    });
}

void combine(const Combine& p, Pool& pool) {
    const int64_t tasks = pieces(pool, p.tokens, 1 + 16384 / (p.k * p.width)), step = (p.tokens + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t t = task * step; t < p.tokens && t < (task + 1) * step; t++) {
            float* out = p.out + t * p.width;
            for (int64_t i = 0; i < p.k; i++) {
                const float *y = p.y + (t * p.k + i) * p.width, gate = p.gates ? p.gates[t * p.k + i] : 1.0f;
                for (int64_t d = 0; d < p.width; d++) out[d] = (i ? out[d] : 0.0f) + gate * y[d];
            }
        }
    });
}

}  // namespace ondevice::cpu
