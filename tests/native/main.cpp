// Every set of kernels in this build against scalar oracles, at odd sizes and addresses. Exit status 1 if one is wrong.
#include "check.h"

namespace ondevice::cpu {

int failures = 0;
const char* variant = "pool";

extern const Kernels kAvx512Bf16, kAvx512, kAvx2, kNeon, kPortable;

}  // namespace ondevice::cpu

// Arguments: the sets to check (none: all).
int main(int count, char** names) {
    using namespace ondevice::cpu;
    const Kernels* all[] = {
#if defined(ONDEVICE_AVX512_BF16)
        &kAvx512Bf16,
#endif
#if defined(ONDEVICE_AVX512)
        &kAvx512,
#endif
#if defined(ONDEVICE_AVX2)
        &kAvx2,
#endif
#if defined(ONDEVICE_NEON)
        &kNeon,
#endif
        &kPortable,
    };
    check_pool();
    check_stack();
    for (const Kernels* kernels : all) {
        bool wanted = count == 1;
        for (int i = 1; i < count; i++) wanted = wanted || std::strcmp(names[i], kernels->name) == 0;
        for (int threads : {1, 3}) {
            if (!wanted) continue;
            Pool pool(threads);
            variant = kernels->name;
            check_elementwise(*kernels, pool);
            check_linear(*kernels, pool);
            check_attention(*kernels, pool);
            check_recurrence(*kernels, pool);
            check_training(*kernels, pool);
            check_experts_that_go(*kernels, pool);
            std::printf("%s, %d threads: done\n", kernels->name, threads);
        }
    }
    return failures ? 1 : 0;
}
