// Norms over rows, and rotary positions.

template <class Row>
static void rows_in_parallel(int64_t rows, int64_t width, Pool& pool, const Row& f) {
    const int64_t tasks = pieces(pool, rows, 1 + 16384 / width), step = (rows + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t row = task * step; row < rows && row < (task + 1) * step; row++) f(row);
    });
}

// The sum of f(x) over a row.
template <class Term>
static inline float total(const float* x, int64_t width, const Term& f) {
    F even = set(0), odd = set(0);
    int64_t i = 0;
    for (; i + 2 * N <= width; i += 2 * N) {
        even = even + f(load(x + i));
        odd = odd + f(load(x + i + N));
    }
    for (; i + N <= width; i += N) even = even + f(load(x + i));
    float rest[N] = {};
    if (i < width) store(rest, f(load_some(x + i, static_cast<int>(width - i))));
    float whole = sum(even + odd);
    for (int64_t j = 0; i + j < width; j++) whole += rest[j];  // not what f made of the places behind the end
    return whole;
}

static void rms_norm(const Norm& p, Pool& pool) {
    rows_in_parallel(p.rows, p.width, pool, [&](int64_t row) {
        const float *x = p.x + row * p.width, *gain = p.gain + row % p.gains * p.width;
        float* out = p.out + row * p.width;
        const float squares = total(x, p.width, [](F v) { return v * v; });
        const F inverse = set(1.0f / sqrtf(squares / static_cast<float>(p.width) + p.eps)), offset = set(p.offset);
        for (int64_t i = 0; i < p.width; i += N) {
            const int n = p.width - i < N ? static_cast<int>(p.width - i) : N;
            store_some(out + i, load_some(x + i, n) * inverse * (load_some(gain + i, n) + offset), n);
        }
    });
}

static void layer_norm(const Norm& p, Pool& pool) {
    rows_in_parallel(p.rows, p.width, pool, [&](int64_t row) {
        const float *x = p.x + row * p.width, *gain = p.gain + row % p.gains * p.width;
        float* out = p.out + row * p.width;
        const float width = static_cast<float>(p.width);
        const F mean = set(total(x, p.width, [](F v) { return v; }) / width);
        const float squares = total(x, p.width, [&](F v) { return (v - mean) * (v - mean); });
        const F inverse = set(1.0f / sqrtf(squares / width + p.eps));
        for (int64_t i = 0; i < p.width; i += N) {
            const int n = p.width - i < N ? static_cast<int>(p.width - i) : N;
            F y = (load_some(x + i, n) - mean) * inverse * load_some(gain + i, n);
            if (p.bias) y = y + load_some(p.bias + i, n);
            store_some(out + i, y, n);
        }
    });
}

// One head: pairs (i, i + pairs) turn, what lies behind them passes.
static inline void turn_halves(const float* x, const float* cos, const float* sin, float* out, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i += N) {
        const int n = pairs - i < N ? static_cast<int>(pairs - i) : N;
        const F a = load_some(x + i, n), b = load_some(x + pairs + i, n);
        const F c = load_some(cos + i, n), s = load_some(sin + i, n);
        store_some(out + i, a * c - b * s, n);
        store_some(out + pairs + i, b * c + a * s, n);
    }
}

static inline void turn_neighbours(const float* x, const float* cos, const float* sin, float* out, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = a * cos[i] - b * sin[i];
        out[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

static void rope(const Rope& p, Pool& pool) {
    rows_in_parallel(p.tokens, p.heads * p.d, pool, [&](int64_t token) {
        const float *cos = p.table + token * 2 * p.pairs, *sin = cos + p.pairs;
        for (int64_t head = 0; head < p.heads; head++) {
            const int64_t at = (token * p.heads + head) * p.d;
            (p.interleaved ? turn_neighbours : turn_halves)(p.x + at, cos, sin, p.out + at, p.pairs);
            const int64_t rest = p.d - 2 * p.pairs;
            if (rest) std::memcpy(p.out + at + 2 * p.pairs, p.x + at + 2 * p.pairs, sizeof(float) * rest);
        }
    });
}
