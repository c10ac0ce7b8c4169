// Attention over the cache, with the running softmax of FlashAttention (Dao et al. 2022): keys pass in blocks, each
// query keeps its largest score, the sum of its weights and its weighted sum of values.
//
// Keys lie 16 to a panel, [d][16], so that a query meets 16 of them in each step, and nothing is summed across; values
// lie as they come, a row a token. Both are the panels that multiply_panels takes. All query heads that share a key
// head are done together: what is read from the cache is read once for them. Latents are stored as keys alone; as values
// they are turned, 16 numbers of a block of keys at a time.

constexpr int64_t kKeys = 128;      // a block of keys: its values (d = 64, float32) fill the first level of cache
constexpr int64_t kQueries = 32;    // rows (tokens x heads that share a key head) that meet a block together, about
constexpr int64_t kSplit = 512;     // keys that make a task of their own when queries are few
constexpr int64_t kSplitLatents = 64;  // the same of latents, which meet all heads at once

template <class E>
struct Heads {  // where one layer's keys and values lie, in the cache or for this call alone
    E *keys, *values;
    int64_t d, width, places;  // width: dv rounded up to 16; places: tokens rounded up to 16
    float *key_scales = nullptr, *value_scales = nullptr;  // [heads, places], of int8

    E* key_panels(int64_t head) const { return keys + head * places * d; }
    E* value_rows(int64_t head) const { return values ? values + head * places * width : nullptr; }
};

// Numbers as the cache holds them; returns the scale that brings them back.
template <class E>
static inline float keep(const float* from, int64_t count, int64_t stride, E* to) {
    for (int64_t i = 0; i < count; i++) narrow(from[i], to + i * stride);
    return 1.0f;
}

static inline float keep(const float* from, int64_t count, int64_t stride, int8_t* to) {
    float most = 0;
    for (int64_t i = 0; i < count; i++) {
        const float size = std::fabs(from[i]);
        if (!(size <= most) && most == most) most = size;  // not-a-number stays
    }
    const bool sound = most > 0 && most <= 3e38f;  // otherwise the scale says it: 0, infinite, or not a number
    const float inverse = sound ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < count; i++)
        to[i * stride] = sound ? static_cast<int8_t>(std::nearbyint(from[i] * inverse)) : int8_t{0};
    return most / 127.0f;
}

static inline void scale_row(float* row, const float* scales, int64_t count) {
    for (int64_t j = 0; j < count; j += N) store(row + j, load(row + j) * load(scales + j));
}

struct Span {  // tokens of each row that are written, then attended to
    int64_t from, to;

    int64_t end(const Attention& p, int64_t b) const { return to < p.lengths[b] ? to : p.lengths[b]; }
};

// The keys and values of row b's tokens, of head `head` (of row b's slot); token t goes to place first + t.
template <class E>
static void write_head(const Attention& p, const Heads<E>& heads, int64_t b, int64_t kv, int64_t head, Span span,
                       int64_t first) {
    E *keys = heads.key_panels(head), *values = heads.value_rows(head);
    for (int64_t t = span.from; t < span.end(p, b); t++) {
        const int64_t token = (b * p.T + t) * p.stored() + kv, place = first + t;
        const float scale = keep(p.k + token * p.d, p.d, kRows, keys + place / kRows * kRows * p.d + place % kRows);
        if (heads.key_scales) heads.key_scales[head * heads.places + place] = scale;
        if (p.latent) continue;
        E* row = values + place * heads.width;
        const float value_scale = keep(p.v + token * p.dv, p.dv, 1, row);
        std::memset(row + p.dv, 0, sizeof(E) * (heads.width - p.dv));
        if (heads.value_scales) heads.value_scales[head * heads.places + place] = value_scale;
    }
}

// One task: some tokens of row b, the query heads of one key head, and a part of the keys.
struct Part {
    int64_t b, kv, head;       // head: of the slot in the cache
    int64_t token, tokens;     // queries
    int64_t first;             // place of the row's first new token
    int64_t base;              // place + base = position
    int64_t begin, end;        // keys' places; begin is a multiple of 16
};

