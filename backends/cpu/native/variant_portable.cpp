#define ONDEVICE_INLINE inline  // forced, plain loops would only grow: nothing here waits in registers

#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "simd/portable.h"

namespace ondevice::cpu::portable {
#include "kernels/all.inl"
}

namespace ondevice::cpu {
extern const Kernels kPortable;
const Kernels kPortable = portable::kernels;
}  // namespace ondevice::cpu
