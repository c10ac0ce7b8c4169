// Linear maps, and what adapters add to them: up . (down . x) beside W . x, in one loop.

// The narrow halves, down . x, of products of the same tokens are the loop's first tasks. The others add the wide halves
// when their own products are done: by then the narrow ones are too, or nearly.
class Narrow {
  public:
    Narrow(const Product* products, int count, int64_t tokens, Pool& pool)
        : products_(products), tokens_(tokens), chunks_((tokens + kChunk - 1) / kChunk), left_(count_tasks(count)) {
        int64_t rank = 0;
        for (int i = 0; i < count; i++) rank += products[i].change.down.rows;
        float* low = rank ? pool.shared(0, static_cast<size_t>(rank * tokens)) : nullptr;
        for (int i = 0; i < count; low += products[i++].change.down.rows * tokens) low_[i] = low;
    }

    int64_t tasks() const { return tasks_; }

    // The narrow half of some tokens of one product.
    void work(int64_t task, float* room) {
        const int product = adapted_[task / chunks_];
        const LowRank& change = products_[product].change;
        const int64_t from = task % chunks_ * kChunk, rank = change.down.rows, columns = change.down.columns;
        const int64_t count = tokens_ - from < kChunk ? tokens_ - from : kChunk;
        float* low = low_[product] + from * rank;
        for (int64_t tile = 0; tile * kRows < rank; tile++)
            float_product(Product{change.down, nullptr, low}, tile, change.x + from * columns, count, room,
                          [](int64_t t) { return t; });
        for (int64_t i = 0; i < count * rank; i++) low[i] *= change.scale;
        left_.arrive();
    }

    // The wide half: added to a finished tile of tokens [from, to) of one product.
    void add(int product, int64_t tile, int64_t from, int64_t to) const {
        const Product& p = products_[product];
        if (!p.change.x) return;
        left_.wait();
        const int64_t rank = p.change.down.rows, row = tile * kRows, rows = p.weight.rows;
        const float* low = low_[product] + from * rank;
        const auto* panel = static_cast<const uint8_t*>(p.change.up.dense) + row * rank * size_of(p.change.up.type);
        if (rows - row >= kRows) return multiply(p, low, panel, to - from, p.out + from * rows + row, rows, true);
        for (int64_t t = from; t < to; t++, low += rank) {
            alignas(64) float sums[kRows];
            multiply(p, low, panel, 1, sums, kRows, false);
            for (int64_t r = row; r < rows; r++) p.out[t * rows + r] += sums[r - row];
        }
    }

  private:
    static void multiply(const Product& p, const float* low, const uint8_t* panel, int64_t tokens, float* out,
                         int64_t stride, bool add) {
        const int64_t rank = p.change.down.rows;
        if (p.change.up.type == Number::f16)
            multiply_panels(tokens, low, rank, reinterpret_cast<const half*>(panel), kRows, rank, out, stride, add);
        else
            multiply_panels(tokens, low, rank, reinterpret_cast<const float*>(panel), kRows, rank, out, stride, add);
    }

    int64_t count_tasks(int count) {
        for (int i = 0; i < count; i++)
            if (products_[i].change.x) adapted_[tasks_++] = i;
        return tasks_ *= chunks_;
    }

    const Product* products_;
    const int64_t tokens_, chunks_;
    int adapted_[kProducts] = {};
    float* low_[kProducts] = {};
    int64_t tasks_ = 0;
    Countdown left_;
};

static void linear_int8(const LinearInt8& p, Pool& pool) {
    int64_t ends[kProducts], tiles = 0;  // tiles of all products, in one row
    for (int i = 0; i < p.count; i++) ends[i] = tiles += p.products[i].weight.tiles->tiles();
    // Tokens by the chunk, such that their codes stay in the second level of cache while all tiles pass.
    const int64_t chunk = round_up(1 + (256 << 10) / p.x.columns, kTokens), chunks = (p.x.tokens + chunk - 1) / chunk;
    const int64_t least = 1 + 32768 / (kRows * p.x.columns * (p.x.tokens < chunk ? p.x.tokens : chunk));
    const int64_t cuts = p.x.tokens >= chunk ? (tiles + least - 1) / least : pieces(pool, tiles, least);
    const int64_t step = (tiles + cuts - 1) / cuts;
    Narrow narrow(p.products, p.count, p.x.tokens, pool);
    pool.run(narrow.tasks() + cuts * chunks, [&](int64_t task, int thread) {
        if (task < narrow.tasks()) return narrow.work(task, pool.scratch(thread, kRoom));
        task -= narrow.tasks();
        const int64_t from = task / cuts * chunk, to = from + chunk < p.x.tokens ? from + chunk : p.x.tokens;
        const int64_t first = task % cuts * step, end = first + step < tiles ? first + step : tiles;
        const auto each = [&](const auto& work) {  // of the task's tiles: work(product, tile)
            for (int64_t at = first, i = 0; at < end; at++) {
                while (at >= ends[i]) i++;
                work(static_cast<int>(i), i ? at - ends[i - 1] : at);
            }
        };
        each([&](int i, int64_t tile) {
            tile_product(p.x, p.products[i], tile, from, to, pool, thread, [&](int64_t t) { return from + t; });
        });
        if (narrow.tasks()) each([&](int i, int64_t tile) { narrow.add(i, tile, from, to); });
    });
}

constexpr int64_t kMany = 32;  // tokens from which strips are worth it

static void linear_many(const LinearFloat& p, Pool& pool) {
    const LowRank& change = p.product.change;
    Products all{{Term{p.x, p.product.weight, false, false, 1.0f}}, 1, p.product.bias, p.product.out, p.tokens,
                 p.product.weight.rows, false, false};
    if (change.x) {
        float* low = pool.shared(0, static_cast<size_t>(p.tokens * change.down.rows));
        const Term narrow{p.x, change.down, false, false, 1.0f};
        products({{narrow}, 1, nullptr, low, p.tokens, change.down.rows, false, false}, pool);
        all.terms[all.count++] = Term{low, change.up, false, false, change.scale};
    }
    products(all, pool);
}

static void linear_float(const LinearFloat& p, Pool& pool) {
    if (p.tokens >= kMany) return linear_many(p, pool);
    const Matrix& w = p.product.weight;
    const int64_t tiles = (w.rows + kRows - 1) / kRows;
    Narrow narrow(&p.product, 1, p.tokens, pool);
    pool.run(narrow.tasks() + tiles, [&](int64_t task, int thread) {
        float* room = pool.scratch(thread, kRoom);
        if (task < narrow.tasks()) return narrow.work(task, room);
        const int64_t tile = task - narrow.tasks();
        float_product(p.product, tile, p.x, p.tokens, room, [](int64_t t) { return t; });
        narrow.add(0, tile, 0, p.tokens);
    });
}
