#include <limits>

#include "check.h"

namespace ondevice::cpu {
namespace {

// A random quantized weight: the numbers it stands for, and its tiles packed from codes of one byte.
struct Packed {
    std::vector<uint8_t> codes, memory;
    std::vector<double> numbers;
    Tiles tiles;
};

void put(std::vector<uint8_t>& out, float value, Number type, double* kept) {
    uint8_t octets[4];
    const auto bytes = static_cast<size_t>(size_of(type));
    if (type == Number::f16) {
        half h;
        narrow(value, &h);
        *kept = widen(h);
        std::memcpy(octets, &h, 2);
    } else if (type == Number::bf16) {
        bfloat b;
        narrow(value, &b);
        *kept = widen(b);
        std::memcpy(octets, &b, 2);
    } else {
        *kept = value;
        std::memcpy(octets, &value, 4);
    }
    out.insert(out.end(), octets, octets + bytes);
}

Packed packed(int bits, int group, Number type, bool biased, int64_t experts, int64_t rows, int64_t columns, Pool& pool) {
    Packed p;
    const float zero = biased ? 0.0f : static_cast<float>(1 << (bits - 1));
    p.tiles = Tiles{bits, group, type, biased, zero, experts, rows, columns, nullptr};
    std::vector<uint8_t> scales, biases;
    for (int64_t row = 0; row < experts * rows; row++)
        for (int64_t g = 0; g < columns / group; g++) {
            double scale, bias = 0;
            put(scales, normal(1, 0.1f)[0], type, &scale);
            if (biased) put(biases, normal(1)[0], type, &bias);
            for (int i = 0; i < group; i++) {
                p.codes.push_back(static_cast<uint8_t>(whole(0, (1 << bits) - 1)));
                p.numbers.push_back(scale * (p.codes.back() - zero) + bias);
            }
        }
    p.memory.resize(static_cast<size_t>(p.tiles.bytes() + kLine));
    const auto address = reinterpret_cast<uintptr_t>(p.memory.data());
    p.tiles.data = p.memory.data() + (kLine - address % kLine) % kLine;
    pack(AffineParts{p.codes.data(), 8, scales.data(), biased ? biases.data() : nullptr}, p.tiles, pool);
    return p;
}

// Of a block's unit and steps, the scale of the first or the last two of four columns.
float step(const float* unit, int64_t stride, int64_t which) {
    int16_t steps[2];
    std::memcpy(steps, unit + stride, sizeof(steps));
    return *unit * steps[which];
}

struct Int8 {  // a Quantized and its memory
    std::vector<int8_t> codes;
    std::vector<float> scales, sums;
    Quantized view;
    std::vector<double> numbers;  // what it stands for

    Int8(const Kernels& k, const float* x, int64_t tokens, int64_t columns, Pool& pool) {
        const int64_t places = padded_tokens(tokens, k.tokens);
        codes.resize(static_cast<size_t>(places * columns));
        scales.resize(static_cast<size_t>(places * columns / kHalf));
        sums.resize(scales.size());
        view = Quantized{codes.data(), scales.data(), sums.data(), tokens, columns};
        k.quantize(Quantize{x, view}, pool);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < columns; c++) {
                const int64_t first = t / k.tokens * k.tokens, rest = tokens - first;
                const int64_t size = rest < k.tokens ? last_block(rest) : k.tokens, block = c / kBlock;
                const int8_t code = codes[first * columns + (block * size + t - first) * kBlock + c % kBlock];
                const float* scale_of = scales.data() + first * columns / kHalf + t - first;
                const float scale = k.steps ? step(scale_of + block * 2 * size, size, c % 4 / 2) : scale_of[c / kHalf * size];
                numbers.push_back(double(scale) * code);
                if (std::abs(numbers.back() - x[t * columns + c]) > 0.5001 * scale) expect(false, "quantize: half a step");
            }
    }
};

std::vector<double> product(const std::vector<double>& x, const double* w, const float* bias, int64_t tokens,
                            int64_t rows, int64_t columns) {
    std::vector<double> y;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = bias ? bias[r] : 0;
            for (int64_t c = 0; c < columns; c++) sum += x[t * columns + c] * w[r * columns + c];
            y.push_back(sum);
        }
    return y;
}

