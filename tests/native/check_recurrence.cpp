// Mixers with a state against their formulas in double, whole and in two pieces.
#include "check.h"

namespace ondevice::cpu {
namespace {

struct Rows {
    std::vector<int32_t> starts, lengths, slots;
};

double at(const std::vector<float>& x, int64_t i) { return x[static_cast<size_t>(i)]; }

void convolution(const Kernels& kernels, Pool& pool, int64_t B, int64_t T, int64_t C, int64_t taps, bool biased) {
    const auto x = normal(B * T * C), weight = normal(taps * C), bias = normal(C);
    std::vector<double> want(static_cast<size_t>(B * T * C));
    for (int64_t i = 0; i < B * T * C; i++) {
        const int64_t c = i % C, t = i / C % T;
        double y = biased ? at(bias, c) : 0;
        for (int64_t j = 0; j < taps; j++)
            if (t - taps + 1 + j >= 0) y += at(weight, j * C + c) * at(x, i - (taps - 1 - j) * C);
        want[static_cast<size_t>(i)] = y;
    }
    std::vector<float> out(static_cast<size_t>(B * T * C)), state = normal((B + 1) * (taps - 1) * C);
    Rows rows;
    for (int64_t b = 0; b < B; b++) {
        rows.starts.push_back(0);
        rows.lengths.push_back(static_cast<int32_t>(T));
        rows.slots.push_back(static_cast<int32_t>(B - b));
    }
    ShortConvolution p{x.data(), weight.data(), biased ? bias.data() : nullptr, out.data(), nullptr, rows.starts.data(),
                       rows.lengths.data(), rows.slots.data(), nullptr, B, T, C, taps};
    kernels.short_convolution(p, pool);
    close("short_convolution", out.data(), want, 1e-5);
    const int64_t first = whole(0, T);
    p.state = state.data();
    for (int64_t from : {int64_t{0}, first}) {  // a row at a time, so that the pieces lie as the kernel wants them
        const int64_t n = from == 0 ? first : T - first;
        for (int64_t b = 0; b < B && n > 0; b++) {
            const auto start = static_cast<int32_t>(from), length = static_cast<int32_t>(n);
            ShortConvolution one = p;
            one.x += (b * T + from) * C, one.out += (b * T + from) * C, one.slots += b;
            one.starts = &start, one.lengths = &length, one.B = 1, one.T = n;
            kernels.short_convolution(one, pool);
        }
        if (first == 0) break;
    }
    if (first) close("short_convolution in pieces", out.data(), want, 1e-5);
}

void delta(const Kernels& kernels, Pool& pool, int64_t T, int64_t H, int64_t K, int64_t dk, int64_t dv) {
    const auto q = normal(T * K * dk), k = normal(T * K * dk), v = normal(T * H * dv), a = normal(T * H), b = normal(T * H);
    const auto rate = normal(H), shift = normal(H);
    std::vector<double> want(static_cast<size_t>(T * H * dv));
    for (int64_t h = 0; h < H; h++) {
        std::vector<double> memory(static_cast<size_t>(dk * dv));
        for (int64_t t = 0; t < T; t++) {
            const int64_t key = (t * K + h / (H / K)) * dk;
            double qq = 1e-6, kk = 1e-6;
            for (int64_t i = 0; i < dk; i++) qq += at(q, key + i) * at(q, key + i), kk += at(k, key + i) * at(k, key + i);
            const double soft = std::log1p(std::exp(double(a[t * H + h]) + shift[h]));
            const double keep = std::exp(-std::exp(double(rate[h])) * soft), learn = 1 / (1 + std::exp(-double(b[t * H + h])));
            for (int64_t j = 0; j < dv; j++) {
                double lacking = v[(t * H + h) * dv + j], y = 0;
                for (int64_t i = 0; i < dk; i++) lacking -= keep * memory[i * dv + j] * at(k, key + i) / std::sqrt(kk);
                for (int64_t i = 0; i < dk; i++) {
                    double& m = memory[static_cast<size_t>(i * dv + j)];
                    m = keep * m + learn * lacking * at(k, key + i) / std::sqrt(kk);
                    y += m * at(q, key + i) / std::sqrt(qq * double(dk));
                }
                want[static_cast<size_t>((t * H + h) * dv + j)] = y;
            }
        }
    }
    std::vector<float> out(static_cast<size_t>(T * H * dv)), state = normal(2 * H * dk * dv);
    int32_t start = 0, length = static_cast<int32_t>(T), slot = 1;
    GatedDelta p{q.data(), k.data(), v.data(), a.data(), b.data(), rate.data(), shift.data(), out.data(), nullptr,
                 &start, &length, &slot, nullptr, 1, T, H, K, dk, dv};
    kernels.gated_delta(p, pool);
    close("gated_delta", out.data(), want, 1e-4);
    p.state = state.data(), p.T = length = 1;
    for (int64_t t = 0; t < T; t++, start++) {
        p.q = q.data() + t * K * dk, p.k = k.data() + t * K * dk, p.v = v.data() + t * H * dv;
        p.a = a.data() + t * H, p.b = b.data() + t * H, p.out = out.data() + t * H * dv;
        kernels.gated_delta(p, pool);
    }
    close("gated_delta by token", out.data(), want, 1e-4);
}

}  // namespace

void check_recurrence(const Kernels& kernels, Pool& pool) {
    for (int64_t C : {1, 7, 64, 300, 515})
        for (int64_t taps : {1, 3, 4}) convolution(kernels, pool, whole(1, 3), whole(1, 9), C, taps, C % 2);
    for (int64_t d : {1, 8, 17, 64}) delta(kernels, pool, whole(1, 12), 4, d % 2 ? 4 : 2, d, d + whole(0, 3));
}

}  // namespace ondevice::cpu
