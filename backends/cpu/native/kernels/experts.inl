// Linear maps of experts: tokens that chose the same expert meet its weights together.

// The pairs (token, choice), sorted by expert: expert e's are pairs[first[e]] ... pairs[first[e + 1] - 1]. `chosen`: the
// experts that have any.
struct Groups {
    int32_t *pairs, *first, *chosen;
    int64_t count = 0;  // of the chosen

    static int64_t room(const ExpertLinear& p) { return p.tokens * p.k + 2 * p.experts + 1; }

    Groups(const ExpertLinear& p, float* memory)
        : pairs(reinterpret_cast<int32_t*>(memory)), first(pairs + p.tokens * p.k), chosen(first + p.experts + 1) {
        const int64_t all = p.tokens * p.k;
        std::memset(first, 0, sizeof(int32_t) * (p.experts + 1));
        for (int64_t i = 0; i < all; i++) first[p.ids[i] + 1]++;
        for (int64_t e = 0; e < p.experts; e++) {
            if (first[e + 1]) chosen[count++] = static_cast<int32_t>(e);
            first[e + 1] += first[e];
        }
        for (int64_t i = 0; i < all; i++) pairs[first[p.ids[i]]++] = static_cast<int32_t>(i);
        for (int64_t e = p.experts; e > 0; e--) first[e] = first[e - 1];  // they had moved on to their ends
        first[0] = 0;
    }
};

// A pair's input, times its gate if gates are on the input.
static inline void copy_input(const ExpertLinear& p, int64_t pair, float* to) {
    const float* x = p.x + (p.own ? pair : pair / p.k) * p.weight.columns;
    const float gate = p.gates ? p.gates[pair] : 1.0f;
    for (int64_t i = 0; i < p.weight.columns; i++) to[i] = x[i] * gate;
}

// The matrix of one expert; w is the first's.
static Matrix of_stack(Matrix w, int64_t expert) {
    w.expert = expert;
    if (!w.tiles) w.dense = static_cast<const uint8_t*>(w.dense) + expert * w.rows * w.columns * size_of(w.type);
    return w;
}

static Product product_of(const ExpertLinear& p, int64_t expert) {
    const Matrix weight = p.stack ? (*p.stack)[expert] : of_stack(p.weight, expert);
    return {weight, p.bias ? p.bias + expert * p.weight.rows : nullptr, p.out};
}

// Calls work(expert, its pairs, how many, task within it, thread): `cuts` tasks for each expert that anyone chose.
template <class Work>
static void each_expert(const Groups& groups, int64_t cuts, Pool& pool, const Work& work) {
    pool.run(groups.count * cuts, [&](int64_t task, int thread) {
        const int64_t expert = groups.chosen[task / cuts], from = groups.first[expert];
        work(expert, groups.pairs + from, groups.first[expert + 1] - from, task % cuts, thread);
    });
}

constexpr int64_t kCuts = 4;  // tasks of an expert's tiles

static void experts_float(const ExpertLinear& p, const Groups& groups, Pool& pool) {
    const int64_t tiles = (p.weight.rows + kRows - 1) / kRows, step = (tiles + kCuts - 1) / kCuts;
    each_expert(groups, kCuts, pool, [&](int64_t expert, const int32_t* pairs, int64_t count, int64_t cut, int thread) {
        float *room = pool.scratch(thread, kRoom + kChunk * p.weight.columns), *x = room + kRoom;
        const Product product = product_of(p, expert);
        for (int64_t from = 0; from < count; from += kChunk) {
            const int64_t n = count - from < kChunk ? count - from : kChunk;
            for (int64_t i = 0; i < n; i++) copy_input(p, pairs[from + i], x + i * p.weight.columns);
            for (int64_t tile = cut * step; tile < tiles && tile < (cut + 1) * step; tile++)
                float_product(product, tile, x, n, room, [&](int64_t t) { return pairs[from + t]; });
        }
    });
}

// Each expert's inputs become a Quantized of its own, which starts where all before it end, padding included.
static void experts_int8(const ExpertLinear& p, const Groups& groups, Pool& pool) {
    const int64_t columns = p.weight.columns, halves = columns / kHalf, count = p.tokens * p.k;
    const int64_t places = count + p.experts * kTokens, bytes = places * (columns + 2 * halves * 4);
    auto* codes = reinterpret_cast<int8_t*>(pool.shared(1, static_cast<size_t>(bytes / 4)));
    float *scales = reinterpret_cast<float*>(codes + places * columns), *sums = scales + places * halves;
    const auto inputs = [&](int64_t expert, int64_t n) {  // an expert's blocks hold kTokens - 1 places too many at most
        const int64_t at = groups.first[expert] + expert * kTokens;
        return Quantized{codes + at * columns, scales + at * halves, sums + at * halves, n, columns};
    };
    each_expert(groups, 1, pool, [&](int64_t expert, const int32_t* pairs, int64_t n, int64_t, int thread) {
        float* x = pool.scratch(thread, columns);
        for (int64_t i = 0; i < n; i++) {
            copy_input(p, pairs[i], x);
            quantize_token(x, i, inputs(expert, n));
        }
    });
    const int64_t tiles = p.weight.tiles->tiles(), step = (tiles + kCuts - 1) / kCuts;
    each_expert(groups, kCuts, pool, [&](int64_t expert, const int32_t* pairs, int64_t n, int64_t cut, int thread) {
        const Product product = product_of(p, expert);
        for (int64_t tile = cut * step; tile < tiles && tile < (cut + 1) * step; tile++)
            tile_product(inputs(expert, n), product, tile, 0, n, pool, thread, [&](int64_t t) { return pairs[t]; });
    });
}

static void expert_linear(const ExpertLinear& p, Pool& pool) {
    const Groups groups(p, pool.shared(0, static_cast<size_t>(Groups::room(p))));
    if (p.stack) p.stack->need(groups.chosen, groups.count);
    if (p.weight.tiles && !p.exact) experts_int8(p, groups, pool);
    else experts_float(p, groups, pool);
}
