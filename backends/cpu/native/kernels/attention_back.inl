// The gradient of attention in training, where a row sees itself alone. As in FlashAttention's backward pass (Dao et al.
// 2022) scores are computed again, for a block of queries at a time: no matrix of all scores is ever whole.

// Rows (tokens x heads that share a key head) of scores that are held at once: few are left over by what is multiplied together.
constexpr int64_t kBackRows = 64 / kFloatTokens * kFloatTokens;

struct BackRoom {
    float *keys, *values;      // in panels of 16 places: [places / 16][d or dv][16]
    float *rows;               // keys in panels of 16 of their numbers: [d / 16][places][16]
    float *to_keys, *to_values;
    float *q, *grad, *to_q;    // of the queries
    float *weights, *scores, *capped;
    int64_t places, d, dv;     // all rounded up to 16
    int64_t apart;             // floats from a row of weights or scores to the next: columns fall into all of a cache's sets
};

static int64_t back_room_size(const Attention& p) {
    const int64_t places = round_up(p.T, kRows), d = round_up(p.d, kRows), dv = round_up(p.dv, kRows);
    const int64_t rows = kBackRows + p.H / p.K;
    return places * (3 * d + 2 * dv) + rows * (2 * d + dv + 3 * (places + kRows));
}

static BackRoom back_room_at(float* data, const Attention& p) {
    BackRoom room{};
    room.places = round_up(p.T, kRows), room.d = round_up(p.d, kRows), room.dv = round_up(p.dv, kRows);
    room.apart = room.places + kRows;
    const int64_t rows = kBackRows + p.H / p.K;
    const auto take = [&](int64_t floats) {
        float* taken = data;
        data += floats;
        return taken;
    };
    room.keys = take(room.places * room.d), room.rows = take(room.places * room.d);
    room.to_keys = take(room.places * room.d);
    room.values = take(room.places * room.dv), room.to_values = take(room.places * room.dv);
    room.q = take(rows * room.d), room.to_q = take(rows * room.d), room.grad = take(rows * room.dv);
    room.weights = take(rows * room.apart), room.scores = take(rows * room.apart);
    room.capped = take(rows * room.apart);
    return room;
}

// One head's numbers of a token, with zeros up to `wide`.
static inline void put_head(const float* from, int64_t width, int64_t wide, float scale, float* to) {
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale;
    for (int64_t i = width; i < wide; i++) to[i] = 0;
}

static void gather_keys(const Attention& p, int64_t b, int64_t kv, const BackRoom& room) {
    std::memset(room.keys, 0, sizeof(float) * room.places * (3 * room.d + 2 * room.dv));  // these lie side by side
    for (int64_t t = 0; t < p.lengths[b]; t++) {
        const int64_t token = (b * p.T + t) * p.K + kv;
        for (int64_t i = 0; i < p.d; i += kRows)
            put_head(p.k + token * p.d + i, p.d - i < kRows ? p.d - i : kRows, kRows, 1.0f, room.rows + i * room.places + t * kRows);
        keep(p.k + token * p.d, p.d, kRows, room.keys + t / kRows * kRows * p.d + t % kRows);
        keep(p.v + token * p.dv, p.dv, kRows, room.values + t / kRows * kRows * p.dv + t % kRows);
    }
}

// One row: scores and the gradient of its weights -> weights and the gradient of its scores; returns the sink's.
static float soften_back(const Attention& p, int64_t h, int64_t count, float* weights, float* grads, float* capped) {
    if (capped) std::memcpy(capped, weights, sizeof(float) * count);
    float largest = largest_of(weights, count);
    if (p.sinks && p.sinks[h] > largest) largest = p.sinks[h];
    float total = exponents(weights, count, largest, weights);
    const float sink = p.sinks ? expf(p.sinks[h] - largest) : 0.0f;
    total += sink;
    const F inverse = set(1.0f / total);
    F sums = set(0);
    for (int64_t j = 0; j < count; j += N) {
        const F weight = load(weights + j) * inverse;
        store(weights + j, weight);
        sums = fma(weight, load(grads + j), sums);
    }
    const float shared = sum(sums);
    for (int64_t j = 0; j < count; j += N) {
        F grad = load(weights + j) * (load(grads + j) - set(shared));
        if (capped) {
            const F part = max(set(-1.0f), load(capped + j) * set(1.0f / p.softcap));  // of hidden places: -1
            grad = grad * (set(1.0f) - part * part);
        }
        store(grads + j, grad);
    }
    return -sink / total * shared;
}

