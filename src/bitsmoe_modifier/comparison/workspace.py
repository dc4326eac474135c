"""The output folder of a comparison: what lies where, and when an existing one may be used again.

report.json, report.html, report.md    the result (report.svg belongs to report.md)
arms/NAME/                             the checkpoint of each run, ready to load
logs/NAME.log                          what the libraries printed
work/inputs.json                       what the comparison was made of; a rerun must match it
work/rows.safetensors                  the token rows
work/reference/                        the unquantized model's predictions
work/results/NAME.json                 the figures of every finished run, used again by a rerun
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import BitsMoEError
from ..storage.folders import is_occupied, resolved
from ..storage.locks import locked
from ..storage.records import differences, write_text


class Workspace:
    """Paths and files under an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = folder / "work" / "reference"

    def checkpoint(self, arm: str) -> Path:
        """Folder of a run's checkpoint."""
        return self.folder / "arms" / arm

    def log(self, name: str) -> Path:
        """Log file of a run or of another process."""
        return self.folder / "logs" / f"{name}.log"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse other comparisons in this folder while the block runs.

        Raises:
            BitsMoEError: when one is running, or the folder cannot be written.
        """
        refusal = f"another comparison is running in {self.folder}; wait for it, or give another --out"
        folder = resolved(self.folder)
        with ExitStack() as held:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder.parent / f".{folder.name}.lock", refusal))
            except OSError:  # a mount point, perhaps, below a folder that is not ours
                try:
                    held.enter_context(locked(folder / ".lock", refusal))
                except OSError as error:
                    raise BitsMoEError(f"{folder} cannot be written ({error.strerror}); give another --out") from None
            yield

    def prepare(self, inputs: Mapping[str, Any], fresh: bool) -> None:
        """Create the folder, or check that an existing one was made from the same inputs.

        Args:
            inputs: everything that the figures depend on, apart from the recipe's stages (JSON types only).
            fresh: forget what an earlier run finished.

        Raises:
            BitsMoEError: when the folder cannot be written, holds something else, or was made from other inputs.
        """
        record = self.folder / "work" / "inputs.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise BitsMoEError(f"{self.folder} is a file; give a folder for --out")
        if is_occupied(self.folder):
            if not record.exists():
                raise BitsMoEError(f"{self.folder} is not empty and no earlier comparison; give another --out")
            changed = differences(json.loads(record.read_text(encoding="utf-8")), json.loads(json.dumps(inputs)))
            if changed:
                raise BitsMoEError(
                    f"{self.folder} holds a comparison of other inputs ({'; '.join(changed)}); "
                    "give another folder for --out, or delete that one"
                )
        try:
            for part in ("arms", "logs", "work/results"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            if fresh:
                shutil.rmtree(self.reference, ignore_errors=True)
                for file in (self.folder / "work" / "results").glob("*.json"):
                    file.unlink()
            write_text(record, json.dumps(inputs, indent=1))
        except OSError as error:
            raise BitsMoEError(f"{self.folder} cannot be written ({error.strerror}); give another --out") from None

    def save_rows(self, calibration: torch.Tensor, evaluation: torch.Tensor) -> None:
        """Keep the token rows for the processes of the runs."""
        rows = {"calibration": calibration.contiguous(), "evaluation": evaluation.contiguous()}
        save_file(rows, self.folder / "work" / "rows.safetensors")

    def rows(self, which: str) -> torch.Tensor:
        """The rows ``calibration`` or ``evaluation``, int64 ``[n, T]``."""
        return load_file(self.folder / "work" / "rows.safetensors")[which]

    def finished(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result that was kept under ``name``, if it was made from ``key``."""
        try:
            kept = json.loads(self._result(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return kept["result"] if kept["key"] == json.loads(json.dumps(key)) else None

    def keep(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result for a rerun."""
        write_text(self._result(name), json.dumps({"key": key, "result": result}, indent=1))

    def _result(self, name: str) -> Path:
        return self.folder / "work" / "results" / f"{name}.json"
