// Sums of float products with many tokens: forward, x . W^T, and the gradient's way, dy . W, over the same weights.
//
// The blocking is that of Goto and van de Geijn 2008, with as little traffic beyond the second level of cache as it allows:
// a strip of the weight is unpacked into panels of 16 columns that stay there, deep enough that a result is not written
// and read again too often; the tokens, woven once for all strips, pass in blocks. A quantized weight is never written out:
// only the strip that is being used. `narrow` products are of numbers rounded to bfloat16, two of them in a word, with float
// sums.

constexpr int64_t kReach = 800;            // places of a sum whose weights are unpacked together, at most
constexpr int64_t kHeld = 80 << 10;        // floats of an unpacked strip, about: 320 KB
constexpr int64_t kTall = 48;              // tokens in a block, a multiple of every kTileTokens: with kReach, 150 KB
constexpr int64_t kPass = 576;             // tokens that an unpacked strip serves at most: then unpacking is a few percent
constexpr int64_t kMost = 2048;            // tokens that are woven at a time, at most
constexpr int64_t kWoven = 4 << 20;        // floats of them: 16 MB

// Places [k, k + depth) of one term's sum, which lie from place `at` on in a cut's tiles and panels.
struct Stretch {
    int term;
    int64_t k, depth, at;
};

// What is summed in one go: up to kReach places, of one term or of several; `before` it come so many,
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

// Tokens lie woven in tiles: [depth][kTileTokens], all numbers of one place side by side. Rows x, `stride` apart, of
// `count` tokens, scaled -> a tile; behind the last token, zeros. Up to N - 1 floats behind the tile are overwritten.
static void weave(const float* x, int64_t stride, int64_t count, int64_t depth, float scale, float* tile) {
    constexpr int T = kTileTokens, last = (T - 1) / N * N;
    for (int64_t k = 0; k < depth; k += N) {
        const int n = depth - k < N ? static_cast<int>(depth - k) : N;
        for (int g = last; g >= 0; g -= N) {  // what a group stores too much is the next ones' to overwrite
            F v[N];
            for (int a = 0; a < N; a++)
                v[a] = g + a < T && g + a < count ? load_some(x + (g + a) * stride + k, n) * set(scale) : set(0);
            transpose(v);
            for (int a = 0; a < n; a++) store(tile + (k + a) * T + g, v[a]);
        }
    }
}

// The same where x is [depth, tokens], of its tokens [at, at + count).
static void weave_turned(const float* x, int64_t tokens, int64_t at, int64_t count, int64_t depth, float scale, float* tile) {
    for (int64_t k = 0; k < depth; k++, x += tokens)
        for (int64_t g = 0; g < kTileTokens; g += N) {
            const int n = at + g + N <= tokens ? N : g < count ? static_cast<int>(tokens - at - g) : 0;
            store(tile + k * kTileTokens + g, load_some(x + at + g, n) * set(scale));
        }
}

