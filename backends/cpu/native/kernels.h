// What the kernels do, as plain arguments, and the table of functions that do it on one instruction set.
//
// All floats are float32 in rows without gaps unless it says otherwise. Sizes as in backends/base.py: B rows, T tokens,
// H query heads, K key heads, d head size. What changes from step to step (ids, starts, lengths, slots) is read through
// its pointer when a kernel runs, so that a recorded call can be repeated.
#pragma once

#include <cstdint>

#include "pool.h"
#include "tiles.h"

namespace ondevice::cpu {

enum class Activation : int { silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh, clamp, clamped_swish };

// out[i] = a[i] op b[i % period]
struct Pairwise {
    const float *a, *b;
    float* out;
    int64_t size, period;
};

// out[i] = f(a[i]); `number` is what is added, multiplied with or capped at
struct Single {
    const float* a;
    float* out;
    int64_t size;
    float number;
};

// out = act(gate) * up, or act(gate) alone without `up`
struct Gated {
    const float *gate, *up;
    float* out;
    int64_t size;
    Activation kind;
};

// rows of `width`, whose gains are the `gains` vectors in turn; rms_norm: bias unused; layer_norm: offset unused, bias may be null
struct Norm {
    const float *x, *gain, *bias;
    float* out;
    int64_t rows, width, gains;
    float eps, offset;
};

// table [B, T, 2, pairs]: cosines, then sines
struct RopeTable {
    const int32_t* starts;
    const float* freqs;
    float* table;
    int64_t B, T, pairs;
    float scale;
};

// x [tokens, heads, d], table [tokens, 2, pairs]
struct Rope {
    const float *x, *table;
    float* out;
    int64_t tokens, heads, d, pairs;
    bool interleaved;
};

// rows of `bytes` each, the ids[i]-th of x to place i of out
struct Take {
    const uint8_t* x;
    const int32_t* ids;
    uint8_t* out;
    int64_t count, bytes;
};

// columns [from, from + width) of rows of `stride`
struct Piece {
    const float* x;
    float* out;
    int64_t rows, stride, from, width;
};

// A dense matrix [rows, columns] as a file holds it (any address), or quantized tiles.
struct Matrix {
    const void* dense;
    Number type;
    int64_t rows, columns;
    const Tiles* tiles;  // if not null, the rest is unused but rows and columns
    int64_t expert;      // of the tiles
    bool panels = false;  // dense numbers lie in panels [rows / 16][columns][16]: of a LowRank's `up` alone
};

// The matrices of a stack that are not all in memory at once.
class Stack {
  public:
    virtual ~Stack() = default;
    virtual void need(const int32_t* experts, int64_t count) = 0;  // sees to it that these are here, till it is called again
    virtual const Matrix& operator[](int64_t expert) const = 0;
};

// Rows of a, those of b behind them: out [rows, a's width + b's]
struct Join {
    const float *a, *b;
    float* out;
    int64_t rows, width_a, width_b;
};

// out [count, columns]
struct Embed {
    Matrix weight;
    const int32_t* ids;
    float* out;
    int64_t count;
};

// Activations in int8: x = scale * code for 16 neighbours (with 32, the error of SmolLM2's predictions is 1.9 times as
// large). Tokens lie in blocks of kTokens (the rest in a block of the next power of two), a block as codes
// [columns / 32][tokens][32], scales [columns / 16][tokens] and sums of the 16 numbers, likewise.
//
// With `steps` (of Kernels) a scale's 16 numbers are not neighbours, but in each four of a block of 32 the first two, or
// the last two. Their scales are whole numbers of a unit: in the place of the block's first scale stands the unit, in that
// of the second both numbers, in 16 bits each.
struct Quantized {
    int8_t* codes;
    float *scales, *sums;
    int64_t tokens, columns;
};

struct Quantize {
    const float* x;
    Quantized to;
};

// What an adapter adds to a product: scale up . (down . x), down [rank, columns], up [rows, rank] in panels.
struct LowRank {
    const float* x;  // [tokens, columns]; null: there is none
    Matrix down, up;
    float scale;
};

struct Product {  // out [tokens, rows] = x . weight^T + bias
    Matrix weight;
    const float* bias;
    float* out;
    LowRank change{};
};

constexpr int kProducts = 4;

// Several products of the same activations, so that q, k, v or gate, up are one parallel loop.
struct LinearInt8 {
    Quantized x;
    Product products[kProducts];
    int count;
};

struct LinearFloat {
    const float* x;
    int64_t tokens;
    Product product;
};

constexpr int kTerms = 2;

// One product of a sum: scale x . weight^T, or, `back`, scale x . weight; x [tokens, depth] or, `turned`, [depth, tokens].
struct Term {
    const float* x;
    Matrix weight;
    bool back, turned;
    float scale;

