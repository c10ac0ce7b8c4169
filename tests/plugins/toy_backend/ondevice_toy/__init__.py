"""The toy backend's face: cheap to import, and honest about what is missing."""

import os

from ondevice.registry import Plugin, Probe


def probe():
    if os.environ.get("TOY_UNPLUGGED"):
        return Probe.missing("the toy is unplugged (TOY_UNPLUGGED is set)", hint="unset TOY_UNPLUGGED")
    return Probe.available("one toy processor", priority=1)


def create(exact=False, threads=None):
    from .backend import ToyBackend

    return ToyBackend()


plugin = Plugin("toy", probe, create)
