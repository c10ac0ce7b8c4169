// What latent attention (DeepSeek-V2) does to queries before they meet the latents.

constexpr int64_t kHeadTile = Region::tile_room(kDepth);  // floats of a tile of queries

// One head's queries of some tokens times columns [from, from + count) of its matrix.
static void absorb_strip(const Absorb& p, int64_t head, int64_t token, int64_t tokens, int64_t from, int64_t count,
                         int64_t strip, float* panels) {
    float *room = panels + kDepth * strip, *tiles = room + kRows * strip;
    const Term t{nullptr, of_stack(p.weight, head), true, false, 1.0f};
    const int64_t n = p.weight.rows, width = p.weight.columns + p.r, stride = p.heads * width;
    float* out = p.out + token * stride + head * width + from;
    for (int64_t k = 0; k < n; k += kDepth) {
        const int64_t depth = n - k < kDepth ? n - k : kDepth;
        unpack_strip(t, k, depth, from, count, room, panels, depth * kRows);
        for (int64_t i = 0; i < tokens; i += kTileTokens)
            weave(p.q + ((token + i) * p.heads + head) * n + k, p.heads * n, tokens - i, depth, 1.0f,
                  tiles + i / kTileTokens * kHeadTile);
        multiply_block<false>({tiles, kHeadTile, tokens}, panels, depth, count, out, stride, k > 0);
    }
}

static void absorb(const Absorb& p, Pool& pool) {
    const int64_t latent = p.weight.columns, width = latent + p.r;
    const int64_t unit = p.weight.tiles && p.weight.tiles->unit() > kRows ? p.weight.tiles->unit() : kRows;
    // Few tokens meet each number once: a strip that fits the first level of cache; many, one for the second.
    const int64_t strip = round_up(p.tokens < kMany ? 64 : 256, unit), strips = (latent + strip - 1) / strip;
    const int64_t chunks = (p.tokens + kTall - 1) / kTall;
    pool.run(p.heads * strips * chunks, [&](int64_t task, int thread) {
        const int64_t head = task % p.heads, from = task / p.heads % strips * strip;
        const int64_t token = task / p.heads / strips * kTall;
        const int64_t tokens = p.tokens - token < kTall ? p.tokens - token : kTall;
        absorb_strip(p, head, token, tokens, from, latent - from < strip ? latent - from : strip, strip,
                     pool.scratch(thread, (kDepth + kRows) * strip + kTall / kTileTokens * kHeadTile));
        if (from) return;
        for (int64_t t = token; t < token + tokens; t++)
            std::memcpy(p.out + (t * p.heads + head) * width + latent, p.turning + (t * p.heads + head) * p.r,
                        sizeof(float) * p.r);
    });
}
