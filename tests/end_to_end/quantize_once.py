"""What the processes of the tests on interruption and on several ranks run; imports nothing of pytest."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

FIELDS = {"bits": 3.0, "group_size": 16, "block_size": 16, "solver": "lagrangian", "refine_passes": 1}


def quantize(source: Path, out: Path, resume_dir: Path | None, **changes: object) -> None:
    """Run `oneshot` on the model in ``source`` and write what it packed to ``out``, whole or not at all."""
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session

    from bitsmoe_modifier import BitsMoEModifier
    from bitsmoe_modifier.storage.records import write_tensors
    from helpers import calibration, load, packed_modules

    torch.set_num_threads(1)
    reset_session()
    model, options = load(source), {"pipeline": str(changes.pop("pipeline", "sequential"))}
    modifier = BitsMoEModifier(**{**FIELDS, **changes}, resume_dir=None if resume_dir is None else str(resume_dir))
    oneshot(model=model, dataset=calibration(), recipe=[modifier], **options)
    write_tensors(out, {f"{n}.{leaf}": t for n, m in packed_modules(model).items() for leaf, t in m.packed.items()}, {})


def quantize_until(when: str, source: Path, out: Path, resume_dir: Path) -> None:
    """`quantize`, but dying by SIGKILL right before or after the next file of ``resume_dir`` is put in place."""
    os.replace = dying(when, resume_dir, lambda: os.kill(os.getpid(), signal.SIGKILL))
    quantize(source, out, resume_dir)


def dying(when: str, folder: Path, die: Callable[[], None]) -> Callable[..., None]:
    """An `os.replace` that calls ``die`` right "before" or "after" it puts a file in place in ``folder``."""
    replace = os.replace

    def replace_and_die(old: object, new: object) -> None:
        ours = str(new).startswith(str(folder))
        if ours and when == "before":
            die()
        replace(old, new)
        if ours:
            die()

    return replace_and_die