    int64_t depth() const { return back ? weight.rows : weight.columns; }
    int64_t width() const { return back ? weight.columns : weight.rows; }
};

// out [tokens, width] = the terms' sum + bias, added to what was there if `add`. narrow: of numbers rounded to bfloat16,
// with float sums
struct Products {
    Term terms[kTerms];
    int count;
    const float* bias;
    float* out;
    int64_t tokens, width;
    bool add, narrow;
};

// One layer's cache: keys [slots, K, blocks of 16 tokens, d, 16], values [slots, K, tokens, dv rounded up to 16],
// tokens = capacity rounded up to 16. In int8, each token's numbers of a head share a scale: [slots, K, tokens] for keys
// and for values. Without a cache (keys null) each row sees itself alone.
//
// latent: all heads share one stored key head (k [B, T, d]), whose first dv numbers are the values (v and values are not
// there); K is only how many parts the heads are cut in.
struct Attention {
    const float *q, *k, *v, *sinks;
    float* out;
    const int32_t *starts, *lengths, *slots, *segments;
    void *keys, *values;
    Number type;
    int64_t B, T, H, K, d, dv, capacity;
    int64_t window, chunk;  // 0: none
    float scale, softcap;   // softcap 0: none
    float *key_scales = nullptr, *value_scales = nullptr;
    bool latent = false;
    int32_t* bases = nullptr;  // [slots]: the position of the first place, of a cache that keeps no more than a window needs
    int64_t kept = 0;          // positions before a new token that it keeps

