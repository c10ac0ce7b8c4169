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

static void softcap_back(const SoftcapBack& p, Pool& pool) {
    const F inverse = set(1.0f / p.cap);
    map(p.size, pool, [&](int64_t i, int n) {
        const F part = tanh(load_some(p.x + i, n) * inverse);
        store_some(p.out + i, load_some(p.grad + i, n) * (set(1.0f) - part * part), n);
    });
}

// What a row is normalised with: n = (x - mean) / divisor.
struct Normal {
    float mean, inverse;
};

static inline Normal normal_of(const float* x, const NormBack& p) {
    const float width = static_cast<float>(p.width);
    const float mean = p.centred ? total(x, p.width, [](F v) { return v; }) / width : 0.0f;
    const float squares = total(x, p.width, [&](F v) { return (v - set(mean)) * (v - set(mean)); });
    return {mean, 1.0f / sqrtf(squares / width + p.eps)};
}

// With g = grad (gain + offset): (g - n mean(g n) - mean(g)) / divisor, where the last mean is of centred norms alone.
static void norm_row_back(const NormBack& p, int64_t row, Normal normal) {
    const float *x = p.x + row * p.width, *grad = p.grad + row * p.width, *gain = p.gain + row % p.gains * p.width;
    float* out = p.out + row * p.width;
    const F offset = set(p.offset), mean = set(normal.mean), inverse = set(normal.inverse);
    const auto some = [&](int64_t i) { return p.width - i < N ? static_cast<int>(p.width - i) : N; };
    F all = set(0), shared = set(0);
    for (int64_t i = 0; i < p.width; i += N) {
        const int n = some(i);
        const F g = load_some(grad + i, n) * (load_some(gain + i, n) + offset);
        shared = fma((load_some(x + i, n) - mean) * inverse, g, shared);  // g is 0 behind the end
        all = all + g;
    }
    const float width = static_cast<float>(p.width);
    const F along = set(sum(shared) / width), middle = set(p.centred ? sum(all) / width : 0.0f);
    for (int64_t i = 0; i < p.width; i += N) {
        const int n = some(i);
        const F g = load_some(grad + i, n) * (load_some(gain + i, n) + offset);
        store_some(out + i, inverse * (g - middle - (load_some(x + i, n) - mean) * inverse * along), n);
    }
}

// Columns [from, end) of the gradients of gain and bias, summed over all rows in their order.
static void norm_columns_back(const NormBack& p, const Normal* normals, int64_t from, int64_t end) {
    for (int64_t i = from; i < end; i += N) {
        const int n = end - i < N ? static_cast<int>(end - i) : N;
        F to_gain = set(0), to_bias = set(0);
        for (int64_t row = 0; row < p.rows; row++) {
            const F g = load_some(p.grad + row * p.width + i, n);
            const F x = load_some(p.x + row * p.width + i, n) - set(normals[row].mean);
            to_gain = fma(g, x * set(normals[row].inverse), to_gain);
            to_bias = to_bias + g;
        }
        if (p.to_gain) store_some(p.to_gain + i, to_gain, n);
        if (p.to_bias) store_some(p.to_bias + i, to_bias, n);
    }
}

static void norm_back(const NormBack& p, Pool& pool) {
    auto* normals = reinterpret_cast<Normal*>(pool.shared(0, 2 * p.rows));
    rows_in_parallel(p.rows, p.width, pool, [&](int64_t row) {
        normals[row] = normal_of(p.x + row * p.width, p);
        norm_row_back(p, row, normals[row]);
    });
    if (!p.to_gain && !p.to_bias) return;
    constexpr int64_t strip = 4 * kRows;
    pool.run((p.width + strip - 1) / strip, [&](int64_t task, int) {
        const int64_t from = task * strip;
        norm_columns_back(p, normals, from, p.width - from < strip ? p.width : from + strip);
    });
}

static inline float largest_of(const float* x, int64_t size) {
    F most = set(-INFINITY);
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

// The largest number of a row, and the sum of e^(x - largest).
struct Softmax {
    float largest, total;
};

static inline Softmax softmax_of(const float* x, int64_t size, float* exponentials) {
    const float largest = largest_of(x, size);
    return {largest, exponents(x, size, largest, exponentials)};
}

// Cross-entropy of a row with the softmax of `wanted`, or (out not null) its gradient.
static inline float imitation(const float* logits, const float* wanted, int64_t width, float grad, float* out) {
    const Softmax own = softmax_of(logits, width, out), other = softmax_of(wanted, width, nullptr);
    const F shift = set(other.largest), share = set(1.0f / other.total), scale = set(1.0f / own.total);
    F sums = set(0);
    float rest = 0;
    for (int64_t i = 0; i < width; i += N) {
        const int n = width - i < N ? static_cast<int>(width - i) : N;
        const F probability = exp(load_some(wanted + i, n) - shift) * share;
        if (out) {
            store_some(out + i, (load_some(out + i, n) * scale - probability) * set(grad), n);
        } else if (n == N) {
            sums = fma(probability, load(logits + i), sums);
        } else {
            float last[N];
            store(last, probability);
            for (int j = 0; j < n; j++) rest += last[j] * logits[i + j];
        }
    }
    return own.largest + logf(own.total) - sum(sums) - rest;
}

static void token_loss(const TokenLoss& p, Pool& pool) {
    rows_in_parallel(p.rows, p.width, pool, [&](int64_t row) {
        const float* logits = p.logits + row * p.width;
        float* out = p.grad ? p.out + row * p.width : nullptr;
        if (p.wanted) {
            const float loss = imitation(logits, p.wanted + row * p.width, p.width, p.grad ? p.grad[row] : 0.0f, out);
            if (!out) p.out[row] = loss;
            return;
        }
        const int32_t target = p.targets[row];
        if (target < 0) {
            if (out) std::memset(out, 0, sizeof(float) * p.width);
            else p.out[row] = 0;
            return;
        }
        const Softmax own = softmax_of(logits, p.width, out);
        if (!out) {
            p.out[row] = own.largest + logf(own.total) - logits[target];
            return;
        }
        const F scale = set(p.grad[row] / own.total);
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
