"""What several sizes of one model share, and which of them an earlier run of the same command has finished."""

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from .. import messages
from ..calibration.fingerprint import rows_digest
from ..calibration.oneshot import QuantizeSettings, without_places
from ..calibration.recipe import Stage
from ..errors import BitsMoEError
from ..sources.provenance import REPORT_NAME, source_record
from ..storage.shards import read_json


class SharedWork:
    """A temporary folder for the survey and the layers that several sizes share, where the user names none.

    It is deleted at the end of the block. When the block fails after something was kept there, it stays, and the error
    says how to go on from it.

    Attributes:
        folder: where it is.
    """

    def __init__(self, parent: Path) -> None:
        self._parent, self.folder = parent, Path()

    def __enter__(self) -> "SharedWork":
        self.folder = Path(tempfile.mkdtemp(dir=self._parent, prefix=".kept-", suffix=".partial"))
        return self

    def renew(self) -> None:
        """Begin with an empty one: surveys and layers belong to their batches."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or not any(self.folder.rglob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        hint = f"what was finished is kept: the same command with --resume-dir {self.folder} goes on from there"
        if isinstance(error, BitsMoEError):
            raise BitsMoEError(f"{error}; {hint}") from error
        messages.say("error", hint)


def is_finished(out: Path, model: Path, stage: Stage, rows: torch.Tensor, settings: QuantizeSettings) -> bool:
    """Whether a checkpoint was made from this model, by this stage, from these rows: by its own record.

    Args:
        out: its folder.
        model: folder of the unquantized model.
        stage: with all fields that the run has.
        rows: calibration tokens, int64 ``[n, T]``.
        settings: how it is run.
    """
    if not (out / REPORT_NAME).exists():
        return False
    record = read_json(out / REPORT_NAME)
    made_of = record.get("made_of", {})
    recipe = json.loads(json.dumps({"recipe": without_places(stage.text)}, default=str))
    return (
        made_of.get("recipe") == recipe
        and made_of.get("settings") == settings.noted()
        and made_of.get("calibration") == rows_digest([{"input_ids": rows}])
        and record.get("source", {}).get("weights") == source_record(model)["weights"]
    )
