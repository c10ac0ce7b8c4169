"""What a training run is asked for: one frozen dataclass, whose fields are also the options of the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadOption
from ..registry import did_you_mean

METHODS = ("lora", "rslora", "dora", "full", "prompt", "scales")
OBJECTIVES = ("next-token", "dpo", "orpo", "distill")
OPTIMIZERS = {"adamw": 32, "adamw8bit": 8}  # bits of the moments
SCHEDULES = ("constant", "linear", "cosine")
RATES = {"full": 2e-5, "prompt": 1e-2, "scales": 1e-3}  # learning rates by method where none is given
USUAL_RATE = 2e-4  # of LoRA and its kin


def option(default: Any, help: str, **checks: Any) -> Any:
    """A field that says for itself what it is (help), how small it may be (least) or which values it knows (known)."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**made, metadata={"help": help, **checks})


@dataclass(frozen=True)
class Settings:
    """One run. None stands for a choice that is made from the rest, and recorded. Raises BadOption for nonsense."""

    method: str = option("lora", "How the model changes.", known=METHODS)
    objective: str = option("next-token", "What it learns from.", known=OBJECTIVES)
    rank: int = option(8, "Rank of LoRA's factors.", least=1)
    alpha: float | None = option(None, "LoRA's update is scaled by alpha / rank; default: twice the rank.", above=0)
    dropout: float = option(0.0, "Share of a LoRA's input that is dropped while training.", least=0, below=1)
    targets: tuple[str, ...] = option(
        ("all-linear",),
        "What LoRA adapts: all-linear, or a name such as q_proj, embed_tokens or layers.3.mlp.up_proj; with a rank and "
        "an alpha of its own as NAME:RANK:ALPHA. May be given several times.",
    )
    modules_to_save: tuple[str, ...] = option(
        (), "Weights that are trained whole beside LoRA, such as embed_tokens or norm. May be given several times."
    )
    layers: int | None = option(None, "Adapt only the last N layers; with -N only the first N.")
    virtual_tokens: int = option(16, "Tokens that prompt tuning learns.", least=1)

    steps: int | None = option(None, "Optimizer steps; default: as many as the epochs have.", least=0)
    epochs: float = option(1.0, "How often the data is gone through, where --steps is not given.", above=0)
    batch_size: int = option(4, "Examples a step (rows, when packing).", least=1)
    accumulate: int = option(1, "Batches whose gradients make up one step.", least=1)
    max_length: int = option(512, "Tokens of an example; longer ones are cut, which is said.", least=2)
    pack: bool = option(False, "Several examples in a row; none sees another.")
    shuffle: bool = option(True, "Another order in each epoch; without, the data's own.")

    learning_rate: float | None = option(
        None, "The highest; default: 2e-4, full 2e-5, prompt 1e-2, scales 1e-3.", above=0
    )
    schedule: str = option("linear", "How it falls after the warmup.", known=SCHEDULES)
    warmup: float = option(0.05, "Steps over which it rises: a number of them, or a share below 1.", least=0)
    optimizer: str = option("adamw", "adamw8bit: moments of 2 bytes a parameter, not 8.", known=OPTIMIZERS)
    weight_decay: float = option(0.0, "AdamW's decoupled decay.", least=0)
    clip: float = option(1.0, "Largest norm of a step's gradient; 0: unlimited.", least=0)
    seed: int = option(0, "Same seed, same adapter.")

    validation: float = option(0.05, "Share held out where the data has no valid.jsonl; 0: none.", least=0, below=1)
    validate_every: int | None = option(None, "Steps between validations; default: a tenth of the run.", least=1)
    patience: int | None = option(None, "Stop after N validations without improvement; default: never.", least=1)
    keep_best: bool = option(True, "Keep the state of the best validation; without, the last.")

    beta: float = option(0.1, "DPO's and ORPO's strength.", above=0)
    temperature: float = option(1.0, "Softens the teacher when distilling.", above=0)
    hard: float = option(0.0, "Distilling: the share of the loss that comes from the data's own tokens.", least=0)

    micro_batch: int | None = option(None, "Rows that go through the model at once; default: what fits.", least=1)
    remat: bool | None = option(None, "Compute activations again in the backward pass; default: when memory asks.")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check(field, getattr(self, field.name))
        if not self.targets:
            raise BadOption("There is nothing to adapt: no target is given.", "Give --target all-linear, or a name.")
        if self.hard > 1:
            raise BadOption(f"--hard {self.hard} is more than the whole loss.", "Give a share, from 0 to 1.")

    @staticmethod
    def _check(field: dataclasses.Field, value: Any) -> None:
        rules: Mapping[str, Any] = field.metadata
        name = f"--{field.name.replace('_', '-')}"
        if value is None:
            return
        if "known" in rules and value not in rules["known"]:
            raise BadOption(f"There is no {name[2:]} {value!r}.", did_you_mean(str(value), rules["known"]))
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        if not math.isfinite(value):
            raise BadOption(f"{name} {value} makes no sense.", "Give a number.")
        if "least" in rules and not value >= rules["least"]:
            raise BadOption(f"{name} {value} makes no sense.", f"Give {rules['least']} or more.")
        if "above" in rules and not value > rules["above"]:
            raise BadOption(f"{name} {value} makes no sense.", f"Give more than {rules['above']}.")
        if "below" in rules and not value < rules["below"]:
            raise BadOption(f"{name} {value} makes no sense.", f"Give less than {rules['below']}.")

    @property
    def moment_bits(self) -> int:
        return OPTIMIZERS[self.optimizer]

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate if self.learning_rate is not None else RATES.get(self.method, USUAL_RATE)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
