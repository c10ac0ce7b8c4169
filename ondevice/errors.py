"""The errors people see: what is wrong and where, then what to do about it. The command line prints exactly that."""

from __future__ import annotations


class OnDeviceError(Exception):
    """Something a person can act on.

    `message` says what is wrong and where, in one line; `hint` says what to do, in one line (may be empty).
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class BadFile(OnDeviceError):
    """A model, tokenizer, adapter or data file that is damaged, hostile or not what it claims to be."""


class Unavailable(OnDeviceError):
    """A backend, package, model or host that is not here now; the hint says how to get it."""


class Unsupported(OnDeviceError):
    """A valid request that this model, backend or format cannot serve."""


class ContextFull(OnDeviceError):
    """More tokens than the model's context holds."""


class BadOption(OnDeviceError):
    """An option or argument with a value that makes no sense (exit status 2)."""
