// Sums of float products with many tokens: forward, x . W^T, and the gradient's way, dy . W, over the same weights.
//
// The blocking is that of Goto and van de Geijn 2008: a strip of the weight is unpacked into panels of 16 columns that
// stay in the second level of cache, and the tokens, gathered once for all strips, pass in blocks that stay there too; a
// panel and six tokens fill the first level. A quantized weight is never written out: only the strip that is being used. `narrow` products are of
// numbers rounded to bfloat16, two of them in a word, with float sums.

constexpr int64_t kStrip = 256;            // columns of the result whose weights are unpacked together, at most: 256 KB
constexpr int64_t kTall = 96;              // tokens in a block: 104 KB
constexpr int64_t kRow = kDepth + kRows;   // floats from one token's numbers to the next's: lines that do not collide
constexpr int64_t kPass = 576;             // tokens that an unpacked strip serves at most: then unpacking is a few percent
constexpr int64_t kMost = 2048;            // tokens that are gathered at a time, at most
constexpr int64_t kGathered = 4 << 20;     // floats of them in rows: 16 MB

// Places [k, k + depth) of one term's sum, which lie from place `at` on in a cut's rows and panels.
struct Stretch {
    int term;
    int64_t k, depth, at;
};

// What is summed in one go: up to kDepth places, of one term or of several; `before` it come so many,
// in whole pairs.
struct Cut {
    Stretch parts[kTerms];
    int count;
    int64_t depth, before;
};

// 16 rows of 16 numbers, the columns of `from` (as unpack_tile leaves them) -> the first `rows` of them, of a panel.
static ONDEVICE_INLINE void turn16(const float* from, int64_t rows, float* panel) {
    for (int i = 0; i < L; i++)
        for (int j = 0; j < L; j++) {
            F v[N];
            for (int a = 0; a < N; a++) v[a] = load(from + (j * N + a) * kRows + i * N);
            transpose(v);
            for (int a = 0; a < N && i * N + a < rows; a++) store(panel + (i * N + a) * kRows + j * N, v[a]);
        }
}

