// Float activations times any weights: dense ones as they lie, quantized ones unpacked tile by tile.

template <int V>
static ONDEVICE_INLINE void load_side(const float* p, F out[V]) {
    for (int i = 0; i < V; i++) out[i] = load(p + i * N);
}

template <int V, class E>
static ONDEVICE_INLINE void load_side(const E* p, F out[V]) {
    static_assert(V == L, "numbers of two bytes are read 16 at a time");
    load16(p, out);
}

// out [T, V N] (+)= x [T, depth] . panel [depth, V N], which is all 16 columns, or half of them; the strides are in
// elements, and so is x_step, between neighbours of a row of x.
template <int T, int V = L, class E>
static ONDEVICE_INLINE void multiply_panel(const float* x, int64_t x_stride, const E* panel, int64_t stride, int64_t depth,
                                  float* out, int64_t out_stride, bool add, int64_t x_step = 1) {
    F y[T][V];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < V; i++) y[t][i] = add ? load(out + t * out_stride + i * N) : set(0);
    ONDEVICE_UNROLL_SOME
    for (int64_t k = 0; k < depth; k++, panel += stride) {
        F w[V];
        load_side<V>(panel, w);
        ONDEVICE_UNROLL
        for (int t = 0; t < T; t++) {
            const F a = set(x[t * x_stride + k * x_step]);
            ONDEVICE_UNROLL
            for (int i = 0; i < V; i++) y[t][i] = fma(a, w[i], y[t][i]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < V; i++) store(out + t * out_stride + i * N, y[t][i]);
}

// The same for any number of tokens.
template <class E, int T = kFloatTokens, int V = L>
static void multiply_panels(int64_t tokens, const float* x, int64_t x_stride, const E* panel, int64_t stride,
                            int64_t depth, float* out, int64_t out_stride, bool add, int64_t x_step = 1) {
    int64_t t = 0;
    for (; t + T <= tokens; t += T)
        multiply_panel<T, V>(x + t * x_stride, x_stride, panel, stride, depth, out + t * out_stride, out_stride, add,
                             x_step);
    if constexpr (T > 1)
        if (t < tokens)
            multiply_panels<E, T - 1, V>(tokens - t, x + t * x_stride, x_stride, panel, stride, depth,
                                      out + t * out_stride, out_stride, add, x_step);
}

constexpr int64_t kDepth = 256;  // columns unpacked at a time: 16 KB, half of the first level of cache

// Columns [from, from + depth) of 16 rows of tiles -> panel [depth, 16]; both are multiples of the tile's unit.
template <int bits, int q = 0>
static ONDEVICE_INLINE void unpack_block(const uint8_t* block, const F* scale, const F* bias, float zero, float* panel) {
    const Line codes = quad_codes<bits, q>(block);
    const F* s = scale;
    const F* m = bias;
    for (int j = 0; j < 4; j++) {
        F code[L];
        column(codes, j, bits == 8, code);
        for (int i = 0; i < L; i++) store(panel + (4 * q + j) * kRows + i * N, fma(code[i] - set(zero), s[i], m[i]));
    }
    if constexpr (q == 3 || q == 7) {
        scale += L;  // the second half's, where a group is 16 columns
        bias += L;
    }
    if constexpr (q < 7) unpack_block<bits, q + 1>(block, scale, bias, zero, panel);
}

template <int bits>
static void unpack_tile(const Tiles& w, const uint8_t* tile, int64_t from, int64_t depth, float* panel) {
    const int64_t blocks = w.unit() / kBlock, halves = w.unit() / w.group, line = w.scales_bytes();
    const float zero = w.zero - (bits == 8 ? 128.0f : 0.0f);
    tile += from / w.unit() * w.unit_bytes();
    for (int64_t u = 0; u < depth / w.unit(); u++, tile += w.unit_bytes()) {
        F scale[2 * L], bias[2 * L];
        const uint8_t* scales = tile + blocks * kLine * bits;
        for (int64_t h = 0; h < 2; h++) {
            const int64_t at = h < halves ? h : 0;
            load16(scales + at * line, w.scale_type, scale + h * L);
            for (int i = 0; i < L; i++) bias[h * L + i] = set(0);
            if (w.biased) load16(scales + (halves + at) * line, w.scale_type, bias + h * L);
        }
        for (int64_t b = 0; b < blocks; b++, panel += kBlock * kRows)
            unpack_block<bits>(tile + b * kLine * bits, scale, bias, zero, panel);
    }
}

static void unpack_tile(const Tiles& w, const uint8_t* tile, int64_t from, int64_t depth, float* panel) {
    switch (w.bits) {
        case 2: return unpack_tile<2>(w, tile, from, depth, panel);
        case 3: return unpack_tile<3>(w, tile, from, depth, panel);
        case 4: return unpack_tile<4>(w, tile, from, depth, panel);
        case 5: return unpack_tile<5>(w, tile, from, depth, panel);
        case 6: return unpack_tile<6>(w, tile, from, depth, panel);
        case 8: return unpack_tile<8>(w, tile, from, depth, panel);
    }
}

// Columns [from, from + depth) of up to 16 rows of a dense matrix -> panel [depth, 16], missing rows 0.
template <class E>
static void transpose(const E* w, int64_t stride, int64_t rows, int64_t from, int64_t depth, float* panel) {
    for (int64_t r = 0; r < kRows; r += N) {
        int64_t k = 0;
        for (; k + N <= depth; k += N) {
            F v[N];
            for (int i = 0; i < N; i++) v[i] = r + i < rows ? load(w + (r + i) * stride + from + k) : set(0);
            transpose(v);
            for (int i = 0; i < N; i++) store(panel + (k + i) * kRows + r, v[i]);
        }
        for (; k < depth; k++)
            for (int64_t i = r; i < r + N; i++) {
                E last{};
                if (i < rows) std::memcpy(&last, w + i * stride + from + k, sizeof(E));
                panel[k * kRows + i] = widen(last);
            }
    }
}

static void copy_panel(const Matrix& w, int64_t tile, int64_t from, int64_t depth, float* panel) {
    const auto* data = static_cast<const uint8_t*>(w.dense);
    for (int64_t k = (tile * w.columns + from) * kRows; depth > 0; depth--, k += kRows, panel += kRows) {
        F v[L];
        load16(data + k * size_of(w.type), w.type, v);
        for (int i = 0; i < L; i++) store(panel + i * N, v[i]);
    }
}

static void unpack(const Matrix& w, int64_t tile, int64_t from, int64_t depth, float* panel) {
    if (w.tiles) return unpack_tile(*w.tiles, w.tiles->tile(w.expert, tile), from, depth, panel);
    if (w.panels) return copy_panel(w, tile, from, depth, panel);
    const int64_t row = tile * kRows, rows = w.rows - row < kRows ? w.rows - row : kRows;
    const auto* data = static_cast<const uint8_t*>(w.dense) + row * w.columns * size_of(w.type);
    if (w.type == Number::f32) transpose(reinterpret_cast<const float*>(data), w.columns, rows, from, depth, panel);
    if (w.type == Number::f16) transpose(reinterpret_cast<const half*>(data), w.columns, rows, from, depth, panel);
    if (w.type == Number::bf16) transpose(reinterpret_cast<const bfloat*>(data), w.columns, rows, from, depth, panel);
}

// 16 rows of the weight times all tokens of x -> sums [tokens, 16]
static void panel_product(const Matrix& w, int64_t tile, const float* x, int64_t tokens, float* panel, float* sums) {
    for (int64_t k = 0; k < w.columns; k += kDepth) {
        const int64_t depth = w.columns - k < kDepth ? w.columns - k : kDepth;
        unpack(w, tile, k, depth, panel);
        multiply_panels(tokens, x + k, w.columns, panel, kRows, depth, sums, kRows, k > 0);
    }
}

// `rows` (up to 4) rows of a dense matrix, one after another in memory, times one token.
template <class E>
static inline void dot_rows(const E* w, int64_t columns, int64_t rows, const float* x, float* out) {
    F sums[4] = {set(0), set(0), set(0), set(0)};
    const E* row[4];
    for (int64_t r = 0; r < 4; r++) row[r] = w + (r < rows ? r : 0) * columns;
    int64_t k = 0;
    for (; k + N <= columns; k += N) {
        const F a = load(x + k);
        ONDEVICE_UNROLL
        for (int r = 0; r < 4; r++) sums[r] = fma(load(row[r] + k), a, sums[r]);
    }
    for (int64_t r = 0; r < rows; r++) {
        float whole = sum(sums[r]);
        for (int64_t i = k; i < columns; i++) {
            E last;
            std::memcpy(&last, row[r] + i, sizeof(E));
            whole += widen(last) * x[i];
        }
        out[r] = whole;
    }
}

// The same as panel_product for dense weights and few tokens: straight from the file's memory, once.
template <class E>
static void row_product(const Matrix& w, int64_t tile, const float* x, int64_t tokens, float* sums) {
    for (int64_t r = 0; r < kRows && tile * kRows + r < w.rows; r += 4) {
        const int64_t row = tile * kRows + r, rows = w.rows - row < 4 ? w.rows - row : 4;
        for (int64_t t = 0; t < tokens; t++)
            dot_rows(static_cast<const E*>(w.dense) + row * w.columns, w.columns, rows, x + t * w.columns,
                     sums + t * kRows + r);
    }
}

constexpr int64_t kFew = 8;     // tokens for which a dense matrix isn't worth transposing
constexpr int64_t kChunk = 96;  // tokens that an unpacked panel serves at most: then unpacking is a few percent
constexpr int64_t kRoom = (kDepth + kChunk) * kRows;  // floats that float_product needs

// One tile times up to kChunk tokens of x, which go to places place(0) ...
template <class Place>
static void float_product(const Product& p, int64_t tile, const float* x, int64_t tokens, float* room,
                          const Place& place) {
    const Matrix& w = p.weight;
    float* sums = room + kDepth * kRows;
    if (w.tiles || tokens > kFew) panel_product(w, tile, x, tokens, room, sums);
    else if (w.type == Number::f32) row_product<float>(w, tile, x, tokens, sums);
    else if (w.type == Number::f16) row_product<half>(w, tile, x, tokens, sums);
    else row_product<bfloat>(w, tile, x, tokens, sums);
    put_tile(p, tile, tokens, sums, place);
}