constexpr int64_t kSmall = 40000;  // products below which waking the other threads costs more than they save

// What a query at `position` sees: places [return value, its own].
static inline int64_t earliest(const Attention& p, int64_t position, int64_t base) {
    int64_t from = 0;
    if (p.window && position - p.window + 1 > from) from = position - p.window + 1;
    if (p.chunk && position / p.chunk * p.chunk > from) from = position / p.chunk * p.chunk;
    return from > base ? from - base : 0;
}

// Scores of one query against places [at, at + count) become weights; returns their largest score so far.
struct Running {
    float largest, sum;
};

static inline void hide(const Attention& p, const Part& part, int64_t t, int64_t at, int64_t count, float* scores) {
    const int64_t place = part.first + t, from = earliest(p, place + part.base, part.base);
    const float never = -INFINITY;
    for (int64_t j = 0; j < count && at + j < from; j++) scores[j] = never;
    for (int64_t j = place + 1 > at ? place + 1 - at : 0; j < count; j++) scores[j] = never;
    if (!p.segments) return;
    const int32_t* segments = p.segments + part.b * p.T;  // no cache: places are tokens
    for (int64_t j = 0; j < count && at + j < p.T; j++)
        if (segments[at + j] != segments[t]) scores[j] = never;
}

// One row of scores (count a multiple of 16) -> weights relative to the largest; returns what the old sums shrink by.
static inline float soften(float* scores, int64_t count, Running& row) {
    F most = load(scores);
    for (int64_t j = N; j < count; j += N) most = max(load(scores + j), most);
    const float block = top(most), largest = block <= row.largest ? row.largest : block;  // not-a-number stays
    if (largest == -INFINITY) {  // nothing seen yet
        for (int64_t j = 0; j < count; j += N) store(scores + j, set(0));
        return 1.0f;
    }
    F sums = set(0);
    for (int64_t j = 0; j < count; j += N) {
        const F weight = exp(load(scores + j) - set(largest));
        store(scores + j, weight);
        sums = sums + weight;
    }
    const float shrink = row.largest == largest ? 1.0f : expf(row.largest - largest);
    row.sum = row.sum * shrink + sum(sums);
    row.largest = largest;
    return shrink;
}

static inline void cap_scores(float* scores, int64_t count, float cap) {
    for (int64_t j = 0; j < count; j += N) store(scores + j, set(cap) * tanh(load(scores + j) * set(1.0f / cap)));
}

// A line to fetch in each step, and how far the next one's is: processors guess that within a page of 4 KB only, and late
// where two streams, keys and values, take turns.
struct Ahead {
    const void* at;
    int64_t step;
};

