// Experts that come when they are needed and go when room is short; kernels that use them.
#include "check.h"
#include "stack.h"

namespace ondevice::cpu {
namespace {

constexpr int64_t kExperts = 5, kOwnRows = 20, kColumns = 64;

// Expert e's numbers are all e + 1, in memory that the sanitizers see go.
Fetched fetched(int64_t expert) {
    auto numbers = std::make_shared<std::vector<float>>(kOwnRows * kColumns, static_cast<float>(expert + 1));
    const auto bytes = static_cast<int64_t>(numbers->size() * sizeof(float));
    return {Matrix{numbers->data(), Number::f32, kOwnRows, kColumns, nullptr, 0}, bytes, numbers};
}

}  // namespace

void check_stack() {
    const auto residents = std::make_shared<Residents>();
    std::vector<int64_t> calls;
    {
        Fetching stack(residents, kExperts, [&](int64_t expert) {
            calls.push_back(expert);
            return fetched(expert);
        });
        Fetching other(residents, 1, fetched);
        const int32_t none = 0;
        other.need(&none, 1);
        const int64_t one = residents->held();
        residents->allow(3 * one);
        for (std::vector<int32_t> chosen : {std::vector<int32_t>{0, 1}, {2}, {1}, {3, 4}, {0, 1, 2, 3, 4}}) {
            stack.need(chosen.data(), static_cast<int64_t>(chosen.size()));
            for (int32_t e : chosen) {
                const auto* numbers = static_cast<const float*>(stack[e].dense);
                for (int64_t i = 0; i < kOwnRows * kColumns; i++)
                    if (numbers[i] != static_cast<float>(e + 1)) return expect(false, "an expert is another one");
            }
        }
        expect(calls == std::vector<int64_t>{0, 1, 2, 3, 4, 0, 2}, "who has not been needed for longest goes");
        expect(residents->held() == 5 * one, "what one call needs stays");
    }
    expect(residents->held() == 0, "all leave with their stack");

    Fetching mapped(residents, 2, [](int64_t expert) {
        Fetched used_in_place = fetched(expert);
        used_in_place.bytes = 0;
        return used_in_place;
    });
    const int32_t both[] = {0, 1};
    mapped.need(both, 2);
    expect(residents->held() == 0, "what lies in a file takes nothing");
}

// A kernel's sums over experts of which one at a time is allowed.
void check_experts_that_go(const Kernels& kernels, Pool& pool) {
    const auto residents = std::make_shared<Residents>();
    Fetching stack(residents, kExperts, fetched);
    residents->allow(1);
    const int64_t tokens = 7, k = 2;
    const auto x = normal(tokens * kColumns);
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++) ids.push_back(static_cast<int32_t>((t + 2 * i) % kExperts));
    std::vector<float> out(static_cast<size_t>(tokens * k * kOwnRows));
    std::vector<double> want;
    for (int64_t pair = 0; pair < tokens * k; pair++) {
        double sum = 0;
        for (int64_t i = 0; i < kColumns; i++) sum += double{x[pair / k * kColumns + i]} * (ids[pair] + 1);
        want.insert(want.end(), static_cast<size_t>(kOwnRows), sum);
    }
    const Matrix like = fetched(0).matrix;
    kernels.expert_linear({x.data(), nullptr, ids.data(), tokens, k, false, true, like, kExperts, nullptr, out.data(), &stack}, pool);
    close("experts that go", out.data(), want, 1e-5);
}

}  // namespace ondevice::cpu
