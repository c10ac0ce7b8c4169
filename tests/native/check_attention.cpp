#include "check.h"

namespace ondevice::cpu {
namespace {

struct Shape {
    int64_t B, T, H, K, d, dv;
};

struct Rule {
    int64_t window, chunk;
    float softcap;
    bool sinks, segments;
};

// One query over everything before it, in double; keys and values by place, `base` + place is the position.
void oracle(const Shape& s, const Rule& rule, const float* q, const std::vector<float>& keys,
            const std::vector<float>& values, int64_t kv, int64_t place, int64_t base, const float* sink,
            const int32_t* segments, float scale, double* out) {
    std::vector<double> weights;
    double total = sink ? std::exp(double(*sink)) : 0;
    for (int64_t j = 0; j <= place; j++) {
        double score = 0;
        for (int64_t i = 0; i < s.d; i++) score += double(q[i]) * keys[(j * s.K + kv) * s.d + i];
        score *= scale;
        if (rule.softcap > 0) score = rule.softcap * std::tanh(score / rule.softcap);
        const int64_t a = place + base, b = j + base;
        bool seen = !rule.window || a - b < rule.window;
        seen = seen && (!rule.chunk || a / rule.chunk == b / rule.chunk);
        seen = seen && (!segments || segments[place] == segments[j]);
        weights.push_back(seen ? std::exp(score) : 0);
        total += weights.back();
    }
    for (int64_t i = 0; i < s.dv; i++) out[i] = 0;
    for (int64_t j = 0; j <= place; j++)
        for (int64_t i = 0; i < s.dv; i++) out[i] += weights[j] / total * values[(j * s.K + kv) * s.dv + i];
}

template <class E>
float rounded(float value) {
    E e;
    narrow(value, &e);
    return widen(e);
}

// Chunks of tokens, one after another, through a cache of E; every result against everything said so far.
template <class E>
void cached(const Kernels& k, Pool& pool, const Shape& s, const Rule& rule, const std::vector<int64_t>& chunks, Number type,
            double tolerance) {
    int64_t longest = 0;
    for (int64_t n : chunks) longest += n;
    const int64_t capacity = longest, places = round_up(capacity, kRows), width = round_up(s.dv, kRows), slots = s.B + 1;
    std::vector<E> keys(static_cast<size_t>(slots * s.K * places * s.d)), values(static_cast<size_t>(slots * s.K * places * width));
    std::vector<std::vector<float>> all_keys(s.B), all_values(s.B);
    const auto sinks = normal(s.H);
    std::vector<int32_t> starts(s.B, 0), lengths(s.B), slot(s.B);
    for (int64_t b = 0; b < s.B; b++) slot[b] = static_cast<int32_t>(s.B - b);  // any order, and one left over
    for (int64_t T : chunks) {
        auto q = normal(s.B * T * s.H * s.d), key = normal(s.B * T * s.K * s.d), value = normal(s.B * T * s.K * s.dv);
        for (int64_t b = 0; b < s.B; b++) lengths[b] = static_cast<int32_t>(b ? whole(0, T) : T);
        std::vector<float> out(static_cast<size_t>(s.B * T * s.H * s.dv), 77.0f);
        const float scale = 1.0f / std::sqrt(float(s.d));
        k.attention(Attention{q.data(), key.data(), value.data(), rule.sinks ? sinks.data() : nullptr, out.data(),
                              starts.data(), lengths.data(), slot.data(), nullptr, keys.data(), values.data(), type, s.B,
                              T, s.H, s.K, s.d, s.dv, capacity, rule.window, rule.chunk, scale, rule.softcap},
                    pool);
        std::vector<double> want(out.size(), 0.0);
        for (int64_t b = 0; b < s.B; b++) {
            for (int64_t i = 0; i < lengths[b] * s.K * s.d; i++) all_keys[b].push_back(rounded<E>(key[b * T * s.K * s.d + i]));
            for (int64_t i = 0; i < lengths[b] * s.K * s.dv; i++)
                all_values[b].push_back(rounded<E>(value[b * T * s.K * s.dv + i]));
            for (int64_t t = 0; t < lengths[b]; t++)
                for (int64_t h = 0; h < s.H; h++) {
                    const int64_t row = (b * T + t) * s.H + h;
                    oracle(s, rule, q.data() + row * s.d, all_keys[b], all_values[b], h / (s.H / s.K), starts[b] + t, 0,
                           rule.sinks ? &sinks[h] : nullptr, nullptr, scale, want.data() + row * s.dv);
                }
            starts[b] += lengths[b];
        }
        close("attention in a cache", out.data(), want, tolerance);
    }
}

void alone(const Kernels& k, Pool& pool, const Shape& s, const Rule& rule) {
    auto q = normal(s.B * s.T * s.H * s.d), key = normal(s.B * s.T * s.K * s.d), value = normal(s.B * s.T * s.K * s.dv);
    const auto sinks = normal(s.H);
    std::vector<int32_t> starts(s.B), lengths(s.B), slots(s.B), segments(s.B * s.T);
    for (int64_t b = 0; b < s.B; b++) {
        starts[b] = static_cast<int32_t>(3 * b);
        lengths[b] = static_cast<int32_t>(b ? whole(1, s.T) : s.T);
        for (int64_t t = 0; t < s.T; t++) segments[b * s.T + t] = static_cast<int32_t>(t / 5);
    }
    std::vector<float> out(static_cast<size_t>(s.B * s.T * s.H * s.dv), 77.0f);
    k.attention(Attention{q.data(), key.data(), value.data(), rule.sinks ? sinks.data() : nullptr, out.data(),
                          starts.data(), lengths.data(), slots.data(), rule.segments ? segments.data() : nullptr,
                          nullptr, nullptr, Number::f32, s.B, s.T, s.H, s.K, s.d, s.dv, s.T, rule.window, rule.chunk,
                          0.3f, rule.softcap},
                pool);
    std::vector<double> want(out.size(), 0.0);
    for (int64_t b = 0; b < s.B; b++) {
        const std::vector<float> keys(key.begin() + b * s.T * s.K * s.d, key.begin() + (b + 1) * s.T * s.K * s.d);
        const std::vector<float> values(value.begin() + b * s.T * s.K * s.dv, value.begin() + (b + 1) * s.T * s.K * s.dv);
        for (int64_t t = 0; t < lengths[b]; t++)
            for (int64_t h = 0; h < s.H; h++) {
                const int64_t row = (b * s.T + t) * s.H + h;
                oracle(s, rule, q.data() + row * s.d, keys, values, h / (s.H / s.K), t, starts[b],
                       rule.sinks ? &sinks[h] : nullptr, rule.segments ? segments.data() + b * s.T : nullptr, 0.3f,
                       want.data() + row * s.dv);
            }
    }
    close("attention alone", out.data(), want, 2e-5);
}

}  // namespace

void check_attention(const Kernels& k, Pool& pool) {
    const Rule rules[] = {{0, 0, 0, false, false}, {5, 0, 0, false, false}, {0, 8, 0, true, false},
                          {0, 0, 3.0f, false, false}, {40, 0, 0, true, false}};
    const Shape shapes[] = {{1, 0, 1, 1, 8, 8}, {1, 0, 6, 2, 20, 5}, {3, 0, 4, 2, 16, 32}, {2, 0, 40, 1, 7, 17}};
    for (const Rule& rule : rules)
        for (const Shape& s : shapes) {
            cached<float>(k, pool, s, rule, {1, 1, 15, 1, 33, 2, 130, 1, 1}, Number::f32, 2e-5);
            cached<half>(k, pool, s, rule, {3, 140, 1, 1}, Number::f16, 2e-5);
            cached<bfloat>(k, pool, s, rule, {20, 1, 1}, Number::bf16, 2e-5);
            for (int64_t T : {1, 7, 16, 50}) {
                Shape with = s;
                with.T = T;
                alone(k, pool, with, rule);
            }
        }
    cached<half>(k, pool, {1, 0, 6, 2, 64, 64}, rules[0], {900, 1, 1}, Number::f16, 2e-5);  // keys in several pieces
    alone(k, pool, {2, 33, 4, 2, 8, 8}, {0, 0, 0, false, true});
}

}  // namespace ondevice::cpu