// out [T, P x 16] (+)= x [T, depth] . P panels that lie `apart`, each [depth, 16]
template <int T, int P, class E>
static ONDEVICE_INLINE void multiply_side(const float* x, int64_t x_stride, const E* panel, int64_t apart, int64_t stride,
                                          int64_t depth, float* out, int64_t out_stride, bool add, Ahead ahead) {
    F y[T][P * L];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < P * L; i++) y[t][i] = add ? load(out + t * out_stride + i * N) : set(0);
    const char* soon = static_cast<const char*>(ahead.at);
    for (int64_t k = 0; k < depth; k++, panel += stride, soon += ahead.step) {
        fetch<2>(soon);
        F a[T];
        ONDEVICE_UNROLL
        for (int t = 0; t < T; t++) a[t] = set(x[t * x_stride + k]);
        ONDEVICE_UNROLL
        for (int i = 0; i < P * L; i++) {
            const F w = load(panel + i / L * apart + i % L * N);
            ONDEVICE_UNROLL
            for (int t = 0; t < T; t++) y[t][i] = fma(a[t], w, y[t][i]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < P * L; i++) store(out + t * out_stride + i * N, y[t][i]);
}

// `count` panels for T rows, several at once: with few sums each would wait for the one before.
template <int T, class E>
static inline void multiply_row(const float* x, int64_t x_stride, const E* panel, int64_t apart, int64_t stride,
                                int64_t depth, int64_t count, float* out, int64_t out_stride, bool add, Ahead ahead) {
    constexpr int P = T == 1 ? 4 : 2;
    const bool rows = apart == kRows;  // panels side by side, in rows: a line for each step; or one after another
    int64_t i = 0;
    for (; i + P <= count; i += P) {
        const auto* next = static_cast<const E*>(ahead.at) + i * apart;
        multiply_side<T, P>(x, x_stride, panel + i * apart, apart, stride, depth, out + i * kRows, out_stride, add,
                            Ahead{next, static_cast<int64_t>(sizeof(E)) * (rows ? stride : P * kRows)});
    }
    for (; i < count; i++) {
        const auto* next = static_cast<const E*>(ahead.at) + i * apart;
        multiply_side<T, 1>(x, x_stride, panel + i * apart, apart, stride, depth, out + i * kRows, out_stride, add,
                            Ahead{next, static_cast<int64_t>(sizeof(E)) * stride});
    }
}

template <class E>
static void multiply_all(int64_t rows, const float* x, int64_t x_stride, const E* panel, int64_t apart, int64_t stride,
                         int64_t depth, int64_t count, float* out, int64_t out_stride, bool add, const E* soon) {
    const Ahead ahead{soon, 0};
    switch (rows) {
        case 1: return multiply_row<1>(x, x_stride, panel, apart, stride, depth, count, out, out_stride, add, ahead);
        case 2: return multiply_row<2>(x, x_stride, panel, apart, stride, depth, count, out, out_stride, add, ahead);
        case 3: return multiply_row<3>(x, x_stride, panel, apart, stride, depth, count, out, out_stride, add, ahead);
    }
    for (int64_t i = 0; i < count; i++)
        multiply_panels(rows, x, x_stride, panel + i * apart, stride, depth, out + i * kRows, out_stride, add);
}

struct Room {  // one thread's
    float *q, *scores, *out, *turned;
    Running* rows;
};

static inline int64_t room_size(int64_t rows, int64_t d, int64_t width) {
    return rows * (round_up(d, kRows) + kKeys + width + 2) + kKeys * kRows + kRows;
}

static inline Room room_at(float* data, int64_t rows, int64_t d, int64_t width) {
    float* scores = data + rows * round_up(d, kRows);
    float* out = scores + rows * kKeys;
    float* turned = out + rows * width;
    return {data, scores, out, turned, reinterpret_cast<Running*>(turned + kKeys * kRows)};
}

// The queries of a part, scaled: row t * group + g.
static void gather_queries(const Attention& p, const Part& part, int64_t group, const Room& room) {
    for (int64_t t = 0; t < part.tokens; t++)
        for (int64_t g = 0; g < group; g++) {
            const float* q = p.q + ((part.b * p.T + part.token + t) * p.H + part.kv * group + g) * p.d;
            float* to = room.q + (t * group + g) * p.d;
            for (int64_t i = 0; i < p.d; i++) to[i] = q[i] * p.scale;
        }
}

// Numbers [from, from + 16) of `count` keys, which lie in panels [d][16] -> rows of 16; behind the last number, zeros.
template <class E>
static inline void turn_keys(const E* keys, int64_t d, int64_t from, int64_t count, float* rows) {
    for (int64_t j = 0; j < count; j += kRows, keys += d * kRows, rows += kRows * kRows)
        for (int i = 0; i < kRows; i += N)
            for (int half = 0; half < kRows; half += N) {
                F v[N];
                for (int a = 0; a < N; a++)
                    v[a] = from + i + a < d ? load(keys + (from + i + a) * kRows + half) : set(0);
                transpose(v);
                for (int a = 0; a < N; a++) store(rows + (half + a) * kRows + i, v[a]);
            }
}

// room.out += weights . latents, of `real` keys
template <class E>
static inline void attend_turned(const Attention& p, const E* keys, int64_t rows, int64_t real, int64_t width,
                                 const Room& room) {
    for (int64_t i = 0; i < width; i += kRows) {
        turn_keys(keys, p.d, i, real, room.turned);
        multiply_panels(rows, room.scores, kKeys, room.turned, kRows, real, room.out + i, width, true);
    }
}

// Attends to the part's keys; leaves weighted sums (not yet divided) in room.out and the rest in room.rows.
template <class E>
static void attend(const Attention& p, const Heads<E>& heads, const Part& part, const Room& room) {
    const int64_t group = p.H / p.K, rows = part.tokens * group, width = heads.width;
    const E *keys = heads.key_panels(part.head), *values = heads.value_rows(part.head);
    const float* key_scales = heads.key_scales ? heads.key_scales + part.head * heads.places : nullptr;
    const float* value_scales = p.latent             ? key_scales
                                : heads.value_scales ? heads.value_scales + part.head * heads.places
                                                     : nullptr;
    gather_queries(p, part, group, room);
    for (int64_t r = 0; r < rows; r++) room.rows[r] = {-INFINITY, 0};
    std::memset(room.out, 0, sizeof(float) * rows * width);
    const int64_t low = part.first + part.token, high = low + part.tokens - 1;  // places of the queries
    for (int64_t at = part.begin; at < part.end; at += kKeys) {
        const int64_t real = part.end - at < kKeys ? part.end - at : kKeys, count = round_up(real, kRows);
        multiply_all(rows, room.q, p.d, keys + at * p.d, kRows * p.d, kRows, p.d, count / kRows, room.scores, kKeys, false,
                     keys + (at + kKeys) * p.d);
        const bool all = at + count <= low + 1 && earliest(p, high + part.base, part.base) <= at && !p.segments;
        for (int64_t r = 0; r < rows; r++) {
            float* scores = room.scores + r * kKeys;
            if (key_scales) scale_row(scores, key_scales + at, count);
            if (p.softcap > 0) cap_scores(scores, count, p.softcap);
            if (!all) hide(p, part, part.token + r / group, at, count, scores);
            const float shrink = soften(scores, count, room.rows[r]);
            if (value_scales) scale_row(scores, value_scales + at, count);
            if (shrink != 1.0f)
                for (int64_t i = 0; i < width; i += N)
                    store(room.out + r * width + i, load(room.out + r * width + i) * set(shrink));
        }
        if (p.latent) {
            attend_turned(p, keys + at * p.d, rows, real, width, room);
            continue;
        }
        multiply_all(rows, room.scores, kKeys, values + at * width, kRows, width, real, width / kRows, room.out, width, true,
                     values + (at + kKeys) * width);
    }
}

// A finished row: divided by the sum of all weights, the sink's among them, and put where it belongs.
static inline void put_row(const Attention& p, int64_t token, int64_t h, Running row, const float* sums) {
    float* out = p.out + (token * p.H + h) * p.dv;
    float scale = 1.0f;
    if (p.sinks) {
        const float largest = row.largest > p.sinks[h] ? row.largest : p.sinks[h];
        scale = expf(row.largest - largest);
        row.sum = row.sum * scale + expf(p.sinks[h] - largest);
    }
    scale = row.sum == 0 ? 0.0f : scale / row.sum;
    for (int64_t i = 0; i < p.dv; i++) out[i] = sums[i] * scale;
}

static void put_part(const Attention& p, const Part& part, const Room& room, int64_t width) {
    const int64_t group = p.H / p.K;
    for (int64_t r = 0; r < part.tokens * group; r++)
        put_row(p, part.b * p.T + part.token + r / group, part.kv * group + r % group, room.rows[r],
                room.out + r * width);
}

// Where a cache keeps no more than a window needs, places are used up: what is still needed of row b moves to the front.
template <class E>
static void make_room(const Attention& p, const Heads<E>& heads, int64_t b, Span span) {
    const int64_t first = p.starts[b] + span.from, base = p.base(b);
    if (first < base) throw std::invalid_argument("these tokens' past is not held any more: truncate the cache first");
    if (span.end(p, b) <= span.from || p.starts[b] + span.end(p, b) - base <= heads.places) return;
    const int64_t by = (first - p.kept - base) / kRows * kRows, count = round_up(first - base - by, kRows);
    for (int64_t head = p.slots[b] * p.stored(); head < (p.slots[b] + 1) * p.stored(); head++) {
        E* keys = heads.key_panels(head);
        std::memmove(keys, keys + by * p.d, sizeof(E) * count * p.d);
        if (E* values = heads.value_rows(head)) std::memmove(values, values + by * heads.width, sizeof(E) * count * heads.width);
        for (float* all : {heads.key_scales, heads.value_scales}) {
            float* scales = all ? all + head * heads.places : nullptr;
            if (scales) std::memmove(scales, scales + by, sizeof(float) * count);
        }
    }
    p.bases[p.slots[b]] += static_cast<int32_t>(by);
}

// What row b's queries [token, token + tokens) of key head kv are, and all keys that any of them sees.
static Part part_of(const Attention& p, int64_t b, int64_t kv, int64_t token, int64_t tokens) {
    const bool cached = p.keys != nullptr;
    Part part{b, kv, (cached ? p.slots[b] : b) * p.stored() + (p.latent ? 0 : kv), token, tokens,
              cached ? p.starts[b] - p.base(b) : 0, cached ? p.base(b) : p.starts[b], 0, 0};
    const int64_t place = part.first + token;
    part.begin = earliest(p, place + part.base, part.base) / kRows * kRows;
    part.end = place + tokens;
    return part;
}

// Few queries and many keys: the keys are cut in pieces, each a task, and their sums are put together afterwards.
template <class E>
static void attend_split(const Attention& p, const Heads<E>& heads, const Part& whole, int64_t cuts, Pool& pool) {
    const int64_t rows = whole.tokens * (p.H / p.K), size = room_size(rows, p.d, heads.width);
    const int64_t step = round_up((whole.end - whole.begin + cuts - 1) / cuts, kRows);
    float* rooms = pool.shared(0, p.K * cuts * size);
    const auto work = [&](int64_t task, int) {
        Part part = whole;
        part.kv = task / cuts;
        part.head = whole.head + (p.latent ? 0 : part.kv);
        part.begin = whole.begin + task % cuts * step;
        part.end = part.begin + step < whole.end ? part.begin + step : whole.end;
        attend(p, heads, part, room_at(rooms + task * size, rows, p.d, heads.width));
    };
    if ((whole.end - whole.begin) * p.H * p.d * whole.tokens < kSmall) {
        for (int64_t task = 0; task < p.K * cuts; task++) work(task, 0);
    } else {
        pool.run(p.K * cuts, work);
    }
    for (int64_t kv = 0; kv < p.K; kv++) {
        const Room all = room_at(rooms + kv * cuts * size, rows, p.d, heads.width);
        for (int64_t cut = 1; cut < cuts; cut++) {
            const Room one = room_at(rooms + (kv * cuts + cut) * size, rows, p.d, heads.width);
            for (int64_t r = 0; r < rows; r++) {
                if (one.rows[r].sum == 0) continue;
                Running& sum = all.rows[r];
                const float largest = sum.largest > one.rows[r].largest ? sum.largest : one.rows[r].largest;
                const float a = expf(sum.largest - largest), b = expf(one.rows[r].largest - largest);
                sum = {largest, sum.sum * a + one.rows[r].sum * b};
                float *to = all.out + r * heads.width, *from = one.out + r * heads.width;
                for (int64_t i = 0; i < heads.width; i += N)
                    store(to + i, fma(load(from + i), set(b), load(to + i) * set(a)));
            }
        }
        Part part = whole;
        part.kv = kv;
        put_part(p, part, all, heads.width);
    }
}

// Many queries: each task takes some tokens of one row and one key head; late tokens see more, so they come first.
template <class E>
static void attend_blocks(const Attention& p, const Heads<E>& heads, Span span, Pool& pool) {
    const int64_t group = p.H / p.K, step = kQueries / group ? kQueries / group : 1;
    const int64_t blocks = (span.to - span.from + step - 1) / step;
    pool.run(blocks * p.B * p.K, [&](int64_t task, int thread) {
        const int64_t b = task / p.K % p.B, token = span.from + (blocks - 1 - task / p.K / p.B) * step;
        const int64_t length = span.end(p, b);
        if (token >= length) return;
        const Part part = part_of(p, b, task % p.K, token, length - token < step ? length - token : step);
        const int64_t rows = step * group;
        const Room room = room_at(pool.scratch(thread, room_size(rows, p.d, heads.width)), rows, p.d, heads.width);
        attend(p, heads, part, room);
        put_part(p, part, room, heads.width);
    });
}

template <class E>
static void attend_span(const Attention& p, const Heads<E>& heads, Span span, Pool& pool) {
    const int64_t tokens = span.to - span.from;
    const auto write = [&](int64_t task, int) {
        const int64_t b = task / p.stored(), kv = task % p.stored(), slot = p.keys ? p.slots[b] : b;
        write_head(p, heads, b, kv, slot * p.stored() + kv, span, p.keys ? p.starts[b] - p.base(b) : 0);
    };
    if (p.B * tokens * p.stored() * p.d < kSmall) {
        for (int64_t task = 0; task < p.B * p.stored(); task++) write(task, 0);
    } else {
        pool.run(p.B * p.stored(), write);
    }
    if (tokens * (p.H / p.K) > kQueries || p.B > 1) return attend_blocks(p, heads, span, pool);
    if (span.end(p, 0) <= span.from) return;
    const Part whole = part_of(p, 0, 0, span.from, span.end(p, 0) - span.from);
    const int64_t split = p.latent ? kSplitLatents : kSplit, cuts = (whole.end - whole.begin + split - 1) / split;
    attend_split(p, heads, whole, cuts, pool);
}

template <class E>
static void attend_all(const Attention& p, const Heads<E>& heads, Pool& pool) {
    for (int64_t b = 0; b < p.B; b++)
        std::memset(p.out + (b * p.T + p.lengths[b]) * p.H * p.dv, 0,
                    sizeof(float) * (p.T - p.lengths[b]) * p.H * p.dv);
    if (!p.bases) return attend_span(p, heads, Span{0, p.T}, pool);
    const int64_t step = heads.places - p.kept > 2 * kRows ? heads.places - p.kept - kRows : kRows;  // these find room
    for (int64_t from = 0; from < p.T; from += step) {
        const Span span{from, from + step < p.T ? from + step : p.T};
        for (int64_t b = 0; b < p.B; b++) make_room(p, heads, b, span);
        attend_span(p, heads, span, pool);
    }
}

template <class E>
static void attention_in_cache(const Attention& p, Pool& pool) {
    const Heads<E> heads{static_cast<E*>(p.keys), static_cast<E*>(p.values), p.d, round_up(p.dv, kRows),
                         round_up(p.capacity, kRows), p.key_scales, p.value_scales};
    attend_all(p, heads, pool);
}

// Keys and values of this call alone: zeroed, for what lies behind the last token is multiplied with weight 0.
static void attention_alone(const Attention& p, Pool& pool) {
    const int64_t width = round_up(p.dv, kRows), places = round_up(p.T, kRows), heads = p.B * p.stored();
    const int64_t numbers = heads * places * (p.d + (p.latent ? 0 : width));
    float* data = pool.shared(1, numbers);
    std::memset(data, 0, sizeof(float) * numbers);
    attend_all(p, Heads<float>{data, data + heads * places * p.d, p.d, width, places}, pool);
}

static void attention(const Attention& p, Pool& pool) {
    if (!p.keys) return attention_alone(p, pool);
    if (p.type == Number::f32) attention_in_cache<float>(p, pool);
    if (p.type == Number::f16) attention_in_cache<half>(p, pool);
    if (p.type == Number::bf16) attention_in_cache<bfloat>(p, pool);
    if (p.type == Number::i8) attention_in_cache<int8_t>(p, pool);
}
