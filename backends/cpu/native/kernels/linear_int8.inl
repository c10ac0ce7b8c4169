// Quantized weights times activations in int8: integer products, float32 sums of groups.

// 16 numbers -> codes, their scale and their sum.
static inline void quantize_half(const float* x, int8_t* codes, float* scale, float* total) {
    constexpr int kVectors = kHalf / N;
    F v[kVectors], most = set(0), whole = set(0);
    for (int i = 0; i < kVectors; i++) {
        v[i] = load(x + i * N);
        most = max(most, abs(v[i]));
    }
    const float largest = top(most), step = largest / 127.0f;
    const F inverse = set(largest > 0 ? 127.0f / largest : 0.0f);
    for (int i = 0; i < kVectors; i++) {
        const F code = nearest(v[i] * inverse);
        store_bytes(codes + i * N, code);
        whole = whole + code;
    }
    *scale = step;
    *total = sum(whole) * step;
}

// A block of 32; its scales and sums lie `stride` apart.
static ONDEVICE_INLINE void quantize_block(const float* x, int64_t stride, int8_t* codes, float* scales, float* sums) {
#if defined(ONDEVICE_STEPS)
    quantize_steps(x, stride, codes, scales, sums);
#else
    for (int h = 0; h < 2; h++)
        quantize_half(x + h * kHalf, codes + h * kHalf, scales + h * stride, sums + h * stride);
#endif
}