template <class E>
struct Adapter {  // a LowRank and its memory
    std::vector<E> down, panels;
    std::vector<double> a, b;  // what down and up stand for
    int64_t rank;

    Adapter(int64_t rank, int64_t rows, int64_t columns) : panels(round_up(rows, kRows) * rank), rank(rank) {
        const auto stored = [](float v, std::vector<double>& numbers) {
            E e;
            narrow(v, &e);
            numbers.push_back(widen(e));
            return e;
        };
        for (float v : normal(rank * columns)) down.push_back(stored(v, a));
        const auto up = normal(rows * rank);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < rank; i++)
                panels[(r / kRows * rank + i) * kRows + r % kRows] = stored(up[r * rank + i], b);
    }
    LowRank of(const float* x, Number type, int64_t rows, int64_t columns) const {
        return {x, Matrix{down.data(), type, rank, columns, nullptr, 0},
                Matrix{panels.data(), type, rows, rank, nullptr, 0, true}, 0.5f};
    }
    // y += up . (down . x) / 2
    void add(const std::vector<double>& x, int64_t tokens, int64_t rows, int64_t columns, std::vector<double>& y) const {
        const auto more = product(product(x, a.data(), nullptr, tokens, rank, columns), b.data(), nullptr, tokens, rows, rank);
        for (size_t i = 0; i < y.size(); i++) y[i] += 0.5 * more[i];
    }
};

// Products with an adapter beside one without and one with another.
template <class E>
void adapted(const Kernels& k, Pool& pool, Number type, int64_t rank, int64_t tokens, int64_t rows, int64_t columns) {
    const Packed w = packed(4, 32, Number::f16, true, 1, rows, columns, pool);
    const Matrix matrix{nullptr, Number::f32, rows, columns, &w.tiles, 0};
    const Adapter<E> first(rank, rows, columns), second(rank + 5, rows, columns);
    auto x = normal(tokens * columns), bias = normal(rows);
    const std::vector<double> exact(x.begin(), x.end());
    const Int8 q(k, x.data(), tokens, columns, pool);
    std::vector<float> y(static_cast<size_t>(tokens * rows)), plain(y.size()), z(y.size());
    k.linear_int8(LinearInt8{q.view,
                             {Product{matrix, bias.data(), y.data(), first.of(x.data(), type, rows, columns)},
                              Product{matrix, nullptr, plain.data()},
                              Product{matrix, nullptr, z.data(), second.of(x.data(), type, rows, columns)}}, 3}, pool);
    auto want = product(q.numbers, w.numbers.data(), bias.data(), tokens, rows, columns);
    first.add(exact, tokens, rows, columns, want);
    close("adapted linear_int8", y.data(), want, 1e-5);
    want = product(q.numbers, w.numbers.data(), nullptr, tokens, rows, columns);
    close("linear_int8 between adapted ones", plain.data(), want, 1e-5);
    second.add(exact, tokens, rows, columns, want);
    close("adapted linear_int8", z.data(), want, 1e-5);
    const Product product1{matrix, bias.data(), y.data(), first.of(x.data(), type, rows, columns)};
    k.linear_float(LinearFloat{x.data(), tokens, product1}, pool);
    want = product(exact, w.numbers.data(), bias.data(), tokens, rows, columns);
    first.add(exact, tokens, rows, columns, want);
    close("adapted linear_float", y.data(), want, 1e-5);
}

