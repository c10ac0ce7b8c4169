"""Tasks of lm-evaluation-harness on one of our models: names that it knows, or YAML files of one's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BadOption, OnDeviceError, Unavailable
from ...registry import did_you_mean
from ...runtime.session import Session


@dataclass(frozen=True)
class TaskOptions:
    """limit: documents of each task at most. fewshot: examples in front of each; None: as the task says. chat: through
    the model's chat template. batch: answers written side by side. max_length: tokens of context; None: the model's."""

    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    batch: int = 16
    max_length: int | None = None


@dataclass(frozen=True)
class Measure:
    """One number of one task. error: the standard error of `value`, None where the harness has none."""

    task: str
    metric: str
    value: float
    error: float | None
    documents: int
    fewshot: int


def run_tasks(
    session: Session,
    tasks: Sequence[str],
    options: TaskOptions = TaskOptions(),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Measure]:
    """Raises Unavailable without the package or a task's data, BadOption for a task that isn't known."""
    harness, lm_eval = _harness()
    manager = lm_eval.tasks.TaskManager(include_defaults=not all(map(_is_file, tasks)))
    known = [_known(task, manager) for task in tasks]
    model = harness.OnDeviceLM(session, batch_size=options.batch, max_length=options.max_length, progress=progress)
    try:
        found = lm_eval.simple_evaluate(
            model, tasks=known, task_manager=manager, num_fewshot=options.fewshot, limit=options.limit,
            apply_chat_template=options.chat, log_samples=False, bootstrap_iters=1000, torch_random_seed=None,
        )  # fmt: skip
    except OnDeviceError:
        raise
    except OSError as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise Unavailable(
            f"The data of {', '.join(tasks)} cannot be had: {what:.200}",
            "Fetch it where there is a network, or give a task of your own: --tasks FILE.yaml.",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadOption(
            f"lm-evaluation-harness fails on {', '.join(tasks)}: {type(error).__name__}: {error!s:.200}",
            "Check the task's YAML file; --debug shows where it failed.",
        ) from error
    return list(_measures(found))


def _harness() -> Any:
    """The module that registers our model, and the package."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars; ours is one line
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError:
        raise Unavailable("Tasks need the package lm-eval.", "pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name in ("get_git_commit_hash", "add_env_info"):  # asking git and pip about this machine: slow, and they print
        setattr(lm_eval.evaluator, name, lambda *_: None)
    from . import harness

    return harness, lm_eval


def _known(task: str, manager: Any) -> str:
    """A name as the harness has it, or the path of a YAML file."""
    if _is_file(task):
        if not Path(task).is_file():
            raise BadOption(f"There is no task file {task}.", "Check the path.")
        return task
    if not manager.match_tasks([task]):
        raise BadOption(f"lm-evaluation-harness has no task {task!r}.", did_you_mean(task, manager.all_tasks))
    return task


def _measures(found: dict[str, Any]):
    for task, numbers in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in numbers.items():
            metric, _, way = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not way:
                continue
            error = numbers.get(f"{metric}_stderr,{way}")
            yield Measure(
                numbers.get("alias", task).strip(" -") or task,
                metric if way == "none" else f"{metric} ({way})",
                float(value),
                float(error) if isinstance(error, int | float) else None,
                counts.get("effective", 0),
                found.get("n-shot", {}).get(task, 0),
            )


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))
