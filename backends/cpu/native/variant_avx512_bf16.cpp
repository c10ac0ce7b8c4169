#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "simd/avx512.h"

namespace ondevice::cpu::avx512_bf16 {
#include "kernels/all.inl"
}

namespace ondevice::cpu {
extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = avx512_bf16::kernels;
}  // namespace ondevice::cpu
