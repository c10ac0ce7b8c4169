#include <algorithm>

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

// `count` numbers of one head of a token, as a cache of E gives them back
template <class E>
void append(std::vector<float>& to, const float* from, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, std::fabs(from[i]));
    for (int64_t i = 0; i < count; i++) {
        if constexpr (std::is_same_v<E, int8_t>) {
            to.push_back(most > 0 ? std::nearbyint(from[i] * (127.0f / most)) * (most / 127.0f) : 0.0f);
        } else {
            E e;
            narrow(from[i], &e);
            to.push_back(widen(e));
        }
    }
}

// Chunks of tokens, one after another, through a cache of E; every result against everything said so far.
template <class E>
void cached(const Kernels& k, Pool& pool, const Shape& s, const Rule& rule, const std::vector<int64_t>& chunks, Number type,
            double tolerance) {
    int64_t longest = 0;
    for (int64_t n : chunks) longest += n;
    const int64_t capacity = longest, places = round_up(capacity, kRows), width = round_up(s.dv, kRows), slots = s.B + 1;
    std::vector<E> keys(static_cast<size_t>(slots * s.K * places * s.d)), values(static_cast<size_t>(slots * s.K * places * width));
    std::vector<float> scales(static_cast<size_t>(2 * slots * s.K * places));
    const bool scaled = type == Number::i8;
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
                              T, s.H, s.K, s.d, s.dv, capacity, rule.window, rule.chunk, scale, rule.softcap,
                              scaled ? scales.data() : nullptr, scaled ? scales.data() + slots * s.K * places : nullptr},
                    pool);
        std::vector<double> want(out.size(), 0.0);
        for (int64_t b = 0; b < s.B; b++) {
            for (int64_t i = 0; i < lengths[b] * s.K; i++) {
                append<E>(all_keys[b], key.data() + (b * T * s.K + i) * s.d, s.d);
                append<E>(all_values[b], value.data() + (b * T * s.K + i) * s.dv, s.dv);
            }
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

// Latents: one key head for all, whose first dv numbers are the values, in a cache (E) and then the same at once without.
template <class E>
void latents(const Kernels& k, Pool& pool, Number type, int64_t H, int64_t parts, int64_t d, int64_t dv, int64_t window,
             const std::vector<int64_t>& chunks) {
    int64_t capacity = 0, at = 0;
    for (int64_t n : chunks) capacity += n;
    const int64_t places = round_up(capacity, kRows), slot = 1;
    const Rule rule{window, 0, 0, false, false};
    const Shape s{1, 0, H, 1, d, dv};
    const auto q = normal(capacity * H * d), said = normal(capacity * d);
    std::vector<float> key;
    append<E>(key, said.data(), capacity * d);
    std::vector<float> values;
    for (int64_t t = 0; t < capacity; t++) values.insert(values.end(), key.begin() + t * d, key.begin() + t * d + dv);
    std::vector<double> want(static_cast<size_t>(capacity * H * dv));
    const float scale = 1.0f / std::sqrt(float(d));
    for (int64_t t = 0; t < capacity; t++)
        for (int64_t h = 0; h < H; h++)
            oracle(s, rule, q.data() + (t * H + h) * d, key, values, 0, t, 0, nullptr, nullptr, scale,
                   want.data() + (t * H + h) * dv);
    std::vector<E> keys(static_cast<size_t>(2 * places * d));
    std::vector<float> out(want.size(), 77.0f);
    const auto attend = [&](int64_t from, int64_t T, void* cache) {
        const auto start = static_cast<int32_t>(from), length = static_cast<int32_t>(T), place = static_cast<int32_t>(slot);
        Attention p{q.data() + from * H * d, key.data() + from * d, nullptr, nullptr, out.data() + from * H * dv,
                    &start, &length, &place, nullptr, cache, nullptr, type, 1, T, H, parts, d, dv, capacity, window, 0,
                    scale, 0};
        p.latent = true;
        k.attention(p, pool);
    };
    for (int64_t T : chunks) attend(at, T, keys.data()), at += T;
    close("attention to latents", out.data(), want, 2e-5);
    std::fill(out.begin(), out.end(), 77.0f);
    attend(0, capacity, nullptr);
    close("attention to latents alone", out.data(), want, 2e-5);
}

void absorbed(const Kernels& k, Pool& pool, int64_t tokens, int64_t heads, int64_t n, int64_t latent, int64_t r) {
    auto q = normal(tokens * heads * n), turning = normal(tokens * heads * r), w = normal(heads * n * latent);
    std::vector<float> out(static_cast<size_t>(tokens * heads * (latent + r)), 77.0f);
    k.absorb(Absorb{q.data(), turning.data(), Matrix{w.data(), Number::f32, n, latent, nullptr, 0}, out.data(), tokens,
                    heads, r}, pool);
    std::vector<double> want;
    for (int64_t row = 0; row < tokens * heads; row++) {
        for (int64_t c = 0; c < latent; c++) {
            double sum = 0;
            for (int64_t i = 0; i < n; i++) sum += double(q[row * n + i]) * w[(row % heads * n + i) * latent + c];
            want.push_back(sum);
        }
        want.insert(want.end(), turning.begin() + row * r, turning.begin() + (row + 1) * r);
    }
    close("absorbed queries", out.data(), want, 1e-5);
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
            cached<int8_t>(k, pool, s, rule, {20, 1, 140, 1}, Number::i8, 2e-5);
            for (int64_t T : {1, 7, 16, 50}) {
                Shape with = s;
                with.T = T;
                alone(k, pool, with, rule);
            }
        }
    for (int64_t window : {0, 9}) {
        latents<float>(k, pool, Number::f32, 3, 1, 14, 12, window, {1, 1, 15, 33, 1});
        latents<half>(k, pool, Number::f16, 6, 2, 40, 32, window, {3, 140, 1});
        latents<bfloat>(k, pool, Number::bf16, 5, 1, 24, 16, window, {200, 1, 1});
    }
    for (int64_t tokens : {1, 5, 100}) {
        absorbed(k, pool, tokens, 3, 8, 12, 4);
        absorbed(k, pool, tokens, 2, 270, 300, 16);
    }
    cached<half>(k, pool, {1, 0, 6, 2, 64, 64}, rules[0], {900, 1, 1}, Number::f16, 2e-5);  // keys in several pieces
    cached<int8_t>(k, pool, {1, 0, 9, 3, 64, 64}, rules[0], {900, 1, 1}, Number::i8, 2e-5);
    alone(k, pool, {2, 33, 4, 2, 8, 8}, {0, 0, 0, false, true});
}

}  // namespace ondevice::cpu
