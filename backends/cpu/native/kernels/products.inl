// Sums of float products with many tokens: forward, x . W^T, and the gradient's way, dy . W, over the same weights.
//
// The blocking is that of Goto and van de Geijn 2008: a strip of the weight is unpacked into panels of 16 columns that
// stay in the second level of cache, and the tokens pass in blocks that stay there too; a panel and six tokens fill the
// first level. A quantized weight is never written out: only the strip that is being used.

constexpr int64_t kStrip = 256;  // columns of the result whose weights are unpacked together, at most: 256 KB
constexpr int64_t kTall = 96;    // tokens in a block: 96 KB
constexpr int64_t kPass = 576;   // tokens that an unpacked strip serves at most: then unpacking is a few percent

// 16 rows of 16 numbers, the columns of `from` (as unpack_tile leaves them) -> as many rows of a panel.
static ONDEVICE_INLINE void turn16(const float* from, float* panel) {
    for (int i = 0; i < L; i++)
        for (int j = 0; j < L; j++) {
            F v[N];
            for (int a = 0; a < N; a++) v[a] = load(from + (j * N + a) * kRows + i * N);
            transpose(v);
            for (int a = 0; a < N; a++) store(panel + (i * N + a) * kRows + j * N, v[a]);
        }
}

// Rows [k, k + depth) of a dense matrix, columns [from, from + count) -> panels of 16 columns, missing ones 0.
template <class E>
static void copy_strip(const E* w, int64_t stride, int64_t depth, int64_t count, float* panels) {
    for (int64_t j = 0; j < count; j += kRows) {
        float* panel = panels + j * kDepth;
        const int64_t real = count - j < kRows ? count - j : kRows;
        for (int64_t r = 0; r < depth; r++, panel += kRows) {
            const E* row = w + r * stride + j;
            if (real == kRows) {
                F v[L];
                load16(row, v);
                for (int i = 0; i < L; i++) store(panel + i * N, v[i]);
                continue;
            }
            for (int64_t c = 0; c < kRows; c++) {
                E last{};
                if (c < real) std::memcpy(&last, row + c, sizeof(E));
                panel[c] = widen(last);
            }
        }
    }
}

// The same of tiles; k is a multiple of 16, from and count of the tiles' unit. room: 16 count floats.
static void turn_tiles(const Matrix& w, int64_t k, int64_t depth, int64_t from, int64_t count, float* room,
                       float* panels) {
    for (int64_t r = 0; r < depth; r += kRows) {
        unpack_tile(*w.tiles, w.tiles->tile(w.expert, (k + r) / kRows), from, count, room);
        for (int64_t j = 0; j < count; j += kRows) turn16(room + j * kRows, panels + j * kDepth + r * kRows);
    }
}

// What columns [from, from + count) of the result need of the weight: places [k, k + depth) of the sum, in panels.
static void unpack_strip(const Term& t, int64_t k, int64_t depth, int64_t from, int64_t count, float* room,
                         float* panels) {
    const Matrix& w = t.weight;
    if (!t.back) {
        for (int64_t j = 0; j < count; j += kRows) unpack(w, (from + j) / kRows, k, depth, panels + j * kDepth);
        return;
    }
    if (w.tiles) return turn_tiles(w, k, depth, from, count, room, panels);
    const auto* data = static_cast<const uint8_t*>(w.dense) + (k * w.columns + from) * size_of(w.type);
    if (w.type == Number::f32) copy_strip(reinterpret_cast<const float*>(data), w.columns, depth, count, panels);
    if (w.type == Number::f16) copy_strip(reinterpret_cast<const half*>(data), w.columns, depth, count, panels);
    if (w.type == Number::bf16) copy_strip(reinterpret_cast<const bfloat*>(data), w.columns, depth, count, panels);
}

// Numbers [k, k + depth) of tokens [at, at + count), scaled, to rows of kDepth: one after another in memory, whatever lay
// between them.
static void gather_tokens(const Term& t, int64_t at, int64_t count, int64_t k, int64_t depth, float* rows) {
    const float* x = t.x + at * t.depth() + k;
    for (int64_t i = 0; i < count; i++, x += t.depth(), rows += kDepth) {
        int64_t j = 0;
        for (; j + N <= depth; j += N) store(rows + j, load(x + j) * set(t.scale));
        for (; j < depth; j++) rows[j] = x[j] * t.scale;
    }
}

// The same where x is [depth, tokens].
static void turn_tokens(const Term& t, int64_t tokens, int64_t at, int64_t count, int64_t k, int64_t depth, float* rows) {
    const float* x = t.x + k * tokens + at;
    for (int64_t i = 0; i < count; i += N)
        for (int64_t j = 0; j < depth; j += N) {
            const int n = count - i < N ? static_cast<int>(count - i) : N;
            F v[N];
            for (int a = 0; a < N; a++) v[a] = j + a < depth ? load_some(x + (j + a) * tokens + i, n) : set(0);
            transpose(v);
            for (int a = 0; a < n; a++) store(rows + (i + a) * kDepth + j, v[a] * set(t.scale));
        }
}

