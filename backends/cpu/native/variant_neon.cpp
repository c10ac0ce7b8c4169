#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "simd/neon.h"

namespace ondevice::cpu::neon {
#include "kernels/all.inl"
}

namespace ondevice::cpu {
extern const Kernels kNeon;
const Kernels kNeon = neon::kernels;
}  // namespace ondevice::cpu
