// Drawing one token: temperature, top-k, top-p, min-p, then the first id at which the running sum exceeds u. Vocabularies
// have 50,000 to 260,000 words and nearly all of them are hopeless, so nothing here sorts more than it must.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace ondevice::cpu {
namespace {

struct Candidate {
    float weight;
    int32_t id;
};

// The likelier first; among equals the lower id.
bool likelier(const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
}

bool earlier(const Candidate& a, const Candidate& b) { return a.id < b.id; }

// The k best of all: a heap whose front is the worst of them.
std::vector<Candidate> best(const float* scores, int64_t size, int64_t k) {
    std::vector<Candidate> heap;
    for (int64_t i = 0; i < size; i++) {
        const Candidate one{scores[i], static_cast<int32_t>(i)};
        if (static_cast<int64_t>(heap.size()) == k) {
            if (!(one.weight > heap.front().weight)) continue;  // equals that come later lose
            std::pop_heap(heap.begin(), heap.end(), likelier);
            heap.pop_back();
        }
        heap.push_back(one);
        std::push_heap(heap.begin(), heap.end(), likelier);
    }
    return heap;
}

double sum_of(const std::vector<Candidate>& all) {
    double sum = 0;
    for (const Candidate& c : all) sum += c.weight;
    return sum;
}

// The likeliest candidates that together reach `mass`. Few do: first only the largest weights (of at most 1) are looked
// at, then more, until there are enough.
std::vector<Candidate> nucleus(const std::vector<Candidate>& all, double mass) {
    std::vector<Candidate> some;
    for (float least = 1.0f / 64; some.size() < all.size(); least = least > 1e-12f ? least / 64 : 0.0f) {
        some.clear();
        std::copy_if(all.begin(), all.end(), std::back_inserter(some), [&](auto& c) { return c.weight >= least; });
        if (sum_of(some) >= mass || least == 0.0f) break;
    }
    std::sort(some.begin(), some.end(), likelier);
    double before = 0;
    size_t kept = 0;
    while (kept < some.size() && (kept == 0 || before < mass)) before += some[kept++].weight;
    some.resize(kept);
    return some;
}

std::vector<Candidate> candidates(const Draw& p, const Kernels& kernels, Pool& pool) {
    const bool few = p.top_k > 0 && p.top_k < p.size;
    std::vector<Candidate> all = few ? best(p.scores, p.size, p.top_k) : std::vector<Candidate>();
    std::sort(all.begin(), all.end(), earlier);
    const auto size = few ? all.size() : static_cast<size_t>(p.size);
    std::vector<float> scores, weights(size);
    for (const Candidate& c : all) scores.push_back(c.weight);
    kernels.weigh(Weigh{few ? scores.data() : p.scores, weights.data(), static_cast<int64_t>(size),
                        static_cast<float>(p.temperature)},
                  pool);
    all.resize(size);
    for (size_t i = 0; i < size; i++) all[i] = {weights[i], few ? all[i].id : static_cast<int32_t>(i)};
    return all;
}

// The first of the largest; 0 if none is a number. Whole lanes are compared at a time: compilers turn that into vectors.
int64_t likeliest(const float* scores, int64_t size) {
    constexpr int64_t kLanes = 32;
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
        for (int64_t j = 0; j < kLanes; j++) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
    for (; i < size; i++) lanes[0] = scores[i] > lanes[0] ? scores[i] : lanes[0];
    const float* found = std::find(scores, scores + size, *std::max_element(lanes, lanes + kLanes));
    return found == scores + size ? 0 : found - scores;
}

}  // namespace

int64_t draw(const Draw& p, const Kernels& kernels, Pool& pool) {
    if (p.temperature <= 0) return likeliest(p.scores, p.size);
    std::vector<Candidate> all = candidates(p, kernels, pool);
    if (p.top_p < 1) {
        all = nucleus(all, std::max(p.top_p, 1e-9) * sum_of(all));
        std::sort(all.begin(), all.end(), earlier);
    }
    if (p.min_p > 0) {  // the likeliest has weight 1
        const auto least = static_cast<float>(p.min_p);
        all.erase(std::remove_if(all.begin(), all.end(), [&](auto& c) { return c.weight < least; }), all.end());
    }
    const double mark = p.u * sum_of(all);
    double running = 0;
    for (const Candidate& c : all)
        if ((running += c.weight) > mark) return c.id;
    return all.empty() ? 0 : all.back().id;
}

}  // namespace ondevice::cpu
