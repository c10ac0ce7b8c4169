// Arithmetic and functions of one number at a time.

// f(i) computes N numbers at place i; runs over [0, size), the last few through a small copy on the stack.
template <class Operands>
static void map(int64_t size, Pool& pool, const Operands& f) {
    const int64_t tasks = pieces(pool, size, 16384), step = round_up((size + tasks - 1) / tasks, N);
    pool.run(tasks, [&](int64_t task, int) {
        const int64_t begin = task * step, end = begin + step < size ? begin + step : size;
        for (int64_t i = begin; i < end; i += N) f(i, end - i < N ? static_cast<int>(end - i) : N);
    });
}

// The first `count` numbers at p, the rest 0.
static inline F load_some(const float* p, int count) {
    if (count == N) return load(p);
    float some[N] = {};
    std::memcpy(some, p, sizeof(float) * count);
    return load(some);
}

static inline void store_some(float* p, F a, int count) {
    if (count == N) return store(p, a);
    float some[N];
    store(some, a);
    std::memcpy(p, some, sizeof(float) * count);
}

template <class Operation>
static void pairwise(const Pairwise& p, Pool& pool, Operation op) {
    const int64_t rows = p.size / p.period;
    if (rows == 1) {
        map(p.size, pool, [&](int64_t i, int n) { store_some(p.out + i, op(load_some(p.a + i, n), load_some(p.b + i, n)), n); });
        return;
    }
    const int64_t tasks = pieces(pool, rows, 1 + 16384 / p.period), step = (rows + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t row = task * step; row < rows && row < (task + 1) * step; row++)
            for (int64_t i = 0; i < p.period; i += N) {
                const int n = p.period - i < N ? static_cast<int>(p.period - i) : N;
                const int64_t at = row * p.period + i;
                store_some(p.out + at, op(load_some(p.a + at, n), load_some(p.b + i, n)), n);
            }
    });
}

static void add(const Pairwise& p, Pool& pool) {
    pairwise(p, pool, [](F a, F b) { return a + b; });
}

static void multiply(const Pairwise& p, Pool& pool) {
    pairwise(p, pool, [](F a, F b) { return a * b; });
}

static void add_number(const Single& p, Pool& pool) {
    map(p.size, pool, [&](int64_t i, int n) { store_some(p.out + i, load_some(p.a + i, n) + set(p.number), n); });
}

static void multiply_number(const Single& p, Pool& pool) {
    map(p.size, pool, [&](int64_t i, int n) { store_some(p.out + i, load_some(p.a + i, n) * set(p.number), n); });
}

static void softcap(const Single& p, Pool& pool) {
    const F cap = set(p.number), inverse = set(1.0f / p.number);
    map(p.size, pool, [&](int64_t i, int n) { store_some(p.out + i, cap * tanh(load_some(p.a + i, n) * inverse), n); });
}

template <Activation kind>
static void gated_as(const Gated& p, Pool& pool) {
    map(p.size, pool, [&](int64_t i, int n) {
        F y = activation<kind>(load_some(p.gate + i, n));
        if (p.up) y = y * load_some(p.up + i, n);
        store_some(p.out + i, y, n);
    });
}

static void gated(const Gated& p, Pool& pool) {
    switch (p.kind) {
        case Activation::silu: return gated_as<Activation::silu>(p, pool);
        case Activation::gelu: return gated_as<Activation::gelu>(p, pool);
        case Activation::gelu_tanh: return gated_as<Activation::gelu_tanh>(p, pool);
        case Activation::relu: return gated_as<Activation::relu>(p, pool);
        case Activation::relu2: return gated_as<Activation::relu2>(p, pool);
        case Activation::sigmoid: return gated_as<Activation::sigmoid>(p, pool);
        case Activation::tanh: return gated_as<Activation::tanh>(p, pool);
        case Activation::clamp: return gated_as<Activation::clamp>(p, pool);
        case Activation::clamped_swish: return gated_as<Activation::clamped_swish>(p, pool);
    }
}

static void weigh(const Weigh& p, Pool& pool) {
    F most = set(-INFINITY);
    int64_t i = 0;
    for (; i + N <= p.size; i += N) most = max(load(p.scores + i), most);
    float largest = top(most);
    for (; i < p.size; i++) largest = p.scores[i] > largest ? p.scores[i] : largest;
    const F shift = set(largest), inverse = set(1.0f / p.temperature);
    map(p.size, pool, [&](int64_t at, int n) {
        store_some(p.weights + at, exp((load_some(p.scores + at, n) - shift) * inverse), n);
    });
}