// out [tokens, 16] (+)= rows [tokens, kDepth] . panel
template <int T = kFloatTokens>
static void multiply_rows(int64_t tokens, const float* rows, const float* panel, int64_t depth, float* out,
                          int64_t stride, bool add) {
    int64_t t = 0;
    for (; t + T <= tokens; t += T)
        multiply_panel<T>(rows + t * kDepth, kDepth, panel, kRows, depth, out + t * stride, stride, add);
    if constexpr (T > 1)
        if (t < tokens)
            multiply_rows<T - 1>(tokens - t, rows + t * kDepth, panel, depth, out + t * stride, stride, add);
}

// The last columns of a result whose width is no multiple of 16. sums: 16 a token.
static void multiply_edge(int64_t tokens, const float* rows, const float* panel, int64_t depth, float* sums,
                          int64_t width, float* out, int64_t stride, bool add) {
    multiply_rows(tokens, rows, panel, depth, sums, kRows, false);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < width; i++)
            out[t * stride + i] = sums[t * kRows + i] + (add ? out[t * stride + i] : 0.0f);
}

static void add_bias(const Products& p, int64_t token, int64_t tokens, int64_t from, int64_t count) {
    for (int64_t t = token; t < token + tokens; t++)
        for (int64_t i = from; i < from + count; i++) p.out[t * p.width + i] += p.bias[i];
}

// Columns that are unpacked together: about kStrip, in whole units of tiles that are read across, all strips alike;
// fewer where tokens are too few to be shared out.
static int64_t strip_of(const Products& p, int64_t threads) {
    int64_t unit = kRows;
    for (int i = 0; i < p.count; i++) {
        const Term& t = p.terms[i];
        if (t.back && t.weight.tiles && t.weight.tiles->unit() > unit) unit = t.weight.tiles->unit();
    }
    const int64_t fewest = (p.width + kStrip - 1) / kStrip, strips = p.tokens > kTall || fewest > 4 * threads ? fewest : 4 * threads;
    return round_up((p.width + strips - 1) / strips, unit);
}

static int64_t products_room(int64_t strip) { return kDepth * strip + kRows * strip + kTall * (kDepth + kRows); }

// How far to go through the sum at a time: in equal parts, of whole units of tiles.
static int64_t depth_of(const Term& t, int64_t cuts) {
    const int64_t unit = t.weight.tiles && !t.back ? t.weight.tiles->unit() : kRows;
    const int64_t step = round_up((t.depth() + cuts - 1) / cuts, unit);
    return step < kDepth ? step : kDepth;
}

// One strip of the result, for tokens [token, token + tokens).
static void product_strip(const Products& p, int64_t token, int64_t tokens, int64_t from, int64_t count, int64_t strip,
                          float* panels) {
    float *room = panels + kDepth * strip, *rows = room + kRows * strip, *sums = rows + kTall * kDepth;
    bool add = p.add;
    for (int i = 0; i < p.count; i++) {
        const Term& t = p.terms[i];
        const int64_t cuts = (t.depth() + kDepth - 1) / kDepth, step = depth_of(t, cuts);
        for (int64_t k = 0; k < t.depth(); k += step, add = true) {
            const int64_t depth = t.depth() - k < step ? t.depth() - k : step;
            unpack_strip(t, k, depth, from, count, room, panels);
            for (int64_t at = token; at < token + tokens; at += kTall) {
                const int64_t some = token + tokens - at < kTall ? token + tokens - at : kTall;
                float* out = p.out + at * p.width + from;
                if (t.turned) turn_tokens(t, p.tokens, at, some, k, depth, rows);
                else gather_tokens(t, at, some, k, depth, rows);
                for (int64_t j = 0; j < count; j += kRows) {
                    const float* panel = panels + j * kDepth;
                    if (count - j >= kRows) multiply_rows(some, rows, panel, depth, out + j, p.width, add);
                    else multiply_edge(some, rows, panel, depth, sums, count - j, out + j, p.width, add);
                }
            }
        }
    }
    if (p.bias) add_bias(p, token, tokens, from, count);
}

static void products(const Products& p, Pool& pool) {
    const int64_t strip = strip_of(p, pool.threads()), strips = (p.width + strip - 1) / strip, enough = 4 * pool.threads();
    int64_t passes = (p.tokens + kPass - 1) / kPass;
    if (pool.threads() > 1 && passes * strips < enough) passes = (enough + strips - 1) / strips;
    const int64_t pass = round_up((p.tokens + passes - 1) / passes, kTall);
    passes = (p.tokens + pass - 1) / pass;
    pool.run(strips * passes, [&](int64_t task, int thread) {
        const int64_t from = task % strips * strip, token = task / strips * pass;
        const int64_t count = p.width - from < strip ? p.width - from : strip;
        product_strip(p, token, p.tokens - token < pass ? p.tokens - token : pass, from, count, strip,
                      pool.scratch(thread, products_room(strip)));
    });
}
