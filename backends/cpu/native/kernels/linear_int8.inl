// Quantized weights times activations in int8: integer products, float32 sums of groups.

// 16 numbers -> codes, their scale and their sum. Not-a-number and infinity make the scale (and with it everything that
// this token is multiplied with) not a number.
static inline void quantize_half(const float* x, int8_t* codes, float* scale, float* total) {
    constexpr int kVectors = kHalf / N;
    F v[kVectors], most = set(0), poison = set(0), whole = set(0);
    for (int i = 0; i < kVectors; i++) {
        v[i] = load(x + i * N);
        most = max(most, abs(v[i]));
        poison = fma(v[i], set(0), poison);
    }
    const float largest = top(most), step = largest / 127.0f + sum(poison);
    const F inverse = set(largest > 0 ? 127.0f / largest : 0.0f);
    for (int i = 0; i < kVectors; i++) {
        const F code = nearest(v[i] * inverse);
        store_bytes(codes + i * N, code);
        whole = whole + code;
    }
    *scale = step;
    *total = sum(whole) * step;
}

// The numbers of token t go to its place in its block.
static void quantize_token(const float* x, int64_t t, const Quantized& to) {
    const int64_t halves = to.columns / kHalf, first = t / kTokens * kTokens, i = t - first, rest = to.tokens - first;
    const int64_t size = rest < kTokens ? last_block(rest) : kTokens;
    int8_t* codes = to.codes + first * to.columns + i * kBlock;
    float *scales = to.scales + first * halves + i, *sums = to.sums + first * halves + i;
    for (int64_t h = 0; h < halves; h++)
        quantize_half(x + h * kHalf, codes + h / 2 * size * kBlock + h % 2 * kHalf, scales + h * size, sums + h * size);
}

static void quantize(const Quantize& p, Pool& pool) {
    const int64_t columns = p.to.columns, tokens = p.to.tokens, tasks = pieces(pool, tokens, 1 + 8192 / columns);
    const int64_t step = (tokens + tasks - 1) / tasks;
    pool.run(tasks, [&](int64_t task, int) {
        for (int64_t t = task * step; t < tokens && t < (task + 1) * step; t++)
            quantize_token(p.x + t * columns, t, p.to);
    });
}

template <int bits, int q>
static ONDEVICE_INLINE Line quad_codes(const uint8_t* block) {
    constexpr auto parts = [] {
        struct Parts {
            Field field[2] = {};
            int count = 0;
        } found;
        found.count = fields(bits, q, found.field);
        return found;
    }();
    constexpr Field a = parts.field[0], b = parts.field[1];
    Line codes = field(load_line(block + kLine * a.line), a.from, a.count, a.to);
    if constexpr (parts.count == 2) codes = codes | field(load_line(block + kLine * b.line), b.from, b.count, b.to);
    return codes;
}

// Half h of a block of 32 columns: 16 rows x T tokens of dots.
template <int bits, int h, int T, int i = 0>
static ONDEVICE_INLINE void dot_half(const uint8_t* block, const int8_t* x, Dot<bits> dots[T]) {
    constexpr int q = 4 * h + i;
    const Line codes = quad_codes<bits, q>(block);
    ONDEVICE_UNROLL
    for (int t = 0; t < T; t++) dots[t].add(i, codes, load_quad(x + t * kBlock + 4 * q));
    if constexpr (i < 3) dot_half<bits, h, T, i + 1>(block, x, dots);
}

// The same, times the activations' scales, added to `part`; and the activations' sums to `part_sums`.
template <int bits, bool biased, int h, int T>
static ONDEVICE_INLINE void add_half(const uint8_t* block, const int8_t* x, const float* scales, const float* sums,
                                     float shift, F part[T][L], float part_sums[T]) {
    Dot<bits> dots[T];
    for (auto& dot : dots) dot.clear();
    dot_half<bits, h, T>(block, x, dots);
    ONDEVICE_UNROLL
    for (int t = 0; t < T; t++) {
        F total[L];
        dots[t].total(4, total);
        const F scale = set(scales[h * T + t]), extra = set(shift * sums[h * T + t]);
        part_sums[t] += sums[h * T + t];
        ONDEVICE_UNROLL
        for (int i = 0; i < L; i++) {
            const F start = biased && bits != 8 ? part[t][i] : part[t][i] + extra;
            part[t][i] = fma(total[i], scale, start);
        }
    }
}

// A single token takes a tile's bytes about as fast as memory gives them; those this far ahead are asked for.
constexpr int64_t kAhead = 2048;