// out [T, 16 P] (+)= tile [words, T] . P panels, `apart` floats from one to the next
template <bool narrow, int T, int P>
static ONDEVICE_INLINE void multiply_tile(const float* tile, const float* panel, int64_t apart, int64_t words, float* out,
                                          int64_t stride, bool add) {
    for (int t = 0; t < T; t++) fetch(out + t * stride);
    F y[T][P * L];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < P * L; i++) y[t][i] = set(0);
    ONDEVICE_UNROLL_SOME
    for (int64_t k = 0; k < words; k++, panel += kRows, tile += T) {
        F w[P * L];
        for (int j = 0; j < P; j++) load16(panel + j * apart, w + j * L);
        ONDEVICE_UNROLL
        for (int t = 0; t < T; t++) {
            const F a = set(tile[t]);
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

// Woven tokens, the tiles `apart` floats from one to the next.
struct Woven {
    const float* tiles;
    int64_t apart, tokens;
};

// The same for all tokens, and only `width` of the columns.
template <bool narrow, int P>
static void multiply_tiles(const Woven& x, const float* panel, int64_t apart, int64_t words, int64_t width, float* out,
                           int64_t stride, bool add) {
    constexpr int64_t T = kTileTokens, wide = P * kRows;
    const float* tile = x.tiles;
    for (int64_t t = 0; t < x.tokens; t += T, tile += x.apart, out += T * stride) {
        if (t + T <= x.tokens && width == wide) {
            multiply_tile<narrow, T, P>(tile, panel, apart, words, out, stride, add);
            continue;
        }
        float sums[T * wide];
        multiply_tile<narrow, T, P>(tile, panel, apart, words, sums, wide, false);
        for (int64_t i = 0; i < T && t + i < x.tokens; i++)
            for (int64_t j = 0; j < width; j++) out[i * stride + j] = sums[i * wide + j] + (add ? out[i * stride + j] : 0.0f);
    }
}

// A block of tokens times `count` columns in panels.
template <bool narrow>
static void multiply_block(const Woven& x, const float* panels, int64_t words, int64_t count, float* out, int64_t stride,
                           bool add) {
    constexpr int64_t wide = kTilePanels * kRows;
    int64_t j = 0;
    for (; j + wide <= count; j += wide)
        multiply_tiles<narrow, kTilePanels>(x, panels + j * words, words * kRows, words, wide, out + j, stride, add);
    for (; j < count; j += kRows)
        multiply_tiles<narrow, 1>(x, panels + j * words, 0, words, count - j < kRows ? count - j : kRows, out + j, stride, add);
}

// A tile of numbers -> one of pairs, which are neighbours of a token.
static void narrow_tile(int64_t depth, const float* tile, float* words) {
    constexpr int64_t T = kTileTokens;
    for (int64_t k = 0; k < depth; k += 2, tile += 2 * T, words += T)
        for (int64_t g = 0; g < T; g += N) store(words + g, pairs_of(load(tile + g), k + 1 < depth ? load(tile + T + g) : set(0)));
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
        if (&p.terms[i] != &t && p.terms[i].depth() < kReach / 8) small += p.terms[i].depth();
    const int64_t cuts = (t.depth() + small + kReach - 1) / kReach;
    const int64_t unit = t.weight.tiles && !t.back ? t.weight.tiles->unit() : kRows;
    const int64_t step = round_up((t.depth() + cuts - 1) / cuts, unit);
    return step < kReach ? step : kReach;
}

static std::vector<Cut> cuts_of(const Products& p) {
    std::vector<Cut> cuts;
    for (int i = 0; i < p.count; i++) {
        const int64_t depth = p.terms[i].depth(), step = step_of(p, p.terms[i]);
        for (int64_t k = 0; k < depth; k += step) {
            const int64_t some = depth - k < step ? depth - k : step;
            if (cuts.empty() || cuts.back().count == kTerms || k > 0 || cuts.back().depth + some > kReach)
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

// What is woven together: tokens [token, token + tokens) of `count` cuts.
struct Region {
    const Cut* cuts;
    int64_t count, token, tokens;
    float* woven;
    bool narrow, last;  // last: the sums are whole with it

    int64_t words(int64_t cut) const { return narrow ? (cuts[cut].depth + 1) / 2 : cuts[cut].depth; }
    int64_t tiles() const { return (tokens + kTileTokens - 1) / kTileTokens; }
    int64_t tile_floats() const { return tile_room(narrow ? kReach / 2 : kReach); }
    float* tile(int64_t cut, int64_t at) const { return woven + (cut * tiles() + at / kTileTokens) * tile_floats(); }
    static constexpr int64_t tile_room(int64_t words) { return round_up(words * kTileTokens + N, kRows); }
};

static void weave_block(const Products& p, const Region& r, int64_t c, int64_t at, float* room) {
    const int64_t end = r.tokens - at < kTall ? r.tokens : at + kTall;
    for (; at < end; at += kTileTokens) {
        float* tile = r.narrow ? room : r.tile(c, at);
        const int64_t count = r.tokens - at < kTileTokens ? r.tokens - at : kTileTokens, token = r.token + at;
        for (int i = 0; i < r.cuts[c].count; i++) {
            const Stretch& s = r.cuts[c].parts[i];
            const Term& t = p.terms[s.term];
            float* to = tile + s.at * kTileTokens;
            if (t.turned) weave_turned(t.x + s.k * p.tokens, p.tokens, token, count, s.depth, t.scale, to);
            else weave(t.x + token * t.depth() + s.k, t.depth(), count, s.depth, t.scale, to);
        }
        if (r.narrow) narrow_tile(r.cuts[c].depth, tile, r.tile(c, at));
    }
}

// The floats that a strip of `depth` places takes, or weaving a tile.
static int64_t products_room(int64_t strip, int64_t depth) {
    return (2 * depth + kRows + 2) * strip + Region::tile_room(kReach);
}

// Columns [from, from + count) of what a cut multiplies -> panels.
static const float* unpack(const Products& p, const Cut& cut, int64_t from, int64_t count, bool narrow, float* room) {
    const int64_t wide = round_up(count, kRows), apart = cut.depth * kRows, words = (cut.depth + 1) / 2 * kRows;
    float *panels = room, *pairs = panels + cut.depth * wide, *tiles = pairs + (cut.depth + 1) * wide;
    for (int i = 0; i < cut.count; i++) {
        const Stretch& s = cut.parts[i];
        unpack_strip(p.terms[s.term], s.k, s.depth, from, count, tiles, panels + s.at * kRows, apart);
    }
    if (!narrow) return panels;
    for (int64_t j = 0; j < wide / kRows; j++) narrow_panel(cut.depth, panels + j * apart, pairs + j * words);
    return pairs;
}

// Tokens [token, end) of a region times columns [from, from + count): a strip stays in the second level of cache.
static void product_strip(const Products& p, const Region& r, int64_t token, int64_t end, int64_t from, int64_t count,
                          float* room) {
    for (int64_t c = 0; c < r.count; c++) {
        const Cut& cut = r.cuts[c];
        const float* panels = unpack(p, cut, from, count, r.narrow, room);
        for (int64_t at = token; at < end; at += kTall) {
            const Woven some{r.tile(c, at), r.tile_floats(), end - at < kTall ? end - at : kTall};
            float* out = p.out + (r.token + at) * p.width + from;
            const bool add = p.add || cut.before > 0;
            if (r.narrow) multiply_block<true>(some, panels, r.words(c), count, out, p.width, add);
            else multiply_block<false>(some, panels, r.words(c), count, out, p.width, add);
        }
    }
    if (p.bias && r.last) add_bias(p, r.token + token, end - token, from, count);
}

// The places of the longest cut.
static int64_t deepest(const Region& r) {
    int64_t depth = 0;
    for (int64_t c = 0; c < r.count; c++) depth = r.cuts[c].depth > depth ? r.cuts[c].depth : depth;
    return depth;
}

// Columns that are unpacked together: as many as kHeld floats, in whole units of tiles that are read across, all strips
// alike; fewer where tokens are too few to be shared out.
static int64_t strip_of(const Products& p, int64_t depth, int64_t threads) {
    const int64_t most = kHeld / depth / kRows * kRows, fewest = (p.width + most - 1) / most;
    const int64_t strips = p.tokens > 2 * kTall || fewest > 4 * threads ? fewest : 4 * threads;
    return round_up((p.width + strips - 1) / strips, unit_of(p));
}

static void products_of(const Products& p, const Region& r, Pool& pool) {
    const int64_t blocks = (r.tokens + kTall - 1) / kTall, depth = deepest(r), strip = strip_of(p, depth, pool.threads());
    const auto room = [&](int thread) { return pool.scratch(thread, products_room(strip, depth)); };
    pool.run(blocks * r.count, [&](int64_t task, int thread) {
        weave_block(p, r, task % r.count, task / r.count * kTall, room(thread));
    });
    const int64_t strips = (p.width + strip - 1) / strip, enough = 4 * pool.threads();
    int64_t passes = (r.tokens + kPass - 1) / kPass;
    if (pool.threads() > 1 && passes * strips < enough) passes = (enough + strips - 1) / strips;
    const int64_t pass = round_up((r.tokens + passes - 1) / passes, kTall);
    passes = (r.tokens + pass - 1) / pass;
    pool.run(strips * passes, [&](int64_t task, int thread) {
        const int64_t from = task % strips * strip, token = task / strips * pass;
        product_strip(p, r, token, token + pass < r.tokens ? token + pass : r.tokens, from,
                      p.width - from < strip ? p.width - from : strip, room(thread));
    });
}

static int64_t equal(int64_t whole, int64_t most, int64_t unit) {
    const int64_t parts = (whole + most - 1) / most;
    return round_up((whole + parts - 1) / parts, unit);
}

constexpr int kHalfPanel = L > 1 ? L / 2 : 1;  // vectors of half a panel, of which twice as many sums fit
constexpr int kHalfTokens = L > 1 ? 2 * kFloatTokens : kFloatTokens;

// A result of up to 16 columns, as a LoRA's narrow half has: the tokens are read once, where they lie.
static void thin_products(const Products& p, Pool& pool) {
    const Term& t = p.terms[0];
    const int64_t depth = t.depth(), tasks = pieces(pool, p.tokens, kTall / 2), step = equal(p.tokens, (p.tokens + tasks - 1) / tasks, 1);
    float* panel = pool.shared(2, depth * kRows);
    unpack_strip(t, 0, depth, 0, p.width, nullptr, panel, 0);
    pool.run((p.tokens + step - 1) / step, [&](int64_t task, int thread) {
        const int64_t at = task * step, some = p.tokens - at < step ? p.tokens - at : step;
        float *sums = pool.scratch(thread, step * kRows), *out = p.out + at * p.width;
        const auto multiply = p.width <= kHalfPanel * N ? multiply_panels<float, kHalfTokens, kHalfPanel> : multiply_panels<float>;
        multiply(some, t.x + at * depth, depth, panel, kRows, depth, sums, kRows, false, 1);
        for (int64_t i = 0; i < some; i++)
            for (int64_t j = 0; j < p.width; j++)
                out[i * p.width + j] = (p.add ? out[i * p.width + j] : 0.0f) + t.scale * sums[i * kRows + j] + (p.bias ? p.bias[j] : 0.0f);
    });
}

constexpr int64_t kLong = 48;  // tokens that are summed up at a time: 48 rows of kAcross columns, in the first level of cache
constexpr int64_t kAcross = 96;

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
    const int64_t all = static_cast<int64_t>(cuts.size()), most = equal(p.tokens, kMost, kTileTokens);
    const int64_t fit = kWoven / (most / kTileTokens * Region::tile_room(kReach)), together = equal(all, fit < 1 ? 1 : fit, 1);
    float* woven = pool.shared(2, together * (most / kTileTokens) * Region::tile_room(kReach));
    for (int64_t token = 0; token < p.tokens; token += most)
        for (int64_t c = 0; c < all; c += together)
            products_of(p, {cuts.data() + c, all - c < together ? all - c : together, token,
                            p.tokens - token < most ? p.tokens - token : most, woven, p.narrow, c + together >= all}, pool);
}
