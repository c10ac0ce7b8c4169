#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "simd/avx512.h"

namespace ondevice::cpu::avx512 {
#include "kernels/all.inl"
}

namespace ondevice::cpu {
extern const Kernels kAvx512;
const Kernels kAvx512 = avx512::kernels;
}  // namespace ondevice::cpu