// A tile times T tokens (one block of Quantized) -> out [T, 16]. `halved`: weights have scales for 16 columns each.
template <int bits, bool biased, bool halved, int T>
static void multiply_tile(const Tiles& w, const uint8_t* tile, const int8_t* x, const float* scales, const float* sums,
                          float* out) {
    constexpr int kHalves = 1 + halved;
    const int64_t units = w.columns / w.unit(), blocks = w.unit() / kBlock, line = w.scales_bytes();
    const float shift = (bits == 8 ? kOffset8 : 0.0f) - w.zero;
    F y[T][L];
    for (auto& row : y)
        for (F& v : row) v = set(0);
    for (int64_t u = 0; u < units; u++) {
        F part[kHalves][T][L];
        float part_sums[kHalves][T] = {};
        for (auto& half : part)
            for (auto& token : half)
                for (F& v : token) v = set(0);
        for (int64_t b = 0; b < blocks; b++, x += T * kBlock, scales += 2 * T, sums += 2 * T, tile += kLine * bits) {
            if constexpr (T == 1)
                for (int line = 0; line <= bits; line++) fetch(tile + kAhead + kLine * line);
            add_half<bits, biased, 0, T>(tile, x, scales, sums, shift, part[0], part_sums[0]);
            add_half<bits, biased, 1, T>(tile, x, scales, sums, shift, part[halved], part_sums[halved]);
        }
        ONDEVICE_UNROLL
        for (int h = 0; h < kHalves; h++) {
            F s[L], m[L];
            load16(tile + h * line, w.scale_type, s);
            if (biased) load16(tile + (kHalves + h) * line, w.scale_type, m);
            ONDEVICE_UNROLL
            for (int t = 0; t < T; t++)
                ONDEVICE_UNROLL
                for (int i = 0; i < L; i++) {
                    y[t][i] = fma(part[h][t][i], s[i], y[t][i]);
                    if (biased) y[t][i] = fma(m[i], set(part_sums[h][t]), y[t][i]);
                }
        }
        tile += kHalves * line * (biased ? 2 : 1);
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < L; i++) store(out + t * kRows + i * N, y[t][i]);
}

using TileKernel = void (*)(const Tiles&, const uint8_t*, const int8_t*, const float*, const float*, float*);

template <int T>
static TileKernel tile_kernel_of(const Tiles& w) {
    const bool halved = w.group < kBlock;
    switch (w.bits * 4 + w.biased * 2 + halved) {
#define ONDEVICE_CASE(bits, biased, halved) \
    case bits * 4 + biased * 2 + halved: return multiply_tile<bits, biased, halved, T>;
#define ONDEVICE_CASES(bits) ONDEVICE_CASE(bits, 0, 0) ONDEVICE_CASE(bits, 1, 0)
        ONDEVICE_CASES(2) ONDEVICE_CASES(3) ONDEVICE_CASES(4) ONDEVICE_CASES(5) ONDEVICE_CASES(6) ONDEVICE_CASES(8)
        ONDEVICE_CASE(2, 1, 1) ONDEVICE_CASE(3, 0, 1) ONDEVICE_CASE(6, 0, 1)  // Q2_K, Q3_K, Q6_K
#undef ONDEVICE_CASES
#undef ONDEVICE_CASE
    }
    return nullptr;  // prepare() lets nothing else in
}

template <int T = kTokens>
static TileKernel tile_kernel(const Tiles& w, int64_t tokens) {
    if constexpr (T > 1)
        if (tokens < T) return tile_kernel<T / 2>(w, tokens);
    return tile_kernel_of<T>(w);
}

// 16 rows of sums, with the bias, into as many columns of out [places, rows]; place(t) is token t's.
template <class Place>
static inline void put_tile(const Product& p, int64_t tile, int64_t tokens, const float* sums, const Place& place) {
    const int64_t row = tile * kRows, rows = p.weight.rows - row < kRows ? p.weight.rows - row : kRows;
    for (int64_t t = 0; t < tokens; t++) {
        float* out = p.out + place(t) * p.weight.rows + row;
        if (rows == kRows) {
            for (int i = 0; i < kRows; i += N) {
                const F sum = load(sums + t * kRows + i);
                store(out + i, p.bias ? sum + load(p.bias + row + i) : sum);
            }
            continue;
        }
        for (int64_t r = 0; r < rows; r++) out[r] = sums[t * kRows + r] + (p.bias ? p.bias[row + r] : 0.0f);
    }
}

// One tile times tokens [from, to) of x (from: a multiple of kTokens), which go to places place(0) ...
template <class Place>
static void tile_product(const Quantized& x, const Product& p, int64_t tile, int64_t from, int64_t to,
                         const Place& place) {
    const int64_t halves = x.columns / kHalf;
    const uint8_t* data = p.weight.tiles->tile(p.weight.expert, tile);
    alignas(64) float sums[kTokens * kRows];
    for (int64_t t = from; t < to; t += kTokens) {
        const int64_t real = to - t < kTokens ? to - t : kTokens, size = real < kTokens ? last_block(real) : kTokens;
        tile_kernel(*p.weight.tiles, size)(*p.weight.tiles, data, x.codes + t * x.columns, x.scales + t * halves,
                                           x.sums + t * halves, sums);
        put_tile(p, tile, real, sums, [&](int64_t i) { return place(t - from + i); });
    }
}
