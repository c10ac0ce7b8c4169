"""The cuda backend beside the reference, in each of its modes, on torch's CPU device; the GPU's own where there is one."""

import pytest

from ondevice.testing.conformance import *  # noqa: F403

torch = pytest.importorskip("torch")

from ondevice.backends.cuda.backend import CudaBackend  # noqa: E402
from ondevice.backends.cuda.graphs import Replay  # noqa: E402

CPU = torch.device("cpu")


class LikeOnAGpu(CudaBackend):
    """Weights packed, decode steps in the form that a CUDA graph records, without the recording."""

    def compile(self, fn, state=()):
        return Replay(self, fn, capture=False)


MODES = {
    "exact": lambda: CudaBackend(CPU, "float32", exact=True, packed=False),
    "like_on_a_gpu": lambda: LikeOnAGpu(CPU, "float32", exact=True, packed=True),
    "bfloat16": lambda: LikeOnAGpu(CPU, "bfloat16", exact=False, packed=True),
}
if torch.cuda.is_available():
    GPU = torch.device("cuda")
    MODES |= {
        "gpu_exact": lambda: CudaBackend(GPU, "float32", exact=True, packed=True),
        "gpu": lambda: CudaBackend(GPU, "bfloat16", exact=False, packed=True),
    }


@pytest.fixture(scope="module", params=MODES)
def backend(request):
    return MODES[request.param]()