// Rows [k, k + depth) of a dense matrix, columns [from, from + count) -> panels of 16 columns, `apart` floats from one to
// the next, missing columns 0.
template <class E>
static void copy_strip(const E* w, int64_t stride, int64_t depth, int64_t count, float* panels, int64_t apart) {
    for (int64_t j = 0; j < count; j += kRows) {
        float* panel = panels + j / kRows * apart;
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
                       float* panels, int64_t apart) {
    for (int64_t r = 0; r < depth; r += kRows) {
        unpack_tile(*w.tiles, w.tiles->tile(w.expert, (k + r) / kRows), from, count, room);
        for (int64_t j = 0; j < count; j += kRows)
            turn16(room + j * kRows, depth - r, panels + j / kRows * apart + r * kRows);
    }
}

// What columns [from, from + count) of the result need of the weight: places [k, k + depth) of the sum, in panels.
static void unpack_strip(const Term& t, int64_t k, int64_t depth, int64_t from, int64_t count, float* room,
                         float* panels, int64_t apart) {
    const Matrix& w = t.weight;
    if (!t.back) {
        for (int64_t j = 0; j < count; j += kRows) unpack(w, (from + j) / kRows, k, depth, panels + j / kRows * apart);
        return;
    }
    if (w.tiles) return turn_tiles(w, k, depth, from, count, room, panels, apart);
    const auto* data = static_cast<const uint8_t*>(w.dense) + (k * w.columns + from) * size_of(w.type);
    if (w.type == Number::f32) copy_strip(reinterpret_cast<const float*>(data), w.columns, depth, count, panels, apart);
    if (w.type == Number::f16) copy_strip(reinterpret_cast<const half*>(data), w.columns, depth, count, panels, apart);
    if (w.type == Number::bf16) copy_strip(reinterpret_cast<const bfloat*>(data), w.columns, depth, count, panels, apart);
}

// Numbers [k, k + depth) of tokens [at, at + count), scaled, to rows of kRow.
static void gather_tokens(const Term& t, int64_t at, int64_t count, int64_t k, int64_t depth, float* rows) {
    const float* x = t.x + at * t.depth() + k;
    for (int64_t i = 0; i < count; i++, x += t.depth(), rows += kRow) {
        int64_t j = 0;
        for (; j + N <= depth; j += N) store(rows + j, load(x + j) * set(t.scale));
        for (; j < depth; j++) rows[j] = x[j] * t.scale;
    }
}

// The same where x is [depth, tokens]; up to N - 1 zeros come behind each row's numbers.
static void turn_tokens(const Term& t, int64_t tokens, int64_t at, int64_t count, int64_t k, int64_t depth, float* rows) {
    const float* x = t.x + k * tokens + at;
    for (int64_t i = 0; i < count; i += N)
        for (int64_t j = 0; j < depth; j += N) {
            const int n = count - i < N ? static_cast<int>(count - i) : N;
            F v[N];
            for (int a = 0; a < N; a++) v[a] = j + a < depth ? load_some(x + (j + a) * tokens + i, n) : set(0);
            transpose(v);
            for (int a = 0; a < n; a++) store(rows + (i + a) * kRow + j, v[a] * set(t.scale));
        }
}

// Words from one token's numbers to the next's.
static constexpr int64_t row_words(bool narrow) { return narrow ? kRow / 2 : kRow; }

// out [T, 16 P] (+)= rows [T, words] . P panels, `apart` words from one to the next
template <bool narrow, int T, int P>
static ONDEVICE_INLINE void multiply_tile(const float* rows, const float* panel, int64_t apart, int64_t words, float* out,
                                          int64_t stride, bool add) {
    for (int t = 0; t < T; t++) ONDEVICE_PREFETCH(out + t * stride);
    F y[T][P * L];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < P * L; i++) y[t][i] = set(0);
    for (int64_t k = 0; k < words; k++, panel += kRows) {
        F w[P * L];
        for (int j = 0; j < P; j++) load16(panel + j * apart, w + j * L);
        ONDEVICE_UNROLL
        for (int t = 0; t < T; t++) {
            const F a = set(rows[t * row_words(narrow) + k]);
            ONDEVICE_UNROLL
            for (int i = 0; i < P * L; i++) {
                if constexpr (narrow) y[t][i] = dot_pairs(a, w[i], y[t][i]);
                else y[t][i] = fma(a, w[i], y[t][i]);
            }
        }
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < P * L; i++) {
            float* to = out + t * stride + i * N;
            store(to, add ? load(to) + y[t][i] : y[t][i]);
        }
}

// The same for any number of tokens, in tiles of T and, for the rest, of half as many.
template <bool narrow, int T, int P>
static void multiply_rows(int64_t tokens, const float* rows, const float* panel, int64_t apart, int64_t words, float* out,
                          int64_t stride, bool add) {
    constexpr int64_t row = row_words(narrow);
    int64_t t = 0;
    for (; t + T <= tokens; t += T)
        multiply_tile<narrow, T, P>(rows + t * row, panel, apart, words, out + t * stride, stride, add);
    if constexpr (T > 1)
        if (t < tokens)
            multiply_rows<narrow, T / 2, P>(tokens - t, rows + t * row, panel, apart, words, out + t * stride, stride, add);
}

// The last columns of a result whose width is no multiple of 16.
template <bool narrow>
static void multiply_edge(int64_t tokens, const float* rows, const float* panel, int64_t words, int64_t width, float* out,
                          int64_t stride, bool add) {
    float sums[kTall * kRows];
    multiply_rows<narrow, kTileTokens, 1>(tokens, rows, panel, 0, words, sums, kRows, false);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < width; i++)
            out[t * stride + i] = sums[t * kRows + i] + (add ? out[t * stride + i] : 0.0f);
}

// Rows of numbers -> rows of pairs; what lies behind the last number counts as 0.
static void narrow_rows(int64_t tokens, int64_t depth, float* rows, float* words) {
    for (int64_t t = 0; t < tokens; t++, rows += kRow, words += kRow / 2) {
        if (depth % 2) rows[depth] = 0;
        for (int64_t k = 0; k < depth; k += 2 * N) store_pairs(words + k / 2, load(rows + k), load(rows + k + N));
    }
}

