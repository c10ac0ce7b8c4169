// Mixers with a state. A row whose start is 0 starts from nothing, whatever its slot holds.

// Whether the token `back` places before token t of a row is of the same document; places before the row count as such.
static inline bool same_document(const int32_t* segments, int64_t t, int64_t back) {
    return !segments || t < back || segments[t] == segments[t - back];
}

// The input at a place of a row, negative before its first: this step's, the kept one, or null.
static inline const float* input_at(const ShortConvolution& p, const float* x, const float* before, int64_t place) {
    if (place >= 0) return x + place * p.C;
    return before ? before + (p.taps - 1 + place) * p.C : nullptr;
}

static void short_convolution(const ShortConvolution& p, Pool& pool) {
    constexpr int64_t kChannels = 256;  // of a task: a kilobyte of each token
    const int64_t blocks = (p.C + kChannels - 1) / kChannels;
    pool.run(p.B * blocks, [&](int64_t task, int thread) {
        const int64_t row = task / blocks, from = task % blocks * kChannels;
        const int64_t width = p.C - from < kChannels ? p.C - from : kChannels, n = p.lengths[row], keep = p.taps - 1;
        const float* x = p.x + row * p.T * p.C + from;
        float* out = p.out + row * p.T * p.C + from;
        float* state = p.state ? p.state + p.slots[row] * keep * p.C + from : nullptr;
        const float* before = p.state && p.starts[row] > 0 ? state : nullptr;
        const int32_t* segments = p.segments ? p.segments + row * p.T : nullptr;
        for (int64_t t = 0; t < p.T; t++) {
            float* y = out + t * p.C;
            for (int64_t c = 0; c < width; c++) y[c] = p.bias ? p.bias[from + c] : 0.0f;
            for (int64_t j = 0; t < n && j < p.taps; j++) {
                const float* in = input_at(p, x, before, t - keep + j);
                if (!in || !same_document(segments, t, keep - j)) continue;
                const float* w = p.weight + j * p.C + from;
                for (int64_t c = 0; c < width; c++) y[c] += w[c] * in[c];
            }
        }
        if (!state || n == 0) return;
        float* last = pool.scratch(thread, keep * kChannels);  // the old inputs are read while the new ones are chosen
        for (int64_t j = 0; j < keep; j++) {
            const float* in = input_at(p, x, before, n - keep + j);
            for (int64_t c = 0; c < width; c++) last[j * kChannels + c] = in ? in[c] : 0.0f;
        }
        for (int64_t j = 0; j < keep; j++) std::memcpy(state + j * p.C, last + j * kChannels, width * sizeof(float));
    });
}

// to = x / |x| * factor
static inline void unit(const float* x, float* to, int64_t d, float factor) {
    float squares = 0;
    for (int64_t i = 0; i < d; i++) squares += x[i] * x[i];
    const float inverse = factor / sqrtf(squares + 1e-6f);
    for (int64_t i = 0; i < d; i++) to[i] = x[i] * inverse;
}

// One token: the memory [dk, dv] fades while it is asked for k; then it learns what it lacked, and is asked for q.
static inline void delta_token(float* memory, const float* q, const float* k, const float* v, float keep, float learn,
                               float* lacking, float* out, int64_t dk, int64_t dv) {
    for (int64_t j = 0; j < dv; j++) lacking[j] = 0;
    for (int64_t i = 0; i < dk; i++) {
        float* row = memory + i * dv;
        const float ki = k[i];
        for (int64_t j = 0; j < dv; j++) {
            row[j] *= keep;
            lacking[j] += ki * row[j];
        }
    }
    for (int64_t j = 0; j < dv; j++) {
        lacking[j] = (v[j] - lacking[j]) * learn;
        out[j] = 0;
    }
    for (int64_t i = 0; i < dk; i++) {
        float* row = memory + i * dv;
        const float ki = k[i], qi = q[i];
        for (int64_t j = 0; j < dv; j++) {
            row[j] += ki * lacking[j];
            out[j] += qi * row[j];
        }
    }
}

static void gated_delta(const GatedDelta& p, Pool& pool) {
    pool.run(p.B * p.H, [&](int64_t task, int thread) {
        const int64_t row = task / p.H, h = task % p.H, size = p.dk * p.dv, key = h / (p.H / p.K);
        float *room = pool.scratch(thread, size + 2 * p.dk + p.dv), *q = room + size, *k = q + p.dk, *lacking = k + p.dk;
        float* memory = p.state ? p.state + (p.slots[row] * p.H + h) * size : room;
        const int32_t* segments = p.segments ? p.segments + row * p.T : nullptr;
        const int64_t n = p.lengths[row];
        if (n && (!p.state || p.starts[row] == 0)) std::memset(memory, 0, size * sizeof(float));
        for (int64_t t = 0; t < p.T; t++) {
            const int64_t token = row * p.T + t;
            float* out = p.out + (token * p.H + h) * p.dv;
            if (t >= n) {
                std::memset(out, 0, p.dv * sizeof(float));
                continue;
            }
            if (!same_document(segments, t, 1)) std::memset(memory, 0, size * sizeof(float));
            unit(p.q + (token * p.K + key) * p.dk, q, p.dk, 1.0f / sqrtf(static_cast<float>(p.dk)));
            unit(p.k + (token * p.K + key) * p.dk, k, p.dk, 1.0f);
            const float a = p.a[token * p.H + h] + p.shift[h], softplus = a > 20 ? a : log1pf(expf(a));
            const float keep = expf(-expf(p.rate[h]) * softplus), learn = 1 / (1 + expf(-p.b[token * p.H + h]));
            delta_token(memory, q, k, p.v + (token * p.H + h) * p.dv, keep, learn, lacking, out, p.dk, p.dv);
        }
    });
}
