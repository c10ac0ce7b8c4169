"""What a quantization is asked for. Defaults live here; the command line takes them from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadOption
from ...schemes import AFFINE_BITS

METHODS = {  # name -> one line of help
    "auto": "bits where they matter most, rounding that makes up for its errors",
    "gptq": "rounding that makes up for its errors in the columns that follow",
    "awq": "columns that meet large inputs are scaled up before they are rounded",
    "search": "scale and zero point of each group by weighted error",
    "rtn": "nearest value, as mx.quantize",
    "distill": "as --start says, then scales and biases are trained against the original",
}
MODES = ("affine", "mxfp4")
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Options:
    """bits and group_size: for every matrix (where a group does not divide a row, the next smaller that does); for
    `auto`, what they would take is the size that it keeps to, unless target_bytes or target_bpw (of the whole model)
    says another.

    mode: affine, or mxfp4 (4-bit floats, 32 to a power of two), which knows rtn alone. calibration: a text or .jsonl;
    None: what the model itself says, drawn with `seed`; `tokens` of it, `length` a window (None: 512, but 256 of its
    own text, which comes token by token). requantize: take weights that are quantized already as they come. start,
    steps, minutes: of distill: the method it begins with, and how long it trains at most.
    """

    method: str = "auto"
    bits: int = 4
    group_size: int = 64
    target_bytes: int | None = None
    target_bpw: float | None = None
    calibration: Path | None = None
    tokens: int = 8192
    length: int | None = None
    seed: int = 0
    requantize: bool = False
    mode: str = "affine"
    start: str = "auto"
    steps: int | None = None
    minutes: float = 10.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise BadOption(f"There is no method {self.method!r}.", f"Choose from {', '.join(METHODS)}.")
        if self.start not in METHODS or self.start == "distill":
            raise BadOption(f"Distilling cannot start with {self.start!r}.", "Choose auto, gptq, awq, search or rtn.")
        if self.mode not in MODES:
            raise BadOption(f"There is no mode {self.mode!r}.", f"Choose from {', '.join(MODES)}.")
        if self.mode == "mxfp4" and (self.method != "rtn" or self.bits != 4):
            raise BadOption("mxfp4 has 4 bits and no scales to choose.", "Use it with --method rtn, without --bits.")
        if self.bits not in AFFINE_BITS:
            raise BadOption(f"{self.bits} bits are not supported.", f"Choose from {', '.join(map(str, AFFINE_BITS))}.")
        if self.group_size not in GROUPS:
            raise BadOption(
                f"Groups of {self.group_size} are not supported.", f"Choose from {', '.join(map(str, GROUPS))}."
            )
        if self.targeted and self.first != "auto":
            raise BadOption(f"{self.first} takes --bits, not a target.", "Use --method auto, which chooses bits.")
        if self.target_bytes is not None and self.target_bpw is not None:
            raise BadOption("Two targets were given.", "Give --target-size or --target-bpw.")
        if self.target_bpw is not None and not 0 < self.target_bpw < math.inf:
            raise BadOption(f"--target-bpw {self.target_bpw:g} makes no sense.", "Give a number above 0, such as 3.5.")
        if not 0 < self.minutes < math.inf:
            raise BadOption(f"{self.minutes:g} minutes are no time to learn in.", "Give more than 0, such as 10.")

    @property
    def window(self) -> int:
        """Tokens of a calibration window."""
        return self.length or (512 if self.calibration else 256)

    @property
    def first(self) -> str:
        """The method that chooses codes."""
        return self.start if self.method == "distill" else self.method

    @property
    def targeted(self) -> bool:
        return self.target_bytes is not None or self.target_bpw is not None
