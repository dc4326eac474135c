"""Accuracy on lm-eval tasks: run a loaded model through the harness, keep the score of every item.

A task is the name of any task or group of lm-eval, of one of ours (`evaluation.tasks`), an lm-eval YAML file, or a file
of items (.jsonl) for the task `continuations`. A group counts as one task: its items are pooled.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import BitsMoEError
from ..extras import require
from .paired import mean, paired
from .tasks import FOLDER
from .tasks.items import read

#: which of a task's metrics is its accuracy: the first of these that it reports
_METRICS = ("acc_mutual_info", "acc_norm", "acc", "exact_match")
_OURS = frozenset(file.stem for file in FOLDER.glob("*.yaml"))

#: accuracy of one model: task -> {"metric", "acc", "stderr", "items", "scores", "others"}
Accuracy = dict[str, dict[str, Any]]


def check_tasks(tasks: Sequence[str]) -> None:
    """Load every task once, with its data, so that a wrong name is found before any long work.

    Raises:
        BitsMoEError: naming the task that cannot be used, and why.
    """
    if tasks:
        require("lm_eval", "accuracy on tasks")
        _load(tasks)


def measure_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, limit: int | None) -> Accuracy:
    """Run the tasks on a loaded model.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: see the module.
        batch_size: requests per forward pass.
        limit: items per task (per member of a group) at most.

    Returns:
        By the task's name (`label`): the metric's name, its mean ``acc`` with ``stderr``, ``items``, the ``scores`` of
        every item in the task's order, and the means of its ``others``.
    """
    from lm_eval.models.huggingface import HFLM

    return run_tasks(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks, limit)


def run_tasks(wrapped: Any, tasks: Sequence[str], limit: int | None) -> Accuracy:
    """`measure_tasks` on a model of any of lm-eval's own kinds."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    evaluator.get_git_commit_hash = lambda: None  # nobody reads it, and git says "fatal" outside of a repository
    measured: Accuracy = {}
    for name, members in _load(tasks).items():
        found = evaluator.simple_evaluate(
            wrapped,
            tasks=members,
            limit=limit,
            bootstrap_iters=0,  # lm-eval's own standard errors; ours come from the items
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
        )
        measured[name] = _summarize(found["samples"])
    return measured


def label(task: str) -> str:
    """A task's name in reports: files by their stem."""
    return Path(task).stem if _is_file(task) else task


def contents(tasks: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files among the tasks, by the task: what was measured on others is no figure of theirs."""
    return {task: hashlib.sha256(Path(task).read_bytes()).hexdigest() for task in tasks if _is_file(task)}


def compare_accuracy(own: Accuracy, reference: Accuracy) -> Accuracy:
    """``own`` without the items' scores, and with the difference to the reference on the same items."""
    compared: Accuracy = {}
    for task, entry in own.items():
        shown = {key: value for key, value in entry.items() if key != "scores"}
        if task in reference and len(reference[task]["scores"]) == len(entry["scores"]):
            shown["paired"] = asdict(paired(entry["scores"], reference[task]["scores"]))
        compared[task] = shown
    return compared


def _is_file(task: str) -> bool:
    return task.endswith((".jsonl", ".yaml", ".yml"))


def _load(tasks: Sequence[str]) -> dict[str, list[Any]]:
    """The lm-eval tasks behind every name, several for a group; by `label`.

    Raises:
        BitsMoEError: naming the one that does not exist, or whose data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    # the harness's own tasks are ten thousand files, which take seconds to look through
    theirs = any(not _is_file(task) and task not in _OURS for task in tasks)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=theirs)
    unknown = [task for task in tasks if not _is_file(task) and task not in manager.all_tasks]
    if unknown:
        raise BitsMoEError(
            f"{', '.join(unknown)}: no such task; give a name of lm-eval's (`lm_eval ls tasks`), "
            f"{', '.join(sorted(_OURS))}, an lm-eval YAML file, or a .jsonl file of items"
        )
    called: dict[str, str] = {}
    for task in tasks:
        before = called.setdefault(label(task), task)
        if before != task:
            raise BitsMoEError(f"{before} and {task} would both be called {label(task)}; rename one of the files")
    loaded = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            spec = _task_of_items(Path(task), Path(scratch)) if task.endswith(".jsonl") else task
            try:
                loaded[label(task)] = list(manager.load([spec])["tasks"].values())
            except BitsMoEError:
                raise
            except Exception as error:  # a task is code and data of others
                message = f"{task}: the task cannot be loaded ({type(error).__name__}: {error})"
                raise BitsMoEError(message) from error
    return loaded


def _task_of_items(items: Path, scratch: Path) -> str:
    """Write the YAML file of a task of these items."""
    read(items)
    file = scratch / f"{items.stem}.yaml"
    file.write_text(
        json.dumps(  # which is YAML too, and takes any name for a text
            {
                "include": str(FOLDER / "continuations.yaml"),
                "task": items.stem,
                "dataset_kwargs": {"file": str(items.resolve())},
            }
        ),
        encoding="utf-8",
    )
    return str(file)


def _summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Pool the items of a task's members into its entry."""
    items = []
    for leaf in sorted(samples):
        # a task may extract several answers from one response, each a filter: the first one counts
        first = [item for item in samples[leaf] if item["filter"] == samples[leaf][0]["filter"]]
        items += sorted(first, key=lambda item: item["doc_id"])
    names = [name for name in items[0]["metrics"] if all(isinstance(item.get(name), int | float) for item in items)]
    if not names:
        raise BitsMoEError(f"{', '.join(samples)}: reports no figure per item ({', '.join(items[0]['metrics'])})")
    metric = next((name for name in _METRICS if name in names), names[0])
    scores = [float(item[metric]) for item in items]
    found = mean(scores)
    others = {name: mean([float(item[name]) for item in items]).value for name in names if name != metric}
    return {
        "metric": metric,
        "acc": found.value,
        "stderr": found.stderr,
        "items": len(items),
        "others": others,
        "scores": scores,
    }
