// All kernel bodies for one instruction set, and their table. Included inside that set's namespace.

#include "math.inl"
#include "elementwise.inl"
#include "norm.inl"
#include "linear_int8.inl"
#include "linear_float.inl"
#include "products.inl"
#include "linear.inl"
#include "attention.inl"

#include "experts.inl"
#include "latent.inl"
#include "recurrence.inl"
#include "training.inl"
#include "attention_back.inl"

static constexpr Kernels kernels = {
    kName,      kTokens,       kSteps, kPairs,        add,           multiply,   add_number, multiply_number, softcap,  gated,
    rms_norm,   layer_norm,    rope,          quantize,   linear_int8, linear_float,   products, attention,
    absorb,     expert_linear, weigh,      short_convolution, gated_delta, gated_back, norm_back, softcap_back,
    attention_back, token_loss, adamw,
};