    int64_t base(int64_t b) const { return bases ? bases[slots[b]] : 0; }
    int64_t stored() const { return latent ? 1 : K; }  // key heads that are kept
};

// Queries of latent attention: out [tokens, heads, L + r] = q [tokens, heads, n] . weight[head] [n, L], and `turning`
// [tokens, heads, r] behind it, so that they meet the latents themselves: q . (W c) = (q . W) . c
struct Absorb {
    const float *q, *turning;
    Matrix weight;  // of the first head
    float* out;
    int64_t tokens, heads, r;
};

enum class Scoring { kSoftmax, kSigmoid, kSparsemixer };  // as in base.SCORINGS

// Which experts each token goes to (`ids` [tokens, k], falling score, the lower id first among equals). bias [experts]
// counts in the election only; groups as in base.RouteRule.
struct Elect {
    const float *logits, *bias;
    int32_t* ids;
    int64_t tokens, experts, k, groups, top_groups;
    Scoring scoring;
};

// What they count: gates [tokens, k]
struct Gates {
    const float* logits;
    const int32_t* ids;
    float* gates;
    int64_t tokens, experts, k;
    Scoring scoring;
    float jitter;
    bool renormalise;
    float scale;
};

// out [tokens, k, O] = x . weight[ids]^T + bias[ids]; x [tokens, I], or [tokens, k, I] if `own`. gates, if given, scale
// the inputs.
struct ExpertLinear {
    const float *x, *gates;
    const int32_t* ids;
    int64_t tokens, k;
    bool own, exact;
    Matrix weight;  // of the first expert; of a `stack`, one like any
    int64_t experts;
    const float* bias;  // [experts, O] or null
    float* out;
    Stack* stack = nullptr;  // null: all matrices lie one behind the other
};

// out [tokens, width] = sum over k of gates y; gates may be null
struct Combine {
    const float *y, *gates;
    float* out;
    int64_t tokens, k, width;
};

// Each channel a weighted sum of its last inputs. x, out [B, T, C]; weight [taps, C]; state [slots, taps - 1, C], or null.
struct ShortConvolution {
    const float *x, *weight, *bias;
    float *out, *state;
    const int32_t *starts, *lengths, *slots, *segments;
    int64_t B, T, C, taps;
};

// base.gated_delta: q, k [B, T, K, dk], v, out [B, T, H, dv], a, b [B, T, H], state [slots, H, dk, dv], or null.
struct GatedDelta {
    const float *q, *k, *v, *a, *b, *rate, *shift;
    float *out, *state;
    const int32_t *starts, *lengths, *slots, *segments;
    int64_t B, T, H, K, dk, dv;
};

// Gradients of Gated: to_gate, and to_up unless there is no up.
struct GatedBack {
    const float *grad, *gate, *up;
    float *to_gate, *to_up;
    int64_t size;
    Activation kind;
};

// Gradients of rms_norm's or, `centred`, of layer_norm's x, gain and bias; any but `out` may be null.
struct NormBack {
    const float *grad, *x, *gain;
    float *out, *to_gain, *to_bias;
    int64_t rows, width, gains;
    float eps, offset;
    bool centred;
};

// Gradient of softcap
struct SoftcapBack {
    const float *grad, *x;
    float* out;
    int64_t size;
    float cap;
};

// What Attention (without a cache) got, the gradient of its result, and those of q, k, v and, by row of the batch
// [B, H], of the sinks, which may be null.
struct AttentionBack {
    Attention forward;
    const float* grad;
    float *to_q, *to_k, *to_v, *to_sinks;
};

// Cross-entropy of logits [rows, width]; targets below 0 count nothing; `wanted`, if given, takes their place: logits
// whose softmax is imitated. With `grad` [rows], out [rows, width] is the
// gradient of the logits; without, [rows] the losses.
struct TokenLoss {
    const float* logits;
    const int32_t* targets;
    const float* wanted;
    const float* grad;
    float* out;
    int64_t rows, width;
};

// base.adamw for one parameter; m and v are null at first. fix: 1 / (1 - beta^step)
struct AdamW {
    const float *param, *grad, *m, *v;
    float *new_param, *new_m, *new_v;
    int64_t size;
    float rate, beta1, beta2, eps, decay, fix1, fix2;
};

// weights = e^((scores - largest) / temperature)
struct Weigh {
    const float* scores;
    float* weights;
    int64_t size;
    float temperature;
};

template <class Arguments>
using Kernel = void (*)(const Arguments&, Pool&);

struct Kernels {
    const char* name;
    int tokens;  // kTokens of Quantized
    bool steps;  // whether Quantized has steps
    bool pairs;  // whether narrow products are the quicker ones
    Kernel<Pairwise> add, multiply;
    Kernel<Single> add_number, multiply_number, softcap;
    Kernel<Gated> gated;
    Kernel<Norm> rms_norm, layer_norm;
    Kernel<Rope> rope;
    Kernel<Quantize> quantize;
    Kernel<LinearInt8> linear_int8;
    Kernel<LinearFloat> linear_float;
    Kernel<Products> products;
    Kernel<Attention> attention;
    Kernel<Absorb> absorb;
    Kernel<ExpertLinear> expert_linear;
    Kernel<Weigh> weigh;
    Kernel<ShortConvolution> short_convolution;
    Kernel<GatedDelta> gated_delta;
    Kernel<GatedBack> gated_back;
    Kernel<NormBack> norm_back;
    Kernel<SoftcapBack> softcap_back;
    Kernel<AttentionBack> attention_back;
    Kernel<TokenLoss> token_loss;
    Kernel<AdamW> adamw;
};

// The instruction sets compiled in that this processor has, the best first; the last is always "portable".
struct Variants {
    const Kernels* all[5];
    int count;
};
Variants variants();

// Kernels that move bytes or are too small to matter: one body for all.
void rope_table(const RopeTable&, Pool&);
void take(const Take&, Pool&);
void piece(const Piece&, Pool&);
void join(const Join&, Pool&);
void embed(const Embed&, Pool&);
void elect(const Elect&, Pool&);
void gates(const Gates&, Pool&);
void combine(const Combine&, Pool&);

// How one token is drawn: see base.SamplingParams. u in [0, 1)
struct Draw {
    const float* scores;
    int64_t size, top_k;
    double temperature, top_p, min_p, u;  // temperature 0: the likeliest
};
int64_t draw(const Draw&, const Kernels&, Pool&);

// Numbers of places for tokens in a Quantized, with the last block's padding.
static inline int64_t last_block(int64_t rest) {
    int64_t size = 1;
    while (size < rest) size *= 2;
    return size;
}
static inline int64_t padded_tokens(int64_t tokens, int block) {
    const int64_t rest = tokens % block;
    return tokens - rest + (rest ? last_block(rest) : 0);
}

}  // namespace ondevice::cpu
