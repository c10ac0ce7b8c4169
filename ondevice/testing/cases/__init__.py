"""The cases, by what they are about. Importing this registers them all in `suite.CASES`."""

from . import attention, compiled, contract, experts, forward, latent, recurrence, sampling, training, weights

__all__ = [
    "attention",
    "compiled",
    "contract",
    "experts",
    "forward",
    "latent",
    "recurrence",
    "sampling",
    "training",
    "weights",
]