void tiles(const Kernels& k, Pool& pool, int bits, int group, Number type, bool biased, int64_t rows, int64_t units) {
    const int64_t columns = units * (group < kBlock ? kBlock : group), experts = 2;
    const Packed w = packed(bits, group, type, biased, experts, rows, columns, pool);
    std::vector<float> row(static_cast<size_t>(columns));
    for (int64_t r : {int64_t{0}, rows - 1}) {
        unpack_row(w.tiles, 1, r, row.data());
        const auto from = w.numbers.begin() + (rows + r) * columns;
        close("unpack_row", row.data(), std::vector<double>(from, from + columns), 1e-6);
    }
    const double* numbers = w.numbers.data() + rows * columns;  // the second expert's
    const Matrix matrix{nullptr, Number::f32, rows, columns, &w.tiles, 1};
    for (int64_t tokens : {1, 2, 3, 5, 8, 21}) {
        auto x = normal(tokens * columns), bias = normal(rows);
        std::vector<float> y(static_cast<size_t>(tokens * rows + 1), 77.0f), z = y;
        const Int8 q(k, x.data(), tokens, columns, pool);
        LinearInt8 twice{q.view, {Product{matrix, bias.data(), y.data()}, Product{matrix, nullptr, z.data()}}, 2};
        k.linear_int8(twice, pool);
        close("linear_int8", y.data(), product(q.numbers, numbers, bias.data(), tokens, rows, columns), 1e-5);
        close("linear_int8", z.data(), product(q.numbers, numbers, nullptr, tokens, rows, columns), 1e-5);
        expect(y.back() == 77.0f && z.back() == 77.0f, "linear_int8 wrote too far");
        k.linear_float(LinearFloat{x.data(), tokens, Product{matrix, bias.data(), y.data()}}, pool);
        const std::vector<double> exact(x.begin(), x.end());
        close("linear_float", y.data(), product(exact, numbers, bias.data(), tokens, rows, columns), 1e-5);
        expect(y.back() == 77.0f, "linear_float wrote too far");
    }
}

template <class E>
void dense(const Kernels& k, Pool& pool, Number type, int64_t rows, int64_t columns, int64_t shift) {
    std::vector<E> stored;
    std::vector<double> numbers;
    for (float v : normal(rows * columns)) {
        E e;
        narrow(v, &e);
        stored.push_back(e);
        numbers.push_back(widen(e));
    }
    Shifted<E> memory(stored, shift);
    const Matrix matrix{memory.data(), type, rows, columns, nullptr, 0};
    for (int64_t tokens : {1, 3, 9, 30, 200}) {
        if (tokens == 200 && rows * columns > 4000) continue;
        auto x = normal(tokens * columns), bias = normal(rows);
        std::vector<float> y(static_cast<size_t>(tokens * rows + 1), 77.0f);
        k.linear_float(LinearFloat{x.data(), tokens, Product{matrix, bias.data(), y.data()}}, pool);
        const std::vector<double> exact(x.begin(), x.end());
        close("dense", y.data(), product(exact, numbers.data(), bias.data(), tokens, rows, columns), 1e-5);
        expect(y.back() == 77.0f, "dense wrote too far");
    }
    std::vector<float> out(static_cast<size_t>(2 * columns));
    const int32_t ids[] = {static_cast<int32_t>(rows - 1), 0};
    embed(Embed{matrix, ids, out.data(), 2}, pool);
    std::vector<double> want(numbers.end() - columns, numbers.end());
    want.insert(want.end(), numbers.begin(), numbers.begin() + columns);
    close("embed", out.data(), want, 0);
}