// What one block of queries gives: to_q, and its share of to_keys, to_values and to_sinks [heads of the group].
static void back_block(const AttentionBack& b, const Part& part, const BackRoom& room, float* to_sinks) {
    const Attention& p = b.forward;
    const int64_t group = p.H / p.K, rows = part.tokens * group, apart = room.apart;
    const int64_t real = part.end - part.begin, count = round_up(real, kRows);
    const auto head = [&](int64_t r) { return (part.b * p.T + part.token + r / group) * p.H + part.kv * group + r % group; };
    for (int64_t r = 0; r < rows; r++) {
        put_head(p.q + head(r) * p.d, p.d, room.d, p.scale, room.q + r * room.d);
        put_head(b.grad + head(r) * p.dv, p.dv, room.dv, 1.0f, room.grad + r * room.dv);
    }
    for (int64_t j = 0; j < count; j += kRows) {
        const int64_t at = part.begin + j;
        multiply_panels(rows, room.q, room.d, room.keys + at * p.d, kRows, p.d, room.weights + j, apart, false);
        multiply_panels(rows, room.grad, room.dv, room.values + at * p.dv, kRows, p.dv, room.scores + j, apart, false);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *weights = room.weights + r * apart, *scores = room.scores + r * apart;
        if (p.softcap > 0) cap_scores(weights, count, p.softcap);
        hide(p, part, part.token + r / group, part.begin, count, weights);
        const int64_t h = part.kv * group + r % group;
        to_sinks[r % group] += soften_back(p, h, count, weights, scores, p.softcap > 0 ? room.capped + r * apart : nullptr);
    }
    for (int64_t i = 0; i < room.d; i += kRows) {
        multiply_panels(rows, room.scores, apart, room.rows + i * room.places + part.begin * kRows, kRows, real, room.to_q + i,
                        room.d, false);
        multiply_panels(real, room.scores, 1, room.q + i, room.d, rows, room.to_keys + part.begin * room.d + i, room.d, true,
                        apart);
    }
    for (int64_t i = 0; i < room.dv; i += kRows)
        multiply_panels(real, room.weights, 1, room.grad + i, room.dv, rows, room.to_values + part.begin * room.dv + i,
                        room.dv, true, apart);
    for (int64_t r = 0; r < rows; r++) put_head(room.to_q + r * room.d, p.d, p.d, p.scale, b.to_q + head(r) * p.d);
}

// Where the queries of the i-th of `cuts` parts begin: a late query sees more keys, so equal work is equal squares.
static int64_t back_begin(int64_t length, int64_t step, int64_t i, int64_t cuts) {
    const int64_t at = static_cast<int64_t>(static_cast<float>(length) * sqrtf(static_cast<float>(i) / static_cast<float>(cuts)));
    return i == cuts ? length : round_up(at, step) < length ? round_up(at, step) : length;
}

// The sums of all parts -> the gradients of one row's and key head's keys and values; 0 for the queries behind the last.
static void put_back(const AttentionBack& b, int64_t row, int64_t kv, const float* sums, int64_t cuts) {
    const Attention& p = b.forward;
    const int64_t places = round_up(p.T, kRows), d = round_up(p.d, kRows), dv = round_up(p.dv, kRows), group = p.H / p.K;
    for (int64_t t = 0; t < p.T; t++) {
        const int64_t token = row * p.T + t;
        float *to_k = b.to_k + (token * p.K + kv) * p.d, *to_v = b.to_v + (token * p.K + kv) * p.dv;
        for (int64_t cut = 0; cut < cuts; cut++) {
            const float *keys = sums + cut * places * (d + dv) + t * d, *values = sums + cut * places * (d + dv) + places * d + t * dv;
            for (int64_t i = 0; i < p.d; i++) to_k[i] = keys[i] + (cut ? to_k[i] : 0.0f);
            for (int64_t i = 0; i < p.dv; i++) to_v[i] = values[i] + (cut ? to_v[i] : 0.0f);
        }
        if (t >= p.lengths[row]) std::memset(b.to_q + (token * p.H + kv * group) * p.d, 0, sizeof(float) * group * p.d);
    }
}

// A task is a row and a key head; where these are too few for the threads, their queries are cut into parts.
static void attention_back(const AttentionBack& b, Pool& pool) {
    const Attention& p = b.forward;
    const int64_t group = p.H / p.K, step = kBackRows / group ? kBackRows / group : 1, heads = p.B * p.K;
    const int64_t wanted = pool.threads() == 1 ? 1 : (4 * pool.threads() + heads - 1) / heads, most = (p.T + step - 1) / step;
    const int64_t cuts = wanted < most ? wanted : most;
    const int64_t size = round_up(p.T, kRows) * (round_up(p.d, kRows) + round_up(p.dv, kRows));
    float *all = pool.shared(0, heads * cuts * size), *sinks = pool.shared(1, heads * cuts * group);
    pool.run(heads * cuts, [&](int64_t task, int thread) {
        const int64_t row = task / cuts / p.K, kv = task / cuts % p.K, cut = cuts - 1 - task % cuts, length = p.lengths[row];
        const BackRoom room = back_room_at(pool.scratch(thread, back_room_size(p)), p);
        gather_keys(p, row, kv, room);
        float* to_sinks = sinks + (task / cuts * cuts + cut) * group;
        for (int64_t h = 0; h < group; h++) to_sinks[h] = 0;
        const int64_t end = back_begin(length, step, cut + 1, cuts);
        for (int64_t token = back_begin(length, step, cut, cuts); token < end; token += step)
            back_block(b, part_of(p, row, kv, token, end - token < step ? end - token : step), room, to_sinks);
        float* sums = all + (task / cuts * cuts + cut) * size;
        std::memcpy(sums, room.to_keys, sizeof(float) * room.places * room.d);
        std::memcpy(sums + room.places * room.d, room.to_values, sizeof(float) * room.places * room.dv);
    });
    pool.run(heads, [&](int64_t task, int) {
        const int64_t row = task / p.K, kv = task % p.K;
        put_back(b, row, kv, all + task * cuts * size, cuts);
        for (int64_t h = 0; b.to_sinks && h < group; h++) {
            float sum = 0;
            for (int64_t cut = 0; cut < cuts; cut++) sum += sinks[(task * cuts + cut) * group + h];
            b.to_sinks[row * p.H + kv * group + h] = sum;
        }
    });
}
