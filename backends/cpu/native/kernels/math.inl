// Vectors of 16 rows and the functions of one number, over the vocabulary of simd/*.h.

// UNROLL: a short loop of constant length becomes straight code. UNROLL_SOME: an innermost loop takes four turns at a time;
// counting them costs a tenth of its speed where a core's front end is shared with a neighbour, as virtual processors' are.

#if defined(__clang__)
#define ONDEVICE_UNROLL _Pragma("clang loop unroll(full)")
#define ONDEVICE_UNROLL_SOME _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define ONDEVICE_UNROLL _Pragma("GCC unroll 16")
#define ONDEVICE_UNROLL_SOME _Pragma("GCC unroll 4")
#else
#define ONDEVICE_UNROLL
#define ONDEVICE_UNROLL_SOME
#endif

// What lies at p will be read or written soon: it is brought into the first level of cache, or as near as `level`. No
// address is wrong.
template <int level = 1>
static ONDEVICE_INLINE void fetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 4 - level);
#else
    (void)p;
#endif
}

constexpr int L = kRows / N;  // vectors that hold one number for each row of a tile

template <class E>
static ONDEVICE_INLINE void load16(const E* p, F out[L]) {
    for (int i = 0; i < L; i++) out[i] = load(p + i * N);
}

static ONDEVICE_INLINE void load16(const uint8_t* p, Number type, F out[L]) {
    if (type == Number::f16) load16(reinterpret_cast<const half*>(p), out);
    else if (type == Number::bf16) load16(reinterpret_cast<const bfloat*>(p), out);
    else load16(reinterpret_cast<const float*>(p), out);
}

#if !defined(ONDEVICE_STEPS)
constexpr bool kSteps = false;  // whether activations have steps, which Dot multiplies with (see Quantized)
#endif

#if !defined(ONDEVICE_PAIRS)  // the instruction set has none: right, not fast

constexpr bool kPairs = false;  // whether products of pairs are quicker than those of floats

// A word holds two numbers as bfloat16, the lower first: of `even` and of `odd`, number by number.
static inline F pairs_of(F even, F odd) {
    float e[N], o[N];
    store(e, even), store(o, odd);
    for (int i = 0; i < N; i++) {
        bfloat low, high;
        narrow(e[i], &low), narrow(o[i], &high);
        e[i] = from_bits(low.bits | static_cast<uint32_t>(high.bits) << 16);
    }
    return load(e);
}

// 2 N numbers that follow one another, as N words.
static inline void store_pairs(float* to, F first, F second) {
    float x[2 * N], even[N], odd[N];
    store(x, first), store(x + N, second);
    for (int i = 0; i < N; i++) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
    store(to, pairs_of(load(even), load(odd)));
}

// sum + both products of each word
static inline F dot_pairs(F a, F b, F sum) {
    float x[N], y[N], low[2][N], high[2][N];
    store(x, a), store(y, b);
    for (int i = 0; i < N; i++) {
        low[0][i] = from_bits(to_bits(x[i]) << 16), high[0][i] = from_bits(to_bits(x[i]) & 0xffff0000);
        low[1][i] = from_bits(to_bits(y[i]) << 16), high[1][i] = from_bits(to_bits(y[i]) & 0xffff0000);
    }
    return fma(load(low[0]), load(low[1]), fma(load(high[0]), load(high[1]), sum));
}

#endif

// e^x, 2 units in the last place: x = n ln 2 + r, e^r by the polynomial of Cephes' expf. Below -87 it is 0, above 88
// infinite or nearly; not-a-number stays that.
static ONDEVICE_INLINE F exp(F x) {
    x = max(set(-88.0f), min(set(89.0f), x));
    const F n = nearest(x * set(1.44269504f));
    F r = fma(n, set(-0.693359375f), x);  // ln 2 in two parts, the first with few bits: n times it is exact
    r = fma(n, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, r * r, r) + set(1.0f);
    return p * power_of_two(n);
}

static ONDEVICE_INLINE F sigmoid(F x) { return set(1.0f) / (set(1.0f) + exp(set(0.0f) - x)); }

// 1 - 2 / (e^2x + 1): right to 1e-7 of 1, not of small results, which is what sums of it need.
static ONDEVICE_INLINE F tanh(F x) { return set(1.0f) - set(2.0f) / (exp(x + x) + set(1.0f)); }

// The normal distribution's share below x, within 1e-7 (Abramowitz and Stegun 7.1.26 for erf, on |x| / sqrt 2).
static ONDEVICE_INLINE F normal_share(F x) {
    const F z = abs(x) * set(0.707106781f);
    const F t = set(1.0f) / fma(z, set(0.3275911f), set(1.0f));
    F p = set(1.061405429f);
    p = fma(p, t, set(-1.453152027f));
    p = fma(p, t, set(1.421413741f));
    p = fma(p, t, set(-0.284496736f));
    p = fma(p, t, set(0.254829592f));
    const F tail = p * t * exp(set(0.0f) - z * z) * set(0.5f);  // the share beyond |x|
    const F half_sign = max(set(-0.5f), min(set(0.5f), x * set(1e30f)));  // of x, times 1/2
    return fma(set(0.5f) - tail, half_sign + half_sign, set(0.5f));
}

template <Activation kind>
static ONDEVICE_INLINE F activation(F x) {
    if constexpr (kind == Activation::silu) return x * sigmoid(x);
    if constexpr (kind == Activation::gelu) return x * normal_share(x);
    if constexpr (kind == Activation::gelu_tanh) {  // (1 + tanh z) / 2 is sigmoid(2 z)
        const F cubic = fma(x * x * x, set(0.044715f), x);
        return x * sigmoid(cubic * set(1.59576912f));
    }
    if constexpr (kind == Activation::relu) return max(set(0.0f), x);
    if constexpr (kind == Activation::relu2) return max(set(0.0f), x) * max(set(0.0f), x);
    if constexpr (kind == Activation::sigmoid) return sigmoid(x);
    if constexpr (kind == Activation::tanh) return tanh(x);
    if constexpr (kind == Activation::clamp) return max(set(-7.0f), min(set(7.0f), x));
    if constexpr (kind == Activation::clamped_swish) {
        const F low = min(set(7.0f), x);
        return low * sigmoid(low * set(1.702f));
    }
}