// A panel of numbers -> one of pairs, which are neighbours of a column.
static void narrow_panel(int64_t depth, const float* panel, float* words) {
    for (int64_t k = 0; k < depth; k += 2, panel += 2 * kRows, words += kRows)
        for (int i = 0; i < L; i++)
            store(words + i * N, pairs_of(load(panel + i * N), k + 1 < depth ? load(panel + kRows + i * N) : set(0)));
}

static void add_bias(const Products& p, int64_t token, int64_t tokens, int64_t from, int64_t count) {
    for (int64_t t = token; t < token + tokens; t++)
        for (int64_t i = from; i < from + count; i++) p.out[t * p.width + i] += p.bias[i];
}

// How far to go through a term's sum at a time: in equal parts, of whole units of tiles, that leave room for what small
// terms add to the last one.
static int64_t step_of(const Products& p, const Term& t) {
    int64_t small = 0;
    for (int i = 0; i < p.count; i++)
        if (&p.terms[i] != &t && p.terms[i].depth() < kDepth / 4) small += p.terms[i].depth();
    const int64_t cuts = (t.depth() + small + kDepth - 1) / kDepth;
    const int64_t unit = t.weight.tiles && !t.back ? t.weight.tiles->unit() : kRows;
    const int64_t step = round_up((t.depth() + cuts - 1) / cuts, unit);
    return step < kDepth ? step : kDepth;
}

static std::vector<Cut> cuts_of(const Products& p) {
    std::vector<Cut> cuts;
    for (int i = 0; i < p.count; i++) {
        const int64_t depth = p.terms[i].depth(), step = step_of(p, p.terms[i]);
        for (int64_t k = 0; k < depth; k += step) {
            const int64_t some = depth - k < step ? depth - k : step;
            if (cuts.empty() || cuts.back().count == kTerms || k > 0 || cuts.back().depth + some > kDepth)
                cuts.push_back(Cut{{}, 0, 0, cuts.empty() ? 0 : cuts.back().before + round_up(cuts.back().depth, 2)});
            Cut& cut = cuts.back();
            cut.parts[cut.count++] = Stretch{i, k, some, cut.depth};
            cut.depth += some;
        }
    }
    return cuts;
}

// Columns that a thread unpacks at a time: whole units of tiles that are read across.
static int64_t unit_of(const Products& p) {
    int64_t unit = kRows;
    for (int i = 0; i < p.count; i++) {
        const Term& t = p.terms[i];
        if (t.back && t.weight.tiles && t.weight.tiles->unit() > unit) unit = t.weight.tiles->unit();
    }
    return unit;
}

// What is gathered together: tokens [token, token + tokens) of `count` cuts, in rows.
struct Region {
    const Cut* cuts;
    int64_t count, token, tokens;
    float* rows;
    bool narrow, last;  // last: the sums are whole with it

    int64_t words(int64_t places) const { return narrow ? (places + 1) / 2 : places; }
    float* rows_of(int64_t cut, int64_t at) const { return rows + (cut * tokens + at) * row_words(narrow); }
};

static void gather(const Products& p, const Region& r, int64_t c, int64_t at, float* room) {
    const int64_t some = r.tokens - at < kTall ? r.tokens - at : kTall;
    float* rows = r.narrow ? room : r.rows_of(c, at);
    for (int i = 0; i < r.cuts[c].count; i++) {
        const Stretch& s = r.cuts[c].parts[i];
        const Term& t = p.terms[s.term];
        if (t.turned) turn_tokens(t, p.tokens, r.token + at, some, s.k, s.depth, rows + s.at);
        else gather_tokens(t, r.token + at, some, s.k, s.depth, rows + s.at);
    }
    if (r.narrow) narrow_rows(some, r.cuts[c].depth, rows, r.rows_of(c, at));
}

// The floats that a strip takes, or gathering a block.
static int64_t products_room(int64_t strip) { return (2 * kDepth + kRows) * strip + kTall * kRow; }