// The numbers of token t go to its place in its block. If any is infinite or not a number, a scale (and with it everything
// that this token is multiplied with) is not a number.
static void quantize_token(const float* x, int64_t t, const Quantized& to) {
    const int64_t halves = to.columns / kHalf, first = t / kTokens * kTokens, i = t - first, rest = to.tokens - first;
    const int64_t size = rest < kTokens ? last_block(rest) : kTokens;
    int8_t* codes = to.codes + first * to.columns + i * kBlock;
    float *scales = to.scales + first * halves + i, *sums = to.sums + first * halves + i;
    F poison = set(0);
    for (int64_t b = 0; b < to.columns / kBlock; b++, x += kBlock) {
        for (int j = 0; j < kBlock; j += N) poison = fma(load(x + j), set(0), poison);
        quantize_block(x, size, codes + b * size * kBlock, scales + 2 * b * size, sums + 2 * b * size);
    }
    *scales += sum(poison);
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

template <int bits, bool plain, int q>
static ONDEVICE_INLINE Line codes_of(const uint8_t* block) {
    if constexpr (plain) return load_line(block + kLine * q);
    else return quad_codes<bits, q>(block);
}

// Quads [from, to) of a block: 16 rows x T tokens of dots.
template <int bits, bool plain, int from, int to, int T, int q = from>
static ONDEVICE_INLINE void dot_quads(const uint8_t* block, const int8_t* x, Dot<bits> dots[T]) {
    const Line codes = codes_of<bits, plain, q>(block);
    ONDEVICE_UNROLL
    for (int t = 0; t < T; t++) dots[t].add(q - from, codes, load_quad(x + t * kBlock + 4 * q));
    if constexpr (q + 1 < to) dot_quads<bits, plain, from, to, T, q + 1>(block, x, dots);
}

// The same, times the activations' scale, added to `part`.
template <int bits, bool plain, int from, int to, int T>
static ONDEVICE_INLINE void add_quads(const uint8_t* block, const int8_t* x, const float* scales, F part[T][L]) {
    Dot<bits> dots[T];
    ONDEVICE_UNROLL
    for (int t = 0; t < T; t++) dots[t].start(scales + T + t);
    dot_quads<bits, plain, from, to, T>(block, x, dots);
    ONDEVICE_UNROLL
    for (int t = 0; t < T; t++) {
        F total[L];
        dots[t].total(to - from, total);
        const F scale = set(scales[(kSteps ? 0 : from / 4 * T) + t]);
        ONDEVICE_UNROLL
        for (int i = 0; i < L; i++) part[t][i] = fma(total[i], scale, part[t][i]);
    }
}

// A single token takes a tile's bytes about as fast as memory gives them; those this far ahead are asked for.
constexpr int64_t kAhead = 2048;

// The numbers lie in memory from here on: each is then loaded into all lanes at once, where compilers would take a vector
// of them apart.
template <int n>
static ONDEVICE_INLINE void lie(float (&numbers)[n]) {
#if defined(__GNUC__)
    __asm__("" : "+m"(numbers));
#else
    (void)numbers;
#endif
}

// A tile times T tokens (one block of Quantized) -> out [T, 16]. `halved`: weights have scales for 16 columns each.
// `plain`: the tile is as unpack_tile() leaves it.
template <int bits, bool biased, bool halved, bool plain, int T>
static void multiply_tile(const Tiles& w, const uint8_t* tile, const int8_t* x, const float* scales, const float* sums,
                          float* out) {
    constexpr int kHalves = 1 + halved, kQuads = kSteps && !halved ? 8 : 4;
    constexpr int64_t kCodes = kLine * (plain ? 8 : bits);
    const int64_t blocks = plain ? 1 : w.unit() / kBlock, units = w.columns / kBlock / blocks;
    const int64_t line = plain ? kRows * sizeof(float) : w.scales_bytes();
    const float shift = (bits == 8 ? kOffset8 : 0.0f) - w.zero;
    F y[T][L];
    for (auto& row : y)
        for (F& v : row) v = set(0);
    for (int64_t u = 0; u < units; u++) {
        const float* last = sums + 2 * T * blocks;
        float whole[kHalves * T], start[kHalves * T];  // sums of the activations; what the dots lack of the products
        ONDEVICE_UNROLL
        for (int i = 0; i < kHalves * T; i++) whole[i] = halved ? sums[i] : sums[i] + sums[T + i];
        lie(whole);
        for (sums += 2 * T; !plain && sums < last; sums += 2 * T, lie(whole))
            ONDEVICE_UNROLL
            for (int i = 0; i < T; i++) whole[i] += sums[i] + sums[T + i];
        ONDEVICE_UNROLL
        for (int i = 0; i < kHalves * T; i++) start[i] = biased && bits != 8 ? 0.0f : shift * whole[i];
        if constexpr (T > 1) lie(start);
        F part[kHalves][T][L];
        ONDEVICE_UNROLL
        for (int h = 0; h < kHalves; h++)
            ONDEVICE_UNROLL
            for (int t = 0; t < T; t++)
                for (F& v : part[h][t]) v = set(start[h * T + t]);
        for (int64_t b = 0; b < blocks; b++, x += T * kBlock, scales += 2 * T, tile += kCodes) {
            if constexpr (T == 1)
                for (int line = 0; line <= bits; line++) fetch(tile + kAhead + kLine * line);
            add_quads<bits, plain, 0, kQuads, T>(tile, x, scales, part[0]);
            if constexpr (kQuads < 8) add_quads<bits, plain, 4, 8, T>(tile, x, scales, part[halved]);
        }
        ONDEVICE_UNROLL
        for (int h = 0; h < kHalves; h++) {
            F s[L], m[L];
            load16(tile + h * line, plain ? Number::f32 : w.scale_type, s);
            if (biased) load16(tile + (kHalves + h) * line, plain ? Number::f32 : w.scale_type, m);
            ONDEVICE_UNROLL
            for (int t = 0; t < T; t++)
                ONDEVICE_UNROLL
                for (int i = 0; i < L; i++) {
                    y[t][i] = fma(part[h][t][i], s[i], y[t][i]);
                    if (biased) y[t][i] = fma(m[i], set(whole[h * T + t]), y[t][i]);
                }
        }
        tile += kHalves * line * (biased ? 2 : 1);
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < L; i++) store(out + t * kRows + i * N, y[t][i]);
}

// Scales and biases of a block, by the 16.
static int64_t plain_lines(const Tiles& w) { return (w.group < kBlock ? 2 : 1) * (w.biased ? 2 : 1); }

template <int bits, int q = 0>
static ONDEVICE_INLINE void unpack_block(const uint8_t* block, uint8_t* out) {
    store_line(out + kLine * q, quad_codes<bits, q>(block));
    if constexpr (q < 7) unpack_block<bits, q + 1>(block, out);
}

// A tile with a byte for each code, and behind each block its scales and biases in float32.
template <int bits>
static void unpack_tile(const Tiles& w, const uint8_t* tile, uint8_t* out) {
    const int64_t blocks = w.unit() / kBlock, lines = plain_lines(w);
    for (int64_t u = 0; u < w.columns / w.unit(); u++, tile += w.unit_bytes())
        for (int64_t b = 0; b < blocks; b++) {
            unpack_block<bits>(tile + b * kLine * bits, out);
            out += kLine * 8;
            for (int64_t i = 0; i < lines; i++, out += kRows * sizeof(float)) {
                F numbers[L];
                load16(tile + blocks * kLine * bits + i * w.scales_bytes(), w.scale_type, numbers);
                for (int j = 0; j < L; j++) store(reinterpret_cast<float*>(out) + j * N, numbers[j]);
            }
        }
}

static void unpack(const Tiles& w, const uint8_t* tile, uint8_t* out) {
    switch (w.bits) {
#define ONDEVICE_CASE(bits) \
    case bits: return unpack_tile<bits>(w, tile, out);
        ONDEVICE_CASE(2) ONDEVICE_CASE(3) ONDEVICE_CASE(4) ONDEVICE_CASE(5) ONDEVICE_CASE(6) ONDEVICE_CASE(8)
#undef ONDEVICE_CASE
    }
}

// Floats that unpack() fills.
static int64_t plain_room(const Tiles& w) { return w.columns / kBlock * (kLine * 8 / 4 + plain_lines(w) * kRows); }

using TileKernel = void (*)(const Tiles&, const uint8_t*, const int8_t*, const float*, const float*, float*);

template <int T, bool plain>
static TileKernel tile_kernel_of(const Tiles& w) {
    const bool halved = w.group < kBlock;
    switch (w.bits * 4 + w.biased * 2 + halved) {
#define ONDEVICE_CASE(bits, biased, halved) \
    case bits * 4 + biased * 2 + halved: return multiply_tile<bits, biased, halved, plain, T>;
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
    return tile_kernel_of<T, false>(w);
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

constexpr int64_t kUnpack = 4 * kTokens;  // tokens from which a tile is unpacked once, not for each block of them

// One tile times tokens [from, to) of x (from: a multiple of kTokens), which go to places place(0) ...
template <class Place>
static void tile_product(const Quantized& x, const Product& p, int64_t tile, int64_t from, int64_t to, Pool& pool,
                         int thread, const Place& place) {
    const int64_t halves = x.columns / kHalf;
    const Tiles& w = *p.weight.tiles;
    const uint8_t* data = w.tile(p.weight.expert, tile);
    alignas(64) float sums[kTokens * kRows];
    const auto multiply = [&](TileKernel kernel, const uint8_t* numbers, int64_t t, int64_t real) {
        kernel(w, numbers, x.codes + t * x.columns, x.scales + t * halves, x.sums + t * halves, sums);
        put_tile(p, tile, real, sums, [&](int64_t i) { return place(t - from + i); });
    };
    int64_t t = from;
    if (to - from >= kUnpack) {
        auto* plain = reinterpret_cast<uint8_t*>(pool.scratch(thread, static_cast<size_t>(plain_room(w))));
        unpack(w, data, plain);
        const TileKernel kernel = tile_kernel_of<kTokens, true>(w);
        for (; t + kTokens <= to; t += kTokens) multiply(kernel, plain, t, kTokens);
    }
    for (; t < to; t += kTokens) {
        const int64_t real = to - t < kTokens ? to - t : kTokens, size = real < kTokens ? last_block(real) : kTokens;
        multiply(tile_kernel(w, size), data, t, real);
    }
}
