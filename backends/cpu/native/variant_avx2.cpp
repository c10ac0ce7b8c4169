#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "simd/avx2.h"

namespace ondevice::cpu::avx2 {
#include "kernels/all.inl"
}

namespace ondevice::cpu {
extern const Kernels kAvx2;
const Kernels kAvx2 = avx2::kernels;
}  // namespace ondevice::cpu