// Columns [from, from + count) of what a cut multiplies -> panels.
static const float* unpack(const Products& p, const Cut& cut, int64_t from, int64_t count, bool narrow, float* room) {
    const int64_t wide = round_up(count, kRows), apart = cut.depth * kRows, words = (cut.depth + 1) / 2 * kRows;
    float *panels = room, *pairs = panels + kDepth * wide, *tiles = pairs + kDepth * wide;
    for (int i = 0; i < cut.count; i++) {
        const Stretch& s = cut.parts[i];
        unpack_strip(p.terms[s.term], s.k, s.depth, from, count, tiles, panels + s.at * kRows, apart);
    }
    if (!narrow) return panels;
    for (int64_t j = 0; j < wide / kRows; j++) narrow_panel(cut.depth, panels + j * apart, pairs + j * words);
    return pairs;
}

// Tokens [at, at + tokens) of a cut times its panels.
template <bool narrow>
static void multiply(const float* rows, int64_t tokens, const float* panels, int64_t words, int64_t count, float* out,
                     int64_t stride, bool add) {
    constexpr int64_t wide = kTilePanels * kRows;
    int64_t j = 0;
    for (; j + wide <= count; j += wide)
        multiply_rows<narrow, kTileTokens, kTilePanels>(tokens, rows, panels + j * words, words * kRows, words, out + j, stride, add);
    for (; j + kRows <= count; j += kRows)
        multiply_rows<narrow, kTileTokens, 1>(tokens, rows, panels + j * words, 0, words, out + j, stride, add);
    if (j < count) multiply_edge<narrow>(tokens, rows, panels + j * words, words, count - j, out + j, stride, add);
}

// Tokens [token, end) of a region times columns [from, from + count): a strip stays in the second level of cache.
static void product_strip(const Products& p, const Region& r, int64_t token, int64_t end, int64_t from, int64_t count,
                          float* room) {
    for (int64_t c = 0; c < r.count; c++) {
        const Cut& cut = r.cuts[c];
        const float* panels = unpack(p, cut, from, count, r.narrow, room);
        for (int64_t at = token; at < end; at += kTall) {
            const int64_t some = end - at < kTall ? end - at : kTall;
            float* out = p.out + (r.token + at) * p.width + from;
            const float* rows = r.rows_of(c, at);
            const bool add = p.add || cut.before > 0;
            if (r.narrow) multiply<true>(rows, some, panels, r.words(cut.depth), count, out, p.width, add);
            else multiply<false>(rows, some, panels, cut.depth, count, out, p.width, add);
        }
    }
    if (p.bias && r.last) add_bias(p, r.token + token, end - token, from, count);
}

// Columns that are unpacked together: about kStrip, in whole units of tiles that are read across, all strips alike;
// fewer where tokens are too few to be shared out.
static int64_t strip_of(const Products& p, int64_t threads) {
    const int64_t unit = unit_of(p), fewest = (p.width + kStrip - 1) / kStrip;
    const int64_t strips = p.tokens > kTall || fewest > 4 * threads ? fewest : 4 * threads;
    return round_up((p.width + strips - 1) / strips, unit);
}

static void products_of(const Products& p, const Region& r, Pool& pool) {
    const int64_t blocks = (r.tokens + kTall - 1) / kTall, strip = strip_of(p, pool.threads());
    pool.run(blocks * r.count, [&](int64_t task, int thread) {
        gather(p, r, task % r.count, task / r.count * kTall, pool.scratch(thread, products_room(strip)));
    });
    const int64_t strips = (p.width + strip - 1) / strip, enough = 4 * pool.threads();
    int64_t passes = (r.tokens + kPass - 1) / kPass;
    if (pool.threads() > 1 && passes * strips < enough) passes = (enough + strips - 1) / strips;
    const int64_t pass = round_up((r.tokens + passes - 1) / passes, kTall);
    passes = (r.tokens + pass - 1) / pass;
    pool.run(strips * passes, [&](int64_t task, int thread) {
        const int64_t from = task % strips * strip, token = task / strips * pass;
        product_strip(p, r, token, token + pass < r.tokens ? token + pass : r.tokens, from,
                      p.width - from < strip ? p.width - from : strip, pool.scratch(thread, products_room(strip)));
    });
}

