#include <limits>

#include "check.h"

namespace ondevice::cpu {
namespace {

double oracle(Activation kind, double x) {
    switch (kind) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x > 0 ? x : 0;
        case Activation::relu2: return x > 0 ? x * x : 0;
        case Activation::sigmoid: return 1 / (1 + std::exp(-x));
        case Activation::tanh: return std::tanh(x);
        case Activation::clamp: return std::min(7.0, std::max(-7.0, x));
        case Activation::clamped_swish: return std::min(7.0, x) / (1 + std::exp(-1.702 * std::min(7.0, x)));
    }
    return 0;
}

const int64_t kSizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 40001};

void arithmetic(const Kernels& k, Pool& pool, int64_t size, int64_t period, int64_t shift) {
    auto a = normal(size), b = normal(period);
    Shifted<float> pa(a, shift), pb(b, shift), out(a, shift);
    std::vector<double> sum, product, plus, times, capped;
    for (int64_t i = 0; i < size; i++) {
        sum.push_back(double(a[i]) + b[i % period]);
        product.push_back(double(a[i]) * b[i % period]);
        plus.push_back(double(a[i]) + 0.5f);
        times.push_back(double(a[i]) * -3.0f);
        capped.push_back(2.0 * std::tanh(a[i] / 2.0));
    }
    k.add({pa.data(), pb.data(), out.data(), size, period}, pool);
    close("add", out.data(), sum, 1e-6);
    k.multiply({pa.data(), pb.data(), out.data(), size, period}, pool);
    close("multiply", out.data(), product, 1e-6);
    k.add_number({pa.data(), out.data(), size, 0.5f}, pool);
    close("add_number", out.data(), plus, 1e-6);
    k.multiply_number({pa.data(), out.data(), size, -3.0f}, pool);
    close("multiply_number", out.data(), times, 1e-6);
    k.softcap({pa.data(), out.data(), size, 2.0f}, pool);
    close("softcap", out.data(), capped, 1e-6);
}

void activations(const Kernels& k, Pool& pool, int64_t size, int64_t shift) {
    auto gate = normal(size, 4.0f), up = normal(size);
    Shifted<float> g(gate, shift), u(up, shift), out(gate, shift);
    for (int kind = 0; kind <= static_cast<int>(Activation::clamped_swish); kind++) {
        std::vector<double> alone, times;
        for (int64_t i = 0; i < size; i++) {
            alone.push_back(oracle(Activation(kind), gate[i]));
            times.push_back(alone.back() * up[i]);
        }
        k.gated({g.data(), nullptr, out.data(), size, Activation(kind)}, pool);
        close("act", out.data(), alone, 2e-6);
        k.gated({g.data(), u.data(), out.data(), size, Activation(kind)}, pool);
        close("gated", out.data(), times, 2e-6);
    }
}

// Where e^x leaves float32's range, and what is not a number.
void extremes(const Kernels& k, Pool& pool) {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> x = {-1000, -89, -88, -87, -30, 0, 30, 88, 89, 1000, inf, nan};
    std::vector<float> y(x.size());
    const auto size = static_cast<int64_t>(x.size());
    k.gated({x.data(), nullptr, y.data(), size, Activation::silu}, pool);
    for (size_t i = 0; i + 2 < x.size(); i++) {
        const double want = oracle(Activation::silu, x[i]);
        expect(std::abs(y[i] - want) <= 1e-5 * std::abs(want) + 1e-30, "silu far from zero");
    }
    expect(y[10] == inf && std::isnan(y[11]), "silu of infinity and of not-a-number");
    k.gated({x.data(), nullptr, y.data(), size, Activation::sigmoid}, pool);
    expect(y[0] >= 0 && y[0] < 1e-37 && y[9] == 1 && std::isnan(y[11]), "sigmoid far from zero");
    k.gated({x.data(), nullptr, y.data(), size, Activation::tanh}, pool);
    expect(y[0] == -1 && y[9] == 1 && std::isnan(y[11]), "tanh far from zero");
}

void norms(const Kernels& k, Pool& pool, int64_t width, int64_t shift) {
    const int64_t rows = width > 1000 ? 2 : 5;
    const int64_t gains = shift ? rows : 1;  // each row's own, or one for all
    auto x = normal(rows * width, 3.0f), gain = normal(gains * width), bias = normal(width);
    Shifted<float> px(x, shift), pg(gain, shift), pb(bias, shift), out(x, shift);
    std::vector<double> rms, layer;
    for (int64_t r = 0; r < rows; r++) {
        double squares = 0, mean = 0, variance = 0;
        const float* g = gain.data() + r % gains * width;
        for (int64_t i = 0; i < width; i++) squares += double(x[r * width + i]) * x[r * width + i];
        for (int64_t i = 0; i < width; i++) mean += double(x[r * width + i]) / width;
        for (int64_t i = 0; i < width; i++) variance += std::pow(x[r * width + i] - mean, 2) / width;
        for (int64_t i = 0; i < width; i++) {
            rms.push_back(x[r * width + i] / std::sqrt(squares / width + 1e-5) * (g[i] + 1.0));
            layer.push_back((x[r * width + i] - mean) / std::sqrt(variance + 1e-5) * g[i] + bias[i]);
        }
    }
    k.rms_norm({px.data(), pg.data(), nullptr, out.data(), rows, width, gains, 1e-5f, 1.0f}, pool);
    close("rms_norm", out.data(), rms, 5e-6);
    k.layer_norm({px.data(), pg.data(), pb.data(), out.data(), rows, width, gains, 1e-5f, 0.0f}, pool);
    close("layer_norm", out.data(), layer, 5e-6);
}

void positions(const Kernels& k, Pool& pool, int64_t pairs, int64_t rest, bool interleaved) {
    const int64_t B = 2, T = 3, heads = 3, d = 2 * pairs + rest;
    const int32_t starts[] = {0, 11};
    auto x = normal(B * T * heads * d);
    std::vector<float> freqs, table(B * T * 2 * pairs), out(x.size());
    for (int64_t i = 0; i < pairs; i++) freqs.push_back(std::pow(100.0f, -float(i) / float(pairs)));
    rope_table({starts, freqs.data(), table.data(), B, T, pairs, 1.5f}, pool);
    k.rope({x.data(), table.data(), out.data(), B * T, heads, d, pairs, interleaved}, pool);
    std::vector<double> want(x.begin(), x.end());
    for (int64_t token = 0; token < B * T; token++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < pairs; i++) {
                const int64_t at = (token * heads + h) * d, a = at + (interleaved ? 2 * i : i);
                const int64_t b = interleaved ? a + 1 : a + pairs;
                const double angle = (starts[token / T] + token % T) * double(freqs[i]);
                want[a] = 1.5 * (x[a] * std::cos(angle) - x[b] * std::sin(angle));
                want[b] = 1.5 * (x[b] * std::cos(angle) + x[a] * std::sin(angle));
            }
    close("rope", out.data(), want, 1e-5);
}

}  // namespace

void check_elementwise(const Kernels& k, Pool& pool) {
    for (int64_t size : kSizes)
        for (int64_t shift : {0, 4, 12}) {
            arithmetic(k, pool, size, size, shift);
            arithmetic(k, pool, 3 * size, size, shift);
            activations(k, pool, size, shift);
            norms(k, pool, size, shift);
        }
    extremes(k, pool);
    for (int64_t pairs : {1, 3, 4, 16, 33})
        for (int64_t rest : {0, 5})
            for (bool interleaved : {false, true}) positions(k, pool, pairs, rest, interleaved);
}

}  // namespace ondevice::cpu
