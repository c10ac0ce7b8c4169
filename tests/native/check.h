// What the checks of the kernels share: random numbers, comparison, and where kernels put things that oracles need.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"
#include "pack.h"

namespace ondevice::cpu {

inline std::mt19937& generator() {
    static std::mt19937 g(7);
    return g;
}

inline int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator()); }

inline std::vector<float> normal(int64_t n, float size = 1.0f) {
    std::vector<float> out(static_cast<size_t>(n));
    std::normal_distribution<float> draw(0.0f, size);
    for (float& v : out) v = draw(generator());
    return out;
}

// A copy at an address `shift` bytes past an aligned one; reading a byte too many is the sanitizers' to find.
template <class T>
class Shifted {
  public:
    Shifted(const std::vector<T>& values, int64_t shift) : octets_(values.size() * sizeof(T) + shift), shift_(shift) {
        if (!values.empty()) std::memcpy(octets_.data() + shift, values.data(), values.size() * sizeof(T));
    }
    T* data() { return reinterpret_cast<T*>(octets_.data() + shift_); }

  private:
    std::vector<uint8_t> octets_;
    int64_t shift_;
};

extern int failures;
extern const char* variant;

// Errors count as shares of the number, of the root mean square of all, and of 1, the size of what went in.
inline void close(const char* what, const float* got, const std::vector<double>& want, double tolerance) {
    double size = 0;
    for (double w : want) size += w * w;
    size = std::sqrt(size / static_cast<double>(want.empty() ? 1 : want.size())) + 1;
    for (size_t i = 0; i < want.size(); i++) {
        const double error = std::abs(got[i] - want[i]) / (std::abs(want[i]) + size);
        if (error <= tolerance) continue;  // false for not-a-number as well
        std::printf("FAIL %s %s: %g instead of %g at %zu of %zu\n", variant, what, got[i], want[i], i, want.size());
        failures++;
        return;
    }
}

inline void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("FAIL %s %s\n", variant, what);
    failures++;
}

void check_elementwise(const Kernels&, Pool&);
void check_linear(const Kernels&, Pool&);
void check_attention(const Kernels&, Pool&);
void check_recurrence(const Kernels&, Pool&);
void check_training(const Kernels&, Pool&);
void check_pool();
void check_experts_that_go(const Kernels&, Pool&);
void check_stack();

}  // namespace ondevice::cpu