static int64_t equal(int64_t whole, int64_t most, int64_t unit) {
    const int64_t parts = (whole + most - 1) / most;
    return round_up((whole + parts - 1) / parts, unit);
}

// A result of up to 16 columns, as a LoRA's narrow half has: the tokens are read once, where they lie.
static void thin_products(const Products& p, Pool& pool) {
    const Term& t = p.terms[0];
    const int64_t depth = t.depth(), tasks = pieces(pool, p.tokens, kTall / 2), step = equal(p.tokens, (p.tokens + tasks - 1) / tasks, 1);
    float* panel = pool.shared(2, depth * kRows);
    unpack_strip(t, 0, depth, 0, p.width, nullptr, panel, 0);
    pool.run((p.tokens + step - 1) / step, [&](int64_t task, int thread) {
        const int64_t at = task * step, some = p.tokens - at < step ? p.tokens - at : step;
        float *sums = pool.scratch(thread, step * kRows), *out = p.out + at * p.width;
        multiply_panels(some, t.x + at * depth, depth, panel, kRows, depth, sums, kRows, false);
        for (int64_t i = 0; i < some; i++)
            for (int64_t j = 0; j < p.width; j++)
                out[i * p.width + j] = (p.add ? out[i * p.width + j] : 0.0f) + t.scale * sums[i * kRows + j] + (p.bias ? p.bias[j] : 0.0f);
    });
}

constexpr int64_t kLong = 64;  // tokens that are summed up at a time: 64 rows of kAcross columns, in the first level of cache
constexpr int64_t kAcross = 64;

// A result of up to 16 rows, each a sum over all tokens: the gradient of a LoRA's factors. x is [tokens, rows], the
// weight an array [tokens, width].
static void long_products(const Products& p, Pool& pool) {
    const Term& t = p.terms[0];
    const auto* w = static_cast<const float*>(t.weight.dense);
    const int64_t width = p.width, depth = t.depth();
    pool.run((width + kAcross - 1) / kAcross, [&](int64_t task, int thread) {
        const int64_t from = task * kAcross, end = width - from < kAcross ? width : from + kAcross;
        float *sums = pool.scratch(thread, (kRows + kLong) * kAcross), *edge = sums + kRows * kAcross;
        for (int64_t k = 0; k < depth; k += kLong) {
            const int64_t some = depth - k < kLong ? depth - k : kLong;
            for (int64_t j = from; j < end; j += kRows) {
                const bool whole = end - j >= kRows;
                if (!whole) copy_strip(w + k * width + j, width, some, end - j, edge, 0);
                multiply_panels(p.tokens, t.x + k * p.tokens, 1, whole ? w + k * width + j : edge, whole ? width : kRows, some,
                                sums + j - from, kAcross, k > 0, p.tokens);
            }
        }
        for (int64_t i = 0; i < p.tokens; i++)
            for (int64_t j = from; j < end; j++) p.out[i * width + j] = t.scale * sums[i * kAcross + j - from];
    });
}

static void products(const Products& p, Pool& pool) {
    const Term& t = p.terms[0];
    if (p.count == 1 && !t.weight.tiles && !t.turned && p.width <= kRows) return thin_products(p, pool);
    if (p.count == 1 && t.turned && t.back && p.tokens <= kRows && !t.weight.tiles && t.weight.type == Number::f32 && !p.add && !p.bias)
        return long_products(p, pool);
    const std::vector<Cut> cuts = cuts_of(p);
    const int64_t all = static_cast<int64_t>(cuts.size()), most = equal(p.tokens, kMost, 1);
    const int64_t fit = kGathered / (most * kRow), together = equal(all, fit < 1 ? 1 : fit, 1);
    float* rows = pool.shared(2, together * most * kRow);
    for (int64_t token = 0; token < p.tokens; token += most)
        for (int64_t c = 0; c < all; c += together)
            products_of(p, {cuts.data() + c, all - c < together ? all - c : together, token,
                            p.tokens - token < most ? p.tokens - token : most, rows, p.narrow, c + together >= all}, pool);
}
