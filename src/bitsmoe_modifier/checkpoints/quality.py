"""What was measured of a checkpoint, kept beside its weights: the card and `bitsmoe inspect` show it."""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage.records import write_text
from ..storage.shards import read_json

#: in a checkpoint's folder
QUALITY_NAME = "bitsmoe_quality.json"
_PARTS = ("reference", "run", "how")


def keep_quality(folder: Path, quality: Mapping[str, Any]) -> dict[str, Any]:
    """Write figures beside a checkpoint, in the place of earlier ones.

    Args:
        folder: of the checkpoint.
        quality: ``reference`` and ``run``, entries of a comparison's report; ``how``, a sentence; and, where the models
            wrote texts, ``samples`` (see `evaluation.samples`).

    Returns:
        What was written: that, and the ``date`` of today in UTC.
    """
    kept = {"date": datetime.now(timezone.utc).date().isoformat(), **quality}
    write_text(folder / QUALITY_NAME, json.dumps(kept, indent=1, default=str))
    return kept


def kept_quality(folder: Path) -> dict[str, Any] | None:
    """What `keep_quality` wrote; None where nothing was measured.

    Raises:
        CheckpointError: when the file is there and holds something else.
    """
    path = folder / QUALITY_NAME
    if not path.exists():
        return None
    found = read_json(path)
    if not all(part in found for part in _PARTS):
        raise CheckpointError(f"{path} holds no figures; delete it, or run `bitsmoe eval` again")
    return dict(found)
