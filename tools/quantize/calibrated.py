"""Rounding with an eye on what flows through: stage by stage, each fed by what was made of those before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...backends.base import Backend
from ...models.config import ModelConfig
from ...models.parameters import Parameters
from ...schemes import stack
from ...tensors import Affine, Dense, Tensor
from ..calibration import Stage, stream
from ..work import Work
from .awq import Scaling, scaling
from .gptq import Feedback, feedback, gptq, search
from .matrices import numbers
from .parallel import side_by_side
from .statistics import Inputs

Known = Feedback | np.ndarray | None  # of the inputs of a map: for feedback, E[x_j^2] alone, or nothing


class Rounding:
    """plan: our name -> format. method: search, awq or gptq. hessians: of embedding and head, where they were measured.
    What grows: notes, by what could not be done as asked; changed, by what is not quantized but other than it was."""

    def __init__(
        self, config: ModelConfig, parameters: Parameters, plan: Mapping[str, Affine], method: str,
        hessians: Mapping[str, np.ndarray],
    ):  # fmt: skip
        self.config, self.parameters, self.plan, self.method = config, parameters, plan, method
        self.hessians = hessians
        self.notes: list[str] = []
        self.changed: dict[str, Dense] = {}

    def run(self, ops: Backend, ids: np.ndarray, work: Work) -> Iterator[tuple[int, int]]:
        """Fills `work` with the tensors of every stage; yields (done, total) stages."""
        total = len(self.config.layers) + 2
        for done, stage in enumerate(stream(self.config, self.parameters, ops, ids), 1):
            made = work.tensors(stage.prefix, self.parameters, self.plan)
            if made is None:
                said = len(self.notes)
                made = self.stage(stage)
                work.keep_record(f"{stage.prefix}.notes", self.notes[said:])
                work.keep_tensors(stage.prefix, made)
            else:
                self.notes += work.record(f"{stage.prefix}.notes") or []
            self.changed |= {name: tensor.format for name, tensor in made.items() if name not in self.plan}
            if stage.prefix != "head":
                for name, tensor in made.items():
                    stage.replace(name, tensor)
            yield done, total

    def stage(self, stage: Stage) -> dict[str, Tensor]:
        """The quantized tensors of one stage. A tied embedding is rounded first where its Hessian is known, else last,
        when all that flows into the head has been seen."""
        names = [name for name in stage.names if name in self.plan]
        if stage.prefix == "embed":
            early = not self.config.tied or "embed" in self.hessians
            return {name: self._alone(name, self.hessians.get(name)) for name in names if early}
        if stage.prefix == "head" and "embed" in names and "embed" in self.hessians:
            return {}
        inputs = Inputs(sized=self.method == "awq")
        stage.observe(inputs)
        if self.method != "awq" or stage.prefix == "head":
            found = Scaling()
        else:
            found = scaling(stage.prefix, self.config, self.parameters, inputs, self.plan)
        shared = self._shared(names, inputs, found)
        made = side_by_side(lambda name: self._rounded(name, inputs, found, shared), names)
        return dict(zip(names, made, strict=True)) | found.norms

    def _shared(self, names: Sequence[str], inputs: Inputs, found: Scaling) -> dict[str, Known]:
        """What is known of the inputs of every matrix, by the map that was first seen to read them."""
        sources = {inputs.source(_reader(name)): name for name in names if len(self.parameters.shapes[name]) < 3}
        known = side_by_side(lambda n: self._known(found.hessian(n, inputs.gram(_reader(n)))), sources.values())
        return dict(zip(sources, known, strict=True))

    def _rounded(self, name: str, inputs: Inputs, found: Scaling, shared: Mapping[str, Known]) -> Tensor:
        if len(self.parameters.shapes[name]) > 2:
            return self._experts(name, inputs)
        values = found.applied(name, numbers(self.parameters, name))
        return self._round(values, shared[inputs.source(_reader(name))], self.plan[name])

    def _alone(self, name: str, hessian: np.ndarray | None) -> Tensor:
        """hessian None: every input counts alike, as for the rows of an embedding."""
        return self._round(numbers(self.parameters, name), self._known(hessian), self.plan[name])

    def _experts(self, name: str, inputs: Inputs) -> Tensor:
        """Each by what it was given; one that was given nothing as if every input counted alike, and that is said."""
        values, made, idle = numbers(self.parameters, name), [], 0
        for matrix, (count, gram) in zip(values, inputs.expert_grams(name, len(values)), strict=True):
            idle += not count
            made.append(self._round(matrix, self._known(gram if count else None), self.plan[name]))
        if idle:
            stored = self.parameters.stored(name)[0]
            self.notes.append(f"{stored}: {idle} of {len(values)} experts met no calibration token, rounded without.")
        return stack(made)

    def _known(self, hessian: np.ndarray | None) -> Known:
        """What the method makes of a Hessian."""
        if hessian is None:
            return None
        return feedback(hessian) if self.method == "gptq" else np.diag(hessian)

    def _round(self, values: np.ndarray, known: Known, form: Affine) -> Tensor:
        if isinstance(known, Feedback):
            return gptq(values, known, form)
        return search(values, np.ones(values.shape[-1], np.float32) if known is None else known, form)


def _reader(name: str) -> str:
    """The map whose inputs a matrix meets: a tied embedding is the head."""
    return "head" if name == "embed" else name