// The largest codes against the largest activations: no sum on the way may overflow.
void largest(const Kernels& k, Pool& pool, int bits) {
    const int64_t columns = 64;
    Packed w = packed(bits, 32, Number::f32, true, 1, 16, columns, pool);
    for (int extreme : {0, (1 << bits) - 1}) {
        std::vector<uint8_t> codes(16 * columns, static_cast<uint8_t>(extreme));
        const std::vector<float> ones(16 * 2, 1.0f), zeros(16 * 2, 0.0f);
        pack(AffineParts{codes.data(), 8, reinterpret_cast<const uint8_t*>(ones.data()),
                         reinterpret_cast<const uint8_t*>(zeros.data())},
             w.tiles, pool);
        for (float sign : {-127.0f, 127.0f}) {
            const std::vector<float> x(static_cast<size_t>(4 * columns), sign);
            std::vector<float> y(4 * 16);
            const Int8 q(k, x.data(), 4, columns, pool);
            const Matrix matrix{nullptr, Number::f32, 16, columns, &w.tiles, 0};
            k.linear_int8(LinearInt8{q.view, {Product{matrix, nullptr, y.data()}}, 1}, pool);
            close("largest codes", y.data(), std::vector<double>(4 * 16, double(sign) * extreme * columns), 1e-6);
        }
    }
}

// One token that is not a number leaves the others alone, and does not pass for one.
void poison(const Kernels& k, Pool& pool) {
    const int64_t columns = 64, rows = 5;
    const Packed w = packed(4, 32, Number::f16, true, 1, rows, columns, pool);
    const Matrix matrix{nullptr, Number::f32, rows, columns, &w.tiles, 0};
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        auto x = normal(3 * columns);
        x[columns + 40] = bad;
        std::vector<int8_t> codes(static_cast<size_t>(8 * columns));
        std::vector<float> scales(8 * columns / kHalf), sums(scales.size()), y(3 * rows), z(3 * rows);
        const Quantized q{codes.data(), scales.data(), sums.data(), 3, columns};
        k.quantize(Quantize{x.data(), q}, pool);
        k.linear_int8(LinearInt8{q, {Product{matrix, nullptr, y.data()}}, 1}, pool);
        k.linear_float(LinearFloat{x.data(), 3, Product{matrix, nullptr, z.data()}}, pool);
        for (int64_t r = 0; r < rows; r++) {
            expect(std::isnan(y[rows + r]) && !std::isfinite(z[rows + r]), "not-a-number became a number");
            expect(std::isfinite(y[r]) && std::isfinite(y[2 * rows + r]), "not-a-number spread to other tokens");
        }
    }
}

}  // namespace

void check_linear(const Kernels& k, Pool& pool) {
    const Number types[] = {Number::f16, Number::bf16, Number::f32};
    for (int bits : {2, 3, 4, 5, 6, 8}) {
        int turn = bits;
        for (int group : {32, 64, 128})
            for (bool biased : {true, false})
                for (int64_t rows : {1, 16, 37}) tiles(k, pool, bits, group, types[turn++ % 3], biased, rows, whole(1, 5));
        largest(k, pool, bits);
    }
    for (int64_t rows : {1, 40}) {
        tiles(k, pool, 2, 16, Number::f32, true, rows, 3);
        tiles(k, pool, 3, 16, Number::f32, false, rows, 3);
        tiles(k, pool, 6, 16, Number::f32, false, rows, 3);
    }
    tiles(k, pool, 4, 32, Number::f16, true, 65, 40);  // more columns than are unpacked at a time
    for (int64_t rows : {1, 4, 15, 16, 17, 50})
        for (int64_t columns : {1, 7, 8, 16, 33, 300}) {
            dense<float>(k, pool, Number::f32, rows, columns, 2 * whole(0, 3));
            dense<half>(k, pool, Number::f16, rows, columns, 2 * whole(0, 3));
            dense<bfloat>(k, pool, Number::bf16, rows, columns, 2 * whole(0, 3));
        }
    for (int64_t tokens : {1, 2, 5, 31, 100})
        for (int64_t rank : {1, 8, 19}) {
            adapted<float>(k, pool, Number::f32, rank, tokens, 37, 96);
            adapted<half>(k, pool, Number::f16, rank, tokens, 53, 96);
        }
    adapted<float>(k, pool, Number::f32, 16, 230, 16, 32);  // more tokens than a panel serves
    poison(k, pool);
}

}  // namespace ondevice::cpu
