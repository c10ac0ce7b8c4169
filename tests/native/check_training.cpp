#include "check.h"

namespace ondevice::cpu {
namespace {

// A weight in some form, and the numbers that it stands for.
struct Form {
    std::vector<float> numbers;
    std::vector<uint8_t> memory, codes;
    Tiles tiles{};
    Matrix matrix{};
};

void fill_dense(Form& f, Number type, int64_t rows, int64_t columns, int64_t shift) {
    f.memory.resize(static_cast<size_t>(rows * columns * size_of(type) + shift));
    for (int64_t i = 0; i < rows * columns; i++) {
        uint8_t* at = f.memory.data() + shift + i * size_of(type);
        float value = normal(1)[0];
        if (type == Number::f16) {
            half h;
            narrow(value, &h);
            value = widen(h);
            std::memcpy(at, &h, 2);
        } else if (type == Number::bf16) {
            bfloat b;
            narrow(value, &b);
            value = widen(b);
            std::memcpy(at, &b, 2);
        } else {
            std::memcpy(at, &value, 4);
        }
        f.numbers.push_back(value);
    }
    f.matrix = Matrix{f.memory.data() + shift, type, rows, columns, nullptr, 0};
}

Form dense_form(int64_t rows, int64_t columns) {
    Form f;
    fill_dense(f, Number::f32, rows, columns, 0);
    return f;
}

void fill_tiles(Form& f, int bits, int group, int64_t rows, int64_t columns, Pool& pool) {
    f.tiles = Tiles{bits, group, Number::f32, true, 0.0f, 1, rows, columns, nullptr};
    for (int64_t i = 0; i < rows * columns; i++) f.codes.push_back(static_cast<uint8_t>(whole(0, (1 << bits) - 1)));
    const auto scales = normal(rows * columns / group, 1.0f / static_cast<float>(1 << bits));
    const auto biases = normal(rows * columns / group);
    f.memory.resize(static_cast<size_t>(f.tiles.bytes() + kLine));
    const auto address = reinterpret_cast<uintptr_t>(f.memory.data());
    f.tiles.data = f.memory.data() + (kLine - address % kLine) % kLine;
    pack(AffineParts{f.codes.data(), 8, reinterpret_cast<const uint8_t*>(scales.data()),
                     reinterpret_cast<const uint8_t*>(biases.data())}, f.tiles, pool);
    f.numbers.resize(static_cast<size_t>(rows * columns));
    for (int64_t r = 0; r < rows; r++) unpack_row(f.tiles, 0, r, f.numbers.data() + r * columns);
    f.matrix = Matrix{nullptr, Number::f32, rows, columns, &f.tiles, 0};
}

// A number as products see it.
double seen(float value, bool narrow_too) {
    bfloat b;
    narrow(value, &b);
    return narrow_too ? widen(b) : value;
}

void add_term(const Term& t, const Form& w, int64_t tokens, bool narrow, std::vector<double>& out) {
    const int64_t depth = t.depth(), width = t.width(), columns = t.weight.columns;
    for (int64_t a = 0; a < tokens; a++)
        for (int64_t b = 0; b < width; b++) {
            double sum = 0;
            for (int64_t k = 0; k < depth; k++)
                sum += seen(t.scale * (t.turned ? t.x[k * tokens + a] : t.x[a * depth + k]), narrow) *
                       seen(w.numbers[t.back ? k * columns + b : b * columns + k], narrow);
            out[a * width + b] += sum;
        }
}

// Both ways through a weight, with a narrow second product, a bias, and added to what is there.
void both_ways(const Kernels& k, Pool& pool, const Form& w, int64_t tokens) {
    const int64_t rows = w.matrix.rows, columns = w.matrix.columns, rank = 5;
    for (const bool back : {false, true}) {
        const int64_t depth = back ? rows : columns, width = back ? columns : rows;
        Form narrow_one;
        fill_dense(narrow_one, Number::f32, back ? rank : width, back ? width : rank, 0);
        for (const int way : {0, 1, 2, 3}) {
            const bool turned = way & 1, narrow = way & 2;
            const auto x = normal(tokens * depth), low = normal(tokens * rank), bias = normal(width);
            auto out = normal(tokens * width);
            const Term first{x.data(), w.matrix, back, turned, 1.0f};
            const Term second{low.data(), narrow_one.matrix, back, turned, 0.5f};
            std::vector<double> want(out.begin(), out.end());
            add_term(first, w, tokens, narrow, want);
            add_term(second, narrow_one, tokens, narrow, want);
            for (int64_t i = 0; i < tokens * width; i++) want[i] += bias[i % width];
            k.products({{first, second}, 2, bias.data(), out.data(), tokens, width, true, narrow}, pool);
            const char* names[] = {"products", "products back", "narrow products", "narrow products back"};
            close(names[back + 2 * narrow], out.data(), want, narrow ? 2e-3 : 3e-5);  // a last bit may turn a rounding
        }
    }
}

void all_products(const Kernels& k, Pool& pool) {
    const int64_t sizes[][3] = {{1, 3, 5}, {7, 33, 18}, {40, 130, 71}, {100, 300, 290}};
    for (const auto& [tokens, rows, columns] : sizes)
        for (const Number type : {Number::f32, Number::f16, Number::bf16}) {
            Form w;
            fill_dense(w, type, rows, columns, tokens % 4);
            both_ways(k, pool, w, tokens);
        }
    for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const int group : {32, 64, 128}) {
            Form w;
            fill_tiles(w, bits, group, 37, 3 * group, pool);
            both_ways(k, pool, w, 35);
        }
}

double function(Activation kind, double x) {
    const double s = 1 / (1 + std::exp(-x)), low = std::min(7.0, x);
    switch (kind) {
        case Activation::silu: return x * s;
        case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x > 0 ? x : 0;
        case Activation::relu2: return x > 0 ? x * x : 0;
        case Activation::sigmoid: return s;
        case Activation::tanh: return std::tanh(x);
        case Activation::clamp: return std::min(7.0, std::max(-7.0, x));
        case Activation::clamped_swish: return low / (1 + std::exp(-1.702 * low));
    }
    return 0;
}

// Against the difference quotient, away from the corners.
void slopes(const Kernels& k, Pool& pool) {
    for (int kind = 0; kind <= static_cast<int>(Activation::clamped_swish); kind++)
        for (const int64_t size : {1, 7, 16, 33}) {
            auto gate = normal(size, 4.0f);
            for (float& g : gate) g = std::abs(std::abs(g) - 7) < 0.01f || std::abs(g) < 0.01f ? 1.0f : g;
            const auto grad = normal(size), up = normal(size);
            std::vector<float> to_gate(static_cast<size_t>(size)), to_up = to_gate;
            std::vector<double> want_gate, want_up;
            for (int64_t i = 0; i < size; i++) {
                const auto f = [&](double x) { return function(Activation(kind), x); };
                want_gate.push_back(grad[i] * up[i] * (f(gate[i] + 1e-5) - f(gate[i] - 1e-5)) / 2e-5);
                want_up.push_back(grad[i] * f(gate[i]));
            }
            k.gated_back({grad.data(), gate.data(), up.data(), to_gate.data(), to_up.data(), size, Activation(kind)}, pool);
            close("gradient of a gate", to_gate.data(), want_gate, 1e-5);
            close("gradient of what is gated", to_up.data(), want_up, 1e-5);
        }
}

void losses(const Kernels& k, Pool& pool) {
    for (const int64_t width : {1, 5, 16, 77, 1003}) {
        const int64_t rows = 6;
        const auto logits = normal(rows * width, 5.0f), grad = normal(rows);
        std::vector<int32_t> targets;
        for (int64_t r = 0; r < rows; r++) targets.push_back(static_cast<int32_t>(r == 2 ? -1 : whole(0, width - 1)));
        std::vector<float> loss(rows), to_logits(static_cast<size_t>(rows * width));
        std::vector<double> want_loss, want;
        for (int64_t r = 0; r < rows; r++) {
            double total = 0;
            for (int64_t i = 0; i < width; i++) total += std::exp(double(logits[r * width + i]));
            want_loss.push_back(targets[r] < 0 ? 0 : std::log(total) - logits[r * width + targets[r]]);
            for (int64_t i = 0; i < width; i++)
                want.push_back(targets[r] < 0 ? 0 : grad[r] * (std::exp(double(logits[r * width + i])) / total - (i == targets[r])));
        }
        k.token_loss({logits.data(), targets.data(), nullptr, nullptr, loss.data(), rows, width}, pool);
        k.token_loss({logits.data(), targets.data(), nullptr, grad.data(), to_logits.data(), rows, width}, pool);
        close("token_loss", loss.data(), want_loss, 1e-5);
        close("gradient of token_loss", to_logits.data(), want, 1e-5);
    }
}

// Imitating other logits.
void imitations(const Kernels& k, Pool& pool) {
    for (const int64_t width : {1, 5, 16, 77, 1003}) {
        const int64_t rows = 3;
        const auto logits = normal(rows * width, 3.0f), wanted = normal(rows * width, 3.0f), grad = normal(rows);
        std::vector<float> loss(rows), to_logits(static_cast<size_t>(rows * width));
        std::vector<double> want_loss, want;
        for (int64_t r = 0; r < rows; r++) {
            double total = 0, other = 0, sum = 0;
            for (int64_t i = r * width; i < (r + 1) * width; i++) total += std::exp(double(logits[i])), other += std::exp(double(wanted[i]));
            for (int64_t i = r * width; i < (r + 1) * width; i++) {
                const double p = std::exp(double(wanted[i])) / other;
                sum += p * (std::log(total) - logits[i]);
                want.push_back(grad[r] * (std::exp(double(logits[i])) / total - p));
            }
            want_loss.push_back(sum);
        }
        k.token_loss({logits.data(), nullptr, wanted.data(), nullptr, loss.data(), rows, width}, pool);
        k.token_loss({logits.data(), nullptr, wanted.data(), grad.data(), to_logits.data(), rows, width}, pool);
        close("imitation", loss.data(), want_loss, 1e-5);
        close("gradient of imitation", to_logits.data(), want, 1e-5);
    }
}

// Against the derivative of norms as numbers of double precision.
void norms_back(const Kernels& k, Pool& pool) {
    for (const int64_t width : {1, 7, 16, 33, 130})
        for (const bool centred : {false, true}) {
            const int64_t rows = 5;
            const double offset = centred ? 0 : 1, eps = 1e-3;
            const auto x = normal(rows * width, 2.0f), gain = normal(width), grad = normal(rows * width);
            std::vector<float> out(x.size()), to_gain(gain.size()), to_bias(gain.size());
            std::vector<double> want, want_gain(gain.size()), want_bias(gain.size());
            for (int64_t r = 0; r < rows; r++) {
                const float *v = x.data() + r * width, *g = grad.data() + r * width;
                double mean = 0, squares = 0, along = 0, middle = 0;
                for (int64_t i = 0; centred && i < width; i++) mean += v[i] / double(width);
                for (int64_t i = 0; i < width; i++) squares += (v[i] - mean) * (v[i] - mean) / double(width);
                const double inverse = 1 / std::sqrt(squares + eps);
                for (int64_t i = 0; i < width; i++) {
                    const double to_n = g[i] * (gain[i] + offset), n = (v[i] - mean) * inverse;
                    along += to_n * n / double(width), middle += centred ? to_n / double(width) : 0;
                    want_gain[i] += g[i] * n, want_bias[i] += g[i];
                }
                for (int64_t i = 0; i < width; i++)
                    want.push_back(inverse * (g[i] * (gain[i] + offset) - middle - (v[i] - mean) * inverse * along));
            }
            k.norm_back({grad.data(), x.data(), gain.data(), out.data(), to_gain.data(), to_bias.data(), rows, width, 1,
                         static_cast<float>(eps), static_cast<float>(offset), centred}, pool);
            close("gradient of a norm", out.data(), want, 3e-5);
            close("gradient of a gain", to_gain.data(), want_gain, 1e-5);
            close("gradient of a norm's bias", to_bias.data(), want_bias, 1e-5);
        }
}

// Products with few columns, or few rows that are sums over all tokens.
void narrow_halves(const Kernels& k, Pool& pool) {
    for (const int64_t tokens : {1, 7, 130})
        for (const int64_t width : {3, 16, 70})
            for (const int64_t rank : {1, 5, 8, 16}) {
                const auto x = normal(tokens * width), low = normal(tokens * rank);
                const Form down = dense_form(rank, width), up = dense_form(width, rank), all = dense_form(tokens, width);
                const Term terms[] = {{x.data(), down.matrix, false, false, 0.5f}, {x.data(), up.matrix, true, false, 2.0f},
                                      {low.data(), all.matrix, true, true, 0.5f}};
                const Form* forms[] = {&down, &up, &all};
                for (int i = 0; i < 3; i++) {
                    const int64_t rows = i < 2 ? tokens : rank, columns = i < 2 ? rank : width;
                    std::vector<float> out(static_cast<size_t>(rows * columns));
                    std::vector<double> want(out.size());
                    add_term(terms[i], *forms[i], rows, false, want);
                    k.products({{terms[i]}, 1, nullptr, out.data(), rows, columns, false, false}, pool);
                    close("narrow half", out.data(), want, 1e-5);
                }
            }
}

}  // namespace

void check_training(const Kernels& k, Pool& pool) {
    all_products(k, pool);
    narrow_halves(k, pool);
    norms_back(k, pool);
    imitations(k, pool);
    slopes(k, pool);
    losses(k, pool);
}

}  // namespace ondevice::cpu
