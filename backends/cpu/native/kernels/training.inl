// Gradients of what works on single numbers or rows, the loss and the optimizer.

// 1 where x is positive, else 0.
static ONDEVICE_INLINE F positive(F x) { return min(set(1.0f), max(set(0.0f), x * set(1e38f))); }

template <Activation kind>
static ONDEVICE_INLINE F slope(F x) {
    const F one = set(1.0f);
    if constexpr (kind == Activation::silu) {
        const F s = sigmoid(x);
        return s * fma(x, one - s, one);
    }
    if constexpr (kind == Activation::gelu)  // the normal distribution's density is e^(-x^2 / 2) / sqrt(2 pi)
        return fma(x * set(0.398942280f), exp(x * x * set(-0.5f)), normal_share(x));
    if constexpr (kind == Activation::gelu_tanh) {
        const F s = sigmoid(fma(x * x * x, set(0.044715f), x) * set(1.59576912f));
        const F inner = fma(x * x, set(3 * 0.044715f * 1.59576912f), set(1.59576912f));
        return s * fma(x * inner, one - s, one);
    }
    if constexpr (kind == Activation::relu) return positive(x);
    if constexpr (kind == Activation::relu2) return positive(x) * (x + x);
    if constexpr (kind == Activation::sigmoid) return sigmoid(x) * sigmoid(set(0.0f) - x);
    if constexpr (kind == Activation::tanh) return one - tanh(x) * tanh(x);
    if constexpr (kind == Activation::clamp) return positive(set(7.0f) - abs(x));
    if constexpr (kind == Activation::clamped_swish) {
        const F s = sigmoid(x * set(1.702f));
        return positive(set(7.0f) - x) * s * fma(x * set(1.702f), one - s, one);
    }
}

template <Activation kind>
static void gated_back_as(const GatedBack& p, Pool& pool) {
    map(p.size, pool, [&](int64_t i, int n) {
        const F gate = load_some(p.gate + i, n), grad = load_some(p.grad + i, n);
        const F to_gate = grad * slope<kind>(gate);
        if (!p.up) return store_some(p.to_gate + i, to_gate, n);
        store_some(p.to_gate + i, to_gate * load_some(p.up + i, n), n);
        store_some(p.to_up + i, grad * activation<kind>(gate), n);
    });
}

static void gated_back(const GatedBack& p, Pool& pool) {
    switch (p.kind) {
        case Activation::silu: return gated_back_as<Activation::silu>(p, pool);
        case Activation::gelu: return gated_back_as<Activation::gelu>(p, pool);
        case Activation::gelu_tanh: return gated_back_as<Activation::gelu_tanh>(p, pool);
        case Activation::relu: return gated_back_as<Activation::relu>(p, pool);
        case Activation::relu2: return gated_back_as<Activation::relu2>(p, pool);
        case Activation::sigmoid: return gated_back_as<Activation::sigmoid>(p, pool);
        case Activation::tanh: return gated_back_as<Activation::tanh>(p, pool);
        case Activation::clamp: return gated_back_as<Activation::clamp>(p, pool);
        case Activation::clamped_swish: return gated_back_as<Activation::clamped_swish>(p, pool);
    }
}

// With g = grad (gain + offset) and 1 / r the norm's divisor: r (g - x r^2 mean(g x)).
static void rms_norm_back(const NormBack& p, Pool& pool) {
    rows_in_parallel(p.rows, p.width, pool, [&](int64_t row) {
        const float *x = p.x + row * p.width, *grad = p.grad + row * p.width, *gain = p.gain + row % p.gains * p.width;
        float* out = p.out + row * p.width;
        const F offset = set(p.offset);
        const auto some = [&](int64_t i) { return p.width - i < N ? static_cast<int>(p.width - i) : N; };
        F squares = set(0), shared = set(0);
        for (int64_t i = 0; i < p.width; i += N) {
            const int n = some(i);
            const F v = load_some(x + i, n), g = load_some(grad + i, n) * (load_some(gain + i, n) + offset);
            squares = fma(v, v, squares);
            shared = fma(v, g, shared);
        }
        const float width = static_cast<float>(p.width), r = 1.0f / sqrtf(sum(squares) / width + p.eps);
        const F along = set(r * r * sum(shared) / width), inverse = set(r);
        for (int64_t i = 0; i < p.width; i += N) {
            const int n = some(i);
            const F g = load_some(grad + i, n) * (load_some(gain + i, n) + offset);
            store_some(out + i, inverse * (g - load_some(x + i, n) * along), n);
        }
    });
}

static inline float largest_of(const float* x, int64_t size) {
    F most = set(-__builtin_inff());
    int64_t i = 0;
    for (; i + N <= size; i += N) most = max(load(x + i), most);
    float largest = top(most);
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// to = e^(x - shift), unless `to` is null; returns the sum.
static inline float exponents(const float* x, int64_t size, float shift, float* to) {
    F sums = set(0);
    float rest = 0;
    for (int64_t i = 0; i < size; i += N) {
        const int n = size - i < N ? static_cast<int>(size - i) : N;
        const F e = exp(load_some(x + i, n) - set(shift));
        if (to) store_some(to + i, e, n);
        if (n == N) {
            sums = sums + e;
            continue;
        }
        float last[N];
        store(last, e);
        for (int j = 0; j < n; j++) rest += last[j];
    }
    return sum(sums) + rest;
}

static void token_loss(const TokenLoss& p, Pool& pool) {
    rows_in_parallel(p.rows, p.width, pool, [&](int64_t row) {
        const float* logits = p.logits + row * p.width;
        const int32_t target = p.targets[row];
        float* out = p.grad ? p.out + row * p.width : nullptr;
        if (target < 0) {
            if (out) std::memset(out, 0, sizeof(float) * p.width);
            else p.out[row] = 0;
            return;
        }
        const float largest = largest_of(logits, p.width), total = exponents(logits, p.width, largest, out);
        if (!out) {
            p.out[row] = largest + logf(total) - logits[target];
            return;
        }
        const F scale = set(p.grad[row] / total);
        for (int64_t i = 0; i < p.width; i += N) {
            const int n = p.width - i < N ? static_cast<int>(p.width - i) : N;
            store_some(out + i, load_some(out + i, n) * scale, n);
        }
        out[target] -= p.grad[row];
    });
}

static void adamw(const AdamW& p, Pool& pool) {
    const F beta1 = set(p.beta1), beta2 = set(p.beta2), left1 = set(1 - p.beta1), left2 = set(1 - p.beta2);
    map(p.size, pool, [&](int64_t i, int n) {
        const F g = load_some(p.grad + i, n);
        const F m = fma(beta1, p.m ? load_some(p.m + i, n) : set(0), left1 * g);
        const F v = fma(beta2, p.v ? load_some(p.v + i, n) : set(0), left2 * g * g);
        const F moved = m * set(p.fix1) / (root(v * set(p.fix2)) + set(p.eps));
        const F kept = load_some(p.param + i, n) * set(1 - p.rate * p.decay);
        store_some(p.new_param + i, kept - set(p.rate) * moved, n);
        store_some(p.new_m + i, m, n);
        store_some(p.new_v + i, v, n);
    });
}
